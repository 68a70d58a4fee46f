"""What a training run is asked to be."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import timm

from .errors import UserError
from .stochastic_depth import SCHEDULES

MODELS = timm.list_models(module="cifar_resnet")
DATASETS = ("cifar10", "cifar100", "synthetic")
LR_SCHEDULES = ("steps", "one-cycle")
# What these say leaves the weights alone, so a resumed run may say something else.
FREE_OPTIONS = ("data_dir", "download", "output", "resume", "checkpoint_steps", "keep_checkpoints", "log_with")


@dataclass(frozen=True)
class Options:
    """The options of a run. The defaults are the authors' protocol on CIFAR-10.

    `batch_size` counts the images of a step over all processes. `lr_schedule` is "steps", the authors', or "one-cycle",
    for runs of a few epochs. `drop_path` is 1 - p_L, None for the network's own, and `drop_path_schedule` how the
    survival probabilities decay to p_L.
    `output` is the run's folder, None for one named after the model, the data set, the seed and what differs from the
    defaults. `checkpoint_steps` asks for a checkpoint every so many steps of an epoch, beside the one at its end.

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
        for name, kind in get_type_hints(Options).items():
            if not _is_a(getattr(self, name), kind):
                kind = getattr(kind, "__name__", kind)
                raise UserError(f"{flag(name)} {getattr(self, name)!r}: it must be of type {kind}")
        if self.model not in MODELS:
            raise UserError(f"--model {self.model}: there is no such network; there are {', '.join(MODELS)}")
        if self.dataset not in DATASETS:
            raise UserError(f"--dataset {self.dataset}: there is no such data set; there are {', '.join(DATASETS)}")
        for name, choices in (("lr_schedule", LR_SCHEDULES), ("drop_path_schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise UserError(f"{flag(name)} {getattr(self, name)}: it must be {' or '.join(choices)}")
        for name, allowed, range_ in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "positive and finite"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("drop_path", self.drop_path is None or 0 <= self.drop_path < 1, "in [0, 1)"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2^32)"),
            ("checkpoint_steps", self.checkpoint_steps is None or self.checkpoint_steps >= 1, "at least 1"),
            ("keep_checkpoints", self.keep_checkpoints >= 1, "at least 1"),
        ):
            if not allowed:
                raise UserError(f"{flag(name)} {getattr(self, name)}: it must be {range_}")
        if self.output_dir == self.output_dir.parent:
            raise UserError(f"--output {self.output}: it must be a folder of the run's own")
        if self.cuda_graphs and self.grad_checkpointing:
            raise UserError("--cuda-graphs keeps every activation: leave out --grad-checkpointing")

    @property
    def output_dir(self) -> Path:
        """The run's folder, an absolute path."""
        named = ("model", "dataset", "seed")
        others = [
            f"-{name.replace('_', '-')}{getattr(self, name)}"
            for name in BOUND_OPTIONS
            if name not in named and getattr(self, name) != getattr(Options, name)
        ]
        default = Path("output") / f"{self.model}-{self.dataset}-seed{self.seed}{''.join(others)}"
        return (self.output or default).expanduser().absolute()

    @property
    def tag(self) -> str:
        """The network's name with the tag of its data configuration, as timm knows it."""
        return f"{self.model}.{'cifar10' if self.dataset == 'synthetic' else self.dataset}"


BOUND_OPTIONS = [field.name for field in fields(Options) if field.name not in FREE_OPTIONS]


def flag(name: str) -> str:
    """An option as the command line has it."""
    return f"--{name.replace('_', '-')}"


def _is_a(value: object, kind: type) -> bool:
    """Whether a value is of a type, integers being floats too, and bools being neither."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind) and abs(value) < 2**53)
