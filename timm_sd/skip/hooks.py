"""How a block is made to skip: hooks on it and its children, which follow its plans.

Hooks find what they follow in attributes of the modules: torch.compile compiles a block anew for a function that
belongs to another. A block has `skipping`; children where branches begin, drop paths and normalizations have `skipped`,
the block's `Skipping` and their name in it.
"""

import functools
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map, tree_unflatten

from .branches import flatten
from .drop_path_gate import DropPathGate, gate_name
from .drop_paths import Kind
from .plan import BLOCK, Branch, Plan, kind_of_call
from .step import Pass, warn


class Thread(threading.local):
    """The passes of blocks that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.passes: list[tuple[Skipping, Pass]] = []


class Skipping:
    """The plans that a block's hooks follow, one for each `kind_of_call`."""

    def __init__(self, block: nn.Module, plans: dict[object, Plan]) -> None:
        self.block, self.plans = block, plans
        branches = [branch for plan in plans.values() for branch in plan.branches]
        self.calls = {b.end: (*b.drop_path.split("."), gate_name(b.end[1])) for b in branches}
        self.in_full = Plan(tuple(Branch(call, entries={}) for call in self.calls), ())
        self.empty_on = {name: branch.empty_on for branch in branches for name in branch.norms}
        names = {name for branch in branches for name in branch.modules() - {branch.drop_path, BLOCK[0]}}
        self.hooked = {name: name.split(".") for name in sorted(names)}

    def new_pass(self, args: tuple, kwargs: dict) -> Pass:
        """A pass of the block."""
        gates = self.gates()
        if not any(gate.can_close() for gate in gates.values()) or _is_traced(args, kwargs):
            return Pass(self.block, Plan((), ()), {}, [])
        kind, values = kind_of_call(args, kwargs)
        plan = self.plans.get(kind)
        if plan is None or not plan.fits(values):
            warn(f"{type(self.block).__name__} computes what its drop paths drop: the example had no such call")
            plan = self.in_full
        elif replaced := [name for name, path in self.hooked.items() if not self._is_own(name, self._child(path))]:
            block, names = type(self.block).__name__, ", ".join(replaced)
            warn(f"{block} computes what its drop paths drop, since modules were replaced ({names}): convert again")
            plan = self.in_full
        return Pass(self.block, plan, gates, values)

    def gates(self) -> dict[tuple[str, int], DropPathGate]:
        """The gate of each call of a drop path that has not been replaced."""
        found = {}
        for call, path in self.calls.items():
            gate = self._child(path)
            if isinstance(gate, DropPathGate):
                if self._is_own(call[0], gate.drop_path):
                    found[call] = gate
                else:
                    block = type(self.block).__name__
                    warn(f"{block} computes what its drop paths drop, since they have changed places: convert again")
        return found

    def _child(self, path: Sequence[str]) -> nn.Module | None:
        child = self.block
        for name in path:
            child = getattr(child, name, None)
        return child

    def _is_own(self, name: str, child: nn.Module | None) -> bool:
        """Whether a child has the hooks of this name. So do PyTorch's wrappers, which only pass on."""
        if torch.compiler.is_compiling():  # which cannot look into modules
            return True
        if child is None or ("skipped" not in vars(child) and not type(child).__module__.startswith("torch.")):
            return False
        skipping, of_name = getattr(child, "skipped", (None, None))
        return skipping is self and of_name == name

    def current(self, called: str | None = None) -> Pass | None:
        """The pass that is going on, also if it begins with the child that is called; None outside of the block."""
        for skipping, current in reversed(passes()):
            if skipping is self:
                return current
        if passes() or torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return None  # called from another block, or outside of all
        # In a backward pass, a part of the block that it has checkpointed is computed again.
        key = torch._C._current_graph_task_id(), threading.get_ident(), self
        current = again.get(key)
        known = current is not None and called in current.calls
        if current is None or (known and (called, current.calls[called]) not in self.calls):
            plan, *others = self.plans.values()
            numbers = [number for b in plan.branches for _, number in b.entries]
            groups = [group for b in plan.branches for group in next(iter(b.entries.values()), {}).values()]
            if others or any(numbers) or any(group > 1 for group in groups):
                raise RuntimeError("a part of this block cannot be checkpointed: checkpoint the whole block")
            if current is None:
                torch.autograd.Variable._execution_engine.queue_callback(lambda: again.pop(key).check_ended())
            else:
                current.check_ended()
            again[key] = current = Pass(self.block, plan, self.gates(), None)
        return current

    @torch.compiler.disable
    def is_closed(self, norm: str) -> bool:
        """Whether a normalization is called in a branch that keeps no sample."""
        current = self.current()
        opened = current.open.items() if current is not None else ()
        return any(
            of.kept is not None and not len(of.kept) and norm in current.branches[index].norms for index, of in opened
        )


thread = Thread()
again: dict[tuple[int, int, Skipping], Pass] = {}  # of parts of blocks, by backward pass and thread, until it ends
traced: list[tuple[Skipping, Pass]] = []  # torch.compile cannot see what belongs to a thread


def passes() -> list[tuple[Skipping, Pass]]:
    """The passes of blocks that this thread is in, the innermost last."""
    return traced if torch.compiler.is_compiling() else thread.passes


def begin(block: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook on the block."""
    if getattr(block, "_is_replica", False) and block.skipping.empty_on:
        raise RuntimeError(
            "batch normalization in a branch does not work with DataParallel: use DistributedDataParallel"
        )
    passes().append((block.skipping, block.skipping.new_pass(args, kwargs)))


def end(block: nn.Module, args: tuple, output: object) -> Tensor | None:
    """Forward hook on the block, called even if its forward method raises an exception (then without output)."""
    if not passes() or passes()[-1][0] is not block.skipping:
        return None  # a pre-hook has failed before `begin`
    _, current = passes().pop()
    if output is None or not current.branches:
        return None
    whole = current.branch(BLOCK)
    if whole in current.open:
        return current.end_of_block(whole, output)
    if current.open:
        names = ", ".join(current.branches[index].drop_path for index in current.open)
        raise RuntimeError(f"{type(block).__name__}: rows were taken for {names}, which was not called")
    if not torch.compiler.is_compiling() and current.leaks(output):
        raise RuntimeError(f"{type(block).__name__}: a branch is used other than through its drop path")
    return None


def called(child: nn.Module) -> tuple[Pass | None, int | None, tuple[str, int] | None]:
    """The pass that a child is called in, the index of the branch that begins or ends there, and the call."""
    skipping, name = getattr(child, "skipped", (None, None))
    if skipping is None:  # restored, but another library has kept the forward method
        return None, None, None
    current = skipping.current(name)
    if current is None:
        return None, None, None
    call = name, current.calls.get(name, 0)
    current.calls[name] = call[1] + 1
    return current, current.branch(call), call


def enter(child: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook where branches begin: take the kept rows of what comes from outside."""
    for other in child._forward_hooks.values():
        if (getattr(other, "__module__", None) or "").partition(".")[0] in ("opacus", "backpack"):
            raise RuntimeError("gradients of each sample need all samples: undo with timm_sd.restore_drop_path(model)")
    current, index, call = called(child)
    if index is None:
        return None
    values, structure = flatten(args, kwargs)
    current.take(index, call, values)
    return (tuple(values), kwargs) if structure is None else tree_unflatten(values, structure)


def give_back(child: nn.Module, args: tuple, output: object) -> object:
    """Forward hook on a child that is computed alone: put its rows back at once."""
    skipping, name = child.skipped
    current = skipping.current()
    index = current.branch((name, current.calls[name] - 1)) if current is not None else None
    if index is None or not current.branches[index].alone or current.open[index].computed is None:
        return None
    return tree_map(lambda y: current.open[index].put(y, 1.0) if isinstance(y, Tensor) else y, output)


def leave(drop_path: nn.Module, *args: object, **kwargs: object) -> Tensor:
    """The forward method of a drop path: put the branch's rows back among zeros."""
    current, index, _ = called(drop_path)
    if index is None:
        return type(drop_path).forward(drop_path, *args, **kwargs)
    (x,) = *args, *kwargs.values()  # an error if there is another argument, so that it is not ignored
    return current.end(index, x)


def normalize(norm: nn.Module, *args: object, **kwargs: object) -> object:
    """The forward method of a normalization over the batch: without samples, it keeps its statistics."""
    (skipping, name), (x, *_) = getattr(norm, "skipped", (None, None)), (*args, *kwargs.values())
    if skipping is None:  # as in `called`
        return type(norm).forward(norm, *args, **kwargs)
    if len(x) == 0 or (x.device.type not in skipping.empty_on[name] and skipping.is_closed(name)):
        frozen = object.__new__(type(norm))  # other threads would see a flag set in the module
        frozen.__dict__ = norm.__dict__ | {"training": False}
        norm = frozen
    return type(norm).forward(norm, *args, **kwargs)


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


def _is_traced(args: tuple, kwargs: dict) -> bool:
    """Whether the number of rows cannot depend on the gates: under torch.func.vmap, torch.jit.trace, and in FX."""
    if torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    mapped = any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)
    return mapped or torch.jit.is_tracing() or any(isinstance(x, fx.Proxy) for x in (*args, *kwargs.values()))


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
    branches = [branch for plan in plans.values() for branch in plan.branches]
    for child, alone in {child: branch.alone for branch in branches for child, _ in branch.entries}.items():
        module = block.get_submodule(child)
        module.skipped = skipping, child
        module.register_forward_pre_hook(enter, with_kwargs=True)
        if alone:
            module.register_forward_hook(give_back)
    for (name, call), mode in modes.items():
        drop_path = block.get_submodule(name)
        drop_path.skipped, drop_path.forward = (skipping, name), functools.partial(leave, drop_path)
        DropPathGate(drop_path, kinds[name], call, mode)
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
