"""A training run by fused kernels, `train.py --fused`: the same run as any other, at the speed of the GPU.

Gates, order, augmentation, learning rates and checkpoints are those of `training.Run`, so a run can be resumed in
either. The differences are where things happen:

    the images of an epoch    augmented all at once, and kept on the GPU
    the weights               the engine's while it trains; the network and its optimizer get a copy after each epoch
    checkpoints               written from that copy by a thread, while the next epoch trains
    the sums of an epoch      read once, at its end
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources

from . import data
from .command_line import say
from .engine import IMAGE_CHANNELS, SIZE, Engine, bordered, inside
from .errors import UserError
from .evaluation import BATCH_SIZE
from .inference import Inference
from .training import Run

AUGMENTED = 5000  # images at a time
LARGEST_BATCH = 50_000  # since kernels count in 32 bits


class FusedRun(Run):
    """A run on one GPU in bfloat16. (In Triton's interpreter, on a CPU in float32.)"""

    saving: Future | None = None
    copies: torch.cuda.Stream | None = None

    def train(self) -> None:
        """As any run, but return only when everything is written."""
        with ThreadPoolExecutor(1) as self.writer:
            try:
                super().train()
            finally:
                self.wait_for_writer()

    def begin(self) -> None:
        """Open or resume the run, and give its values to the engine."""
        super().begin()
        self.plain = self.network  # there is nothing that training adds to it
        if self.progress.epoch > self.options.epochs:  # finished
            return
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

        device = self.accelerator.device
        self.images = bordered(count, SIZE, IMAGE_CHANNELS, dtype, device)
        self.evaluated = {}
        for name, part in (("validation_error", self.validation_set), ("test_error", self.test_set)):
            images = bordered(len(part), SIZE, IMAGE_CHANNELS, torch.float32, device)
            fill(images, data.evaluation_batches(part, AUGMENTED, self.standardize))
            self.evaluated[name] = images, part.labels
        if device.type == "cuda":
            self.copies = torch.cuda.Stream()

    def batches(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """For the remaining steps of the current epoch: images as the engine takes them, labels, and their number."""
        options, progress = self.options, self.progress
        batches = data.training_batches(  # the same images in batches of any size
            self.training_set,
            AUGMENTED,
            self.standardize,
            options.seed,
            progress.epoch,
            augmented=self.protocol.augmented,
        )
        labels = fill(self.images, batches)
        for start in range(progress.steps * options.batch_size, len(labels), options.batch_size):
            batch = slice(start, start + options.batch_size)
            yield self.images[batch], labels[batch], len(labels[batch])

    def step(self, images: Tensor, labels: Tensor, gate_values: Tensor, batch_size: int) -> None:
        """One step of SGD on a batch."""
        self.lr = self.learning_rate(self.progress.steps + 1)
        self.engine.step(images, labels, gate_values, self.lr)

    def evaluate(self) -> dict[str, float]:
        """The current network's validation and test error, in percent."""
        return {name: self.inference.error(*part) for name, part in self.evaluated.items()}

    def check_finite(self, total: float) -> None:
        """Copy the current state to the network and the optimizer, once they are saved, and check it."""
        self.wait_for_writer()
        self.engine.export(self.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        super().check_finite(total)

    def save(self, best: nn.Module | None = None) -> None:
        """Write a checkpoint in the background. The network and the optimizer do not change until it is written."""
        if self.copies is not None:  # the thread must not wait for steps that are launched from now on
            self.copies.wait_stream(torch.cuda.current_stream())
        progress = replace(self.progress)  # the run goes on

        def write() -> None:
            with torch.cuda.stream(self.copies):  # None: no change
                self.folder.save(self.accelerator, progress, self.options.keep_checkpoints, best)

        self.saving = self.writer.submit(write)

    def wait_for_writer(self) -> None:
        """Wait until the last checkpoint is written. Raises what that raised."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.result()

    def end(self) -> None:
        """Write the summary, once the weights are written."""
        self.wait_for_writer()
        super().end()


def fill(images: Tensor, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Put batches of (images, labels) into a bordered tensor, one after another; return all labels."""
    labels = []
    start = 0
    for batch, own in batches:
        inside(images)[start : start + len(batch), ..., : batch.shape[1]] = batch.permute(0, 2, 3, 1)
        start += len(batch)
        labels.append(own)
    return torch.cat(labels)
