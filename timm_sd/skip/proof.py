"""What is skipped must be proven first: a block must compute the same with its plan as with drop paths that zero.

Both are run on an example, in training mode and float64, with the same samples dropped. Outputs, gradients and what
the block keeps in attributes and buffers must agree.
"""

import copy
from collections import Counter
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .branches import tensors
from .drop_paths import Kind, drop_probability
from .step import DropPathGate, Plan, gate_name, install, kind_of_call

Masks = dict[tuple[str, int], Tensor]
"""The rows to keep, by drop path and number of its call."""

OWN = {*vars(nn.Module()), "forward", "skipping", "skipped"} - {"training"}  # attributes that every module has


class Example:
    """A call of a block, prepared to be computed with and without a plan.

    Nothing in the block is random. No parameter is zero, so that no branch is invisible, and samples differ.
    """

    def __init__(self, block: nn.Module, kinds: dict[str, Kind], args: tuple, kwargs: dict, dtype: torch.dtype) -> None:
        self.block, self.kinds = copy.deepcopy(block).to(dtype).train(), kinds
        self.tolerance = 1e-5 if dtype == torch.float64 else 1e-3
        self.norms: list[str] = []  # which use their running statistics, since those of fewer samples would differ
        self.plain: dict[object, tuple] = {}
        generator = torch.Generator().manual_seed(0)

        def noise(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

        def vary(x: object) -> object:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            x = x.detach().to(dtype)
            finite = x[x.isfinite()]
            spread = finite.std() if finite.numel() > 1 and finite.std() > 0 else 1.0
            return x + 0.3 * spread * noise(x)

        with torch.no_grad():
            for parameter in filter(Tensor.is_floating_point, self.block.parameters()):
                size = parameter.abs().mean().item() if parameter.numel() else 0.0
                parameter.requires_grad_().add_(noise(parameter), alpha=0.1 * size if size > 0.01 else 0.1)
        for module in self.block.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, float) and ("drop" in name or isinstance(module, nn.modules.dropout._DropoutNd)):
                    setattr(module, name, 0.0)
        for name, kind in kinds.items():
            setattr(self.block.get_submodule(name), kind.attribute, 1.0 if kind.survival else 0.0)
        self.args, self.kwargs = tree_map(vary, (args, kwargs))
        self.kind, self.values = kind_of_call(self.args, self.kwargs)

    def disprove(self, plan: Plan, masks: Masks) -> str | None:
        """Why a plan must not be used, None if the block computes the same with it when these samples are dropped."""
        key = tuple((call, *mask.tolist()) for call, mask in masks.items())
        if key not in self.plain:
            block, calls = self.copy(), Counter()
            for name, kind in self.kinds.items():
                drop_path = block.get_submodule(name)
                drop_path.forward = partial(_zero, masks, calls, name, drop_path, kind)
            self.plain[key] = _results(block, self)
        block = self.copy()
        install(block, self.kinds, {self.kind: plan}, dict.fromkeys(masks, "row"))
        for (name, call), mask in masks.items():
            getattr(block.get_submodule(name), gate_name(call)).provided = mask
        try:
            found = _results(block, self)
        except Exception as error:  # whatever a forward method raises when its tensors have other sizes
            return f"{type(error).__name__}: {error}".splitlines()[0]
        for what, expected, ours in zip(
            ("outputs", "input gradients", "gradients"), self.plain[key], found, strict=True
        ):
            if not all(_same(a, b, self.tolerance) for a, b in zip_longest(expected, ours)):
                return f"its {what} would differ"
        return None

    def copy(self) -> nn.Module:
        block = copy.deepcopy(self.block)
        for name in self.norms:
            block.get_submodule(name).eval()
        return block


def _zero(masks: Masks, calls: Counter, name: str, drop_path: nn.Module, kind: Kind, x: Tensor, *_: object) -> Tensor:
    """A drop path that drops these samples, if it can drop any (a forward method may set its probability)."""
    mask = masks.get((name, calls[name]))
    calls[name] += 1
    keep = 1 - drop_probability(drop_path, kind) if kind.scaled else 1
    return x if mask is None else x * (mask.to(x) / keep).view(-1, *[1] * (x.ndim - 1))


def _results(block: nn.Module, example: Example) -> tuple[list, list, list]:
    """What a block computes and keeps, and the gradients of its inputs and parameters."""
    leaves = []

    def leaf(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.clone()
        leaves.append(x.clone().requires_grad_())
        return leaves[-1].clone()  # a block may change it in place

    with torch.enable_grad():
        args, kwargs = tree_map(leaf, (example.args, example.kwargs))
        outputs = tensors(block(*args, **kwargs))
        generator = torch.Generator().manual_seed(1)
        losses = [
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
            for x in outputs
            if x.requires_grad
        ]
        sum(losses).backward()
    for module in (module for module in block.modules() if not isinstance(module, DropPathGate)):
        outputs += module.buffers(recurse=False)
        kept = {name: value for name, value in vars(module).items() if name not in OWN}
        outputs += tensors(kept)
        outputs += [value for value in kept.values() if isinstance(value, (int, float))]
    return outputs, [x.grad for x in leaves], [parameter.grad for parameter in block.parameters()]


def _same(expected: object, found: object, tolerance: float) -> bool:
    if expected is None:  # without a gradient, there may be zeros
        return found is None or (isinstance(found, Tensor) and not found.any())
    if not isinstance(expected, Tensor):
        return type(expected) is type(found) and expected == found
    if not isinstance(found, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    if not expected.numel():
        return True
    return bool((expected - found).abs().nan_to_num(torch.inf).max() <= tolerance * expected.abs().max() + 1e-12)
