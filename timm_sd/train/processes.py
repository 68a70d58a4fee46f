"""Coordination between the processes of a run."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..errors import UserError

T = TypeVar("T")


def on_all_processes(action: Callable[[], T]) -> T:
    """The result of `action`, run in every process, one per machine first; a UserError in any is raised in all."""
    result = message = None
    with PartialState().local_main_process_first():
        try:
            result = action()
        except UserError as error:
            message = str(error)
    if messages := [message for message in gather_object([message]) if message is not None]:
        raise UserError(messages[0])
    return result


def on_main_process(action: Callable[[], T]) -> T:
    """The result of `action`, run in the main process for all of them; a UserError is raised in all."""
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    result, message = broadcast_object_list(outcome)
    if message is not None:
        raise UserError(message)
    return result


def mean_in_order(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean gradient of the processes, summed in order of rank.

    Gloo's own order of summation depends on the position in a bucket, and DDP's buckets differ after resuming.
    """
    mine = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]

    def mean(gathered: torch.futures.Future) -> Tensor:
        gathered.wait()  # raises an error if a process is gone
        return sum(parts[1:], start=parts[0]).div_(len(parts))

    return torch.distributed.all_gather(parts, mine, async_op=True).get_future().then(mean)
