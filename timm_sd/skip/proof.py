"""The proof that branches are skipped rightly: a block must compute the same whether it skips them or not.

It is run both ways on an example, in training mode, with the same samples dropped. Outputs, gradients, and the values
that the block keeps in its arguments, attributes and buffers must agree.
"""

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .branches import observe, tensors
from .drop_path_gate import DropPathGate, gate_name
from .drop_paths import Kind
from .hooks import install
from .plan import Branch, kind_of_call, make_plan

Masks = dict[tuple[str, int], Tensor]
"""The rows to keep, by drop path and number of its call."""

OWN = {*vars(nn.Module()), "forward", "skipping", "skipped"}  # attributes that every module may have


class Example:
    """A call of a block in training, prepared to be computed with and without skipping.

    Nothing in the block is random. No parameter is zero, so that no branch is invisible, and samples differ.
    """

    def __init__(
        self,
        block: nn.Module,
        kinds: dict[str, Kind],
        args: tuple,
        kwargs: dict,
        dtype: torch.dtype,
        tolerance: float,
    ) -> None:
        self.block, self.kinds, self.tolerance = copy.deepcopy(block).to(dtype), kinds, tolerance
        self.in_full = {}
        generator = torch.Generator().manual_seed(0)

        def vary(x: object, to: torch.dtype = dtype) -> object:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            usual = x.abs() < 1e4  # masks have infinite values, or the largest
            spread = x.where(usual, 0).double().std().item() if x.numel() > 1 else 0.0
            noise = 0.3 * (spread or 1.0) * torch.randn(x.shape, generator=generator).to(x)
            return torch.where(usual, x + noise, x).to(to)

        with torch.no_grad():
            for parameter in filter(Tensor.is_floating_point, self.block.parameters()):
                parameter.requires_grad_().copy_(vary(parameter, parameter.dtype))
        for name, kind in kinds.items():
            with suppress(AttributeError):  # a property that cannot be set; code may depend on it
                setattr(self.block.get_submodule(name), kind.attribute, 0.5)
        # Which modules compute statistics over the batch? Those whose buffers depend on the block's arguments.
        buffers = []
        for _ in range(2):
            self.args, self.kwargs = tree_map(vary, (args, kwargs))
            with torch.no_grad():
                self.run(probe := self.copy())
            buffers.append(dict(probe.named_buffers()))
        changed = (name for name, x in buffers[0].items() if not torch.equal(x, buffers[1][name]))
        self.norms = list({name.rpartition(".")[0]: None for name in changed if "." in name})  # not the block itself
        before = _random_state()
        self.seen = observe(self.block, kinds, self.args, self.kwargs)
        self.kind, self.values = kind_of_call(self.args, self.kwargs)
        for name in self.norms:  # statistics of fewer samples would differ
            self.block.get_submodule(name).eval()
        if _random_state() != before:
            drop_paths = [self.block.get_submodule(name) for name in kinds]
            for module in self.block.modules():
                dropout = isinstance(module, nn.modules.dropout._DropoutNd)
                for name, value in list(vars(module).items()) if module not in drop_paths else ():
                    if isinstance(value, float) and (dropout or "drop" in name):
                        setattr(module, name, 0.0)

    def copy(self) -> nn.Module:
        """A copy of the block with the same parameters."""
        return copy.deepcopy(self.block, {id(parameter): parameter for parameter in self.block.parameters()})

    def compute(self, branches: list[Branch], masks: Masks) -> tuple[list, list]:
        """The results of a pass if these branches are skipped, and others computed in full, with these gates."""
        block, skipped = self.copy(), {branch.end: branch for branch in branches}
        calls = [drop.key for drop in self.seen.drops]
        plan = make_plan([skipped.get(call) or Branch(call, entries={}) for call in calls], self.values)
        install(block, self.kinds, {self.kind: plan}, dict.fromkeys(calls, "row"))
        for name, call in calls:
            getattr(block.get_submodule(name), gate_name(call)).provided = masks[name, call]
        return self.run(block)

    def run(self, block: nn.Module) -> tuple[list, list]:
        """The outputs of a block, the values that it keeps, and the gradients of its inputs and parameters."""
        leaves = [*self.block.parameters()]

        def leaf(x: object) -> object:
            if not isinstance(x, Tensor):
                return copy.copy(x)
            if not x.is_floating_point():
                return x.clone()
            leaves.append(x.clone().requires_grad_())
            return leaves[-1].clone()  # a block may change it in place

        args, kwargs = tree_map(leaf, (self.args, self.kwargs))
        for set_seed in (torch.manual_seed, np.random.seed, random.seed):
            set_seed(0)
        versions = [parameter._version for parameter in self.block.parameters()]
        output = block(*args, **kwargs)
        if versions != [parameter._version for parameter in self.block.parameters()]:
            raise RuntimeError("it changes its parameters")
        losses = [
            (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)).sum()
            for x in tensors(output)
            if x.requires_grad and not x.is_complex()
        ]
        leaves = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad(sum(losses), leaves, allow_unused=True) if losses else []
        modules = [module for module in block.modules() if not isinstance(module, DropPathGate)]
        kept = [{name: x for name, x in vars(module).items() if name not in OWN} for module in modules]
        return list(_values([output, args, kwargs, kept, *block.buffers()], set())), list(gradients)

    def disprove(self, branches: list[Branch], masks: Masks) -> str | None:
        """Why these branches must not be skipped; None if the block computes the same with these samples dropped."""
        key = str([mask.tolist() for mask in masks.values()])
        if key not in self.in_full:
            self.in_full[key] = self.compute([], masks)
        try:
            found = self.compute(branches, masks)
        except Exception as error:  # of any type: a forward method's tensors have other sizes
            return f"{type(error).__name__}: {error}".splitlines()[0]
        for what, expected, ours in zip(("outputs", "gradients"), self.in_full[key], found, strict=True):
            # Some gradients, such as that of a bias of keys, are zero but for rounding.
            sizes = [x.abs().max().item() for x in expected if what != "outputs" and x is not None and x.numel()]
            least = 1e-3 * max(sizes, default=0.0)
            if not all(_same(a, b, self.tolerance, least) for a, b in zip_longest(expected, ours)):
                return f"its {what} would differ"
        return None


def _random_state() -> tuple:
    """The state of all generators that a block may use."""
    _, of_numpy, *position = np.random.get_state()
    return torch.get_rng_state().tolist(), of_numpy.tolist(), position, random.getstate()


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
        return expected == found or abs(expected - found) <= tolerance * abs(expected)
    if not isinstance(expected, Tensor):
        return type(expected) is type(found) and expected == found
    if not isinstance(found, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    special = ~expected.isfinite()
    if special.any():
        if not torch.allclose(expected[special], found[special], equal_nan=True):
            return False
        expected, found = expected.where(~special, 0), found.where(~special, 0)
    difference = (expected - found).abs().nan_to_num(torch.inf)
    return not expected.numel() or bool(difference.max() <= tolerance * max(expected.abs().max().item(), least) + 1e-12)
