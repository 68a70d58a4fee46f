"""Loss and errors of a network on a set of images, each counted once, with any number of processes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from . import data

BATCH_SIZE = 1000


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy `loss`, top-1 `error` in percent, and per class the number of `images` and of `errors`."""

    loss: float
    error: float
    images: list[int]
    errors: list[int]


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator, network: nn.Module, images: data.ImageSet, standardize: data.Standardize
) -> Evaluation:
    """Evaluate `network` on all the images; every process computes a part, and all get the whole result.

    Leaves the network in evaluation mode.
    """
    network.eval()
    first, end = (
        len(images) * index // accelerator.num_processes
        for index in (accelerator.process_index, accelerator.process_index + 1)
    )
    sums = torch.zeros(3, network.num_classes, device=accelerator.device)  # loss, images and errors, per class
    for batch, labels in data.evaluation_batches(images[first:end], BATCH_SIZE, standardize):
        logits = network(batch)
        losses = F.cross_entropy(logits, labels, reduction="none")
        wrong = logits.argmax(1) != labels
        sums.index_add_(1, labels, torch.stack([losses, torch.ones_like(losses), wrong.to(losses.dtype)]))
    loss, counts, errors = accelerator.reduce(sums).tolist()
    return Evaluation(
        loss=sum(loss) / len(images),
        error=100 * sum(errors) / len(images),
        images=[int(count) for count in counts],
        errors=[int(count) for count in errors],
    )
