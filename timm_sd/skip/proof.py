"""What is skipped must be proven first: a block must compute the same with its plan as with drop paths that zero.

Both are run on an example, in training mode and float64, with the same samples dropped. Outputs, gradients, and what
the block keeps in its arguments, attributes and buffers must agree.
"""

import contextlib
import copy
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .branches import observe, tensors
from .drop_paths import Kind, drop_probability
from .step import DropPathGate, Plan, gate_name, install, kind_of_call

Masks = dict[tuple[str, int], Tensor]
"""The rows to keep, by drop path and number of its call."""

OWN = {*vars(nn.Module()), "forward", "skipping", "skipped"}  # attributes that every module may have


class Example:
    """A call of a block in training, prepared to be computed with and without a plan.

    Nothing in the block is random. No parameter is zero, so that no branch is invisible, and samples differ.
    """

    def __init__(self, block: nn.Module, kinds: dict[str, Kind], args: tuple, kwargs: dict, dtype: torch.dtype) -> None:
        self.block, self.kinds, self.plain = copy.deepcopy(block).to(dtype), kinds, {}
        self.tolerance = 1e-5 if dtype == torch.float64 else 1e-3
        generator = torch.Generator().manual_seed(0)

        def vary(x: object, to: torch.dtype = dtype) -> object:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            usual = x[x.abs() < 1e4]  # masks have infinite values, or the largest
            spread = usual.std().item() if usual.numel() > 1 else 0.0
            noise = 0.3 * (spread or 1.0) * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            return torch.where(x.abs() < 1e4, x + noise, x).to(to)

        with torch.no_grad():
            for parameter in filter(Tensor.is_floating_point, self.block.parameters()):
                parameter.requires_grad_().copy_(vary(parameter, parameter.dtype))
        self.set_probabilities()
        # Which modules compute statistics over the batch? Those whose buffers depend on the block's arguments.
        buffers = []
        for _ in range(2):
            self.args, self.kwargs = tree_map(vary, (args, kwargs))
            self.run(probe := copy.deepcopy(self.block))
            buffers.append(dict(probe.named_buffers()))
        changed = (name for name, x in buffers[0].items() if not torch.equal(x, buffers[1][name]))
        self.norms = list({name.rpartition(".")[0]: None for name in changed})
        self.seen = observe(self.block, list(kinds), self.args, self.kwargs)
        self.kind, self.values = kind_of_call(self.args, self.kwargs)
        for name in self.norms:  # statistics of fewer samples would differ
            self.block.get_submodule(name).eval()
        if not all(map(torch.equal, *(tensors(self.run(self.without_plan({}), seed)[0]) for seed in (0, 1)))):
            for module in self.block.modules():
                for name, value in list(vars(module).items()):
                    if isinstance(value, float) and (
                        "drop" in name or isinstance(module, nn.modules.dropout._DropoutNd)
                    ):
                        setattr(module, name, 0.0)
            self.set_probabilities()

    def set_probabilities(self) -> None:
        """Let drop paths drop, since code may depend on it."""
        for name, kind in self.kinds.items():
            with contextlib.suppress(AttributeError):  # a property that cannot be set
                setattr(self.block.get_submodule(name), kind.attribute, 0.5)

    def without_plan(self, masks: Masks) -> nn.Module:
        """A copy of the block whose drop paths drop these samples."""
        block, calls = copy.deepcopy(self.block), Counter()
        for name, kind in self.kinds.items():
            total = sum(drop.name == name for drop in self.seen.drops)
            drop_path = block.get_submodule(name)
            drop_path.forward = partial(_zero, masks, calls, total, name, drop_path, kind)
        return block

    def with_plan(self, plan: Plan, masks: Masks) -> nn.Module:
        """A copy of the block that follows a plan, with these gates."""
        block = copy.deepcopy(self.block)
        for name in self.kinds:
            block.get_submodule(name).eval()  # without a gate, it drops nothing
        install(block, self.kinds, {self.kind: plan}, dict.fromkeys(masks, "row"))
        for (name, call), mask in masks.items():
            gate = getattr(block.get_submodule(name), gate_name(call)).train()
            gate.provided = mask
        return block

    def run(self, block: nn.Module, seed: int = 0, grad: bool = False) -> tuple[list, list, list]:
        """What a block computes and keeps, and the gradients of its inputs and parameters."""
        leaves = []

        def leaf(x: object) -> object:
            if not isinstance(x, Tensor):
                return copy.copy(x)
            if not x.is_floating_point():
                return x.clone()
            leaves.append(x.clone().requires_grad_())
            return leaves[-1].clone()  # a block may change it in place

        args, kwargs = tree_map(leaf, (self.args, self.kwargs))
        for set_seed in (torch.manual_seed, np.random.seed, random.seed):
            set_seed(seed)
        with torch.set_grad_enabled(grad):
            output = block(*args, **kwargs)
        losses = [
            (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)).sum()
            for x in tensors(output)
            if x.requires_grad and not x.is_complex()
        ]
        if losses:
            sum(losses).backward()
        modules = [module for module in block.modules() if not isinstance(module, DropPathGate)]
        kept = [{name: x for name, x in vars(module).items() if name not in OWN} for module in modules]
        values = _values([output, args, kwargs, kept, *block.buffers()], set())
        return list(values), [x.grad for x in leaves], [parameter.grad for parameter in block.parameters()]

    def disprove(self, plan: Plan, masks: Masks) -> str | None:
        """Why a plan must not be used, None if the block computes the same with it when these samples are dropped."""
        key = tuple((call, *mask.tolist()) for call, mask in masks.items())
        if key not in self.plain:
            self.plain[key] = self.run(self.without_plan(masks), grad=True)
        try:
            found = self.run(self.with_plan(plan, masks), grad=True)
        except Exception as error:  # whatever a forward method raises when its tensors have other sizes
            return f"{type(error).__name__}: {error}".splitlines()[0]
        for what, expected, ours in zip(
            ("outputs", "input gradients", "gradients"), self.plain[key], found, strict=True
        ):
            # Some gradients, such as that of a bias of keys, are zero but for rounding.
            sizes = [x.abs().max().item() for x in expected if what != "outputs" and x is not None and x.numel()]
            least = 1e-3 * max(sizes, default=0.0)
            if not all(_same(a, b, self.tolerance, least) for a, b in zip_longest(expected, ours)):
                return f"its {what} would differ"
        return None

    def norms_of(self, plan: Plan, masks: Masks) -> tuple[str, ...]:
        """Those of its modules with statistics over the batch that get other rows with a plan than without it."""
        rows = []
        for block in (self.without_plan(masks), self.with_plan(plan, masks)) if self.norms else ():
            rows.append({name: [] for name in self.norms})
            for name, of_norm in rows[-1].items():
                hook = partial(lambda of_norm, _, args: of_norm.append(len(args[0])), of_norm)
                block.get_submodule(name).register_forward_pre_hook(hook)
            self.run(block)
        return tuple(name for name in self.norms if rows[0][name] != rows[1][name])


def _zero(
    masks: Masks, calls: Counter, total: int, name: str, drop_path: nn.Module, kind: Kind, *args, **kwargs
) -> Tensor:
    """A drop path that drops these samples. If a part of the block is computed again, it is called again."""
    (x,) = args[:1] or kwargs.values()
    mask = masks.get((name, calls[name] % total))
    calls[name] += 1
    keep = 1 - drop_probability(drop_path, kind) if getattr(drop_path, "scale_by_keep", kind.scaled) else 1
    return x if mask is None else x * (mask.to(x) / keep).view(-1, *[1] * (x.ndim - 1))


def _values(value: object, seen: set[int]) -> Iterator[object]:
    """The tensors and plain values in a value, also in the attributes of its objects."""
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        yield value
    elif id(value) not in seen and not isinstance(value, (nn.Module, type)) and not callable(value):
        seen.add(id(value))
        if isinstance(value, dict):
            value = value.values()
        elif not isinstance(value, Iterable):
            value = getattr(value, "__dict__", {}).values()
        for each in list(value):
            yield from _values(each, seen)


def _same(expected: object, found: object, tolerance: float, least: float) -> bool:
    """Whether the largest difference is within the tolerance, relative to the largest value or at least to `least`."""
    if expected is None:  # without a gradient, there may be zeros
        return found is None or (isinstance(found, Tensor) and not found.any())
    if isinstance(expected, float) and isinstance(found, float):
        return abs(expected - found) <= tolerance * abs(expected)
    if not isinstance(expected, Tensor):
        return type(expected) is type(found) and expected == found
    if not isinstance(found, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    difference = (expected - found).abs().nan_to_num(torch.inf)
    return not expected.numel() or bool(difference.max() <= tolerance * max(expected.abs().max().item(), least) + 1e-12)
