"""A training step: the block's own forward method runs, and its children get fewer rows.

A forward pre-hook takes the kept rows of what enters a branch, and the drop path puts the branch's rows back among
zeros. Every module is called in every step, with as many rows as there are samples to compute, which may be none.
"""

import warnings
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..rows import is_channels_last, put_rows, take_rows
from .branches import ancestors, tensors
from .drop_path_gate import DropPathGate
from .plan import BLOCK, Plan, samples_of_call


class Open(NamedTuple):
    """A branch that has begun.

    `kept` are the rows that are kept, `computed` these and any that do not count; None if all rows are kept. An output
    without rows has no memory format, so this is that of the input.
    """

    kept: Tensor | None
    computed: Tensor | None
    size: int
    scale: float
    channels_last: bool

    def take(self, x: Tensor, group: int) -> Tensor:
        """The rows of x that are computed. A sample may have several adjacent rows, such as its windows."""
        if group == 1 and (torch.compiler.is_compiling() or len(x) == self.size):  # compiled, it would fix the size
            return take_rows(x, self.computed)
        if len(x) % self.size:
            raise RuntimeError(f"{len(x)} rows of {self.size} samples enter a branch")
        return take_rows(x.unflatten(0, (self.size, -1)), self.computed).flatten(0, 1)

    def put(self, x: Tensor, scale: float) -> Tensor:
        """The rows that are kept, of those computed, among zeros."""
        windows = not torch.compiler.is_compiling() and len(x) > len(self.computed)
        if windows:
            x = x.unflatten(0, (len(self.computed), -1))
        if len(self.computed) > len(self.kept):
            x = x[: len(self.kept)]
        y = put_rows(x, self.kept, self.size, scale, self.channels_last and not len(self.computed))
        return y.flatten(0, 1) if windows else y


class Pass:
    """One pass of a block: how often its children have been called, and the branches that have begun."""

    def __init__(
        self, block: nn.Module, plan: Plan, gates: dict[tuple[str, int], DropPathGate], inputs: list[Tensor] | None
    ) -> None:
        """
        Args:
            block: The block.
            plan: The plan to follow.
            gates: The gate of each call of a drop path that has not been replaced.
            inputs: The tensors that the block is called with, None if only a part of it is computed again.
        """
        self.block, self.branches, self.gates = block, plan.branches, gates
        self.inputs, self.part = inputs or [], inputs is None
        self.calls: dict[str, int] = {}  # PyTorch 2.7 cannot compile a Counter
        self.open: dict[int, Open] = {}
        # Autograd nodes of what was taken and put back
        self.taken, self.put = [], [node for x in self.inputs for node in _nodes(x)]

    def branch(self, call: tuple[str, int]) -> int | None:
        """The index of the branch that begins or ends with this call; None if it cannot be skipped now."""
        for index, branch in enumerate(self.branches):
            if call in branch.entries or call == branch.end:
                gate = self.gates.get(branch.end)
                return index if gate is not None and gate.can_close() else None
        return None

    def begin(self, index: int, x: Tensor, size: int, in_full: bool = False) -> Open:
        """Draw the gate of a branch for so many rows of the drop path.

        The branch begins with x, or ends with it if it has been computed `in_full`.
        """
        gate = self.gates[self.branches[index].end]
        rows, scale = gate.draw_rows(size)
        if not torch.compiler.is_compiling():  # there, a number that changes would be a constant
            gate.tally.add(size, *((size, size) if in_full else (len(rows), size * gate.survival)))
        if len(rows) == size:
            return Open(None, None, size, scale, False)
        rows = computed = rows.to(x.device, non_blocking=True)
        if len(rows) == 0 and not self.works_on_no_rows(index, x):
            computed = rows.new_zeros(1)
        elif len(rows) == 1:  # a single row might be broadcast where it does not belong
            computed = torch.cat((rows, (rows + 1) % size))
        return Open(rows, computed, size, scale, is_channels_last(x))

    def works_on_no_rows(self, index: int, x: Tensor) -> bool:
        """Whether a branch has been tried on no rows with such tensors.

        It has not with parameters that have become DTensors since, whose `view` fails on them (PyTorch 2.14).
        """
        branch = self.branches[index]
        modules = (module for name, module in self.block.named_modules() if name in branch.children)
        parameters = chain.from_iterable(module.parameters() for module in modules)
        distributed = not branch.norms and any(hasattr(parameter, "device_mesh") for parameter in parameters)
        return x.device.type in branch.empty_on and not distributed

    def take(self, index: int, call: tuple[str, int], values: list) -> None:
        """Take the rows that are computed of some of the arguments of a call."""
        branch = self.branches[index]
        if self.part and index not in self.open and call != next(iter(branch.entries)):
            raise RuntimeError(f"the branch of {branch.drop_path} is checkpointed in part: checkpoint the whole block")
        for position, group in branch.entries[call].items():
            if index not in self.open:
                x = values[position]
                size = samples_of_call(self.inputs) if branch.of_samples and not self.part else len(x)
                self.open[index] = self.begin(index, x, size)
            if self.open[index].computed is None:
                return
            values[position] = self.open[index].take(values[position], group)
            self.taken += _nodes(values[position])

    def end(self, index: int, x: Tensor) -> Tensor:
        """The output of a drop path, where its branch ends."""
        branch, opened = self.branches[index], self.open.get(index)
        dropped = opened is None or branch.alone  # of what has been computed
        if opened is None:
            if branch.entries and self.part:
                raise RuntimeError(
                    f"the branch of {branch.drop_path} is checkpointed in part: checkpoint the whole block"
                )
            if branch.entries:
                warn(f"the branch of {branch.drop_path} is computed in full: where it began, a module was replaced")
            opened = self.begin(index, x, len(x), in_full=True)
        if BLOCK not in branch.entries:
            self.open.pop(index, None)
        if opened.kept is None or BLOCK in branch.entries:
            y = x if opened.scale == 1 else x * opened.scale
        elif dropped:
            y = put_rows(take_rows(x, opened.kept), opened.kept, opened.size, opened.scale)
        elif not torch.compiler.is_compiling() and len(x) != len(opened.computed):
            raise RuntimeError(f"{len(x)} rows reach {branch.drop_path}, but {len(opened.computed)} were taken")
        else:
            y = opened.put(x, opened.scale)
        self.put += _nodes(y)
        return y

    def end_of_block(self, index: int, output: Tensor) -> Tensor:
        """The output of a block that is a branch as a whole, in which dropped samples are passed on."""
        opened, node = self.open.pop(index), output.grad_fn
        if opened.kept is None:
            return output
        if node and self.taken:  # there are no nodes while torch.compile traces
            added = {_past_hooks(*edge) for edge in node.next_functions} <= {self.taken[0], *self.put}
            if not added or "Add" not in node.name():
                raise RuntimeError("a block does more than to add the output of its drop path to its input")
        return self.inputs[0].to(output.dtype).index_copy(0, opened.kept, output[: len(opened.kept)])

    def check_ended(self) -> None:
        """Raise RuntimeError if a branch has begun in a part of the block, but not ended in it."""
        for index, opened in self.open.items():
            if opened.computed is not None:
                name = self.branches[index].drop_path
                raise RuntimeError(
                    f"a branch is checkpointed without {name}, where it ends: checkpoint the whole block"
                )

    def leaks(self, output: object) -> bool:
        """Whether rows that were taken reach the block's output other than through a drop path, by the graph."""
        taken = set(self.taken) - {None, *self.put}
        return bool(taken) and not taken.isdisjoint(ancestors((x.grad_fn for x in tensors(output)), {*self.put}))


def _nodes(x: Tensor) -> list:
    """The autograd node of a tensor and, if it is a view, of what it is a view of, since its own may change.

    There is no graph yet while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return []
    return [x.grad_fn, x._base.grad_fn] if x._is_view() else [x.grad_fn]


def _past_hooks(node: object, number: int) -> object:
    """The node of an output, before those of full backward hooks."""
    while node is not None and node.name() == "BackwardHookFunctionBackward":
        node, number = node.next_functions[number]
    return node


@torch.compiler.disable
def warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
