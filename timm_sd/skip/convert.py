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
from .drop_path_gate import gate_name
from .drop_paths import drop_probability, has_own_forward, kind_of, looks_like_drop_path
from .example import BlockCall, block_calls
from .hooks import install, uninstall
from .plan import Plan
from .plans import plan_call

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
            "auto": "batch" for branches with batch normalization, "row" for all others. The paper's networks keep
            the mode that they were made with in "auto", and change it otherwise.
        example: The model's arguments, with at least four samples: a tensor, a tuple, or a dict of keyword arguments.
            By default, noise of the image size of a timm, torchvision or transformers model. Other sizes may follow.
        strict: Raise an error instead of warning.
        allow_batch_norm: Let a batch normalization in a branch compute its statistics from the kept samples only, in
            modes "row", "count" and "auto", which then is "row".

    Returns:
        The same model.

    Raises:
        ValueError: An unknown mode; a drop probability outside [0, 1]; an example that the model does not run on, or
            none to be had; batch normalization in a branch in mode "row" or "count"; with `strict`, no drop path, or
            one that cannot be skipped. The model is then unchanged.
    """
    check_choice("mode", mode, ("auto", *MODES))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, but it must run on an example: load its weights first")
    try:
        with _undisturbed():
            probe = restore_drop_path(copy.deepcopy(model)).train()
    except Exception as error:
        raise ValueError(f"the model cannot be copied ({error}): convert it before it is trained or sharded") from error
    kinds = {module: kind for module in probe.modules() if (kind := kind_of(module))}
    for module, kind in kinds.items():
        if not 0 <= (rate := drop_probability(module, kind)) <= 1:
            raise ValueError(f"a drop path has probability {rate:g}, but it must lie in [0, 1]")
    if not kinds and gates(probe):  # which has none of drop paths
        return _set_mode(model, mode, allow_batch_norm)
    blocks = {}
    for name, block in probe.named_modules():
        own = {child: kinds[module] for child, module in children(block) if module in kinds}
        if own and not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
            blocks[name] = own
    whole = True if mode == "batch" else False if mode != "auto" or allow_batch_norm else None
    with _undisturbed():
        calls, uncalled, flops = block_calls(probe, blocks, example) if blocks else ([], {}, {})
        plans, left = _plans(probe, blocks, whole, calls)
    left += [("its drop paths", why, name) for name, why in uncalled.items()]
    branches = [(name, branch) for name, of_block in plans.items() for p in of_block.values() for branch in p.branches]
    modes = defaultdict(dict)
    for name, branch in branches:
        if branch.norms and mode in ("row", "count") and not allow_batch_norm:
            norm = type(probe.get_submodule(name).get_submodule(branch.norms[0])).__name__
            raise ValueError(
                f"{name} has a {norm} in its branch, which would compute its statistics from the kept samples only: use"
                ' mode="batch" or "auto", or allow it with allow_batch_norm=True'
            )
        auto = "batch" if branch.norms and not allow_batch_norm else "row"
        modes[name][branch.end] = auto if mode == "auto" else mode
    messages = _complaints(probe, kinds, modes, left)
    if strict and messages:
        raise ValueError(" ".join(messages))

    restore_drop_path(model)
    model.not_skipped = messages
    for name, of_block in modes.items():
        install(model.get_submodule(name), blocks[name], plans[name], of_block)
    for name, branch in branches:
        gate = getattr(model.get_submodule(f"{name}.{branch.drop_path}".lstrip(".")), gate_name(branch.end[1]))
        of_children = (flops.get(f"{name}.{child}".lstrip("."), 0) for child in branch.children)
        gate.tally.flops = sum(of_children) / (flops.get("", 0) or 1)
    chosen = [gate.mode for gate in gates(model)]
    if mode == "auto" and "batch" in chosen:
        count = f"{chosen.count('batch')} of {len(chosen)}" if "row" in chosen else f"all {len(chosen)}"
        why = "since their branches compute statistics over it"
        messages = [*messages, f"{count} calls of drop paths use one gate for the mini-batch, {why}"]
    for message in messages:
        warnings.warn(message, stacklevel=2)
    return model


def _set_mode(model: Model, mode: str, allow_batch_norm: bool) -> Model:
    """Change the mode of one of the paper's networks, which skip by themselves and have BatchNorm in every branch."""
    if mode in ("row", "count") and not allow_batch_norm:
        raise ValueError(
            f"{type(model).__name__} has a BatchNorm2d in its branches, which would compute its statistics from the"
            ' kept samples only: use mode="batch" or "auto", or allow it with allow_batch_norm=True'
        )
    if mode != "auto":
        for gate in gates(model):
            gate.mode = mode
    return model


def _plans(
    model: nn.Module, blocks: dict, whole: bool | None, calls: list[BlockCall]
) -> tuple[dict[str, dict[object, Plan]], list[tuple[str, str, str]]]:
    """For each block the plan for each kind of call; and what is not skipped, why, and in which block."""
    plans, left, known, owners = defaultdict(dict), [], {}, {}
    for call in calls:
        block = model.get_submodule(call.block)
        if call.alike not in known:
            known[call.alike] = plan_call(block, blocks[call.block], whole, call.args, call.kwargs)
        plan, of_call = known[call.alike]
        modules = {block.get_submodule(name) for branch in plan.branches for name in branch.modules()}
        replaced = [block.get_submodule(name) for branch in plan.branches for name in (branch.drop_path, *branch.norms)]
        if plans[call.block].setdefault(call.kind, plan) != plan:
            of_call = {"its drop paths": "it depends on sizes"}
        elif any(owners.setdefault(module, block) is not block for module in modules):
            of_call = {"its drop paths": "another block has the same module"}
        elif any(has_own_forward(module) for module in replaced):
            of_call = {"its drop paths": "a module has a forward method of its own"}
        if "its drop paths" in of_call:
            plans[call.block][call.kind] = Plan((), plan.rows)
        left += [(name, why, call.block) for name, why in of_call.items()]
    return plans, left


def _complaints(model: nn.Module, kinds: dict, modes: dict, left: list[tuple[str, str, str]]) -> list[str]:
    """A sentence for each drop path that is not skipped, or one that says why nothing is."""
    if left:
        reasons = defaultdict(dict)
        for name, why, block in left:
            reasons[f"{name} of {type(model.get_submodule(block)).__name__} ({why})"][block] = None
        where = "; ".join(
            f"{reason} in {', '.join(filter(None, names)) or 'the model'}" for reason, names in reasons.items()
        )
        return [f"computed in full, since skipping it could not be proven to be right: {where}"]
    others = {type(m).__name__ for m in model.modules() if m not in kinds and looks_like_drop_path(m)}
    if others:
        return [f"not skipped, since they do not behave like timm's DropPath: {', '.join(sorted(others))}"]
    if modes:
        return []
    if kinds or any(isinstance(module, fx.GraphModule) for module in model.modules()):
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


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Compute gradients in any mode, and leave the generators of PyTorch, NumPy and Python as they are."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
