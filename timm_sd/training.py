"""One training run under the authors' protocol (Huang et al., section 4), from the data to the best weights."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_model
from torch import nn
from tqdm.auto import tqdm

from . import data
from .errors import UserError
from .stochastic_depth import draw_gates, stochastic_blocks, use_gates

MODELS = timm.list_models(module="cifar_resnet")
DATASETS = ("cifar10", "cifar100", "synthetic")
EVALUATION_BATCH_SIZE = 1000

METRICS_FILE = "metrics.jsonl"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Options:
    """What a run is a function of. The defaults are the authors' protocol on CIFAR-10.

    `drop_path` is 1 - p_L, None for the network's own; `output` the run's folder, None for one named after the model,
    the data set and the seed. Raises UserError for a value that is not allowed.
    """

    model: str = "cifar_resnet110_sd"
    dataset: str = "cifar10"
    data_dir: Path = Path("data")
    download: bool = False
    epochs: int = 500
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 1e-4
    drop_path: float | None = None
    seed: int = 0
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise UserError(f"--model {self.model}: there is no such network; there are {', '.join(MODELS)}")
        if self.dataset not in DATASETS:
            raise UserError(f"--dataset {self.dataset}: there is no such data set; there are {', '.join(DATASETS)}")
        for flag, value, allowed, range_ in (
            ("--epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("--lr", self.lr, 0 < self.lr < math.inf, "positive"),
            ("--weight-decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0"),
            ("--drop-path", self.drop_path, self.drop_path is None or 0 <= self.drop_path < 1, "in [0, 1)"),
            ("--seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2^32)"),
        ):
            if not allowed:
                raise UserError(f"{flag} {value}: it must be {range_}")

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.output or Path("output") / f"{self.model}-{self.dataset}-seed{self.seed}"


def learning_rate(epoch: int, epochs: int, initial: float) -> float:
    """`initial`, divided by 10 from 50% of the epochs on and again from 75%; epochs count from 1.

    Of 500, epoch 250 is the first at a tenth and epoch 375 the first at a hundredth.
    """
    drops = (epoch >= 0.5 * epochs) + (epoch >= 0.75 * epochs)
    return initial / 10**drops


def use_all_cores() -> None:
    """Give torch every core this process may run on: `accelerate launch` sets OMP_NUM_THREADS=1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores)


def create_network(options: Options) -> nn.Module:
    """The network of a run, initialised as a function of its seed."""
    set_seed(options.seed)
    tag = "cifar10" if options.dataset == "synthetic" else options.dataset
    network = timm.create_model(f"{options.model}.{tag}", drop_path_rate=options.drop_path)
    return network.to(memory_format=torch.channels_last)


def train(options: Options) -> None:
    """Train, leaving a line of figures an epoch and the weights of the best validation error in the run's folder.

    Raises UserError if the folder already holds a run, data are missing or the loss is no longer finite.
    """
    use_all_cores()
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("training runs in one process: launch it with --num_processes 1")
    if accelerator.gradient_accumulation_steps > 1:
        raise UserError("every batch is a step of its own: launch it with --gradient_accumulation_steps 1")

    learning_set, test_set = data.load(options.dataset, options.data_dir, options.download)
    training_set, validation_set = data.split(learning_set, options.seed)
    training_set, validation_set, test_set = (
        part.to(accelerator.device) for part in (training_set, validation_set, test_set)
    )
    network = create_network(options)
    standardise = data.Standardise.of(network, accelerator.device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=options.weight_decay
    )
    model, optimizer = accelerator.prepare(network, optimizer)  # the network in its wrappers

    best = None
    with _new_run(options.output_dir) as metrics:
        for epoch in range(1, options.epochs + 1):
            started = time.perf_counter()
            figures = train_epoch(accelerator, model, optimizer, training_set, standardise, options, epoch)
            figures["validation_error"] = evaluate(model, validation_set, standardise)
            figures["test_error"] = evaluate(model, test_set, standardise)
            figures["seconds"] = time.perf_counter() - started
            if best is None or figures["validation_error"] < best["validation_error"]:
                best = figures
                _save_weights(network, options.output_dir / WEIGHTS_FILE)
            print(json.dumps(figures), file=metrics, flush=True)
            accelerator.print(
                "epoch {epoch}: lr {lr:g}, training loss {train_loss:.4f}, errors {train_error:.2f}% in training,"
                " {validation_error:.2f}% validation, {test_error:.2f}% test, {active_blocks:.2f} active blocks,"
                " {images_per_second:.0f} images/s, {seconds:.1f} s".format(**figures)
            )
    accelerator.print(
        "test error {test_error:.2f}% at the best validation error, {validation_error:.2f}% in epoch {epoch};"
        " the weights are in {file}".format(**best, file=options.output_dir / WEIGHTS_FILE)
    )


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training_set: data.ImageSet,
    standardise: data.Standardise,
    options: Options,
    epoch: int,
) -> dict[str, float]:
    """One pass over the training images; its figures.

    Those are the mean loss and the error in percent over the epoch's batches as they were trained on, the mean number
    of active blocks a step, and images a second. Raises UserError if the loss is no longer finite.
    """
    started = time.perf_counter()
    lr = learning_rate(epoch, options.epochs, options.lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    survival = [block.survival for block in stochastic_blocks(model)]
    num_images, steps = len(training_set), math.ceil(len(training_set) / options.batch_size)
    loss_sum = torch.zeros((), device=accelerator.device)
    errors = torch.zeros((), device=accelerator.device, dtype=torch.int64)
    active_blocks = 0

    model.train()
    batches = data.training_batches(training_set, options.batch_size, standardise, options.seed, epoch)
    batches = tqdm(batches, f"epoch {epoch}/{options.epochs}", steps, unit="step", leave=False, disable=None)
    for step, (images, labels) in enumerate(batches, start=(epoch - 1) * steps):
        gates = draw_gates(survival, options.seed, step)
        with use_gates(model, gates):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        # Summed on the device: reading a figure at every step would make the host wait for it.
        loss_sum += loss.detach() * len(labels)
        errors += (logits.detach().argmax(1) != labels).sum()
        active_blocks += int(gates.sum())

    train_loss = loss_sum.item() / num_images
    if not math.isfinite(train_loss):
        raise UserError(f"the training loss of epoch {epoch} is {train_loss}: try an --lr below {options.lr:g}")
    return dict(
        epoch=epoch,
        lr=lr,
        train_loss=train_loss,
        train_error=100 * errors.item() / num_images,
        active_blocks=active_blocks / steps,
        images_per_second=num_images / (time.perf_counter() - started),
    )


@torch.inference_mode()
def evaluate(model: nn.Module, images: data.ImageSet, standardise: data.Standardise) -> float:
    """The top-1 error in percent."""
    model.eval()
    errors = sum(
        (model(batch).argmax(1) != labels).sum()
        for batch, labels in data.evaluation_batches(images, EVALUATION_BATCH_SIZE, standardise)
    )
    return 100 * errors.item() / len(images)


@contextmanager
def _new_run(folder: Path) -> Iterator[TextIO]:
    """The opened metrics file of a new run, gone again if the run ends before its first line.

    Raises UserError rather than touch a run that is there.
    """
    file = folder / METRICS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / WEIGHTS_FILE).exists():
            raise FileExistsError
        metrics = file.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"{folder} already holds a run: choose another --output") from error
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --output") from error
    try:
        with metrics:
            yield metrics
    finally:
        if not file.stat().st_size:
            file.unlink()


def _save_weights(network: nn.Module, file: Path) -> None:
    """Write a safetensors file whole or not at all."""
    partial = file.with_suffix(".partial")
    save_model(network, partial, metadata={"format": "pt"})
    os.replace(partial, file)
