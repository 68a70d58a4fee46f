"""Gates decide which residual branches a training step computes, in the paper's networks and in any timm model.

A residual block adds a branch f to a shortcut s. In training, a gate decides for which samples of the mini-batch f is
computed at all:

    open      s + f        (f scaled by 1 / p if the network asks for it)
    closed    s            f is not computed, forward or backward

    mode     gates                                          drawn
    "batch"  one for the whole mini-batch, as in the paper  Bernoulli, open with survival probability p
    "row"    one for each sample                            the same, independently
    "count"  one for each sample                            k = max(1, int(B p)) of B open, without replacement
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

MODES = ("batch", "row", "count")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a ValueError naming the argument, its value and the choices, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}, but it must be one of {', '.join(map(repr, allowed))}")


def check_survival(name: str, probability: float) -> None:
    """Raise a ValueError naming the argument and its value unless it lies in (0, 1]."""
    if not 0 < probability <= 1:
        raise ValueError(f"{name}={probability!r}, but it must lie in (0, 1]")


def kept(batch_size: int, survival: float) -> int:
    """k = max(1, int(B p)), the number of samples that mode "count" keeps."""
    k = max(1, int(batch_size * survival + 1e-6))  # 10 * (1 - 0.8) is 1.9999999999999996
    return len(range(k))  # k itself, but to torch.compile a constant, as the autograd functions below need


class _ZeroGradients(torch.autograd.Function):
    """Identity on the shortcut that gives the parameters of the dropped branch zero gradients.

    Zero, not None: the authors' optimizer still updates a dropped block by momentum and weight decay. PyTorch's
    optimizers skip parameters without a gradient, and DistributedDataParallel would keep waiting for them.
    """

    @staticmethod
    def forward(shortcut: Tensor, *parameters: Tensor) -> Tensor:
        return shortcut.view_as(shortcut)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return gradient, *(torch.zeros_like(parameter) if need else None for parameter, need in needed)


class _TakeRows(torch.autograd.Function):
    """x[rows] for distinct rows. PyTorch's own backward pass must allow for repeated rows and is much slower.

    (`index_select` would not keep channels_last.)
    """

    @staticmethod
    def forward(x: Tensor, rows: Tensor) -> Tensor:
        return x[rows]

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, rows = inputs
        ctx.like = torch.empty_like(x, device="meta")  # x itself would be kept until the backward pass
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        whole = torch.zeros_like(ctx.like, dtype=gradient.dtype, device=gradient.device)
        whole[rows] = gradient
        return whole, None


class _AddToRows(torch.autograd.Function):
    """shortcut.index_add(0, rows, f, alpha=scale), which by itself would not keep channels_last."""

    @staticmethod
    def forward(shortcut: Tensor, f: Tensor, rows: Tensor, scale: float) -> Tensor:
        total = shortcut.to(torch.promote_types(shortcut.dtype, f.dtype), copy=True)
        return total.index_add_(0, rows, f.to(total.dtype), alpha=scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        shortcut, f, rows, ctx.scale = inputs
        ctx.types = shortcut.dtype, f.dtype
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        shortcut_type, f_type = ctx.types
        return gradient.to(shortcut_type), (gradient[rows] * ctx.scale).to(f_type), None, None


class Gate(nn.Module):
    """The gate of one residual branch.

    In training it is drawn in each forward pass from PyTorch's global CPU generator, so that reading it never waits for
    a GPU, unless `use_gates` provides it. A gate with p = 1 draws nothing.
    """

    scale_by_keep = False  # the paper scales by p in inference, not by 1 / p in training
    copies_shortcut = False  # whether a closed gate must return a new tensor, since it may be modified in place later

    def __init__(self, survival: float = 1.0, mode: str = "batch") -> None:
        """
        Args:
            survival: The survival probability p, which may be changed at any time.
            mode: "batch", "row" or "count".

        Raises:
            ValueError: A probability outside (0, 1] or an unknown mode.
        """
        super().__init__()
        check_survival("survival", survival)
        check_choice("mode", mode, MODES)
        self.survival = survival
        self.mode = mode
        self.provided: Tensor | None = None

    def can_close(self) -> bool:
        """Whether the gate can be closed in the next forward pass."""
        return self.training and (self.survival < 1 or self.provided is not None)

    @torch.jit.unused
    def forward(
        self,
        branch: Callable[..., Tensor],
        shortcut: Tensor,
        inputs: Sequence[Tensor],
        parameters: Iterable[Tensor],
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The shortcut plus the branch, computed only for the samples whose gate is open.

        Args:
            branch: f, which treats each sample independently (except for batch normalization).
            shortcut: s, of shape (B, ...).
            inputs: The arguments of f, each of shape (B, ...).
            parameters: All tensors that get a gradient through f: zero if no sample is kept.
            activation: Applied to the sum. It must leave the shortcut unchanged, since it may be skipped along with f.

        Raises:
            ValueError: `use_gates` provided gates for a different number of samples.
        """
        batch_size = len(shortcut)
        if not self.can_close():
            return _add(shortcut, branch(*inputs), None, 1.0, activation)
        if self.mode == "count":
            scale = batch_size / kept(batch_size, self.survival) if self.scale_by_keep else 1.0
            rows = self._kept_rows(batch_size).to(shortcut.device, non_blocking=True)
            return _add(shortcut, branch(*_take_rows(inputs, rows)), rows, scale, activation)
        return self._decide(branch, shortcut, inputs, parameters, activation)

    # Reading a gate inside a compiled region would make it part of the graph, one graph for each pattern of gates. So
    # this is not compiled, but the branch that it calls is.
    @torch.compiler.disable(recursive=False)
    def _decide(self, branch, shortcut, inputs, parameters, activation) -> Tensor:
        gate = self.draw(len(shortcut))
        if not gate.any():
            dropped = _ZeroGradients.apply(shortcut, *parameters)
            return dropped.clone() if self.copies_shortcut else dropped
        scale = 1 / self.survival if self.scale_by_keep else 1.0
        if self.mode == "batch":
            return _add(shortcut, branch(*inputs), None, scale, activation)
        rows = gate.nonzero().squeeze(1).to(shortcut.device, non_blocking=True)
        return _add(shortcut, branch(*_take_rows_eagerly(inputs, rows)), rows, scale, activation)

    @torch.compiler.disable
    def draw(self, batch_size: int) -> Tensor:
        """The gate of a forward pass, of shape () in mode "batch" and (B,) in mode "row"."""
        shape = (batch_size,) if self.mode == "row" else ()
        if self.provided is None:
            return torch.rand(shape, dtype=torch.float32, device="cpu") < self.survival
        self._check_provided(shape)
        return self.provided

    def _kept_rows(self, batch_size: int) -> Tensor:
        """The k samples to keep. Their number is fixed and no value is read, so this compiles."""
        k = kept(batch_size, self.survival)
        if self.provided is None:
            return torch.randperm(batch_size, device="cpu")[:k]
        self._check_provided((batch_size,))
        return torch.argsort(self.provided.logical_not().byte(), stable=True)[:k]

    def _check_provided(self, shape: tuple[int, ...]) -> None:
        if self.provided.shape != shape:
            raise ValueError(f"gates of shape {tuple(self.provided.shape)}, but this pass needs {shape}")

    def __getstate__(self) -> dict:
        """Copies and pickles made within `use_gates` do not keep its gates."""
        return vars(self) | {"provided": None}

    def extra_repr(self) -> str:
        return f"survival={self.survival:.4f}, mode={self.mode!r}"


def _take_rows(inputs: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [_TakeRows.apply(x, rows) for x in inputs]


_take_rows_eagerly = torch.compiler.disable(_take_rows)  # not worth a graph of its own, and there would be many


def _add(
    shortcut: Tensor,
    f: Tensor,
    rows: Tensor | None,
    scale: float,
    activation: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The shortcut plus scale * f, where f has all samples or only those in `rows`.

    f may be broadcast to the shortcut's shape, but not the other way round: a closed gate returns the shortcut.
    """
    if rows is None:
        total = torch.add(shortcut, f.expand_as(shortcut), alpha=scale)
    else:
        total = _AddToRows.apply(shortcut, f.expand(-1, *shortcut.shape[1:]), rows, scale)
    return total if activation is None else activation(total)


def gates(network: nn.Module) -> list[Gate]:
    """The gates of a network, wrapped or not (by DDP, `torch.compile`, feature extractors).

    There is one per residual branch, with its `survival` probability: one per block in the paper's networks, one per
    DropPath call in a model converted by `skip_drop_path`. They are in order of registration, which in timm's models is
    the order of execution.
    """
    return [module for module in network.modules() if isinstance(module, Gate)]


def draw_gates(
    survival: Sequence[float] | Tensor, seed: int, step: int, batch_size: int | None = None, mode: str | None = None
) -> Tensor:
    """The gates of training step `step`, drawn according to their mode: a pure function of the arguments.

    So a resumed run, and every process of a distributed one, can have the same gates.

    Args:
        survival: The survival probability of each of L gates. (A float32 tensor rounds them, which may change k.)
        seed: The run's seed.
        step: The step, counted from the beginning of the run.
        batch_size: The number of samples B, None in mode "batch".
        mode: "batch", "row" or "count"; by default "batch" without a batch size and "row" with one.

    Returns:
        A bool tensor on the CPU, of shape (L,) in mode "batch" and (L, B) in the others.

    Raises:
        ValueError: `survival` is not a list of probabilities, the mode is unknown, or it needs a batch size.
    """
    probabilities = torch.as_tensor(survival, dtype=torch.float64, device="cpu")
    if probabilities.ndim != 1 or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(f"survival={survival!r}, but it must be a list of probabilities, one for each gate")
    mode = mode or ("batch" if batch_size is None else "row")
    check_choice("mode", mode, MODES)
    if mode != "batch" and batch_size is None:
        raise ValueError(f"mode={mode!r} draws one gate per sample, so it needs a batch_size")
    shape = (len(probabilities), 1 if mode == "batch" else batch_size)
    uniform = torch.from_numpy(np.random.default_rng([seed, step]).random(shape))
    if mode == "count":
        counts = torch.tensor([kept(batch_size, p) for p in probabilities.tolist()])
        return uniform.argsort(dim=1).argsort(dim=1) < counts.unsqueeze(1)
    drawn = uniform < probabilities.unsqueeze(1)
    return drawn.squeeze(1) if mode == "batch" else drawn


@contextmanager
def use_gates(network: nn.Module | list[Gate], values: Tensor) -> Iterator[None]:
    """Within the context, every training pass of `network` uses these gates.

    The context must cover the backward pass too, since gradient checkpointing recomputes blocks there:

        survival = [gate.survival for gate in gates(network)]
        with use_gates(network, draw_gates(survival, seed, step)):
            loss = criterion(network(images), labels)
            loss.backward()

    Args:
        network: Any module with gates, wrapped or not, or the list of its gates, which saves looking for them at every
            step.
        values: A bool tensor with one row per gate, in order: of shape (L,) in mode "batch", (L, B) in the others.

    Raises:
        ValueError: `values` is not such a tensor.
    """
    own = network if isinstance(network, list) else gates(network)
    modes = {gate.mode for gate in own}
    shape = f"({len(own)},)" if modes <= {"batch"} else f"({len(own)}, B)"
    dimensions = 1 if modes <= {"batch"} else 2
    if not isinstance(values, Tensor):
        raise ValueError(f"gates of type {type(values).__name__}, but use_gates takes a torch.bool tensor")
    if values.dtype != torch.bool or len(values) != len(own) or values.ndim != dimensions:
        raise ValueError(
            f"gates of type {values.dtype} and shape {tuple(values.shape)}, but this network's {len(own)} gates in"
            f" mode {' and '.join(map(repr, sorted(modes)))} take torch.bool of shape {shape}"
        )
    values = values.cpu()
    for gate, value in zip(own, values, strict=True):
        if gate.mode == "count" and value.sum() != kept(len(value), gate.survival):
            raise ValueError(
                f"{value.sum()} of {len(value)} gates are open, but mode 'count' with p = {gate.survival:g} opens"
                f" {kept(len(value), gate.survival)}: draw them with mode='count' and each gate's own `survival`"
            )
    outer = [gate.provided for gate in own]
    for gate, value in zip(own, values, strict=True):
        gate.provided = value
    try:
        yield
    finally:
        for gate, value in zip(own, outer, strict=True):
            gate.provided = value
