"""The plan of a block, made from an example: for each kind of call, the branches of its drop paths."""

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from .branches import Calls, flatten

BLOCK = "", 0  # the call of the block itself, where its whole forward method is a branch


class Branch(NamedTuple):
    """The branch that is skipped for a call of a drop path.

    `end` is that call, and `entries` are those where rows are taken; without any, the drop path drops what has been
    computed. If they are `alone`, each puts its results back at once, so that the code between them sees all samples.
    `of_samples` is whether the drop path drops samples of the block's call, rather than windows or the like, `norms`
    are the modules in it that compute statistics over the batch, and `empty_on` the types of devices on which it works
    on no rows.
    """

    end: tuple[str, int]
    entries: Calls
    alone: bool = False
    of_samples: bool = False
    children: tuple[str, ...] = ()  # all that it calls
    norms: tuple[str, ...] = ()
    empty_on: tuple[str, ...] = ()

    @property
    def drop_path(self) -> str:
        return self.end[0]

    def modules(self) -> set[str]:
        """The modules of the block that get hooks, or another forward method."""
        return {self.drop_path, *self.norms, *(child for child, _ in self.entries)}


class Plan(NamedTuple):
    """The branches of a block in one kind of call, and whether a tensor of the call has a row for each sample."""

    branches: tuple[Branch, ...]
    rows: tuple[bool | None, ...]  # True, False for a single row, None for anything else

    def fits(self, values: list[Tensor]) -> bool:
        """Whether the tensors of a call have rows where those of the example did."""
        if torch.compiler.is_compiling():
            return True  # a check would make their sizes constants
        lengths, samples = [len(x) for x in values if x.ndim], samples_of_call(values)
        return all(rows is None or n == (samples if rows else 1) for rows, n in zip(self.rows, lengths, strict=True))


def make_plan(branches: list[Branch], values: list[Tensor]) -> Plan:
    """A plan for calls like the example's, with these tensors."""
    samples, lengths = samples_of_call(values), [len(x) for x in values if x.ndim]
    return Plan(tuple(branches), tuple({samples: True, 1: False}.get(n) for n in lengths))


def kind_of_call(args: tuple, kwargs: dict) -> tuple[object, list[Tensor]]:
    """The kind of a call, which must be as in the example for a plan to hold, and the tensors of the call.

    The kind is the structure of the arguments, the dimensions of tensors, and other values. Numbers are free, except
    that rows of one frame or window each are not those of several.
    """
    values, structure = flatten(args, kwargs)
    kept = (bool, str, enum.Enum, type(None))
    kinds = (
        x.ndim if isinstance(x, Tensor) else x if isinstance(x, kept) else (type(x), type(x) is int and x == 1)
        for x in values
    )
    return (repr(structure), *kinds), [x for x in values if isinstance(x, Tensor)]  # not hashable in PyTorch 2.7


def samples_of_call(values: list[Tensor]) -> int:
    """The number of samples, which is the length of the first tensor of a call."""
    lengths = [len(x) for x in values if x.ndim]  # PyTorch 2.7 cannot compile `next` with a default
    return lengths[0] if lengths else 1
