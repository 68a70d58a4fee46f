"""What a training step does: the block's own forward method runs, and its children get fewer rows.

A forward pre-hook takes the kept rows of what enters a branch, and the drop path puts the branch's rows back among
zeros. Every module is called in every step, with as many rows as there are samples to compute, which may be none.
"""

import operator
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..gate import Gate
from ..rows import put_rows, take_rows
from .branches import Calls, tensors
from .drop_paths import Kind, drop_probability

BLOCK = "", 0  # the call of the block itself, where its whole forward method is a branch


class DropPathGate(Gate):
    """The gate of one call of a drop path; probability and scaling are read from the drop path, so changes count."""

    def __init__(self, drop_path: nn.Module, kind: Kind, call: int, mode: str) -> None:
        """
        Args:
            drop_path: The drop path.
            kind: How it stores its probability.
            call: The number of the call in a pass of the block, from 0.
            mode: "batch", "row" or "count".
        """
        super().__init__(mode=mode)
        self.kind, self.call = kind, call
        self.__dict__["drop_path"] = drop_path  # not a submodule: it is the parent
        self.samples = self.computed = 0  # so far

    @property
    def survival(self) -> float:
        return 1 - drop_probability(self.drop_path, self.kind)

    @survival.setter
    def survival(self, probability: float) -> None:
        if "drop_path" in vars(self):
            setattr(self.drop_path, self.kind.attribute, probability if self.kind.survival else 1 - probability)

    def draw_rows(self, size: int) -> tuple[Tensor, float]:
        """The rows to keep of `size`, and the factor to scale them by."""
        p = self.survival
        if not 0 <= p <= 1:
            raise RuntimeError(f"a drop path's {self.kind.attribute} makes its survival probability {p:g}")
        rows = self.draw_count(size) if self.mode == "count" else self.draw(size)
        if self.mode == "batch":
            rows = torch.arange(size if rows else 0)
        elif self.mode == "row":
            rows = rows.nonzero().squeeze(1)
        if not torch.compiler.is_compiling():  # there, a number that changes would be a constant
            self.samples, self.computed = self.samples + size, self.computed + len(rows)
        share = len(rows) / size if self.mode == "count" and size else p
        return rows, 1 / share if share and getattr(self.drop_path, "scale_by_keep", self.kind.scaled) else 1.0


class Branch(NamedTuple):
    """A call of a drop path whose branch is skipped.

    `entries` are the calls where rows are taken. If they are `alone`, these are all calls of the branch, and each puts
    its results back, so that the code between them sees all samples. `per_sample` is the number of the drop path's rows
    for each of the block's samples, as a fraction. `empty_on` is the type of device on which the branch is known to
    work without any rows, and `norms` are its modules that compute statistics over the batch.
    """

    drop_path: str
    call: int
    entries: Calls
    alone: bool
    per_sample: tuple[int, int]
    empty_on: str | None
    norms: tuple[str, ...]


class Plan(NamedTuple):
    """The branches of a block in one kind of call, and which of the call's tensors have rows, as `rows_of_call`."""

    branches: tuple[Branch, ...]
    rows: tuple[bool | None, ...]


def kind_of_call(args: tuple, kwargs: dict) -> tuple[object, list[Tensor]]:
    """What must be as in the example for a plan to hold, and the tensors of a call.

    That is the structure of the arguments, the dimensions of tensors, the types of numbers, and other values.
    """
    values, structure = tree_flatten((args, kwargs))
    kinds = (
        x.ndim if isinstance(x, Tensor) else x if x is None or isinstance(x, (bool, str)) else type(x) for x in values
    )
    return (structure, *kinds), [x for x in values if isinstance(x, Tensor)]


def samples_of_call(values: list[Tensor]) -> int:
    """The number of samples, which is the length of the first tensor of a call."""
    return next((len(x) for x in values if x.ndim), 1)


def rows_of_call(values: list[Tensor]) -> tuple[bool | None, ...]:
    """For each tensor, whether it has a row for each sample (True) or a single one (False), None for anything else."""
    samples = samples_of_call(values)
    return tuple(True if len(x) == samples else False if len(x) == 1 else None for x in values if x.ndim)


class Open(NamedTuple):
    """A branch that has begun: the rows that are computed, None for all, and how many of them count."""

    rows: Tensor | None
    kept: int
    size: int
    scale: float

    def take(self, x: Tensor, group: int = 1) -> Tensor:
        """The rows of x, in which a sample has several adjacent ones (such as its windows)."""
        return (
            take_rows(x, self.rows) if group == 1 else take_rows(x.unflatten(0, (-1, group)), self.rows).flatten(0, 1)
        )

    def put(self, x: Tensor, group: int = 1, scale: float = 1.0) -> Tensor:
        """The rows that count among zeros."""
        rows = self.rows[: self.kept]
        if self.kept < len(self.rows):
            x = x[: self.kept * group]
        if group == 1:
            return put_rows(x, rows, self.size, scale)
        return put_rows(x.unflatten(0, (self.kept, group)), rows, self.size, scale).flatten(0, 1)


class Pass:
    """One pass of a block: how often its children have been called, and the branches that have begun."""

    def __init__(self, plan: Plan, block: nn.Module, inputs: list[Tensor] | None) -> None:
        self.branches = plan.branches
        self.gates = [_gate(block, branch) for branch in plan.branches]
        self.part = inputs is None  # of the block, computed again
        self.inputs = inputs or []
        self.calls: Counter[str] = Counter()
        self.open: dict[int, Open] = {}
        self.groups: dict[str, int] = {}
        self.taken, self.put = [], [_node(x) for x in self.inputs]

    def count(self, name: str) -> tuple[str, int]:
        """A call of a child, with its number."""
        self.calls[name] += 1
        return name, self.calls[name] - 1

    def branch(self, call: tuple[str, int]) -> int | None:
        """The index of the branch that has this call as an entry or its end; None if it cannot be skipped now."""
        for index, branch in enumerate(self.branches):
            if call in branch.entries or call == (branch.drop_path, branch.call):
                gate = self.gates[index]  # None if the drop path has been replaced
                return index if gate is not None and gate.can_close() else None
        return None

    def begin(self, index: int, x: Tensor, group: int) -> Open:
        """Draw the gate of a branch that begins with x, of which a sample has `group` rows."""
        branch, size = self.branches[index], len(x)
        if group != 1:
            samples, rows = branch.per_sample
            size = samples_of_call(self.inputs) * rows // samples
        rows, scale = self.gates[index].draw_rows(size)
        kept = len(rows)
        if kept == size:
            return Open(None, size, size, scale)
        if kept == 0 and branch.empty_on != x.device.type:
            rows = torch.zeros(1, dtype=torch.long)
        elif kept == 1:  # a single row might be broadcast where it does not belong
            rows = torch.cat((rows, (rows + 1) % size))
        return Open(rows.to(x.device, non_blocking=True), kept, size, scale)

    def take(self, call: tuple[str, int], index: int, values: list) -> None:
        """Take the kept rows of some of the arguments of a call."""
        for position, group in self.branches[index].entries[call].items():
            x = values[position]
            if index not in self.open:
                self.open[index] = self.begin(index, x, group)
            opened = self.open[index]
            if opened.rows is None:
                return
            if not torch.compiler.is_compiling() or group != 1:  # there, a check would make the size a constant
                group, rest = divmod(len(x), opened.size)
                if rest:
                    raise RuntimeError(f"{len(x)} rows enter the branch of {self.branches[index].drop_path}")
            values[position] = opened.take(x, group)
            self.groups[call[0]] = group
            if call != BLOCK:
                self.taken.append(_node(values[position]))

    def end(self, index: int, x: Tensor) -> Tensor:
        """The output of a drop path at the end of a branch."""
        branch, opened = self.branches[index], self.open[index]
        if BLOCK in branch.entries:
            return x if opened.scale == 1 else x * opened.scale
        del self.open[index]
        if opened.rows is None:
            y = x if opened.scale == 1 else x * opened.scale
        else:
            if branch.alone:
                x = opened.take(x)
            elif not torch.compiler.is_compiling() and len(x) != len(opened.rows):
                raise RuntimeError(
                    f"{len(x)} rows reach {branch.drop_path}, whose branch began with {len(opened.rows)}"
                )
            y = opened.put(x, scale=opened.scale)
        self.put.append(_node(y))
        return y

    def leaks(self, output: object) -> bool:
        """Whether rows that were taken reach the block's output other than through a drop path, by the graph."""
        taken, seen = set(self.taken) - {None}, {None, *self.put}
        stack = [x.grad_fn for x in tensors(output)] if taken else []
        while stack:
            node = stack.pop()
            if node in taken and node not in seen:
                return True
            if node not in seen:
                seen.add(node)
                stack.extend(parent for parent, _ in node.next_functions)
        return False


class Passes(threading.local):
    """The passes of a block that a thread is in, the innermost last; None for one in which nothing is skipped."""

    def __init__(self) -> None:
        self.stack: list[Pass | None] = []
        self.again: Pass | None = None


class Skipping:
    """The hooks of a block, which follow its plans, one for each `kind_of_call`."""

    def __init__(self, block: nn.Module, plans: dict[object, Plan]) -> None:
        self.block, self.plans = block, plans
        self.passes = Passes()
        self.traced: list[Pass | None] = []  # torch.compile cannot see what belongs to a thread

    def __getstate__(self) -> dict:
        """Copies and pickles made during a pass begin anew."""
        return dict(block=self.block, plans=self.plans)

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def stack(self) -> list[Pass | None]:
        """The passes of the block that this thread is in, the innermost last."""
        return self.traced if torch.compiler.is_compiling() else self.passes.stack

    def new_pass(self, args: tuple, kwargs: dict) -> Pass | None:
        """A pass of the block, None if it skips nothing."""
        names = dict.fromkeys(branch.drop_path for plan in self.plans.values() for branch in plan.branches)
        gates = (gate for name in names for gate in operator.attrgetter(name)(self.block).children())
        if not any(gate.can_close() for gate in gates) or _in_vmap():
            return None
        kind, values = kind_of_call(args, kwargs)
        plan = self.plans.get(kind)
        if plan is None or not _fits(plan, values):
            _warn(f"{type(self.block).__name__} computes what its drop paths drop: the example had no such call")
            return None
        return Pass(plan, self.block, values)

    def current(self, name: str) -> Pass | None:
        """The pass in which a child is called, None if nothing is skipped in it."""
        if torch.compiler.is_compiling():
            return self.traced[-1] if self.traced else None
        if self.passes.stack:
            return self.passes.stack[-1]
        if torch._C._current_graph_task_id() == -1:  # called from outside of the block
            return None
        # In a backward pass, a part of the block that it has checkpointed is computed again.
        again = self.passes.again
        if again is None or again.calls[name]:
            again = self.passes.again = Pass(self.only_plan(), self.block, None)
        return again

    @torch.compiler.disable
    def is_closed(self, norm: str) -> bool:
        """Whether a normalization is called in a branch that keeps no sample."""
        current = self.current(norm)
        opened = current.open.items() if current is not None else ()
        return any(branch.kept == 0 and norm in current.branches[index].norms for index, branch in opened)

    def empties(self, norm: str, device: str) -> bool:
        """Whether a normalization gets no rows at all on this type of device if its branch keeps no sample."""
        branches = (branch for plan in self.plans.values() for branch in plan.branches)
        return all(branch.empty_on == device for branch in branches if norm in branch.norms)

    def only_plan(self) -> Plan:
        """The plan of a block that is called in one way and calls each child once, so that a part of it is enough."""
        plan, *others = self.plans.values()
        calls = [(branch.drop_path, branch.call) for branch in plan.branches]
        if others or any(
            number for _, number in [*calls, *(call for branch in plan.branches for call in branch.entries)]
        ):
            raise RuntimeError(f"{type(self.block).__name__} checkpoints a part of itself: checkpoint the whole block")
        return plan


# The hooks, which find what they follow in attributes of the modules: torch.compile would compile a block anew for a
# function that belongs to another block. `block.skipping` is a block's `Skipping`; `child.skipped` has that, and the
# child's name, for children where branches begin, drop paths and normalizations.


def begin(block: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook on the block."""
    block.skipping.stack().append(block.skipping.new_pass(args, kwargs))


def end(block: nn.Module, args: tuple, output: object) -> Tensor | None:
    """Forward hook on the block, called even if its forward method raises an exception (then without output)."""
    current = block.skipping.stack().pop()
    if current is None or output is None:
        return None
    whole = current.branch(BLOCK)
    if whole is not None and (opened := current.open.pop(whole)).rows is not None:
        x = current.inputs[0].to(output.dtype)
        return x.index_copy(0, opened.rows[: opened.kept], output[: opened.kept])
    if current.open:
        names = ", ".join(current.branches[index].drop_path for index in current.open)
        raise RuntimeError(f"{type(block).__name__}: rows were taken for {names}, which was not called")
    if not torch.compiler.is_compiling() and current.leaks(output):
        raise RuntimeError(f"{type(block).__name__}: a branch is used other than through its drop path")
    return None


def enter(child: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook where branches begin: take the kept rows of what comes from outside."""
    skipping, name = child.skipped
    current = skipping.current(name)
    if current is None:
        return None
    call = current.count(name)
    index = current.branch(call)
    if index is None:
        return None
    values, structure = tree_flatten((args, kwargs))
    current.take(call, index, values)
    return tree_unflatten(values, structure)


def give_back(child: nn.Module, args: tuple, output: object) -> object:
    """Forward hook on a child that is computed alone: put its rows back at once."""
    skipping, name = child.skipped
    current = skipping.current(name)
    index = None if current is None else current.branch((name, current.calls[name] - 1))
    if index is None or not current.branches[index].alone or (opened := current.open[index]).rows is None:
        return None
    computed = len(opened.rows)

    def put(y: object) -> object:
        group = len(y) // computed if computed else current.groups[name]
        return opened.put(y, group)

    return tree_map(lambda y: put(y) if isinstance(y, Tensor) else y, output)


def leave(drop_path: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The forward method of a drop path: put the branch's rows back among zeros."""
    skipping, name = drop_path.skipped
    current = skipping.current(name)
    index = None if current is None else current.branch(current.count(name))
    if index is not None and index in current.open:
        return current.end(index, x)
    if index is not None and current.part:
        raise RuntimeError(f"{name} is in a part of a block that is checkpointed, but not its branch: checkpoint both")
    return type(drop_path).forward(drop_path, x, *args, **kwargs)


def normalize(norm: nn.Module, x: Tensor, *args: object, **kwargs: object) -> object:
    """The forward method of a normalization over the batch: without samples, it keeps its statistics."""
    skipping, name = norm.skipped
    if len(x) == 0 or (not skipping.empties(name, x.device.type) and skipping.is_closed(name)):
        frozen = object.__new__(type(norm))  # other threads would see a flag set in the module
        frozen.__dict__ = norm.__dict__ | {"training": False}
        norm = frozen
    return type(norm).forward(norm, x, *args, **kwargs)


# In modes "row" and "batch" the host reads the gates. In a compiled region, their values would become part of the
# graph: one graph for each pattern of gates.
HOOKS = begin, end, enter, give_back, leave
NOT_COMPILED = tuple(map(torch.compiler.disable, HOOKS))


def gate_name(call: int) -> str:
    """The name of the gate of a call, a child of the drop path."""
    return f"gate_{call}" if call else "gate"


def _node(x: Tensor) -> object:
    """The autograd node of a tensor. There is no graph yet while torch.compile traces."""
    return None if torch.compiler.is_compiling() else x.grad_fn


def _gate(block: nn.Module, branch: Branch) -> DropPathGate | None:
    return getattr(operator.attrgetter(branch.drop_path)(block), gate_name(branch.call), None)


def _fits(plan: Plan, values: list[Tensor]) -> bool:
    """Whether the tensors of a call have rows where those of the example did."""
    if torch.compiler.is_compiling():
        return True  # a check would make their sizes constants
    samples, lengths = samples_of_call(values), (len(x) for x in values if x.ndim)
    return all(rows is None or n == (samples if rows else 1) for rows, n in zip(plan.rows, lengths, strict=True))


def _in_vmap() -> bool:
    """Whether torch.func.vmap is active, in which the number of rows cannot depend on the sample."""
    if torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


@torch.compiler.disable
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def install(
    block: nn.Module, kinds: dict[str, Kind], plans: dict[object, Plan], modes: dict[tuple[str, int], str]
) -> None:
    """Make a block follow its plans.

    Args:
        block: The block.
        kinds: The kind of each of its drop paths, by name.
        plans: A plan for each `kind_of_call`.
        modes: The mode of each call of a drop path that has a branch, by the drop path's name and number of the call.
    """
    begin, end, enter, give_back, leave = HOOKS if set(modes.values()) == {"count"} else NOT_COMPILED
    branches = [branch for plan in plans.values() for branch in plan.branches]
    entered = {child: branch.alone for branch in branches for child, _ in branch.entries}
    block.skipping = Skipping(block, plans)
    block.register_forward_pre_hook(begin, with_kwargs=True)
    block.register_forward_hook(end, always_call=True)
    for name in {*entered, *(name for name, _ in modes), *(norm for branch in branches for norm in branch.norms)}:
        block.get_submodule(name).skipped = block.skipping, name
    for child, alone in entered.items():
        block.get_submodule(child).register_forward_pre_hook(enter, with_kwargs=True)
        if alone:
            block.get_submodule(child).register_forward_hook(give_back)
    for (name, call), mode in modes.items():
        drop_path = block.get_submodule(name)
        drop_path.forward = partial(leave, drop_path)
        drop_path.add_module(
            gate_name(call), DropPathGate(drop_path, kinds[name], call, mode).train(drop_path.training)
        )
    for norm in {block.get_submodule(norm) for branch in branches for norm in branch.norms}:
        norm.forward = partial(normalize, norm)
