"""Stochastic depth, as in Huang, Sun, Liu, Sedra, Weinberger, *Deep Networks with Stochastic Depth*, 2016
(arXiv:1603.09382).

A network has residual blocks b = 1..L. Block b maps its input H_{b-1} to H_b with a residual branch f_b, a shortcut s_b
and an activation, and survives with probability p_b:

    training, gate open    H_b = ReLU(f_b(H_{b-1}) + s_b(H_{b-1}))                     (eq. 2, gate 1)
    training, gate closed  H_b = s_b(H_{b-1}), f_b not computed, forward or backward   (eq. 3)
    inference              H_b = ReLU(p_b * f_b(H_{b-1}) + s_b(H_{b-1}))               (eq. 5)

Nothing here knows a particular network: `StochasticDepth` is one block, the functions work on whatever holds some.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

SCHEDULES = ("linear", "uniform")
MODES = ("batch", "row")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a ValueError naming the argument, its value and what is allowed, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}, but it must be one of {', '.join(map(repr, allowed))}")


def check_survival(name: str, probability: float) -> None:
    """Raise a ValueError naming the argument and its value unless it lies in (0, 1]."""
    if not 0 < probability <= 1:
        raise ValueError(f"{name}={probability!r}, but it must lie in (0, 1]")


def survival_probabilities(num_blocks: int, final: float, schedule: str = "linear") -> list[float]:
    """The survival probabilities p_1..p_L of L = `num_blocks` blocks, `final` being p_L.

    "linear" decays from the input, which always survives (p_0 = 1), to p_L: p_b = 1 - (b / L)(1 - p_L) (section 3,
    eq. 4). "uniform" gives every block p_L.

    Raises ValueError for a `final` outside (0, 1] and for an unknown schedule.
    """
    check_survival("final", final)
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "uniform":
        return [final] * num_blocks
    return [1 - block / num_blocks * (1 - final) for block in range(1, num_blocks + 1)]


def draw_gates(survival: Sequence[float] | Tensor, seed: int, step: int, batch_size: int | None = None) -> Tensor:
    """The gates of training step `step` of a run: independent Bernoulli draws, gate b open with probability p_b.

    A pure function of its arguments, so a resumed run and every process of a distributed one hold the same gates.
    Returns a bool tensor on the CPU of shape (L,) for mode "batch", or (L, batch_size) for mode "row".
    """
    shape = (len(survival), 1 if batch_size is None else batch_size)
    uniform = torch.from_numpy(np.random.default_rng([seed, step]).random(shape))
    gates = uniform < torch.as_tensor(survival, dtype=torch.float64, device="cpu").unsqueeze(1)
    return gates.squeeze(1) if batch_size is None else gates


class _Dropped(torch.autograd.Function):
    """Identity on the shortcut that hands the dropped branch's parameters zero gradients.

    Zero, not none: the authors' optimiser goes on moving a dropped block by momentum and weight decay. PyTorch's
    optimisers skip a parameter without gradient, and DistributedDataParallel waits for it in vain.
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


class StochasticDepth(nn.Module):
    """A residual block under stochastic depth: eq. 2 and 3 in training, eq. 5 in inference.

    By default the gate of a training pass is drawn from torch's global CPU generator, so there is no waiting for a GPU;
    `use_gates` hands it over instead. A block with p_b = 1 draws nothing. TorchScript always follows eq. 5.

    The output of a dropped block can be its input: do not change it in place.
    """

    def __init__(
        self,
        branch: nn.Sequential,
        shortcut: nn.Module,
        activation: nn.Module,
        survival: float = 1.0,
        mode: str = "batch",
    ) -> None:
        """
        Args:
            branch: f_b. Its last module must be linear in its parameters (a normalisation with scale and shift, a
                linear map or a convolution): `load_survival` scales f_b by scaling those.
            shortcut: s_b, with an output of the branch's shape.
            activation: Applied to the sum.
            survival: p_b.
            mode: "batch", one gate for the whole mini-batch as in the paper, or "row", a gate a sample: the branch is
                then computed for the kept samples alone, which are also all that its batch normalisation sees (it
                needs more than one value a channel, so more than one sample where they are of a single pixel).

        Raises:
            ValueError: A probability outside (0, 1], an unknown mode.
        """
        super().__init__()
        check_survival("survival", survival)
        check_choice("mode", mode, MODES)
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        self.survival = survival
        self.mode = mode
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """H_{b-1} of shape (B, ...) to H_b. Raises a ValueError if there are gates for another number of samples."""
        if not torch.jit.is_scripting() and self.training and (self.survival < 1 or self.gate is not None):
            return self._gated(x)
        return self._residual(x, self.survival)

    def _residual(self, x: Tensor, scale: float) -> Tensor:
        return self.activation(torch.add(self.shortcut(x), self.branch(x), alpha=scale))

    def _kept(self, x: Tensor) -> Tensor:
        return self._residual(x, 1.0)

    @torch.compiler.disable(recursive=False)
    def _dropped(self, x: Tensor) -> Tensor:
        return _Dropped.apply(self.shortcut(x), *self.branch.parameters())

    def _residual_of_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        kept = self.activation(shortcut.index_select(0, rows) + self.branch(x.index_select(0, rows)))
        return shortcut.to(kept.dtype).index_copy(0, rows, kept)

    # A gate read inside a compiled region would become part of it, one graph for each pattern of gates. This stays
    # outside, while what it calls is compiled.
    @torch.compiler.disable(recursive=False)
    def _gated(self, x: Tensor) -> Tensor:
        gate = self._gate(len(x))
        if not gate.any():
            return self._dropped(x)
        if self.mode == "batch":
            return self._kept(x)
        return self._residual_of_rows(x, gate.nonzero().squeeze(1).to(x.device, non_blocking=True))

    @torch.compiler.disable
    def _gate(self, batch_size: int) -> Tensor:
        shape = (batch_size,) if self.mode == "row" else ()
        if self.gate is None:
            return torch.rand(shape, device="cpu") < self.survival
        if self.gate.shape != shape:
            raise ValueError(f"gates for {len(self.gate)} samples, but the batch has {batch_size}")
        return self.gate

    def extra_repr(self) -> str:
        return f"survival={self.survival:.4f}, mode={self.mode!r}"


def stochastic_blocks(network: nn.Module) -> list[StochasticDepth]:
    """The blocks 1..L of a network, in order, whatever wraps it (DDP, `torch.compile`, timm's feature extractors)."""
    return [module for module in network.modules() if isinstance(module, StochasticDepth)]


@contextmanager
def use_gates(network: nn.Module | list[StochasticDepth], gates: Tensor) -> Iterator[None]:
    """Within the context, every training pass of `network` uses these gates.

    The context must hold the pass's backward too, since gradient checkpointing computes blocks again there:

        survival = [block.survival for block in stochastic_blocks(network)]
        with use_gates(network, draw_gates(survival, seed, step)):
            loss = criterion(network(images), labels)
            loss.backward()

    Args:
        network: Anything that holds `StochasticDepth` blocks, wrapped or not; or the list of those blocks, which spares
            a loop the search for them at every step.
        gates: A bool tensor with a row for each of the blocks it holds, in order: of shape (L,) in mode "batch", (L, B)
            in mode "row".

    Raises:
        ValueError: The gates are not a bool tensor of that shape.
    """
    blocks = network if isinstance(network, list) else stochastic_blocks(network)
    mode = blocks[0].mode if blocks else "batch"
    if gates.dtype != torch.bool or len(gates) != len(blocks) or gates.ndim != 1 + (mode == "row"):
        shape = f"({len(blocks)}, B)" if mode == "row" else f"({len(blocks)},)"
        raise ValueError(
            f"gates of type {gates.dtype} and shape {tuple(gates.shape)}, but this network's {len(blocks)} blocks in"
            f" mode {mode!r} take torch.bool of shape {shape}"
        )
    outer_gates = [block.gate for block in blocks]
    for block, gate in zip(blocks, gates.cpu(), strict=True):
        block.gate = gate
    try:
        yield
    finally:
        for block, gate in zip(blocks, outer_gates, strict=True):
            block.gate = gate


def load_survival(network: nn.Module, own: Sequence[float], state_dict: dict[str, Tensor], prefix: str) -> None:
    """Change `state_dict` in place so that loading it leaves `network` computing, in inference, what it was trained to.

    p * f(x) is f(x) with the parameters of f's last module multiplied by p. So a branch trained with p_b that is now
    scaled by p'_b takes those parameters times p_b / p'_b, to the precision in which the checkpoint holds them. A
    network calls this from its `_load_from_state_dict`.

    Args:
        network: Holds the first blocks of L, all of them unless it was pruned.
        own: Its survival probabilities p'_1..p'_L, which it keeps as a persistent buffer `survival` of shape (L,).
        state_dict: What is being loaded. Its entry `survival` holds the p_b it was trained with (none: all 1, a plain
            network) and becomes the p'_b. Tensors are replaced, never written to.
        prefix: The network's prefix in the keys.
    """
    own_survival = torch.tensor(own, device="cpu")
    survival = state_dict.get(prefix + "survival", torch.ones_like(own_survival))
    if survival.shape != own_survival.shape:
        return  # another network's: load_state_dict says so
    state_dict[prefix + "survival"] = own_survival.to(survival.device)
    # A network saved in half precision holds rounded probabilities: those are equal if ours round to them.
    equal = survival.cpu() == own_survival.to(survival.dtype)
    ratios = torch.where(equal, 1.0, survival.cpu() / own_survival).tolist()
    blocks = [(name, module) for name, module in network.named_modules() if isinstance(module, StochasticDepth)]
    for (name, block), ratio in zip(blocks, ratios, strict=False):
        last, module = list(block.branch.named_children())[-1]
        for parameter, _ in module.named_parameters():
            key = f"{prefix}{name}.branch.{last}.{parameter}"
            if ratio != 1 and key in state_dict:
                state_dict[key] = state_dict[key] * ratio
