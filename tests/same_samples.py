"""A converted model against the plain one, with the same samples dropped.

`compare` is what all corpora use: timm's models, those of other libraries, and the packages of `packages.py`.
"""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_sd import gates, skip_drop_path

# What everybody's drop paths are called, and what they call their drop probability
DROP_PATHS = re.compile(r"drop_?path|stochastic_?depth|drop_?sample", re.IGNORECASE)
PROBABILITIES = ("drop_prob", "p", "prob", "drop_path_prob", "drop_rate")
LISTS = (nn.ModuleList, nn.ModuleDict)

CallName = tuple[str, int]
"""The name of a drop path, and the number of its call in a pass of its block, from 0."""


class Rule(NamedTuple):
    """What a call of a drop path multiplies its rows by."""

    mask: Tensor
    scale: float


Rules = dict[CallName, list[Rule]]
"""The rules of a call in the passes of its block, of which a model may make several."""
Sizes = dict[CallName, list[int]]
"""The number of rows that a call got in the passes of its block."""


@dataclass
class Result:
    ok: bool
    gates: int  # of drop paths with a rate above 0
    drop_path_calls: int  # of the same, in a training pass of the plain model
    left: list[str] = field(default_factory=list)  # those of them without a gate
    message: str = ""  # what differs, or what the conversion warned of

    def __str__(self) -> str:
        state = "ok" if self.ok else "differs"
        left = f", left: {' '.join(self.left)}" if self.left else ""
        return f"{state}, {self.gates} gates for {self.drop_path_calls} calls{left}. {self.message}".strip()


@dataclass
class Flops:
    """What forward and backward passes compute, by PyTorch's counter."""

    plain: int
    closed: int  # with all gates closed
    shared: int  # what the plain model computes outside the branches of its drop paths

    @property
    def left(self) -> float:
        """The part of the branches that is computed although all gates are closed."""
        return (self.closed - self.shared) / (self.plain - self.shared) if self.plain > self.shared else 0.0


def compare(
    model: nn.Module, inputs: Mapping[str, Any] | tuple, mode: str, closed: bool = False, **options: Any
) -> Result:
    """Compare a model and its conversion with some of the samples dropped, or with all gates closed.

    The arguments are those of `Comparison`, which compares several states of the gates faster.
    """
    return Comparison(model, inputs, mode, **options).run("none" if closed else "some")


class Comparison:
    """A model and its conversion by `skip_drop_path`, in training.

    Both compute in float64, or in float32 if the model cannot. Dropout is off, and so are calls of drop paths without
    a gate. Gates for samples are compared with batch normalization in evaluation, since it would see other samples.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any] | tuple,
        mode: str,
        is_drop_path: Callable[[nn.Module], bool] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            model: A plain model, which is left as it is.
            inputs: Its arguments in a forward pass, by name or in order.
            mode: As for `skip_drop_path`.
            is_drop_path: Which modules are drop paths; by default those of classes that are called so.
            options: Further arguments of `skip_drop_path`. By default, the inputs are its example, and batch norms are
                allowed in the branches of gates for samples.
        """
        self.is_drop_path = is_drop_path or named_so
        self.plain, self.inputs, self.tolerance = _prepared(model, inputs, mode, self.is_drop_path)
        self.sizes = _sizes(copy.deepcopy(self.plain), self.inputs, self.is_drop_path)
        options = dict(example=self.inputs, allow_batch_norm=mode in ("row", "count")) | options
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            self.converted = skip_drop_path(copy.deepcopy(self.plain), mode, **options)
        self.warnings = [str(warning.message) for warning in warned if issubclass(warning.category, UserWarning)]

    def run(self, kept: str = "some") -> Result:
        """Compare outputs, gradients and buffers.

        Args:
            kept: "some" samples, or gates in mode "batch", "none" or "all" of them; or "one" sample.
        """
        plain, converted = copy.deepcopy(self.plain), copy.deepcopy(self.converted)
        draws = Draws(converted, plain, self.sizes, kept)
        problems = draws.problems
        try:
            with _without_gates(self.plain, self.is_drop_path):
                ours = _results(converted, self.inputs)
        except Exception as error:  # whatever a forward method raises for the shapes that it got
            problems.append(f"{type(error).__name__}: {error}")
        else:
            problems += draws.missing()
            _force(plain, draws.rules, self.is_drop_path)
            problems += _differences(ours, _results(plain, self.inputs), self.tolerance)
            if not draws.closed_batch_gate():  # a batch norm that is not run does not change its statistics
                problems += _different_buffers(converted, plain, self.tolerance)
        gated = {draws.call_of(gate) for gate in draws.gates}
        left = [f"{name}[{number}]" for name, number in self.sizes if (name, number) not in gated]
        message = "; ".join(problems[:3] or self.warnings)
        return Result(not problems, len(draws.gates), len(self.sizes), left, message)

    def flops(self) -> Flops:
        """What the converted model computes if all of its gates are closed.

        `shared` is exact if the backward pass of each operation is twice its forward pass, as in linear layers with
        trainable parameters whose inputs get gradients, and close to it in others.
        """
        plain, cut, converted = map(copy.deepcopy, (self.plain, self.plain, self.converted))
        _force(plain, {}, self.is_drop_path)
        for module in filter(self.is_drop_path, cut.modules()):
            if probability(module):
                module.forward = lambda x, *_, **__: torch.zeros_like(x)  # no gradient goes into the branch
        forward, backward = _flops(plain, self.inputs)
        _, kept = _flops(cut, self.inputs)
        Draws(converted, plain, self.sizes, "none")
        with _without_gates(self.plain, self.is_drop_path):
            closed = sum(_flops(converted, self.inputs))
        return Flops(forward + backward, closed, round(kept + forward * kept / backward))


def named_so(module: nn.Module) -> bool:
    return DROP_PATHS.search(type(module).__name__) is not None


def probability(drop_path: nn.Module) -> float:
    """The probability of a drop path to drop a sample."""
    values = (getattr(drop_path, name, None) for name in PROBABILITIES)
    return float(next((value for value in values if value is not None), 0))


def tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested lists and dicts, each with its place."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield "", value
        return
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        items = getattr(value, "__dict__", {}).items()
    for key, item in items:
        for place, tensor in tensors(item):
            yield f".{key}{place}", tensor


def _prepared(model: nn.Module, inputs: Any, mode: str, drop_paths: Callable) -> tuple[nn.Module, Any, float]:
    """A copy of a model for the comparison, its inputs and the relative tolerance."""
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # layer scales and last normalizations often begin at zero, which would hide a branch
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and not drop_paths(module):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and mode in ("row", "count"):
            module.eval()
    double = copy.deepcopy(model).double()
    try:
        with _Types() as types:
            _run(copy.deepcopy(double), _cast(inputs, torch.float64), drop_paths)
    except RuntimeError:  # tensors that are made in float32 meet float64
        return model, inputs, 1e-3
    return double, _cast(inputs, torch.float64), 1e-4 if torch.float32 in types.seen else 1e-6


class _Types(TorchDispatchMode):
    """Notes the types of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.seen |= {tensor.dtype for _, tensor in tensors(output) if tensor.numel() > 1}
        return output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return type(value)(_cast(item, dtype) for item in value) if isinstance(value, (list, tuple)) else value


def _leaves(value: Any, leaves: list[Tensor]) -> Any:
    """The value with its floating-point tensors as copies whose gradients `leaves` will have."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a model may change its input in place
    if isinstance(value, Mapping):
        return {key: _leaves(item, leaves) for key, item in value.items()}
    return type(value)(_leaves(item, leaves) for item in value) if isinstance(value, (list, tuple)) else value


def _call(model: nn.Module, inputs: Mapping[str, Any] | tuple) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _run(model: nn.Module, inputs: Any, drop_paths: Callable) -> None:
    """A pass that drops nothing."""
    _force(model, {}, drop_paths)
    with torch.no_grad():
        _call(model, inputs)


def _sizes(model: nn.Module, inputs: Any, drop_paths: Callable) -> Sizes:
    """The calls of drop paths with a rate above 0 in a pass of the model."""
    sizes: Sizes = {}
    _force(model, {}, drop_paths, sizes)
    with torch.no_grad():
        _call(model, inputs)
    return sizes


def _force(model: nn.Module, rules: Rules, drop_paths: Callable, sizes: Sizes | None = None) -> None:
    """Make drop paths multiply by what the rules say, and drop nothing in other calls."""
    counts: Counter[str] = Counter()
    passes: Counter[CallName] = Counter()

    def forced(name: str) -> Callable:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            call = name, counts[name]
            counts[name] += 1
            passes[call] += 1
            if sizes is not None:
                sizes.setdefault(call, []).append(len(x))
            if len(rules.get(call, ())) < passes[call]:
                return x
            mask, scale = rules[call][passes[call] - 1]
            mask = mask.view(-1, *[1] * (x.ndim - 1)) if mask.ndim else mask
            return x * (mask.to(x.dtype) * scale)

        return forward

    named = {name: module for name, module in model.named_modules() if drop_paths(module) and probability(module)}
    for name, module in named.items():
        module.forward = forced(name)
    for module in model.modules():
        if not isinstance(module, LISTS):  # a pass of these cannot be counted
            own = [name for name, drop_path in named.items() if any(drop_path is child for child in _children(module))]
            if own:
                module.register_forward_pre_hook(
                    lambda *_, own=own: counts.subtract({name: counts[name] for name in own})
                )


def _children(block: nn.Module) -> Iterator[nn.Module]:
    """A block's children, and those in its lists."""
    for child in block.children():
        yield child
        if isinstance(child, LISTS):
            yield from _children(child)


@contextmanager
def _without_gates(model: nn.Module, drop_paths: Callable) -> Iterator[None]:
    """Calls of drop paths that have no gate drop nothing, and then do what is in their classes."""
    classes = {type(module) for module in model.modules() if drop_paths(module)}
    own = {cls: vars(cls).get("forward") for cls in classes}
    for cls in classes:
        cls.forward = lambda self, x, *_, **__: x
    try:
        yield
    finally:
        for cls, forward in own.items():
            if forward is None:
                del cls.forward
            else:
                cls.forward = forward


class Draws:
    """Decides what the gates of a converted model draw, and notes what the plain model's drop paths must do.

    The gates decide when they are asked, since a gate in the branch of another one gets only the rows that this keeps.
    """

    def __init__(self, converted: nn.Module, plain: nn.Module, sizes: Sizes, kept: str) -> None:
        self.plain, self.sizes, self.kept = plain, sizes, kept
        self.gates = [gate for gate in gates(converted) if gate.survival < 1]
        self.generator = torch.Generator().manual_seed(3)
        self.names = {module: name for name, module in converted.named_modules()}
        self.rules: Rules = {}
        self.problems: list[str] = []
        self.open: list[tuple[nn.Module, int, Tensor]] = []  # a gate, its number of rows, and those that it keeps
        for gate in self.gates:
            name = "draw_count" if gate.mode == "count" else "draw"
            setattr(gate, name, partial(self.draw, gate, getattr(gate, name)))
        for drop_path in {gate.drop_path for gate in self.gates}:
            drop_path.register_forward_hook(self.after)

    def call_of(self, gate: nn.Module) -> CallName:
        return self.names[gate.drop_path], gate.call

    def draw(self, gate: nn.Module, original: Callable, size: int) -> Tensor:
        """Provide a gate for `size` rows, note the rule for the plain model, and draw as the gate does."""
        call, drop_path = self.call_of(gate), self.plain.get_submodule(self.names[gate.drop_path])
        rules, survival = self.rules.setdefault(call, []), 1 - probability(drop_path)
        if len(rules) == len(self.sizes.get(call, ())):
            raise RuntimeError(f"{call} is not called as often as its gate is drawn")
        if abs(gate.survival - survival) > 1e-6:
            self.problems.append(f"{call} survives with p = {gate.survival}, but the plain one with {survival}")
        rows = self.sizes[call][len(rules)]
        gate.provided, scale = self.choose(gate, size, survival)
        mask = gate.provided
        if gate.mode != "batch":
            mask = torch.zeros(rows, dtype=torch.bool)
            inner = self.rows_of(size, rows)
            mask[inner] = gate.provided[: len(inner)]
            self.open.append((gate, rows, mask.nonzero().squeeze(1)))
        rules.append(Rule(mask, scale if getattr(drop_path, "scale_by_keep", True) else 1.0))
        return original(size)

    def choose(self, gate: nn.Module, size: int, survival: float) -> tuple[Tensor, float]:
        """A gate for this many rows, and the factor that kept ones are scaled by."""
        scale = 1 / survival if survival else 1.0
        if gate.mode == "batch":
            alternating = len(self.rules) % 3 != 2
            return torch.tensor(dict(all=True, none=False).get(self.kept, alternating)), scale
        some = int(torch.randint(2, max(3, size), (), generator=self.generator))
        k = dict(all=size, some=some, one=1, none=0)[self.kept]
        if gate.mode == "count":
            k = min(size, max(1, int(size * survival + 0.5 + 1e-6)))
            scale = size / k if k else 1.0
        return torch.randperm(size, generator=self.generator) < k, scale

    def rows_of(self, size: int, rows: int) -> Tensor:
        """Which of the plain model's rows these are."""
        if size == rows or not self.open:
            return torch.arange(size)
        _, outer, kept = self.open[-1]
        group = rows // outer
        return (kept.unsqueeze(1) * group + torch.arange(group)).flatten()  # and behind them, rows without weight

    def after(self, drop_path: nn.Module, *_: Any) -> None:
        """Forward hook on the drop paths: the innermost branch that ends there is over."""
        for i in reversed(range(len(self.open))):
            if self.open[i][0].drop_path is drop_path:
                del self.open[i]
                break

    def missing(self) -> list[str]:
        """Gates that were not drawn, or not in every pass of their block."""
        if self.closed_batch_gate():  # inner gates are not reached
            return []
        counts = [
            (call, len(self.rules.get(call, ())), len(self.sizes.get(call, ())))
            for call in map(self.call_of, self.gates)
        ]
        return [
            f"the gate of {call} was drawn {drawn} times in {made} calls"
            for call, drawn, made in counts
            if drawn != made
        ]

    def closed_batch_gate(self) -> bool:
        return any(rule.mask.ndim == 0 and not rule.mask for rules in self.rules.values() for rule in rules)


def _results(model: nn.Module, inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs, and gradients of inputs and parameters for a loss that weights every output differently."""
    leaves: list[Tensor] = []
    torch.manual_seed(5)
    outputs = dict(tensors(_call(model, _leaves(inputs, leaves))))
    generator = torch.Generator().manual_seed(7)
    losses = [
        (output * torch.randn(output.shape, generator=generator)).sum()
        for output in outputs.values()
        if output.requires_grad
    ]
    sum(losses).backward()
    gradients = {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    gradients |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {place: output.detach() for place, output in outputs.items()}, gradients


def _differences(found: tuple[dict, dict], expected: tuple[dict, dict], tolerance: float) -> list[str]:
    problems = []
    for kind, ours, theirs in zip(("output", "gradient of"), found, expected, strict=True):
        if ours.keys() != theirs.keys():
            problems.append(f"{kind} {sorted(ours.keys() ^ theirs.keys())} on one side only")
        largest = max([_size(value) for value in theirs.values() if value is not None], default=0.0)
        for name, value in theirs.items():
            if value is None:
                if ours.get(name) is not None and ours[name].any():
                    problems.append(f"{kind} {name} is not zero, but the plain model has none")
            elif ours.get(name) is None:
                problems.append(f"{kind} {name} is missing")
            elif problem := _difference(ours[name], value, tolerance, largest):
                problems.append(f"{kind} {name} {problem}")
    return problems


def _difference(found: Tensor, expected: Tensor, tolerance: float, largest: float) -> str:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return f"has shape {tuple(found.shape)} and {found.dtype}, not {tuple(expected.shape)} and {expected.dtype}"
    finite = expected.isfinite()  # some models mask with -inf
    if not torch.equal(found[~finite], expected[~finite]):
        return "differs where it is not finite, or is not a number"
    # Some gradients, such as that of a bias of keys, are zero but for rounding.
    bound = tolerance * max(_size(expected), 1e-3 * largest)
    difference = (found - expected)[finite].abs().max().item() if finite.any() else 0.0
    return "" if difference <= bound else f"differs by {difference:.2g}, where {bound:.2g} is allowed"


def _size(value: Tensor) -> float:
    """The largest absolute value that is finite."""
    finite = value[value.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _different_buffers(converted: nn.Module, plain: nn.Module, tolerance: float) -> list[str]:
    ours = dict(converted.named_buffers())
    return [
        f"buffer {name} differs"
        for name, value in plain.named_buffers()
        if value.is_floating_point() and (name not in ours or _difference(ours[name], value, tolerance, _size(value)))
    ]


def _flops(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """Of a forward and a backward pass."""
    with FlopCounterMode(display=False) as forward:
        outputs = [output for _, output in tensors(_call(model, _leaves(inputs, []))) if output.requires_grad]
    with FlopCounterMode(display=False) as backward:
        if outputs:  # if nothing of the output is left by the drop paths, none
            sum(output.sum() for output in outputs).backward()
    return forward.get_total_flops(), backward.get_total_flops()
