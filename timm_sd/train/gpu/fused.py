"""A training run by fused kernels, `train.py --fused`: the same run as any other, at the speed of the GPU.

Gates, order, augmentation, learning rates and checkpoints are those of any run, so a run can be resumed with or without
it. The differences are where things happen:

    the images of an epoch    augmented all at once, and kept on the GPU
    the weights               the engine's while it trains; the network and its optimizer get a copy after each epoch
    checkpoints               written from that copy by a thread, while the next epoch trains
    the sums of an epoch      read once, at its end
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from accelerate import Accelerator
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ...command_line import say
from ...errors import UserError
from ...paper.datasets import DATASETS
from .. import data
from ..evaluation import BATCH_SIZE
from ..learner import Learner
from ..options import Options
from .engine import IMAGE_CHANNELS, SIZE, Engine, bordered, inside
from .inference import Inference

AUGMENTED = 5000  # images at a time
LARGEST_BATCH = 50_000  # since kernels count in 32 bits


class FusedLearner(Learner):
    """A learner on one GPU in bfloat16. (In Triton's interpreter, on a CPU in float32.)"""

    saving: Future | None = None
    copies: torch.cuda.Stream | None = None

    def __init__(self, accelerator: Accelerator, options: Options) -> None:
        super().__init__(accelerator, options)
        self.writer = ThreadPoolExecutor(1)

    def begin(self) -> None:
        """Give the weights to the engine, and the images a place on the GPU."""
        say("--fused has not been measured on a GPU yet; --cuda-graphs has")
        options, count = self.options, len(self.training_set)
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        sizes = {min(options.batch_size, count - start) for start in range(0, count, options.batch_size)}
        if max(sizes) > LARGEST_BATCH:
            raise UserError(f"--batch-size {options.batch_size}: --fused takes at most {LARGEST_BATCH} images")
        try:
            self.engine = Engine(self.network, options.weight_decay, sorted(sizes, reverse=True), dtype)
            largest = max(len(self.validation_set), len(self.test_set))
            self.inference = Inference(self.engine, min(BATCH_SIZE, largest))
        except OutOfResources as error:
            raise UserError(f"--fused: its kernels are too large for this GPU ({error}): omit it") from error
        self.engine.load(self.optimizer)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.engine.sums.copy_(self.sums)
        self.sums = self.engine.sums
        self.plain = self.network  # there is nothing that training adds to it

        device = self.accelerator.device
        self.images = bordered(count, SIZE, IMAGE_CHANNELS, dtype, device)
        self.evaluated = {}
        for name, part in (("validation_error", self.validation_set), ("test_error", self.test_set)):
            images = bordered(len(part), SIZE, IMAGE_CHANNELS, torch.float32, device)
            fill(images, data.evaluation_batches(part, AUGMENTED, self.standardize))
            self.evaluated[name] = images, part.labels
        if device.type == "cuda":
            self.copies = torch.cuda.Stream()

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor, int]]:
        """From a step of an epoch on: images as the engine takes them, labels, and their number."""
        options = self.options
        augmented = DATASETS[options.dataset].augmented
        batches = data.training_batches(  # the same images in batches of any size
            self.training_set, AUGMENTED, self.standardize, options.seed, epoch, augmented=augmented
        )
        labels = fill(self.images, batches)
        for start in range(first_step * options.batch_size, len(labels), options.batch_size):
            batch = slice(start, start + options.batch_size)
            yield self.images[batch], labels[batch], len(labels[batch])

    def step(self, images: Tensor, labels: Tensor, batch_size: int, gate_values: Tensor, lr: float) -> None:
        """One step of SGD on a batch."""
        self.lr = lr
        self.engine.step(images, labels, gate_values, lr)

    def evaluate(self) -> dict[str, float]:
        """The current network's validation and test error, in percent."""
        return {name: self.inference.error(*part) for name, part in self.evaluated.items()}

    def read_sums(self) -> list[list[float]]:
        """The sums, after copying the current state to the network and the optimizer once they are saved."""
        self.wait()
        self.engine.export(self.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        return super().read_sums()

    def save(self, write: Callable[[], None]) -> None:
        """Write a checkpoint in the background. The network and the optimizer do not change until it is written."""
        if self.copies is not None:  # the thread must not wait for steps that are launched from now on
            self.copies.wait_stream(torch.cuda.current_stream())

        def write_aside() -> None:
            with torch.cuda.stream(self.copies):  # None: no change
                write()

        self.saving = self.writer.submit(write_aside)

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises what that raised."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.result()

    def close(self) -> None:
        """Wait for the thread that writes."""
        self.writer.shutdown()


def fill(images: Tensor, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Put batches of (images, labels) into a bordered tensor, one after another; return all labels."""
    labels = []
    start = 0
    for batch, own in batches:
        inside(images)[start : start + len(batch), ..., : batch.shape[1]] = batch.permute(0, 2, 3, 1)
        start += len(batch)
        labels.append(own)
    return torch.cat(labels)
