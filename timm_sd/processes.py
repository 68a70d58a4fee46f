"""What the processes of a run do together."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from .errors import UserError

T = TypeVar("T")


def on_all_processes(action: Callable[[], T]) -> T:
    """The result of what each process does, one of each machine ahead of the others; any UserError is everyone's."""
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
    """The result of what the main process does for all of them; its UserError is everyone's."""
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
    """The processes' mean gradient, summed in their order.

    Gloo's own sum takes another order for each place in a bucket, and DDP's buckets are others after a resume.
    """
    mine = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    gathered = torch.distributed.all_gather(parts, mine, async_op=True).get_future()
    return gathered.then(lambda _: sum(parts[1:], start=parts[0]).div_(len(parts)))
