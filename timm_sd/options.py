"""What a training run is asked to be."""

import math
from dataclasses import dataclass
from pathlib import Path

import timm

from .errors import UserError
from .stochastic_depth import SCHEDULES

MODELS = timm.list_models(module="cifar_resnet")
DATASETS = ("cifar10", "cifar100", "synthetic")
LR_SCHEDULES = ("steps", "one-cycle")


@dataclass(frozen=True)
class Options:
    """The options of a run. The defaults are the authors' protocol on CIFAR-10.

    `batch_size` counts the images of a step over all processes. `lr_schedule` is "steps", the authors', or "one-cycle",
    for runs of a few epochs. `drop_path` is 1 - p_L, None for the network's own, and `drop_path_schedule` how the
    survival probabilities decay to p_L.
    `output` is the run's folder, None for one named after the model, the data set and the seed. `checkpoint_steps` asks
    for a checkpoint every so many steps of an epoch, beside the one at its end.

    Raises UserError for a value that is not allowed.
    """

    model: str = "cifar_resnet110_sd"
    dataset: str = "cifar10"
    data_dir: Path = Path("data")
    download: bool = False
    epochs: int = 500
    batch_size: int = 128
    lr: float = 0.1
    lr_schedule: str = "steps"
    weight_decay: float = 1e-4
    drop_path: float | None = None
    drop_path_schedule: str = "linear"
    seed: int = 0
    sync_bn: bool = False
    grad_checkpointing: bool = False
    cuda_graphs: bool = False
    output: Path | None = None
    resume: bool = False
    checkpoint_steps: int | None = None
    keep_checkpoints: int = 2
    log_with: str | None = None

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise UserError(f"--model {self.model}: there is no such network; there are {', '.join(MODELS)}")
        if self.dataset not in DATASETS:
            raise UserError(f"--dataset {self.dataset}: there is no such data set; there are {', '.join(DATASETS)}")
        for flag, value, choices in (
            ("--lr-schedule", self.lr_schedule, LR_SCHEDULES),
            ("--drop-path-schedule", self.drop_path_schedule, SCHEDULES),
        ):
            if value not in choices:
                raise UserError(f"{flag} {value}: it must be {' or '.join(choices)}")
        for flag, value, allowed, range_ in (
            ("--epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("--lr", self.lr, 0 < self.lr < math.inf, "positive"),
            ("--weight-decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0"),
            ("--drop-path", self.drop_path, self.drop_path is None or 0 <= self.drop_path < 1, "in [0, 1)"),
            ("--seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2^32)"),
            (
                "--checkpoint-steps",
                self.checkpoint_steps,
                self.checkpoint_steps is None or self.checkpoint_steps >= 1,
                "at least 1",
            ),
            ("--keep-checkpoints", self.keep_checkpoints, self.keep_checkpoints >= 1, "at least 1"),
        ):
            if not allowed:
                raise UserError(f"{flag} {value}: it must be {range_}")
        if self.cuda_graphs and self.grad_checkpointing:
            raise UserError("--cuda-graphs keeps every activation: leave out --grad-checkpointing")

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.output or Path("output") / f"{self.model}-{self.dataset}-seed{self.seed}"

    @property
    def tag(self) -> str:
        """The network's name with the tag of its data configuration, as timm knows it."""
        return f"{self.model}.{'cifar10' if self.dataset == 'synthetic' else self.dataset}"
