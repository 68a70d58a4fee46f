"""Any timm model: what its DropPath drops is not computed.

timm's blocks compute `shortcut + drop_path(branch)`: the whole branch, of which `drop_path` then zeroes some samples.
`skip_drop_path` rewrites each such call around a gate, so that the branch is a function computed for the kept samples.
torch.fx traces the forward method of each block, its child modules as leaves, to find the calls; what is between the
shortcut and the sum becomes the branch, and all else stays where it is.
"""

import copy
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from timm.layers import DropPath, LayerScale, LayerScale2d
from timm.models import get_notrace_functions
from timm.models.metaformer import Scale
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .gate import MODES, Gate, check_choice

SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
IN_PLACE = {operator.iadd, operator.imul}
SCALES = (LayerScale, LayerScale2d, Scale, nn.Identity)
METHOD = "drop_path_call_"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class CannotSkipError(Exception):
    """Why a block is left as it is, in a few words."""


class DropPathGate(Gate):
    """The gate of one call of a DropPath: its probability and scaling are the DropPath's, whatever they are by then."""

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
        return 1 - self.drop_path.drop_prob

    @survival.setter
    def survival(self, probability: float) -> None:
        if "block" in vars(self):
            self.drop_path.drop_prob = 1 - probability

    @property
    def scale_by_keep(self) -> bool:
        return self.drop_path.scale_by_keep

    @property
    def active(self) -> bool:
        return super().active and self.drop_path.training


def skip_drop_path(
    model: nn.Module, mode: str = "row", strict: bool = False, allow_batch_norm: bool = False
) -> nn.Module:
    """Change a model in place so that, in training, it does not compute what its DropPaths drop.

    Inference, parameters, state dict, probabilities and scaling stay as they are. Samples are dropped with the
    probability that each DropPath has at that moment. Calls that cannot be rewritten are left as they are, with a
    warning that names them and says why.

    Args:
        model: Any model whose blocks use `timm.layers.DropPath`; made with `drop_path_rate=`, as a rule.
        mode: "row", a gate for each sample and call, which is DropPath's own distribution; "count", a fixed number of
            samples for each call; or "batch", one gate for the mini-batch, as in the paper (see `timm_sd.gate`).
        strict: Raise an error where there would be a warning.
        allow_batch_norm: Accept that in modes "row" and "count" a BatchNorm within a branch takes its statistics from
            the kept samples alone.

    Returns:
        The same model.

    Raises:
        ValueError: An unknown mode, a BatchNorm in a branch in mode "row" or "count", or with `strict` a DropPath that
            cannot be skipped. The model is then unchanged.
    """
    check_choice("mode", mode, MODES)
    plans, reasons = {}, {}
    for name, block in model.named_modules():
        if isinstance(block, CONTAINERS) or not any(_own_drop_paths(block)):
            continue
        try:
            plan = _first_plan(block)
            if not allow_batch_norm and mode != "batch":
                _refuse_batch_norm(name, block, plan)
            if plan.calls:
                plans[block] = plan
            left = plan.left
        except CannotSkipError as reason:
            left = dict.fromkeys(_own_drop_paths(block), str(reason))
        for reason in dict.fromkeys(left.values()):
            calls = ", ".join(drop_path for drop_path in left if left[drop_path] == reason)
            reasons.setdefault(f"{calls} of {_base(type(block)).__name__}, for {reason}", []).append(name)
    if reasons:
        message = "; ".join(f"{reason} ({', '.join(blocks)})" for reason, blocks in reasons.items())
        message = f"what these drop is still computed: {message}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    for block, plan in plans.items():
        block.__class__ = _skipping(_base(type(block)))
        block.drop_path_gates = nn.ModuleList(DropPathGate(block, call.drop_path, mode) for call in plan.calls)
        block.drop_path_gates.train(block.training)
    return model


def _own_drop_paths(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """The names of the DropPaths of a block itself, not of a block within it."""
    for name, child in module.named_children():
        if isinstance(child, DropPath):
            yield prefix + name
        elif isinstance(child, CONTAINERS):
            yield from _own_drop_paths(child, f"{prefix}{name}.")


def _refuse_batch_norm(name: str, block: nn.Module, plan: "Plan") -> None:
    for target in itertools.chain.from_iterable(call.attributes for call in plan.calls):
        value = operator.attrgetter(target)(block)
        for module in value.modules() if isinstance(value, nn.Module) else ():
            if isinstance(module, _BatchNorm) or getattr(module, "running_var", None) is not None:
                raise ValueError(
                    f"{name} has a {type(module).__name__} in its branch, which would take its statistics from the kept"
                    ' samples alone: use mode="batch", or accept it with allow_batch_norm=True'
                )


# Tracing


class _Proxy(fx.Proxy):
    """Stands for a tensor, and passes for one where a forward method asks."""

    __class__ = Tensor
    _is_param = False


class _Tracer(fx.Tracer):
    """Traces a block's own forward method as it would run with these arguments.

    Only tensors are symbols; None, numbers and the like are themselves, so that `if mask is not None` goes the way of
    the real call. `attributes_read` collects the names of the block's attributes that the method depends on.
    """

    def __init__(self, args: Sequence, kwargs: dict) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.call = args, kwargs
        self.attributes_read: set[str] = set()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, value: object) -> object:
        if issubclass(type(value), fx.Proxy):
            return value.node
        if isinstance(value, Tensor) and not any(
            value is own for own in itertools.chain(self.root.parameters(), self.root.buffers())
        ):
            raise TypeError("it uses a tensor that is neither an argument nor a parameter or buffer")
        return super().create_arg(value)

    def create_args_for_root(self, forward: Callable, is_module: bool, concrete_args: object = None) -> tuple:
        count = itertools.count()

        def symbol(value: object) -> object:
            return (
                self.create_proxy("placeholder", f"x{next(count)}", (), {})
                if isinstance(value, Tensor) or value is Tensor
                else value
            )

        args, kwargs = self.call
        args = [self.root, *map(symbol, args)]
        return partial(forward, **{name: symbol(value) for name, value in kwargs.items()}), args

    def trace_block(self, block: nn.Module) -> fx.Graph:
        base, own, read = _base(type(block)), type(block), self.attributes_read

        def __getattribute__(self: nn.Module, name: str) -> object:  # noqa: N807
            read.add(name)
            return base.__getattribute__(self, name)

        block.__class__ = type(base.__name__, (base,), {"__getattribute__": __getattribute__})
        try:
            return self.trace(block)
        except Exception as error:
            raise CannotSkipError(f"its forward method cannot be traced ({str(error).splitlines()[0]})") from error
        finally:
            block.__class__ = own


# Rewriting


@dataclass
class Call:
    """One call of a DropPath, as a method `name` of the block.

    `branch` is a function of the block and its inputs, and `attributes` are those of the block that it uses. An input
    is `loose` if it would get no gradient without the branch, since the shortcut is not computed from it.
    """

    name: str
    drop_path: str
    branch: Callable[..., Tensor]
    attributes: tuple[str, ...]
    loose: tuple[bool, ...]


@dataclass
class Plan:
    """A block's forward method for one kind of call, rewritten around gates.

    `function` takes the block and the call's tensors. `arguments` and `state` are what the call and the block's
    attributes were like when it was traced, and must be like for it to be used.
    """

    arguments: tuple
    state: dict[str, object]
    calls: list[Call] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    function: Callable[..., Tensor] | None = None

    @property
    def drop_paths(self) -> list[str]:
        return [call.drop_path for call in self.calls]

    def fits(self, block: nn.Module, arguments: tuple) -> bool:
        return self.arguments == arguments and all(
            _state(getattr(block, name, None)) == value for name, value in self.state.items()
        )


def _state(value: object) -> object:
    """What a forward method can depend on of an attribute: a module's kind, what a list of them holds, plain values."""
    if isinstance(value, CONTAINERS):
        return tuple((name, _state(child)) for name, child in value.named_children())
    for kind in (nn.Identity, DropPath, nn.Module, Tensor):
        if isinstance(value, kind):
            return kind
    return tuple(value) if isinstance(value, list) else value


def _kind(value: object) -> object:
    """What a forward method can depend on of an argument: Tensor for any tensor, a plain value itself."""
    if isinstance(value, Tensor) or value is Tensor:
        return Tensor
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value)) if all(_kind(item) is not Tensor for item in value) else object
    return value if value is None or isinstance(value, (bool, int, float, str)) else object


def _arguments(args: Sequence, kwargs: dict) -> tuple:
    """The kind of a call."""
    return len(args), *kwargs, *map(_kind, args), *map(_kind, kwargs.values())


def _first_plan(block: nn.Module) -> Plan:
    """The plan for a call with the required arguments alone, which all are taken to be tensors."""
    parameters = list(inspect.signature(_base(type(block)).forward).parameters.values())[1:]
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return _plan(block, [Tensor] * len(required), {})


def _plan(block: nn.Module, args: Sequence, kwargs: dict) -> Plan:
    """Trace and rewrite. Raises CannotSkipError."""
    arguments = _arguments(args, kwargs)
    if object in arguments:
        raise CannotSkipError("an argument is neither a tensor nor a plain value")
    cls = _skipping(_base(type(block)))
    for plan in cls.plans:
        if plan.fits(block, arguments):
            return plan
    tracer = _Tracer(args, kwargs)
    graph = tracer.trace_block(block)
    for node in reversed(list(graph.nodes)):
        if not node.users and (_is_size(node) or node.target is operator.getitem):  # an unused B in `B, N, C = x.shape`
            graph.erase_node(node)
    names = [name for name in tracer.attributes_read if name in _attribute_names(block)]
    plan = Plan(arguments, {name: _state(getattr(block, name)) for name in names})
    number = len(cls.plans)
    called = {node: block.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    drop_paths = [node for node, module in called.items() if isinstance(module, DropPath)]
    for name in _own_drop_paths(block):
        if any(name.startswith(f"{node.target}.") for node in called):
            plan.left[name] = "it is inside a Sequential"
    # The last first: of a DropPath within the branch of another, the outer one is the one to skip.
    for index, node in reversed(list(enumerate(drop_paths))):
        try:
            if node._erased:
                raise CannotSkipError("it is within the branch of another DropPath")
            plan.calls.insert(0, _extract(graph, block, node, f"{METHOD}{number}_{index}"))
        except CannotSkipError as reason:
            plan.left[node.target] = str(reason)
    for index, call in enumerate(plan.calls):
        setattr(cls, call.name, _method(index, call))
    plan.function = _compile(graph)
    cls.plans.append(plan)
    return plan


def _attribute_names(block: nn.Module) -> set[str]:
    """Of what is set on a block: modules, tensors and plain values."""
    return {name for name in vars(block) if not name.startswith("_")} | set(
        itertools.chain(block._modules, block._parameters, block._buffers)
    )


def _extract(graph: fx.Graph, block: nn.Module, drop_path: fx.Node, name: str) -> Call:
    """Replace the sum that follows a DropPath by a call of the block's method `name`."""
    end, total, shortcut = _find_sum(block, drop_path)
    nodes = list(graph.nodes)
    checks = set()  # assertions on sizes, and what is computed for them alone
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

    # Sizes must be read anew, of the tensors with fewer rows, and attributes are the block's in any case.
    copied = {node for node in nodes if node in branch or _is_size(node) or node.op == "get_attr"}
    inputs, needed = [], set()
    stack = [end, *(checks & branch)]
    while stack:
        node = stack.pop()
        if node in copied:
            if node not in needed:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        elif node not in inputs:
            inputs.append(node)
    inputs.sort(key=nodes.index)
    for node in needed:
        if _is_in_place(block, node) and node.args[0] not in needed:
            raise CannotSkipError("its branch changes its input in place")
        if node.target is operator.getitem and isinstance(node.args[1], int) and node.args[0] not in needed:
            raise CannotSkipError("what its branch returns beside it is used elsewhere")

    function, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = function.placeholder(node.name)
    attributes = {}
    for node in nodes:
        if node not in needed:
            continue
        if node is drop_path:
            copies[node] = copies[node.args[0]]
            continue
        copies[node] = function.node_copy(node, copies.__getitem__)
        if node.op in ("call_module", "get_attr"):
            attributes[node.target] = None
    function.output(copies[end])

    linked, stack = set(), [shortcut]
    while stack:
        node = stack.pop()
        if node not in linked:
            linked.add(node)
            stack.extend(node.all_input_nodes)
    loose = tuple(node not in linked for node in inputs)

    with graph.inserting_before(total):
        call = graph.create_node("call_module", name, (shortcut, *inputs))
    total.replace_all_uses_with(call)
    graph.erase_node(total)
    for node in reversed(nodes):
        if node in branch:
            graph.erase_node(node)
    return Call(name, drop_path.target, _compile(function), tuple(attributes), loose)


def _find_sum(block: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The end of the branch, the sum, and the shortcut: between DropPath and sum, a branch may only be scaled."""
    while True:
        if len(node.users) != 1:
            raise CannotSkipError("the output of its DropPath is used more than once")
        (user,) = node.users
        operands = [value for value in user.args if value is not node]
        if user.target in SUMS and len(user.args) == 2 and not user.kwargs and len(operands) == 1:
            (shortcut,) = operands
            if not isinstance(shortcut, fx.Node):
                raise CannotSkipError("the output of its DropPath is not added to a tensor")
            if _is_in_place(block, user) and user.args[0] is shortcut and any(other > user for other in shortcut.users):
                raise CannotSkipError("its shortcut is used again after being changed in place")
            return node, user, shortcut
        scaled = user.target in PRODUCTS and all(
            not isinstance(value, fx.Node) or value.op == "get_attr" for value in operands
        )
        if not scaled and not (user.op == "call_module" and isinstance(block.get_submodule(user.target), SCALES)):
            raise CannotSkipError("the output of its DropPath does not go straight into a sum")
        node = user


def _is_size(node: fx.Node) -> bool:
    """Whether a node is computed from the shape or type of tensors alone."""
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


def _is_in_place(block: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        if node.target.startswith(METHOD):
            return False
        first = next(m for m in block.get_submodule(node.target).modules() if not any(m.children()))
        return getattr(first, "inplace", False)
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.op == "call_function" and node.target in IN_PLACE


def _compile(graph: fx.Graph) -> Callable[..., Tensor]:
    """A graph as a Python function of a block and the graph's inputs."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return namespace["forward"]


# Running


def _method(index: int, call: Call) -> Callable[..., Tensor]:
    """The method of a block that computes the sum of call number `index`."""
    known: dict[tuple, tuple[bool, ...] | None] = {}

    def method(self: nn.Module, shortcut: Tensor, *inputs: Tensor) -> Tensor:
        gate = self.drop_path_gates[index]
        has_rows = tuple(x is shortcut for x in inputs)
        if gate.mode != "batch" and not all(has_rows):
            shapes = (shortcut.shape, *(x.shape for x in inputs))
            if shapes not in known:
                known[shapes] = _find_rows(self, call.branch, shortcut, inputs)
            has_rows = known[shapes]
            if has_rows is None:
                return shortcut + gate.drop_path(call.branch(self, *inputs))

        parameters = itertools.chain(_parameters(self, call.attributes), itertools.compress(inputs, call.loose))
        if gate.mode == "batch" or all(has_rows):
            return gate(partial(call.branch, self), shortcut, inputs, parameters)

        def branch(*rows: Tensor) -> Tensor:
            remaining = iter(rows)
            return call.branch(self, *(next(remaining) if has else x for x, has in zip(inputs, has_rows, strict=True)))

        return gate(branch, shortcut, list(itertools.compress(inputs, has_rows)), parameters)

    return method


def _parameters(block: nn.Module, attributes: tuple[str, ...]) -> Iterator[Tensor]:
    for name in attributes:
        value = operator.attrgetter(name)(block)
        if isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, nn.Parameter):
            yield value


@torch.compiler.disable
def _find_rows(
    block: nn.Module, branch: Callable, shortcut: Tensor, inputs: Sequence[Tensor]
) -> tuple[bool, ...] | None:
    """Which inputs of a branch have a row for each sample, None if that cannot be told.

    The length of an input does not tell: a mask may have as many tokens as the batch has samples. So the branch is
    tried, without computing anything, on another number of rows.
    """
    batch_size = len(shortcut)
    other = 1 + max(itertools.chain.from_iterable(x.shape for x in (shortcut, *inputs)))
    choices = [
        (True,) if x is shortcut else (True, False) if x.ndim and len(x) == batch_size else (False,) for x in inputs
    ]
    block = copy.deepcopy(block).to("meta")
    works = []
    for choice in itertools.product(*choices):
        tried = [
            torch.empty((other, *x.shape[1:]) if has else x.shape, dtype=x.dtype, device="meta")
            for x, has in zip(inputs, choice, strict=True)
        ]
        try:
            shape = branch(block, *tried).shape
        except Exception:  # whatever the operators raise for shapes that do not fit
            continue
        if shape == (other, *shortcut.shape[1:]):
            works.append(choice)
    if len(works) == 1 or (works and batch_size == 1):
        return works[0]
    warnings.warn(
        f"{type(block).__name__}: its DropPath computes what it drops, since it cannot be told which inputs of its"
        " branch have a row for each sample",
        stacklevel=2,
    )
    return None


class _Skipping:
    """Put before a block's class: its forward method with gates where one is active, its own otherwise."""

    def forward(self, *args, **kwargs) -> Tensor:
        if any(gate.active for gate in self.drop_path_gates):
            arguments = _arguments(args, kwargs)
            names = [gate.name for gate in self.drop_path_gates]
            for plan in self.plans:
                if plan.fits(self, arguments) and (plan.function is None or plan.drop_paths == names):
                    break
            else:
                plan = self.add_plan(args, kwargs, arguments, names)
            if plan.function is not None:
                return plan.function(self, *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        return super().forward(*args, **kwargs)

    @torch.compiler.disable
    def add_plan(self, args: Sequence, kwargs: dict, arguments: tuple, names: list[str]) -> Plan:
        """A plan for a kind of call not foreseen; if there can be none, one without a function, with a warning."""
        try:
            plan = _plan(self, args, kwargs)
            if plan.drop_paths == names:
                return plan
            reason = "this call uses other DropPaths"
        except CannotSkipError as error:
            reason = error
        warnings.warn(f"{type(self).__name__} computes what its DropPath drops: {reason}", stacklevel=3)
        plan = Plan(arguments, {})
        self.plans.insert(0, plan)
        return plan

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (_base(type(self)),), *state


def _new(base: type[nn.Module]) -> nn.Module:
    return object.__new__(_skipping(base))


@cache
def _skipping(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a block whose DropPaths skip."""
    names = dict(__module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    return type(base.__name__, (_Skipping, base), names | dict(plans=[]))


def _base(cls: type[nn.Module]) -> type[nn.Module]:
    return cls.__bases__[1] if issubclass(cls, _Skipping) else cls
