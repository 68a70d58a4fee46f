"""SIGTERM and Ctrl-C, deferred until the current training step is done."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class Interruption:
    """Within the context, the two signals are recorded instead of ending the process.

    One that is ignored stays so, as Ctrl-C is in what a shell script runs in the background.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.signal = 0
        # A separate group for the hosts: going through the GPUs' group would make each host wait for its GPU.
        self.hosts = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> "Interruption":
        self.handlers = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGINT)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def noted(self) -> str | None:
        """The name of a signal that reached any process, the same in all of them: each must call this at every step."""
        number = torch.tensor(self.signal)
        if self.hosts is not None:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.hosts)
        return signal.Signals(int(number)).name if number else None
