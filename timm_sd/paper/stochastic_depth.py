"""Stochastic depth, as in Huang, Sun, Liu, Sedra, Weinberger, *Deep Networks with Stochastic Depth*, 2016
(arXiv:1603.09382).

A network has residual blocks b = 1..L. Block b maps its input H_{b-1} to H_b with a residual branch f_b, a shortcut s_b
and a ReLU, and survives a training step with probability p_b:

    training, gate open    H_b = ReLU(f_b(H_{b-1}) + s_b(H_{b-1}))                     (eq. 2, gate 1)
    training, gate closed  H_b = s_b(H_{b-1}), f_b not computed, forward or backward   (eq. 3)
    inference              H_b = ReLU(p_b * f_b(H_{b-1}) + s_b(H_{b-1}))               (eq. 5)

Nothing here is specific to a network: `StochasticDepth` is a single block, built around a gate from `timm_sd.gate`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..gate import Gate, check_choice, check_survival
from ..rows import put_rows, take_rows, zero_gradients

# p_b from a block's relative depth b / L and p_L.
SCHEDULES = {
    "linear": lambda depth, final: 1 - depth * (1 - final),
    "uniform": lambda depth, final: final,
    "quadratic": lambda depth, final: 1 - depth**2 * (1 - final),
    "exponential": lambda depth, final: final**depth,
}


def survival_probabilities(num_blocks: int, final: float, schedule: str | Sequence[float] = "linear") -> list[float]:
    """The survival probabilities p_1..p_L of L = `num_blocks` blocks.

    All schedules end with p_L = `final`. "linear" is the paper's: it decays from the input, which always survives
    (p_0 = 1), so p_b = 1 - (b / L)(1 - p_L) (section 3, eq. 4). "uniform" gives every block p_L (section 3).
    "quadratic", p_b = 1 - (b / L)^2 (1 - p_L), drops fewer blocks than "linear" at every depth, and "exponential",
    p_b = p_L^(b / L), more. The schedule can also be the L probabilities themselves; then `final` is not used.

    Raises ValueError for a probability outside (0, 1], an unknown schedule, or another number of probabilities.
    """
    check_survival("final", final)
    if not isinstance(schedule, str) and hasattr(schedule, "__len__"):
        if len(schedule) != num_blocks:
            raise ValueError(f"{len(schedule)} survival probabilities, but there are {num_blocks} residual blocks")
        for block, probability in enumerate(schedule, start=1):
            check_survival(f"p_{block}", probability)
        return [float(probability) for probability in schedule]
    check_choice("schedule", schedule, list(SCHEDULES))
    return [SCHEDULES[schedule](block / num_blocks, final) for block in range(1, num_blocks + 1)]


class BranchGate(Gate):
    """The gate of a residual block, which computes the branch only for the samples whose gate is open.

    Setting its survival probability sets the block's, too. In evaluation, it is the block's, since a moving average of
    a network's state dict averages that; `train()` takes it over. In training, nothing waits for a device to read it.
    """

    __jit_unused_properties__ = ("survival",)

    def __init__(self, block: "StochasticDepth", survival: float, mode: str) -> None:
        self.__dict__["block"] = block  # not a submodule: it is the parent
        super().__init__(survival, mode)

    @property
    def survival(self) -> float:
        return self.probability if self.training else self.of_block()

    @survival.setter
    def survival(self, probability: float) -> None:
        self.probability = probability
        self.block.set_buffer(probability)

    def of_block(self) -> float:
        """The block's survival probability: as it was set, unless it has been averaged since."""
        buffer = self.block.survival
        unreadable = buffer.is_meta or type(buffer) is not Tensor  # such as a FakeTensor
        return self.probability if unreadable or buffer.item() == np.float32(self.probability) else buffer.item()

    def train(self, mode: bool = True) -> "BranchGate":
        """Enter training or evaluation."""
        if mode and not self.training:
            self.probability = self.of_block()
        return super().train(mode)

    @torch.jit.unused
    def forward(
        self,
        branch: Callable[[Tensor], Tensor],
        shortcut: Tensor,
        x: Tensor,
        parameters: Iterable[Tensor],
        activation: nn.Module,
    ) -> Tensor:
        """H_b in training.

        Args:
            branch: f_b, which treats each sample independently, except for batch normalization.
            shortcut: s_b(H_{b-1}), of shape (B, ...).
            x: H_{b-1}, of shape (B, ...).
            parameters: Those of f_b, which get zero gradients if no sample is kept.
            activation: Applied to the sum. It must leave the shortcut unchanged, since it may be skipped along with f.

        Raises:
            ValueError: `use_gates` provided gates for a different number of samples.
        """
        if not self.can_close():
            return _add(shortcut, branch(x), activation)
        if self.mode == "count":
            rows = self.draw_count(len(x)).to(x.device, non_blocking=True)
            return _add_rows(shortcut, branch(take_rows(x, rows)), rows, activation)
        return self._decide(branch, shortcut, x, parameters, activation)

    # Reading a gate inside a compiled region would make it part of the graph, one graph for each pattern of gates. So
    # this is not compiled, but the branch that it calls is.
    @torch.compiler.disable(recursive=False)
    def _decide(self, branch, shortcut, x, parameters, activation) -> Tensor:
        gate = self.draw(len(x))
        if not gate.any():
            return zero_gradients(shortcut, *parameters)
        if self.mode == "batch":
            return _add(shortcut, branch(x), activation)
        rows = gate.nonzero().squeeze(1).to(x.device, non_blocking=True)
        return _add_rows(shortcut, branch(_take_rows_eagerly(x, rows)), rows, activation)


class StochasticDepth(nn.Module):
    """A residual block under stochastic depth: eq. 2 and 3 in training, eq. 5 in inference.

    Since p * f(x) is meaningful only with the p that f was trained with, p is stored in the state dict, as `survival`,
    and loading weights trained with p into a block with p' multiplies the parameters of f's last module by p / p':
    **loading never changes the function.**

    The output of a dropped block may be its input: do not modify it in place. TorchScript is for inference only.
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
            branch: f_b. Its last module must be linear in its parameters (a normalization with scale and shift, a
                linear layer or a convolution), since loading rescales them.
            shortcut: s_b, with an output of the same shape as the branch's.
            activation: Applied to the sum. It must leave the shortcut's output unchanged, as ReLU does with identity or
                average pooling after a ReLU (section 3), so that eq. 3 can do without it.
            survival: p_b.
            mode: "batch", one gate for the whole mini-batch, as in the paper; "row", one per sample; or "count", a
                fixed number of samples (see `timm_sd.gate`). In the last two, batch normalization sees only the kept
                samples, and needs more than one value per channel.

        Raises:
            ValueError: A probability outside (0, 1] or an unknown mode.
        """
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        device = next((parameter.device for parameter in branch.parameters()), None)
        self.register_buffer("survival", torch.ones((), dtype=torch.float32, device=device))
        self.gate = BranchGate(self, survival, mode)

    def forward(self, x: Tensor) -> Tensor:
        """H_{b-1} of shape (B, ...) to H_b."""
        if not torch.jit.is_scripting() and self.training:
            return self.gate(
                partial(_call, self.branch), self.shortcut(x), x, self.branch.parameters(), self.activation
            )
        if self.training and self.survival < 1:
            raise RuntimeError("TorchScript cannot train with stochastic depth: call eval(), or use torch.compile")
        f, s = self.branch(x), self.shortcut(x)
        # A copy, since autograd may keep it while the probability changes.
        p = self.survival.to(s.dtype, copy=True)
        return self.activation(torch.addcmul(s, f, p))

    @torch.jit.ignore
    def set_buffer(self, survival: float) -> None:
        """Set the buffer alone."""
        if self.survival.is_inference():  # it can only be replaced
            self.survival = torch.full_like(self.survival, survival)
        else:
            self.survival.fill_(survival)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StochasticDepth":
        # The probability stays exact in half precision, and stays at all if a device gets memory with nothing in it.
        survival = self.gate.of_block()
        super()._apply(fn, recurse)
        self.survival = self.survival.float()
        self.set_buffer(survival)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: dict, strict: bool, missing_keys: list[str], *args
    ) -> None:
        trained = state_dict.get(prefix + "survival")
        if trained is not None:
            # Half-precision checkpoints hold rounded probabilities, which are equal to ours if ours round to them.
            device, trained = trained.device, trained.cpu()
            if not trained.is_floating_point() or trained.numel() != 1 or not 0 < trained.item() <= 1:
                raise RuntimeError(f"the weights are damaged: {prefix}survival is not a probability in (0, 1]")
            own = torch.tensor(self.gate.survival, dtype=torch.float32, device="cpu")
            if own.to(trained.dtype) != trained:
                last, module = list(self.branch.named_children())[-1]
                for name, _ in module.named_parameters():
                    key = f"{prefix}branch.{last}.{name}"
                    if key in state_dict:
                        state_dict[key] = state_dict[key] * (trained / own).item()
            state_dict[prefix + "survival"] = own.to(device)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)


def _call(branch: nn.Module, x: Tensor) -> Tensor:
    # The gate is given this function: not the branch itself, since torch.compile starts no graph in nn.Sequential's own
    # code, and not a method, since up to PyTorch 2.9 a function that gets a bound method is compiled anew each time.
    return branch(x)


def _add(shortcut: Tensor, f: Tensor, activation: nn.Module) -> Tensor:
    return activation(shortcut + f)


def _add_rows(shortcut: Tensor, f: Tensor, rows: Tensor, activation: nn.Module) -> Tensor:
    return activation(shortcut + put_rows(f, rows, len(shortcut)))


_take_rows_eagerly = torch.compiler.disable(take_rows)  # not worth a graph of its own, and there would be many
