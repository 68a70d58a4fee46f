"""The gates of drop paths."""

from torch import Tensor, nn

from ..gate import Gate
from .drop_paths import Kind, drop_probability


class Tally:
    """The work that a gate has saved so far.

    Of `samples`, `computed` were computed, where the rates ask for `expected`; the branch has a share
    `flops` of the model's.
    """

    samples = computed = 0
    expected = flops = 0.0

    def add(self, samples: int, computed: int, expected: float) -> None:
        """Count a call."""
        self.samples += samples
        self.computed += computed
        self.expected += expected


class DropPathGate(Gate):
    """The gate of one call of a drop path; probability and scaling are read from the drop path, so changes count."""

    def __init__(self, drop_path: nn.Module, kind: Kind, call: int, mode: str) -> None:
        """
        Args:
            drop_path: The drop path, which gets the gate as a child.
            kind: How it stores its probability.
            call: The number of the call in a pass of the block, from 0.
            mode: "batch", "row" or "count".
        """
        super().__init__(mode=mode)
        self.kind, self.call = kind, call
        self.__dict__["drop_path"] = drop_path  # not a submodule: it is the parent
        self.tally = Tally()
        drop_path.add_module(gate_name(call), self.train(drop_path.training))

    @property
    def survival(self) -> float:
        return 1 - drop_probability(self.drop_path, self.kind)

    @survival.setter
    def survival(self, probability: float) -> None:
        if "drop_path" in vars(self):
            setattr(self.drop_path, self.kind.attribute, probability if self.kind.survival else 1 - probability)

    def can_close(self) -> bool:
        """Whether the gate can be closed in the next forward pass."""
        return self.drop_path.training and super().can_close()

    def draw_rows(self, size: int) -> tuple[Tensor, float]:
        """The rows to keep of `size`, and the factor to scale them by."""
        p = self.survival
        if not 0 <= p <= 1:
            raise RuntimeError(f"a drop path's {self.kind.attribute} is {getattr(self.drop_path, self.kind.attribute)}")
        count = self.mode == "count"
        rows = self.draw_count(size) if count else self.draw(size).expand(size).nonzero().squeeze(1)
        share = len(rows) / size if count and size else p
        return rows, 1 / share if share and getattr(self.drop_path, "scale_by_keep", self.kind.scaled) else 1.0


def gate_name(call: int) -> str:
    """The name of the gate of a call, a child of the drop path."""
    return f"gate_{call}" if call else "gate"
