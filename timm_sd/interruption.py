"""SIGTERM and Ctrl-C, put off until the training step in hand is done."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class Interruption:
    """Within the context, the two signals are noted instead of ending the process."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.signal = 0
        # A group of the hosts' own: asking through the GPUs' would make each host wait for its GPU.
        self.hosts = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> "Interruption":
        self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def noted(self) -> str | None:
        """The name of a signal that reached any process, the same in all of them: each must ask after each step."""
        number = torch.tensor(self.signal)
        if self.hosts is not None:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.hosts)
        return signal.Signals(int(number)).name if number else None
