"""Gates decide which residual branches a training step computes, in the paper's networks and in any other model.

A residual block adds a branch f to a shortcut s. In training, a gate decides for which samples of the mini-batch f is
computed at all:

    open      s + f        (f scaled by 1 / p if the network asks for it)
    closed    s            f is not computed, forward or backward

    mode     gates                                          drawn
    "batch"  one for the whole mini-batch, as in the paper  Bernoulli, open with survival probability p
    "row"    one for each sample                            the same, independently
    "count"  one for each sample                            k of B open, without replacement: the integer nearest to
                                                            B p, but at least 1 unless p = 0
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

MODES = ("row", "count", "batch")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a ValueError naming the argument, its value and the choices, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}, but it must be one of {', '.join(map(repr, allowed))}")


def check_survival(name: str, probability: float) -> None:
    """Raise a ValueError naming the argument and its value unless it lies in (0, 1]."""
    if not 0 < probability <= 1:
        raise ValueError(f"{name}={probability!r}, but it must lie in (0, 1]")


def kept(batch_size: int, survival: float) -> int:
    """k = floor(B p + 1/2), the number of samples that mode "count" keeps; at least 1 unless p or B is 0."""
    k = int(batch_size * survival + 0.5 + 1e-6)  # 15 * (1 - 0.9) is 1.4999999999999996
    k = min(max(k, 1 if survival else 0), batch_size)
    return len(range(k))  # k itself, but to torch.compile a constant, as the autograd functions need


class Gate(nn.Module):
    """The gate of one residual branch.

    In training it is drawn in each forward pass from PyTorch's global CPU generator, so that reading it never waits for
    a GPU, unless `use_gates` provides it. A gate with p = 1 draws nothing.
    """

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

    @torch.compiler.disable
    def draw(self, batch_size: int) -> Tensor:
        """The gate of a forward pass, of shape () in mode "batch" and (B,) in mode "row"."""
        shape = (batch_size,) if self.mode == "row" else ()
        if self.provided is None:
            return torch.rand(shape, dtype=torch.float32, device="cpu") < self.survival
        self._check_provided(shape)
        return self.provided

    def draw_count(self, batch_size: int) -> Tensor:
        """The k samples that mode "count" keeps. Their number is fixed and no value is read, so this compiles."""
        k = kept(batch_size, self.survival)
        if self.provided is None:
            return torch.randperm(batch_size, device="cpu")[:k]
        self._check_provided((batch_size,))
        return torch.argsort(self.provided.logical_not().byte(), stable=True)[:k]

    def provide(self, value: Tensor) -> None:
        """Use these gates, of shape () or (B,) as in a row of `use_gates`, until others are provided.

        Raises ValueError if they are no gates of this mode.
        """
        if self.mode == "batch" and value.ndim:
            if value.any() != value.all():
                raise ValueError("open and closed gates for a branch in mode 'batch', which takes one for all samples")
            value = value.all()
        if self.mode == "count" and value.sum() != kept(len(value), self.survival):
            raise ValueError(
                f"{value.sum()} of {len(value)} gates are open, but mode 'count' with p = {self.survival:g} opens"
                f" {kept(len(value), self.survival)}: draw them with mode='count' and each gate's own `survival`"
            )
        self.provided = value

    def _check_provided(self, shape: tuple[int, ...]) -> None:
        if self.provided.shape != shape:
            raise ValueError(f"gates of shape {tuple(self.provided.shape)}, but this pass needs {shape}")

    def __getstate__(self) -> dict:
        """Copies and pickles made within `use_gates` do not keep its gates."""
        return vars(self) | {"provided": None}

    def extra_repr(self) -> str:
        return f"survival={self.survival:.4f}, mode={self.mode!r}"


def gates(network: nn.Module) -> list[Gate]:
    """The gates of a network, wrapped or not (by DDP, `torch.compile`, feature extractors).

    There is one per residual branch, with its `survival` probability: one per block in the paper's networks, one per
    call of a drop path in a model converted by `skip_drop_path`. They are in order of registration, which in timm's
    models is the order of execution.
    """
    return [module for module in network.modules() if isinstance(module, Gate)]


def draw_gates(
    survival: Sequence[float] | Tensor,
    seed: int,
    step: int,
    batch_size: int | None = None,
    mode: str | Sequence[str] | None = None,
) -> Tensor:
    """The gates of training step `step`, drawn according to their mode: a pure function of the arguments.

    So a resumed run, and every process of a distributed one, can have the same gates.

    Args:
        survival: The survival probability of each of L gates. (A float32 tensor rounds them, which may change k.)
        seed: The run's seed.
        step: The step, counted from the beginning of the run.
        batch_size: The number of samples B, None if all gates have mode "batch".
        mode: "batch", "row" or "count", for all gates or one for each; by default "batch" without a batch size and
            "row" with one.

    Returns:
        A bool tensor on the CPU, of shape (L,) without a batch size and (L, B) with one; there, the row of a gate in
        mode "batch" has B equal entries.

    Raises:
        ValueError: `survival` is not a list of probabilities, a mode is unknown, or it needs a batch size.
    """
    probabilities = torch.as_tensor(survival, dtype=torch.float64, device="cpu")
    if probabilities.ndim != 1 or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(f"survival={survival!r}, but it must be a list of probabilities, one for each gate")
    mode = mode or ("batch" if batch_size is None else "row")
    modes = [mode] * len(probabilities) if isinstance(mode, str) else list(mode)
    if len(modes) != len(probabilities):
        raise ValueError(f"{len(modes)} modes, but there are {len(probabilities)} gates")
    for each in {mode, *modes} if isinstance(mode, str) else set(modes):
        check_choice("mode", each, MODES)
        if each != "batch" and batch_size is None:
            raise ValueError(f"mode={each!r} draws one gate per sample, so it needs a batch_size")
    whole = mode == "batch" or batch_size is None
    uniform = torch.from_numpy(np.random.default_rng([seed, step]).random((len(modes), 1 if whole else batch_size)))
    drawn = uniform < probabilities.unsqueeze(1)
    if whole:
        return drawn.squeeze(1)
    for row, (each, p) in enumerate(zip(modes, probabilities.tolist(), strict=True)):
        if each == "count":
            drawn[row] = uniform[row].argsort().argsort() < kept(batch_size, p)
        elif each == "batch":  # the same for any batch size
            drawn[row] = np.random.default_rng([seed, step, row]).random() < p
    return drawn


@contextmanager
def use_gates(network: nn.Module | list[Gate], values: Tensor) -> Iterator[None]:
    """Within the context, every training pass of `network` uses these gates.

    The context must cover the backward pass too, since gradient checkpointing recomputes blocks there:

        own = gates(network)
        values = draw_gates([g.survival for g in own], seed, step, batch_size, [g.mode for g in own])
        with use_gates(network, values):
            loss = criterion(network(images), labels)
            loss.backward()

    Args:
        network: Any module with gates, wrapped or not, or the list of its gates, which saves looking for them at every
            step.
        values: A bool tensor with one row per gate, in order: of shape (L, B), with equal entries in the row of a gate
            in mode "batch", or of shape (L,) if all gates have this mode.

    Raises:
        ValueError: `values` is not such a tensor.
    """
    own = network if isinstance(network, list) else gates(network)
    if not isinstance(values, Tensor):
        raise ValueError(f"gates of type {type(values).__name__}, but use_gates takes a torch.bool tensor")
    modes = {gate.mode for gate in own}
    shapes = [f"({len(own)}, B)"] + [f"({len(own)},)"] * (modes <= {"batch"})
    if values.dtype != torch.bool or len(values) != len(own) or values.ndim not in (2, 3 - len(shapes)):
        raise ValueError(
            f"gates of type {values.dtype} and shape {tuple(values.shape)}, but this network's {len(own)} gates in"
            f" mode {' and '.join(map(repr, sorted(modes)))} take torch.bool of shape {' or '.join(shapes)}"
        )
    outer = [gate.provided for gate in own]
    try:
        for gate, value in zip(own, values.cpu(), strict=True):
            gate.provide(value)
        yield
    finally:
        for gate, value in zip(own, outer, strict=True):
            gate.provided = value
