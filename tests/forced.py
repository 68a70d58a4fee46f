"""A plain model whose drop paths drop given samples, to compare a converted one with: outputs and gradients."""

import copy
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch
from timm.layers import DropPath
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from timm_sd import gates


def drop_path_calls(model, *args, **kwargs):
    """The calls of a model's drop paths in a pass, by name and number, each with its number of rows."""
    calls, counts = {}, Counter()

    def note(name, x):
        calls[name, counts[name]] = len(x)
        counts[name] += 1
        return x

    drop_paths = {name: module for name, module in model.named_modules() if isinstance(module, DropPath)}
    for name, drop_path in drop_paths.items():
        drop_path.forward = partial(note, name)
    with torch.no_grad():
        model(*args, **kwargs)
    for drop_path in drop_paths.values():
        del drop_path.forward
    return calls


def gated_calls(converted):
    """The calls that have a gate, by name and number, in a model converted by `skip_drop_path`."""
    names = {module: name for name, module in converted.named_modules()}
    return {(names[gate.drop_path], gate.call): gate for gate in gates(converted)}


@contextmanager
def forced(plain, converted, kept):
    """Let a plain model drop, at each call of a drop path, the rows that the gate of this call drops.

    Kept rows are multiplied by 1 / p, or by B / k in mode "count". Calls without a gate drop nothing.

    Args:
        plain: timm's model.
        converted: The same model converted, which says which calls have gates, and in which mode.
        kept: For each gate, which rows it keeps.
    """
    rules, counts = dict(zip(gated_calls(converted), zip(gates(converted), kept, strict=True), strict=True)), Counter()

    def forward(name, drop_path, x):
        gate, mask = rules.get((name, counts[name]), (None, None))
        counts[name] += 1
        if gate is None:
            return x
        share = mask.double().mean().item() if gate.mode == "count" else 1 - drop_path.drop_prob
        scale = 1 / share if drop_path.scale_by_keep and share else 1.0
        return x * (scale * mask).to(x).view(-1, *[1] * (x.ndim - 1))

    with ExitStack() as stack:
        stack.enter_context(plain.register_forward_pre_hook(lambda *_: counts.clear()))
        for name, drop_path in plain.named_modules():
            if isinstance(drop_path, DropPath):
                drop_path.forward = partial(forward, name, drop_path)
                stack.callback(vars(drop_path).pop, "forward")
        yield


def results(model, *args, **kwargs):
    """The outputs of a pass, and the gradients of inputs and parameters, by name.

    The loss weights every number differently.
    """
    leaves = []

    def leaf(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a block may change it in place

    model.zero_grad()
    args, kwargs = tree_map(leaf, (args, kwargs))
    outputs = [x for x in tree_leaves(model(*args, **kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True) if x.requires_grad).backward()
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(leaves)}
    return found | {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found, expected, tolerance=1e-6):
    """Where there is no gradient, there may be one of zeros, but not the other way around."""
    assert found.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values() if x is not None and x.numel())
    for name, theirs in expected.items():
        ours = found[name]
        if theirs is None:
            assert ours is None or not ours.any(), f"{name} should be zero"
            continue
        assert ours is not None, f"{name} is missing"
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        if theirs.numel():
            # Some gradients, such as that of a bias of keys, are zero but for rounding.
            bound = tolerance * max(float(theirs.abs().max()), 1e-3 * largest)
            difference = float((ours - theirs).abs().max())
            assert difference <= bound, f"{name} differs by {difference:.2g}"


def provide(converted, kept):
    """Hand each gate the rows that it keeps. They may differ in number, which `use_gates` does not allow."""
    for gate, mask in zip(gates(converted), kept, strict=True):
        gate.provided = mask.all() if mask is not None and gate.mode == "batch" else mask


def assert_drops_as_plain(plain, converted, kept, *args, tolerance=1e-6, **kwargs):
    """Compare a converted model with the plain one; `kept` says which rows each gate keeps."""
    with forced(plain, converted, kept):
        expected = results(plain, *args, **kwargs)
    provide(converted, kept)
    with mock.patch.object(DropPath, "forward", nn.Identity.forward):  # calls without a gate drop nothing
        found = results(converted, *args, **kwargs)
    provide(converted, [None] * len(kept))
    assert_same(found, expected, tolerance)


# How many of so many rows gates keep in turn, with survival probability p
PATTERNS = dict(
    row=(lambda size, p: size // 2 + 1, lambda size, p: min(size, 1), lambda size, p: 0),
    count=(lambda size, p: max(int(p > 0), int(round(size * p, 5) + 0.5)),),
    batch=(lambda size, p: 0, lambda size, p: size),
)


def check(plain, converted, *args, rows=None, tolerance=1e-6, **kwargs):
    """Compare a converted model with the plain one while each gate keeps some samples, one, none or all in turn.

    `rows` are the `drop_path_calls` of the plain model, if they are known.
    """
    rows, generator = rows or drop_path_calls(copy.deepcopy(plain), *args, **kwargs), torch.Generator().manual_seed(3)
    for turn in range(max(len(PATTERNS[gate.mode]) for gate in gates(converted))):
        kept = []
        for index, (call, gate) in enumerate(gated_calls(converted).items()):
            patterns = PATTERNS[gate.mode]
            k = patterns[(index + turn) % len(patterns)](rows[call], gate.survival)
            kept.append(torch.randperm(rows[call], generator=generator) < k)
        assert_drops_as_plain(plain, converted, kept, *args, tolerance=tolerance, **kwargs)
