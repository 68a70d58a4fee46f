"""skip_drop_path: any model trains without computing the branches that its drop paths drop."""

import copy
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import fx, nn

from ..gate import MODES, check_choice, gates
from .branches import children
from .drop_paths import kind_of, looks_like_drop_path
from .example import block_calls
from .plans import plan_call
from .step import Plan, gate_name, install, uninstall

Model = TypeVar("Model", bound=nn.Module)


def skip_drop_path(
    model: Model, mode: str = "auto", example: object = None, strict: bool = False, allow_batch_norm: bool = False
) -> Model:
    """Convert a model in place so that, in training, it does not compute what its drop paths drop.

    The forward methods of its blocks stay as they are; hooks let them compute fewer rows. Inference, parameters, state
    dict, probabilities and scaling are unchanged, and later changes of a drop path's probability count. Converting
    again changes the mode, and `restore_drop_path` undoes it.

    A copy of the model is run on an example to see how its blocks are called. Every branch is proven to be skipped
    rightly before it is. What cannot be proven is computed in full, and named in a warning; so is, when it occurs, a
    kind of call that the example did not have.

    Args:
        model: Any model whose blocks have drop paths: timm's `DropPath`, torchvision's `StochasticDepth` in mode "row",
            or a class that does the same (see `register_drop_path`).
        mode: "row", one gate per sample and call, which is the distribution of drop paths; "count", a fixed number of
            samples per call; "batch", one gate per call for the mini-batch, as in the paper (see `timm_sd.gate`); or
            "auto": "batch" for branches with batch normalization, "row" for all others.
        example: The model's arguments, with at least four samples: a tensor, a tuple, or a dict of keyword arguments.
            By default, noise of the image size of a timm, torchvision or transformers model. Other sizes may follow.
        strict: Raise an error instead of warning.
        allow_batch_norm: Let a batch normalization in a branch compute its statistics from the kept samples only, in
            modes "row", "count" and "auto", which then is "row".

    Returns:
        The same model.

    Raises:
        ValueError: An unknown mode; an example that the model does not run on, or none to be had; batch normalization
            in a branch in mode "row" or "count"; with `strict`, no drop path, or one that cannot be skipped. The model
            is then unchanged.
    """
    check_choice("mode", mode, ("auto", *MODES))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, but it must run on an example: load its weights first")
    try:
        probe = restore_drop_path(copy.deepcopy(model)).train()
    except Exception as error:
        raise ValueError(f"the model cannot be copied ({error}): convert it before it is trained or sharded") from error
    kinds = {module: kind for module in probe.modules() if (kind := kind_of(module))}
    if not kinds and gates(model):
        return model  # one of the paper's networks, which skip by themselves
    blocks = {}
    for name, block in probe.named_modules():
        own = {child: kinds[module] for child, module in children(block) if module in kinds}
        if own and not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
            blocks[name] = own
    whole = True if mode == "batch" else False if mode != "auto" or allow_batch_norm else None
    plans, modes, left = defaultdict(dict), defaultdict(dict), defaultdict(list)
    with _same_randomness():
        calls, others, flops = block_calls(probe, blocks, example) if blocks else ([], {}, {})
        for name, why in others.items():
            left[f"{type(probe.get_submodule(name)).__name__} ({why})"].append(name)
        known, owners = {}, {}
        for call in calls:
            block = probe.get_submodule(call.block)
            if call.alike not in known:
                known[call.alike] = plan_call(block, blocks[call.block], whole, call.args, call.kwargs)
            plan, of_call = known[call.alike]
            if _conflicts(block, plan, plans[call.block].setdefault(call.kind, plan), owners):
                plans[call.block][call.kind], of_call = (
                    Plan((), plan.rows),
                    {("its drop paths", 0): "it shares modules"},
                )
            for (drop_path, _), why in of_call.items():
                left[f"{drop_path} of {type(block).__name__} ({why})"].append(call.block)
    for name, of_block in plans.items():
        for branch in (branch for plan in of_block.values() for branch in plan.branches):
            if branch.norms and mode in ("row", "count") and not allow_batch_norm:
                norm = type(probe.get_submodule(name).get_submodule(branch.norms[0])).__name__
                raise ValueError(
                    f"{name} has a {norm} in its branch, which would compute its statistics from the kept samples only:"
                    ' use mode="batch" or "auto", or allow it with allow_batch_norm=True'
                )
            own = mode if mode != "auto" else "batch" if branch.norms and not allow_batch_norm else "row"
            if modes[name].get((branch.drop_path, branch.call)) != "batch":
                modes[name][branch.drop_path, branch.call] = own
    messages = _complaints(probe, kinds, modes, left)
    if strict and messages:
        raise ValueError(" ".join(messages))
    restore_drop_path(model)
    for name, of_block in modes.items():
        block = model.get_submodule(name)
        install(block, blocks[name], plans[name], of_block)
        for branch in block.skipping.branches():
            gate = getattr(block.get_submodule(branch.drop_path), gate_name(branch.call))
            of_children = (flops.get(f"{name}.{child}".lstrip("."), 0) for child in branch.children)
            gate.flops = sum(of_children) / (flops.get("", 0) or 1)
    model.not_skipped = list(messages)
    chosen = [each for of_block in modes.values() for each in of_block.values()]
    if mode == "auto" and "batch" in chosen:
        count = f"{chosen.count('batch')} of {len(chosen)}" if "row" in chosen else f"all {len(chosen)}"
        messages.append(
            f"{count} calls of drop paths use one gate for the mini-batch, since they compute statistics over it"
        )
    for message in messages:
        warnings.warn(message, stacklevel=2)
    return model


def _complaints(model: nn.Module, kinds: dict, modes: dict, left: dict[str, list[str]]) -> list[str]:
    """What is not skipped, or why nothing is, in a sentence each."""
    if left:
        reasons = "; ".join(f"{reason} in {', '.join(dict.fromkeys(names))}" for reason, names in left.items())
        return [f"computed in full, since skipping it could not be proven to be right: {reasons}"]
    others = {type(m).__name__ for m in model.modules() if m not in kinds and looks_like_drop_path(m)}
    if others:
        return [f"not skipped, since they do not behave like timm's DropPath: {', '.join(sorted(others))}"]
    if modes:
        return []
    if isinstance(model, fx.GraphModule) or kinds:
        return [
            "nothing is skipped: no module calls a drop path of its own. Convert a model before it becomes an FX graph"
        ]
    return [
        "nothing is skipped: the model has no drop path. Create it with drop_path_rate=, or use timm_sd.set_drop_path"
    ]


def restore_drop_path(model: Model) -> Model:
    """Undo `skip_drop_path`, in place; returns the model."""
    for module in model.modules():
        uninstall(module)
    return model


def _conflicts(block: nn.Module, plan: Plan, first: Plan, owners: dict[nn.Module, nn.Module]) -> bool:
    """Whether a plan differs from that of another call of this kind, or needs a module that is another block's, too."""
    names = {branch.drop_path for branch in plan.branches}
    for branch in plan.branches:
        names |= {*branch.norms, *(child for child, _ in branch.entries if child)}
    modules = [block.get_submodule(name) for name in names]
    patched = any("forward" in vars(module) for module in modules)
    return patched or plan != first or any(owners.setdefault(module, block) is not block for module in modules)


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Leave the generators of PyTorch, NumPy and Python as they are."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(of_python)
    np.random.set_state(of_numpy)
