"""Where the branch of a drop path begins, as one pass of a block shows by its autograd graph.

A block's own code is not read. Of the calls of its children, those that only a drop path's input depends on are its
branch; where they take a tensor from outside, the branch begins.
"""

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Set
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

Calls = dict[tuple[str, int], dict[int, int]]
"""Calls of children, by name and number from 0, each with some of its arguments: rows per sample, by position."""


class Call(NamedTuple):
    """A call of a child: its tensors by position, each with its rows and autograd node, and its outputs' nodes."""

    child: str
    number: int
    inputs: dict[int, tuple[int, object]]
    outputs: list

    @property
    def key(self) -> tuple[str, int]:
        return self.child, self.number

    @property
    def rows(self) -> int:
        """The number of rows that a drop path is called with."""
        return next(rows for rows, _ in self.inputs.values())


class Observed(NamedTuple):
    """The calls of one pass of a block, which of them are of drop paths, and the nodes of its arguments and outputs."""

    calls: list[Call]
    drops: list[Call]
    inputs: list
    outputs: list


def children(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that a block's forward method can call: its children, and those in its lists and dicts."""
    for name, child in block.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from children(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def flatten(args: tuple, kwargs: dict) -> tuple[list, TreeSpec | None]:
    """The arguments of a call in a list, and their structure; None for tensors by position, the usual case, is fast."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return list(args), None
    return tree_flatten((args, kwargs))


def tensors(*values: object) -> list[Tensor]:
    return [x for x in flatten(values, {})[0] if isinstance(x, Tensor)]


def observe(block: nn.Module, drop_paths: Collection[str], args: tuple, kwargs: dict) -> Observed:
    """Run a copy of a block whose parameters all require gradients. Its drop paths drop nothing."""
    block = copy.deepcopy(block)
    calls, count, running = [], Counter(), []

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = enumerate(tree_leaves((args, kwargs)))
        inputs = {i: (len(x), x.grad_fn) for i, x in values if isinstance(x, Tensor) and x.ndim}
        if not running:  # a child that another child calls is a part of that
            calls.append(Call(name, count[name], inputs, []))
        running.append(name)
        count[name] += 1

    def after(name: str, module: nn.Module, args: tuple, output: object) -> None:
        running.pop()
        if not running:
            calls[-1].outputs.extend(x.grad_fn for x in tensors(output) if x.grad_fn)

    def tracked(x: object) -> object:
        tracks = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().clone().requires_grad_().clone() if tracks else x

    for name, module in children(block):
        if name in drop_paths:
            module.forward = lambda *args, **kwargs: tensors(args, kwargs)[0].clone()
        module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
        module.register_forward_hook(partial(after, name))
    with torch.enable_grad():
        args, kwargs = tree_map(tracked, (args, kwargs))
        inputs = [x.grad_fn for x in tensors(args, kwargs)]
        outputs = [x.grad_fn for x in tensors(block(*args, **kwargs))]
    if not any(outputs):
        raise TypeError("its output is neither a tensor that needs gradients, nor a tuple, list or dict with one")
    return Observed(calls, [call for call in calls if call.child in drop_paths], inputs, outputs)


def ancestors(nodes: Iterable, stop: Set = frozenset()) -> set:
    """The nodes and all that they are computed from, except what is computed only for those in `stop`."""
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node is not None and node not in stop and node not in found:
            found.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return found


def branch_of(drop: Call, seen: Observed) -> list[Call]:
    """The calls that are made only for a call of a drop path, in order.

    If another drop path is within its branch, those after it: each branch has one drop path.
    """
    own = ancestors(node for _, node in drop.inputs.values())
    others = ancestors(seen.outputs, {*drop.outputs})
    branch = []
    for call in seen.calls[: seen.calls.index(drop)]:
        if not own.isdisjoint(call.outputs) and others.isdisjoint(call.outputs):
            branch = [] if call in seen.drops else [*branch, call]
    return branch


def entries(drop: Call, branch: list[Call], seen: Observed, alone: bool = False) -> Calls:
    """The arguments of a branch that come from outside and have rows of their own for each of the drop path's.

    Those are as many as it has, or, if computed from the block's first tensor, a multiple (such as windows). If the
    calls are `alone`, what comes from other calls of the branch counts, too.
    """
    inner = set() if alone else {node for call in branch for node in call.outputs}
    first = next((node for node in seen.inputs if node is not None), None)
    found = {}
    for call in branch:
        groups = {}
        for position, (rows, node) in call.inputs.items():
            group, rest = divmod(rows, drop.rows)
            of = ancestors([node])
            if group and not rest and (group == 1 or first in of) and not of & inner:
                groups[position] = group
        if groups:
            found[call.key] = groups
    return found
