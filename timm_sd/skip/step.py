"""What a training step does: the block's own forward method runs, and its children get fewer rows.

A forward pre-hook takes the kept rows of what enters a branch, and the drop path puts the branch's rows back among
zeros. Every module is called in every step, with as many rows as there are samples to compute, which may be none.
"""

import enum
import functools
import operator
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..gate import Gate
from ..rows import is_channels_last, put_rows, take_rows
from .branches import Calls, tensors
from .drop_paths import Kind, drop_probability

BLOCK = "", 0  # the call of the block itself, where its whole forward method is a branch


class Tally:
    """What a gate has saved so far: samples that came, those computed, and its branch's share of the model's FLOPs."""

    samples = computed = 0
    flops = 0.0


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
        self.tally = Tally()

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
            raise RuntimeError(f"a drop path's {self.kind.attribute} is {getattr(self.drop_path, self.kind.attribute)}")
        rows = self.draw_count(size) if self.mode == "count" else self.draw(size)
        if self.mode == "batch":
            rows = torch.arange(size if rows else 0)
        elif self.mode == "row":
            rows = rows.nonzero().squeeze(1)
        if not torch.compiler.is_compiling():  # there, a number that changes would be a constant
            self.tally.samples += size
            self.tally.computed += len(rows)
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
    children: tuple[str, ...]  # all that it calls
    per_sample: tuple[int, int]
    empty_on: str | None = None
    norms: tuple[str, ...] = ()

    def modules(self) -> set[str]:
        """The modules of the block that get hooks, or another forward method."""
        return {self.drop_path, *self.norms, *(child for child, _ in self.entries if child)}


class Plan(NamedTuple):
    """The branches of a block in one kind of call, and which of the call's tensors have rows, as `rows_of_call`."""

    branches: tuple[Branch, ...]
    rows: tuple[bool | None, ...]


def kind_of_call(args: tuple, kwargs: dict) -> tuple[object, list[Tensor]]:
    """What must be as in the example for a plan to hold, and the tensors of a call.

    That is the structure of the arguments, the dimensions of tensors, and other values; numbers are free, except that
    rows of one frame or window each are not those of several.
    """
    values, structure = tree_flatten((args, kwargs))
    kept = (bool, str, enum.Enum, type(None))
    kinds = (
        x.ndim if isinstance(x, Tensor) else x if isinstance(x, kept) else (type(x), type(x) is int and x == 1)
        for x in values
    )
    return (repr(structure), *kinds), [x for x in values if isinstance(x, Tensor)]  # not hashable in PyTorch 2.7


def samples_of_call(values: list[Tensor]) -> int:
    """The number of samples, which is the length of the first tensor of a call."""
    return next((len(x) for x in values if x.ndim), 1)


def rows_of_call(values: list[Tensor]) -> tuple[bool | None, ...]:
    """For each tensor, whether it has a row for each sample (True) or a single one (False), None for anything else."""
    samples = samples_of_call(values)
    return tuple(True if len(x) == samples else False if len(x) == 1 else None for x in values if x.ndim)


class Open(NamedTuple):
    """A branch that has begun: the rows that are kept, those that are computed, each None for all, and their scale.

    Its input tells the memory format, which the output of a branch without rows does not have.
    """

    kept: Tensor | None
    computed: Tensor | None
    size: int
    scale: float
    channels_last: bool

    def take(self, x: Tensor, group: int) -> Tensor:
        """The rows of x that are computed; a sample may have a group of adjacent rows, such as its windows."""
        if group == 1:
            return take_rows(x, self.computed)
        return take_rows(x.unflatten(0, (self.size, group)), self.computed).flatten(0, 1)

    def put(self, x: Tensor, scale: float) -> Tensor:
        """The rows that are kept, of those computed, among zeros."""
        group = 1 if torch.compiler.is_compiling() or not len(self.computed) else len(x) // len(self.computed)
        if len(self.computed) > len(self.kept):
            x = x[: len(self.kept) * group]
        if group == 1:
            return put_rows(x, self.kept, self.size, scale, self.channels_last and not len(self.computed))
        return put_rows(x.unflatten(0, (len(self.kept), group)), self.kept, self.size, scale).flatten(0, 1)


class Pass:
    """One pass of a block: how often its children have been called, and the branches that have begun."""

    def __init__(self, plan: Plan, block: nn.Module, inputs: list[Tensor] | None) -> None:
        self.branches = plan.branches
        # None for a drop path that has been replaced
        self.gates = [getattr(block.get_submodule(b.drop_path), gate_name(b.call), None) for b in plan.branches]
        self.part = inputs is None  # of the block, computed again
        self.inputs = inputs or []
        self.calls: Counter[str] = Counter()
        self.open: dict[int, Open] = {}
        # Autograd nodes: of what was taken and put back, and of the last output of a drop path
        self.taken, self.put, self.left = [], [node for x in self.inputs for node in _nodes(x)], []

    def count(self, name: str) -> tuple[str, int]:
        """A call of a child, with its number."""
        self.calls[name] += 1
        return name, self.calls[name] - 1

    def branch(self, call: tuple[str, int]) -> int | None:
        """The index of the branch that begins or ends with this call; None if it cannot be skipped now."""
        for index, (branch, gate) in enumerate(zip(self.branches, self.gates, strict=True)):
            if call in branch.entries or call == (branch.drop_path, branch.call):
                return index if gate is not None and gate.can_close() else None
        return None

    def begin(self, index: int, x: Tensor, group: int) -> Open:
        """Draw the gate of a branch that begins with x, of which a sample has a group of rows."""
        branch, size = self.branches[index], len(x)
        if group != 1:
            samples, rows = branch.per_sample
            size = samples_of_call(self.inputs) * rows // samples
        rows, scale = self.gates[index].draw_rows(size)
        if len(rows) == size:
            return Open(None, None, size, scale, False)
        rows = computed = rows.to(x.device, non_blocking=True)
        if len(rows) == 0 and (branch.empty_on is None or x.device.type not in (branch.empty_on, "meta")):
            computed = rows.new_zeros(1)
        elif len(rows) == 1:  # a single row might be broadcast where it does not belong
            computed = torch.cat((rows, (rows + 1) % size)) if size > 2 else None
        return Open(rows, computed, size, scale, is_channels_last(x))

    def take(self, call: tuple[str, int], index: int, values: list) -> None:
        """Take the rows that are computed of some of the arguments of a call."""
        for position, group in self.branches[index].entries[call].items():
            x = values[position]
            if index not in self.open:
                self.open[index] = self.begin(index, x, group)
            opened = self.open[index]
            if opened.computed is None:
                return
            if group != 1 or not torch.compiler.is_compiling():  # there, a check would make the size a constant
                group, rest = divmod(len(x), opened.size)
                if rest:
                    raise RuntimeError(f"{len(x)} rows enter the branch of {self.branches[index].drop_path}")
            values[position] = opened.take(x, group)
            self.taken += _nodes(values[position])

    def end(self, index: int, x: Tensor) -> Tensor:
        """The output of a drop path, where its branch ends."""
        branch, opened = self.branches[index], self.open.get(index)
        if opened is None:  # a child has been replaced, so it did not begin
            if self.part:
                raise RuntimeError(
                    f"{branch.drop_path} is checkpointed without all of its branch: checkpoint the block"
                )
            if branch.entries:
                _warn(f"the branch of {branch.drop_path} is computed in full: where it began, a module was replaced")
            opened = self.begin(index, x, 1)._replace(computed=None)
        if BLOCK in branch.entries:
            y = x if opened.scale == 1 else x * opened.scale
        else:
            self.open.pop(index, None)
            if opened.kept is None:
                y = x if opened.scale == 1 else x * opened.scale
            elif opened.computed is None or branch.alone:
                y = put_rows(take_rows(x, opened.kept), opened.kept, opened.size, opened.scale)
            elif not torch.compiler.is_compiling() and len(x) != len(opened.computed):
                raise RuntimeError(f"{len(x)} rows reach {branch.drop_path}, but {len(opened.computed)} were taken")
            else:
                y = opened.put(x, opened.scale)
        self.left = _nodes(y)
        self.put += self.left
        return y

    def end_of_block(self, index: int, output: Tensor) -> Tensor:
        """The output of a block that is a branch as a whole, in which dropped samples are passed on."""
        opened, nodes = self.open.pop(index), _nodes(output)
        if opened.kept is None:
            return output
        if opened.computed is not None and nodes and nodes[0] is not None:
            added = {self.taken[0], self.left[0]} == {parent for parent, _ in nodes[0].next_functions}
            if not added or "Add" not in nodes[0].name():
                raise RuntimeError("a block does more than to add the output of its drop path to its input")
        output = output[: len(opened.kept)] if opened.computed is not None else take_rows(output, opened.kept)
        return self.inputs[0].to(output.dtype).index_copy(0, opened.kept, output)

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
    """What a block's hooks follow: its plan for each `kind_of_call`."""

    def __init__(self, block: nn.Module, plans: dict[object, Plan]) -> None:
        self.block, self.plans = block, plans
        self.branches = [branch for plan in plans.values() for branch in plan.branches]
        self.drop_paths = dict.fromkeys(branch.drop_path for branch in self.branches)
        self.empty_on = {name: branch.empty_on for branch in self.branches for name in branch.norms}
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
        gates = (gate for name in self.drop_paths for gate in operator.attrgetter(name)(self.block).children())
        if not any(gate.can_close() for gate in gates) or _in_vmap():
            return None
        kind, values = kind_of_call(args, kwargs)
        plan = self.plans.get(kind)
        if plan is None or not _fits(plan, values):
            _warn(f"{type(self.block).__name__} computes what its drop paths drop: the example had no such call")
            plan = Plan(tuple(branch._replace(entries={}) for branch in self.branches), ())
        return Pass(plan, self.block, values)

    def current(self, name: str) -> Pass | None:
        """The pass in which a child is called, None if nothing is skipped in it."""
        stack = self.stack()
        if stack or torch.compiler.is_compiling():
            return stack[-1] if stack else None
        if torch._C._current_graph_task_id() == -1:  # called from outside of the block
            return None
        # In a backward pass, a part of the block that it has checkpointed is computed again.
        if self.passes.again is None or self.passes.again.calls[name]:
            plan, *others = self.plans.values()
            calls = [call for b in plan.branches for call in (*b.entries, (b.drop_path, b.call))]
            if others or any(number for _, number in calls):
                raise RuntimeError("a part of a block that calls a module twice is checkpointed: checkpoint the block")
            self.passes.again = Pass(plan, self.block, None)
        return self.passes.again

    @torch.compiler.disable
    def is_closed(self, norm: str) -> bool:
        """Whether a normalization is called in a branch that keeps no sample."""
        current = self.current(norm)
        opened = current.open.items() if current is not None else ()
        return any(
            of.kept is not None and not len(of.kept) and norm in current.branches[index].norms for index, of in opened
        )


# Hooks find what they follow in attributes of the modules: torch.compile compiles a block anew for a function that
# belongs to another. A block has `skipping`; children where branches begin, drop paths and normalizations have
# `skipped`, the block's `Skipping` and their name in it.


def begin(block: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook on the block."""
    if getattr(block, "_is_replica", False) and block.skipping.empty_on:
        raise RuntimeError(
            "batch normalization in a branch does not work with DataParallel: use DistributedDataParallel"
        )
    block.skipping.stack().append(block.skipping.new_pass(args, kwargs))


def end(block: nn.Module, args: tuple, output: object) -> Tensor | None:
    """Forward hook on the block, called even if its forward method raises an exception (then without output)."""
    current = block.skipping.stack().pop()
    if current is None or output is None:
        return None
    whole = current.branch(BLOCK)
    if whole is not None and whole in current.open:
        return current.end_of_block(whole, output)
    if current.open:
        names = ", ".join(current.branches[index].drop_path for index in current.open)
        raise RuntimeError(f"{type(block).__name__}: rows were taken for {names}, which was not called")
    if not torch.compiler.is_compiling() and current.leaks(output):
        raise RuntimeError(f"{type(block).__name__}: a branch is used other than through its drop path")
    return None


def enter(child: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook where branches begin: take the kept rows of what comes from outside."""
    for other in child._forward_hooks.values():
        if (getattr(other, "__module__", None) or "").partition(".")[0] in ("opacus", "backpack"):
            raise RuntimeError("gradients of each sample need all samples: undo with timm_sd.restore_drop_path(model)")
    skipping, name = child.skipped
    current = skipping.current(name)
    call = current.count(name) if current is not None else None
    index = current.branch(call) if current is not None else None
    if index is None:
        return None
    values, structure = tree_flatten((args, kwargs))
    current.take(call, index, values)
    return tree_unflatten(values, structure)


def give_back(child: nn.Module, args: tuple, output: object) -> object:
    """Forward hook on a child that is computed alone: put its rows back at once."""
    skipping, name = child.skipped
    current = skipping.current(name)
    index = current.branch((name, current.calls[name] - 1)) if current is not None else None
    if index is None or not current.branches[index].alone or current.open[index].computed is None:
        return None
    return tree_map(lambda y: current.open[index].put(y, 1.0) if isinstance(y, Tensor) else y, output)


def leave(drop_path: nn.Module, *args: object, **kwargs: object) -> Tensor:
    """The forward method of a drop path: put the branch's rows back among zeros."""
    skipping, name = drop_path.skipped
    current = skipping.current(name)
    index = current.branch(current.count(name)) if current is not None else None
    if index is None:
        return type(drop_path).forward(drop_path, *args, **kwargs)
    return current.end(index, *args[:1] or kwargs.values())


def not_compiled(function: Callable) -> Callable:
    """A hook for modes "row" and "batch", where the host reads the gates.

    In a compiled region, a gate's value would become part of the graph: one graph for each pattern of gates.
    """
    function = torch.compiler.disable(function)
    function.__name__ = function.__qualname__ = f"{function.__name__}_not_compiled"  # under which pickle looks it up
    return function


HOOKS = begin, end, enter, give_back, leave
NOT_COMPILED = tuple(map(not_compiled, HOOKS))
begin_not_compiled, end_not_compiled, enter_not_compiled, give_back_not_compiled, leave_not_compiled = NOT_COMPILED


def normalize(norm: nn.Module, x: Tensor, *args: object, **kwargs: object) -> object:
    """The forward method of a normalization over the batch: without samples, it keeps its statistics."""
    skipping, name = norm.skipped
    if len(x) == 0 or (x.device.type != skipping.empty_on[name] and skipping.is_closed(name)):
        frozen = object.__new__(type(norm))  # other threads would see a flag set in the module
        frozen.__dict__ = norm.__dict__ | {"training": False}
        norm = frozen
    return type(norm).forward(norm, x, *args, **kwargs)


def gate_name(call: int) -> str:
    """The name of the gate of a call, a child of the drop path."""
    return f"gate_{call}" if call else "gate"


def _nodes(x: Tensor) -> list:
    """The autograd node of a tensor and, if it is a view, of what it is a view of, since its own may change.

    There is no graph yet while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return []
    return [x.grad_fn, x._base.grad_fn] if x._is_view() else [x.grad_fn]


def _fits(plan: Plan, values: list[Tensor]) -> bool:
    """Whether the tensors of a call have rows where those of the example did."""
    if torch.compiler.is_compiling():
        return True  # a check would make their sizes constants
    samples, lengths = samples_of_call(values), (len(x) for x in values if x.ndim)
    return all(rows is None or n == (samples if rows else 1) for rows, n in zip(plan.rows, lengths, strict=True))


def _in_vmap() -> bool:
    """Whether torch.func.vmap is active, in which the number of rows cannot depend on the sample."""
    levels = () if torch.compiler.is_compiling() else torch._C._functorch.get_interpreter_stack() or ()
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
    block.skipping = skipping = Skipping(block, plans)
    block.register_forward_pre_hook(begin, with_kwargs=True)
    block.register_forward_hook(end, always_call=True)
    for child, alone in {child: branch.alone for branch in skipping.branches for child, _ in branch.entries}.items():
        module = block.get_submodule(child)
        module.skipped = skipping, child
        module.register_forward_pre_hook(enter, with_kwargs=True)
        if alone:
            module.register_forward_hook(give_back)
    for (name, call), mode in modes.items():
        drop_path = block.get_submodule(name)
        drop_path.skipped, drop_path.forward = (skipping, name), functools.partial(leave, drop_path)
        drop_path.add_module(
            gate_name(call), DropPathGate(drop_path, kinds[name], call, mode).train(drop_path.training)
        )
    for name in skipping.empty_on:
        norm = block.get_submodule(name)
        norm.skipped, norm.forward = (skipping, name), functools.partial(normalize, norm)


def uninstall(module: nn.Module) -> None:
    """Remove from a module what `install` has added."""
    if getattr(vars(module).get("forward"), "func", None) in (*HOOKS, *NOT_COMPILED, normalize):
        del module.forward
    for name in {"skipping", "skipped", "not_skipped"} & vars(module).keys():
        delattr(module, name)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, each in hooks.items() if each in (*HOOKS, *NOT_COMPILED)]:
            for of_kind in (hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                of_kind.pop(key, None)
    for name in [name for name, child in module.named_children() if isinstance(child, DropPathGate)]:
        delattr(module, name)
