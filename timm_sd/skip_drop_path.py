"""Skip DropPath: any timm model trains without computing the branches that its DropPaths drop.

timm's blocks compute `shortcut + drop_path(branch)`: the whole branch, of which `drop_path` then zeroes some samples.
`skip_drop_path` rewrites each such call around a gate, so that the branch is a function computed for the kept samples.
To find the calls, torch.fx traces the forward method of each block, with its child modules as leaves; whatever is
between the shortcut and the sum becomes the branch, and everything else stays in place.
"""

import contextlib
import copy
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TypeVar

import torch
from timm.layers import DropPath, LayerScale, LayerScale2d
from timm.models import get_notrace_functions
from timm.models.metaformer import Scale
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .gate import MODES, Gate, check_choice

Model = TypeVar("Model", bound=nn.Module)

SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
NEW = {  # these return a new tensor
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.cat, "add", "sub", "mul", "div"),
}
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
SCALES = (LayerScale, LayerScale2d, Scale, nn.Identity)
# These may return the input itself, or a view of it.
ALIASES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, DropPath)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class CannotSkipError(Exception):
    """Why a block is left unchanged, in a few words."""


class DropPathGate(Gate):
    """The gate of one DropPath call; probability and scaling are read from the DropPath, so later changes count."""

    copies_shortcut = True

    def __init__(self, block: nn.Module, name: str, mode: str) -> None:
        super().__init__(mode=mode)
        self.name = name
        self.__dict__["block"] = block  # not a submodule

    @property
    def drop_path(self) -> DropPath:
        return operator.attrgetter(self.name)(self.block)

    @property
    def survival(self) -> float:
        return 1 - getattr(self.drop_path, "drop_prob", 0.0)

    @survival.setter
    def survival(self, probability: float) -> None:
        if "block" in vars(self):
            self.drop_path.drop_prob = 1 - probability

    @property
    def scale_by_keep(self) -> bool:
        return self.drop_path.scale_by_keep

    def can_close(self) -> bool:
        return super().can_close() and self.drop_path.training


def skip_drop_path(model: Model, mode: str = "row", strict: bool = False, allow_batch_norm: bool = False) -> Model:
    """Convert a model in place so that, in training, it does not compute what its DropPaths drop.

    Inference, parameters, state dict, probabilities and scaling are unchanged. Samples are dropped with the current
    probability of each DropPath. Calls that cannot be rewritten are left unchanged, with a warning that names them and
    says why. If a later call takes another way through a block, it is rewritten then, or computed in full with a
    warning.

    Args:
        model: Any model whose blocks use `timm.layers.DropPath`, usually created with `drop_path_rate=`.
        mode: "row", one gate per sample and call, which is DropPath's own distribution; "count", a fixed number of
            samples per call; or "batch", one gate per call for the mini-batch, as in the paper (see `timm_sd.gate`).
        strict: Raise an error instead of warning.
        allow_batch_norm: In modes "row" and "count", let a BatchNorm inside a branch compute its statistics from the
            kept samples only.

    Returns:
        The same model.

    Raises:
        ValueError: An unknown mode, a BatchNorm in a branch in mode "row" or "count", or with `strict` a DropPath that
            cannot be skipped. The model is then unchanged.
    """
    check_choice("mode", mode, MODES)
    allow_batch_norm = allow_batch_norm or mode == "batch"
    plans, reasons = {}, {}
    for name, block in model.named_modules():
        if isinstance(block, CONTAINERS) or not any(_own_drop_paths(block)):
            continue
        plan = _first_plan(block)
        if not allow_batch_norm and (norm := next(_batch_norms(block, plan), None)):
            raise ValueError(
                f"{name} has a {type(norm).__name__} in its branch, which would compute its statistics from the kept"
                ' samples only: use mode="batch", or allow it with allow_batch_norm=True'
            )
        if plan.calls:
            plans[block] = plan
        for reason in dict.fromkeys(plan.left.values()):
            calls = ", ".join(drop_path for drop_path in plan.left if plan.left[drop_path] == reason)
            reasons.setdefault(f"{calls} of {_base(type(block)).__name__}, because {reason}", []).append(name)
    if reasons:
        message = "; ".join(f"{reason} ({', '.join(blocks)})" for reason, blocks in reasons.items())
        message = f"these DropPath calls cannot be skipped and are computed in full: {message}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    for block, plan in plans.items():
        block.__class__ = _skipping(_base(type(block)))
        block.drop_path_gates = nn.ModuleList(DropPathGate(block, call.drop_path, mode) for call in plan.calls)
        block.drop_path_gates.train(block.training)
        block.drop_path_plans, block.drop_path_rows = [plan], {}
        block.drop_path_allow_batch_norm = allow_batch_norm
    return model


def _own_drop_paths(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """The names of a block's own DropPaths, not those of blocks within it."""
    for name, child in module.named_children():
        if isinstance(child, DropPath):
            yield prefix + name
        elif isinstance(child, CONTAINERS):
            yield from _own_drop_paths(child, f"{prefix}{name}.")


def _batch_norms(block: nn.Module, plan: "Plan") -> Iterator[nn.Module]:
    """The modules in a plan's branches that compute statistics over the batch."""
    for target in itertools.chain.from_iterable(call.attributes for call in plan.calls):
        value = operator.attrgetter(target)(block)
        for module in value.modules() if isinstance(value, nn.Module) else ():
            if isinstance(module, _BatchNorm) or getattr(module, "running_var", None) is not None:
                yield module


# Tracing


def _in_place(operation: Callable) -> Callable:
    """A method of `_Proxy` that records an operation as it is."""
    return lambda x, y: x.tracer.create_proxy("call_function", operation, (x, y), {})


class _Attribute(fx.proxy.Attribute):
    """Stands for an attribute of a tensor."""

    __hash__ = None  # `x.ndim in {2, 4}` would find nothing


class _Proxy(fx.Proxy):
    """Stands for a tensor, and passes for one if a forward method checks."""

    __class__ = Tensor
    __hash__ = None
    _is_param = False

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    # fx.Proxy would turn `x += y` into an addition, and lose that x is modified.
    __iadd__, __isub__, __imul__, __itruediv__ = map(
        _in_place, (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    )


_reads: list[tuple[nn.Module, str]] = []


@cache
def _reading(cls: type[nn.Module]) -> type[nn.Module]:
    """A class whose instances record in `_reads` which of their attributes are read."""

    def __getattribute__(self: nn.Module, name: str) -> object:  # noqa: N807
        _reads.append((self, name))
        return cls.__getattribute__(self, name)

    names = dict(__module__=cls.__module__, __qualname__=cls.__qualname__, __getattribute__=__getattribute__)
    return type(cls.__name__, (cls,), names)


class _Tracer(fx.Tracer):
    """Traces a block's own forward method as it would run with these arguments.

    Only tensors are symbolic; None, numbers and the like keep their values, so that `if mask is not None` goes the same
    way as in the real call. So does a condition on the shapes and types of the arguments, which is also recorded. A
    forward method is rejected if it does what no graph can express (change the gradient mode or autocast, draw random
    numbers), or uses a tensor other than its arguments, parameters and buffers.
    """

    proxy_buffer_attributes = True

    def __init__(self, args: Sequence, kwargs: dict, conditions: list, assumed: Sequence[bool]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.call = args, kwargs
        self.conditions = conditions
        self.assumed = iter(assumed)
        self.modes = _modes()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, name: str, value: object, known_parameters: dict) -> object:
        count = len(_reads)
        value = super().getattr(name, value, known_parameters)
        del _reads[count:]
        return value

    def create_arg(self, value: object) -> object:
        if issubclass(type(value), fx.Proxy):
            return value.node
        if isinstance(value, Tensor) and not any(
            value is own for own in itertools.chain(self.root.parameters(), self.root.buffers())
        ):
            raise TypeError("it uses a tensor that is not an argument, parameter or buffer")
        return super().create_arg(value)

    def create_args_for_root(self, forward: Callable, is_module: bool, concrete_args: object = None) -> tuple:
        count = itertools.count()

        def symbol(value: object) -> object:
            return (
                self.create_proxy("placeholder", f"x{next(count)}", (), {})
                if isinstance(value, Tensor) or value is Tensor
                else value
            )

        _reads.clear()  # reads by the tracer itself
        args, kwargs = self.call
        args = [self.root, *map(symbol, args)]
        keywords = {name: symbol(value) for name, value in kwargs.items()}
        return lambda *args: forward(*args, **keywords), args

    def to_bool(self, proxy: fx.Proxy) -> bool:
        result = proxy.node
        nodes = list(self.graph.nodes)
        needed = _ancestors([result], set(nodes))
        if not _is_size(result) or not all(node.op == "placeholder" or _is_size(node) for node in needed):
            return super().to_bool(proxy)
        if len(self.conditions) == 100:
            raise TypeError("it branches too often")  # such as in a loop that ends when a condition holds
        function = fx.Graph()
        copies = {}
        for node in nodes:
            if node.op == "placeholder" or node in needed:
                copies[node] = function.node_copy(node, copies.__getitem__)
        function.output(copies[result])
        condition = _compile(function)
        tensors = _tensors(*self.call)
        # At conversion there are no tensors to decide by. If the real call goes another way, it gets another plan.
        holds = bool(condition(self.root, *tensors)) if tensors else next(self.assumed, False)
        self.conditions.append((condition, holds))
        return holds

    def create_node(self, *args, **kwargs) -> fx.Node:
        if _modes() != self.modes:
            raise TypeError("it changes the gradient mode or autocast")
        return super().create_node(*args, **kwargs)

    def trace_block(self, block: nn.Module) -> tuple[fx.Graph, dict[tuple[str, str], object]]:
        """The graph, and the state of the attributes of the block and its submodules that tracing has read."""
        paths = {module: path for path, module in block.named_modules()}
        classes = {module: type(module) for module in paths}
        random_state = torch.get_rng_state()
        _reads.clear()
        for module, cls in classes.items():
            module.__class__ = _reading(_base(cls) if module is block else cls)
        try:
            graph = self.trace(block)
            if not torch.equal(torch.get_rng_state(), random_state):
                raise TypeError("it draws random numbers")
        except Exception as error:
            message = (str(error) or type(error).__name__).splitlines()[0]
            raise CannotSkipError(f"its forward method cannot be traced ({message})") from error
        finally:
            for module, cls in classes.items():
                module.__class__ = cls
            torch.set_rng_state(random_state)
        state = {}
        for module, name in dict.fromkeys(_reads):
            value = getattr(module, name, None)
            if module in paths and not name.startswith("__") and not inspect.isroutine(value):
                state[paths[module], name] = _state(value)
                if state[paths[module], name] is object:
                    raise CannotSkipError(f"its forward method depends on {name}, a {type(value).__name__}")
        _reads.clear()
        return graph, state


def _modes() -> tuple:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


# Rewriting


@dataclass(frozen=True)
class Call:
    """One DropPath call.

    `branch` is a function of the block and its inputs, and `attributes` are the block's attributes that it uses. An
    input is `loose` if the shortcut does not depend on it, so that it would get no gradient when the branch is skipped.
    """

    drop_path: str
    branch: Callable[..., Tensor]
    attributes: tuple[str, ...]
    loose: tuple[bool, ...]


@dataclass
class Plan:
    """A block's forward method for one kind of call, rewritten around gates.

    `function` takes the block (twice) and the call's tensors. `arguments` describe the call, `state` is what tracing
    has read from the block, and `conditions` are what it has branched on, as functions of the block and the call's
    tensors, each with whether it held. The plan is used only while all three match. `left` are the DropPaths that could
    not be rewritten, each with the reason. If there is a `reason` not to use the plan, it has no `function`, and the
    block's own forward method is used.
    """

    arguments: tuple
    state: dict[tuple[str, str], object] = field(default_factory=dict)
    conditions: list[tuple[Callable[..., bool], bool]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    function: Callable[..., Tensor] | None = None
    reason: str | None = None

    def fits(self, block: nn.Module, arguments: tuple, tensors: Sequence[Tensor]) -> bool:
        if self.arguments != arguments:
            return False
        for (path, name), value in self.state.items():
            owner = block
            for key in path.split(".") if path else ():
                owner = getattr(owner, key, None)
            if _state(getattr(owner, name, None)) != value:
                return False
        # torch.compile cannot compare a condition on symbolic sizes with a bool, but it can branch on it.
        return all(holds if condition(block, *tensors) else not holds for condition, holds in self.conditions)


def _state(value: object) -> object:
    """What a forward method can depend on in an attribute, `object` if that is unknown.

    For a module, its class and whether it works in place; for a container, its contents; plain values as they are.
    """
    if isinstance(value, CONTAINERS):
        return tuple((name, _state(child)) for name, child in value.named_children())
    if isinstance(value, nn.Module):
        return type(value).__module__, type(value).__qualname__, getattr(value, "inplace", False)
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, (tuple, list)):
        states = tuple(map(_state, value))
        return object if object in states else states
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)) or callable(value):
        return value
    return object


def _kind(value: object) -> object:
    """What a forward method can depend on in an argument: Tensor for any tensor, plain values as they are."""
    if isinstance(value, Tensor) or value is Tensor:
        return Tensor
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value)) if all(_kind(item) is not Tensor for item in value) else object
    return value if value is None or isinstance(value, (bool, int, float, str)) else object


def _arguments(args: Sequence, kwargs: dict) -> tuple:
    """The kind of a call."""
    return len(args), *kwargs, *map(_kind, args), *map(_kind, kwargs.values())


def _tensors(args: Sequence, kwargs: dict) -> list[Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def _first_plan(block: nn.Module) -> Plan:
    """The plan for a call with only the required arguments, which are all assumed to be tensors."""
    parameters = list(inspect.signature(_base(type(block)).forward).parameters.values())[1:]
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    plan = _plan(block, [Tensor] * len(required), {})
    if plan.conditions:
        for name in _own_drop_paths(block):
            if all(name != call.drop_path for call in plan.calls):
                plan.left.setdefault(name, "not every call uses it")
    return plan


def _plan(block: nn.Module, args: Sequence, kwargs: dict) -> Plan:
    """The plan for calls like this one."""
    plan = Plan(_arguments(args, kwargs))
    try:
        _rewrite(block, args, kwargs, plan)
    except CannotSkipError as error:
        plan.reason = str(error)
        plan.left = dict.fromkeys(_own_drop_paths(block), plan.reason)
    return plan


def _rewrite(block: nn.Module, args: Sequence, kwargs: dict, plan: Plan) -> None:
    """Trace a block and fill in the plan. Raises CannotSkipError."""
    if object in plan.arguments:
        raise CannotSkipError("an argument is neither a tensor nor a plain value")
    graph = _trace(block, args, kwargs, plan)
    for node in reversed(list(graph.nodes)):
        if not node.users and (_is_size(node) or node.target is operator.getitem):  # an unused B of `B, N, C = x.shape`
            graph.erase_node(node)
    for node in graph.nodes:
        changed = _changed_by(block, node)
        if changed is None:
            continue
        if node.op == "call_method":  # it returns the tensor that it changes, so later uses are uses of its result
            changed.replace_all_uses_with(node, delete_user_cb=node.__lt__)
        if not _is_new(block, changed, node):
            raise CannotSkipError("it modifies in place a tensor that is used elsewhere")
    called = {node: block.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    drop_paths = [node for node, module in called.items() if isinstance(module, DropPath)]
    for name in _own_drop_paths(block):
        if any(name.startswith(f"{node.target}.") for node in called):
            plan.left[name] = "it is inside a Sequential"
    with graph.inserting_before(next(iter(graph.nodes))):
        itself = graph.placeholder("block")
    # If a DropPath is within the branch of another, the outer one gets the gate.
    within = set()
    for node in drop_paths:
        with contextlib.suppress(CannotSkipError):
            within |= _find_branch(graph, block, node)[0] - {node}
    for node in drop_paths:
        try:
            if node in within:
                raise CannotSkipError("it is within the branch of another DropPath")
            plan.calls.append(_extract(graph, block, itself, node, len(plan.calls)))
        except CannotSkipError as reason:
            plan.left[node.target] = str(reason)
    plan.function = _compile(graph)


def _trace(block: nn.Module, args: Sequence, kwargs: dict, plan: Plan) -> fx.Graph:
    """Trace a block and fill in the plan's state and conditions. Raises CannotSkipError.

    Without tensors, conditions are assumed not to hold. If an assertion then fails, other assumptions are tried.
    """
    assumed, attempts = [], 0
    while True:
        attempts += 1
        plan.conditions.clear()
        try:
            graph, plan.state = _Tracer(args, kwargs, plan.conditions, assumed).trace_block(block)
            return graph
        except CannotSkipError as error:
            # Next, the last condition that did not hold will hold, and those after it are decided anew.
            assumed = [holds for _, holds in plan.conditions]
            while assumed and assumed[-1]:
                assumed.pop()
            undecided = assumed and not _tensors(args, kwargs)
            if not undecided or attempts == 16 or not isinstance(error.__cause__, AssertionError):
                raise
            assumed[-1] = True


def _find_branch(
    graph: fx.Graph, block: nn.Module, drop_path: fx.Node
) -> tuple[set[fx.Node], fx.Node, fx.Node, fx.Node]:
    """The nodes that are computed only for a DropPath, the last of them, the sum, and the shortcut."""
    end, total, shortcut = _find_sum(block, drop_path)
    nodes = list(graph.nodes)
    checks = set()  # assertions on sizes, and what is computed only for them
    for node in reversed(nodes):
        if node.target is torch._assert or (_is_size(node) and all(user in checks for user in node.users)):
            checks.add(node)
    branch = {end}
    for node in reversed(nodes):
        users = [user for user in node.users if user not in checks]
        if node.op != "placeholder" and users and all(user in branch for user in users):
            branch.add(node)
    for node in nodes:
        if node in checks and any(value in branch for value in node.all_input_nodes):
            branch.add(node)
    return branch, end, total, shortcut


def _extract(graph: fx.Graph, block: nn.Module, itself: fx.Node, drop_path: fx.Node, index: int) -> Call:
    """Turn the branch of a DropPath into a function, and replace the sum with call number `index` of the plan."""
    branch, end, total, shortcut = _find_branch(graph, block, drop_path)
    nodes = list(graph.nodes)
    # Sizes must be read again, from the tensors with fewer rows; attributes are the block's anyway.
    copied = {node for node in nodes if node in branch or _is_size(node) or node.op == "get_attr"}
    needed = _ancestors([end, *(node for node in branch if not node.users)], copied)
    if not any(node.op in ("call_module", "get_attr") for node in needed if node is not drop_path):
        raise CannotSkipError("its branch is used elsewhere")
    for node in nodes:  # an element of what is used elsewhere is an input
        if node in needed and _is_element(node) and node.args[0] not in needed:
            if node.args[0].op == "call_module":
                raise CannotSkipError("its branch also returns something that is used elsewhere")
            needed.remove(node)
    inputs = [node for node in nodes if node not in needed and any(user in needed for user in node.users)]
    for node in needed:
        if not _is_size(node) and node.op == "call_function" and any(map(_is_batch_size, node.args)):
            raise CannotSkipError("its branch depends on the number of samples")

    function = fx.Graph()
    copies = {node: function.placeholder(node.name) for node in inputs}
    for node in nodes:
        if node is drop_path:
            copies[node] = copies[node.args[0]]
        elif node in needed:
            copies[node] = function.node_copy(node, copies.__getitem__)
    function.output(copies[end])
    attributes = [node.target for node in nodes if node in needed and node.op in ("call_module", "get_attr")]
    linked = _ancestors([shortcut], set(nodes))
    call = Call(
        drop_path=drop_path.target,
        branch=_compile(function),
        attributes=tuple(dict.fromkeys(name for name in attributes if name != drop_path.target)),
        loose=tuple(node not in linked for node in inputs),
    )
    with graph.inserting_before(total):
        sum_ = graph.call_function(_gated_sum(index, call), (itself, shortcut, *inputs))
    total.replace_all_uses_with(sum_)
    graph.erase_node(total)
    for node in reversed(nodes):
        if node in branch and node in needed:
            graph.erase_node(node)
    return call


def _ancestors(nodes: list[fx.Node], among: set[fx.Node]) -> set[fx.Node]:
    """The nodes and what they are computed from, restricted to `among`."""
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node in among and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _find_sum(block: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The end of the branch, the sum, and the shortcut. Between DropPath and sum, a branch may only be scaled."""
    while True:
        if len(node.users) != 1:
            raise CannotSkipError("the output of its DropPath is used more than once")
        (user,) = node.users
        operands = [value for value in user.args if value is not node]
        if user.target in SUMS and len(user.args) == 2 and not user.kwargs and len(operands) == 1:
            (shortcut,) = operands
            if not isinstance(shortcut, fx.Node):
                raise CannotSkipError("the output of its DropPath is not added to a tensor")
            return node, user, shortcut
        scaled = user.target in PRODUCTS and [
            not isinstance(value, fx.Node) or value.op == "get_attr" for value in operands
        ] == [True]
        if not scaled and not (user.op == "call_module" and isinstance(block.get_submodule(user.target), SCALES)):
            raise CannotSkipError("the output of its DropPath does not go straight into a sum")
        node = user


def _is_element(node: fx.Node) -> bool:
    """Whether a node is an element of a tensor or tuple."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _is_size(node: fx.Node) -> bool:
    """Whether a node is computed only from the shape or type of tensors."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return bool(
        node.op == "call_function"
        and node.all_input_nodes
        and node.target.__module__ in ("_operator", "builtins", "math")
        and all(map(_is_size, node.all_input_nodes))
    )


def _is_batch_size(value: object) -> bool:
    """Whether a value is computed from the length of a tensor."""
    if not isinstance(value, fx.Node) or not _is_size(value):
        return False
    if value.op == "call_method":
        return value.args[1:] == (0,)
    if value.target is operator.getitem:
        return value.args[1] == 0 and value.args[0].target in (getattr, "size")
    return any(map(_is_batch_size, value.args))


def _changed_by(block: nn.Module, node: fx.Node) -> fx.Node | None:
    """The tensor that a node modifies in place, if any."""
    if node.op == "call_module":
        modules = block.get_submodule(node.target).modules()
        working = (m for m in modules if not any(m.children()) or any(True for _ in m.parameters(recurse=False)))
        first = next((module for module in working if not isinstance(module, ALIASES)), None)
        in_place = getattr(first, "inplace", False)
    elif node.op == "call_method":
        in_place = node.target.endswith("_") and not node.target.endswith("__")
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = node.target in IN_PLACE or name.endswith("_") or node.kwargs.get("inplace", False)
    else:
        return None
    return node.args[0] if in_place and isinstance(node.args[0], fx.Node) else None


def _is_new(block: nn.Module, node: fx.Node, user: fx.Node) -> bool:
    """Whether a tensor was made only for this user, so that nothing else sees it change."""
    if set(node.users) != {user}:
        return False
    if _changed_by(block, node) is not None:
        return _is_new(block, node.args[0], node)
    if node.op == "call_module":
        leaves = [module for module in block.get_submodule(node.target).modules() if not any(module.children())]
        if all(isinstance(module, ALIASES) for module in leaves):
            return _is_new(block, node.args[0], node)
        return True
    return node.target in NEW


_compiled: dict[tuple, Callable[..., Tensor]] = {}


def _compile(graph: fx.Graph) -> Callable[..., Tensor]:
    """A graph as a Python function of a block and the graph's inputs, the same for equal graphs."""
    code = graph.python_code("self")
    key = code.src, frozenset((name, id(value)) for name, value in code.globals.items())
    if key not in _compiled:  # torch.compile would compile each function separately
        namespace = dict(code.globals)
        exec(code.src, namespace)
        _compiled[key] = namespace["forward"]
    return _compiled[key]


# Running


@cache
def _gated_sum(index: int, call: Call) -> Callable[..., Tensor]:
    """The sum of call number `index`, as a function of the block, the shortcut and the branch's inputs."""

    def gated_sum(block: nn.Module, shortcut: Tensor, *inputs: object) -> Tensor:
        gate = block.drop_path_gates[index]
        has_rows = tuple(x is shortcut for x in inputs)
        if not all(has_rows):
            kinds = (x.shape if isinstance(x, Tensor) else type(x) for x in inputs)
            key = call.branch, gate.mode, shortcut.shape, *kinds
            if key not in block.drop_path_rows:
                block.drop_path_rows[key] = _find_rows(block, call.branch, shortcut, inputs, gate.mode)
            has_rows = block.drop_path_rows[key]
            if has_rows is None:
                return shortcut + gate.drop_path(call.branch(block, *inputs))

        loose = (x for x in itertools.compress(inputs, call.loose) if isinstance(x, Tensor))
        parameters = itertools.chain(_parameters(block, call.attributes), loose)
        if gate.mode == "batch" or all(has_rows):
            return gate(partial(call.branch, block), shortcut, inputs, parameters)

        def branch(*rows: Tensor) -> Tensor:
            remaining = iter(rows)
            return call.branch(block, *(next(remaining) if has else x for x, has in zip(inputs, has_rows, strict=True)))

        return gate(branch, shortcut, list(itertools.compress(inputs, has_rows)), parameters)

    gated_sum.__name__ = f"gated_sum_{index}"
    return gated_sum


def _parameters(block: nn.Module, attributes: tuple[str, ...]) -> Iterator[Tensor]:
    for name in attributes:
        value = operator.attrgetter(name)(block)
        if isinstance(value, nn.Module):
            yield from value.parameters()
        else:
            yield value


@torch.compiler.disable
def _find_rows(
    block: nn.Module, branch: Callable, shortcut: Tensor, inputs: Sequence[object], mode: str
) -> tuple[bool, ...] | None:
    """Which inputs of a branch have one row per sample, None if that is unclear.

    Its length does not tell: a mask may have as many tokens as the batch has samples. So the branch is tried, without
    computing anything, on another number of rows. In mode "batch" only the shape of the result matters.
    """
    batch_size = len(shortcut)
    other = 1 + max(itertools.chain.from_iterable(x.shape for x in (shortcut, *inputs) if isinstance(x, Tensor)))
    possible = [isinstance(x, Tensor) and x.shape[:1] == (batch_size,) for x in inputs]
    choices = [
        (True,) if x is shortcut else (True, False) if has else (False,)
        for x, has in zip(inputs, possible, strict=True)
    ]
    if mode == "batch":
        other, choices = batch_size, [(False,)] * len(inputs)
    works = []
    with torch.random.fork_rng(devices=[]), torch.no_grad(), contextlib.suppress(RuntimeError):
        on_meta = copy.deepcopy(block).to("meta")

        def fits(lengths: Sequence[int | None]) -> bool:
            """Whether the branch returns `other` rows for inputs of these lengths, None for their own."""
            tried = [
                x.new_empty(x.shape if length is None else (length, *x.shape[1:]), device="meta")
                if isinstance(x, Tensor)
                else x
                for x, length in zip(inputs, lengths, strict=True)
            ]
            try:
                return len(branch(on_meta, *tried).expand(-1, *shortcut.shape[1:])) == other
            except Exception:  # whatever operators raise for shapes that do not match
                return False

        for choice in itertools.product(*choices):
            if fits([other if has else None for has in choice]):
                works.append(choice)
        lengths = [other if has else None for has in works[0]] if works else []
        if len(works) > 1:  # an input that the branch ignores may have any length
            ignored = [
                len(options) == 2 and fits([other + 1 if i == j else length for j, length in enumerate(lengths)])
                for i, options in enumerate(choices)
            ]
            works = [
                choice for choice in works if all(has for has, ignore in zip(choice, ignored, strict=True) if ignore)
            ]
    if len(works) == 1 or (works and batch_size == 1):
        return works[0]
    warnings.warn(
        f"{type(block).__name__}: cannot tell which inputs of a branch have one row per sample, so what its DropPath"
        " drops is computed",
        stacklevel=2,
    )
    return None


def _checked(block: nn.Module, plan: Plan) -> Plan:
    """The plan, without its function if the block's gates are not for it."""
    called = [call.drop_path for call in plan.calls]
    if (called or plan.left) and called != [gate.name for gate in block.drop_path_gates]:
        plan.reason = plan.reason or "this call uses other DropPaths"
    elif not block.drop_path_allow_batch_norm and any(_batch_norms(block, plan)):
        plan.reason = 'a BatchNorm in its branch needs mode="batch" or allow_batch_norm=True'
    if plan.reason:
        plan.function = None
    return plan


class _Skipping:
    """Mixin for a block's class: the forward method with gates if one can close, the block's own otherwise."""

    def forward(self, *args, **kwargs) -> Tensor:
        if not any([gate.can_close() for gate in self.drop_path_gates]):
            return super().forward(*args, **kwargs)
        arguments, tensors = _arguments(args, kwargs), _tensors(args, kwargs)
        for plan in self.drop_path_plans:
            if plan.fits(self, arguments, tensors):
                break
        else:
            plan = self.add_plan(args, kwargs)
        if plan.function is None:
            return super().forward(*args, **kwargs)
        return plan.function(self, self, *tensors)

    @torch.compiler.disable
    def add_plan(self, args: Sequence, kwargs: dict) -> Plan:
        """Add a plan for a new kind of call; if it cannot be rewritten, one without a function, with a warning."""
        plan = _checked(self, _plan(self, args, kwargs))
        if plan.function is None:
            warnings.warn(f"{type(self).__name__} computes what its DropPath drops: {plan.reason}", stacklevel=3)
        self.drop_path_plans.append(plan)
        return plan

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The plans' functions cannot be pickled; a copy makes its own.
        _, _, state, *rest = super().__reduce_ex__(protocol)
        return _new, (_base(type(self)),), state | dict(drop_path_plans=[], drop_path_rows={}), *rest

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        plan = _checked(self, _first_plan(self))
        if plan.function is not None:
            self.drop_path_plans.append(plan)


def _new(base: type[nn.Module]) -> nn.Module:
    return object.__new__(_skipping(base))


@cache
def _skipping(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a block whose DropPaths skip."""
    names = dict(__module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    return type(base.__name__, (_Skipping, base), names)


def _base(cls: type[nn.Module]) -> type[nn.Module]:
    classes = cls.__mro__
    return classes[classes.index(_Skipping) + 1] if _Skipping in classes else cls
