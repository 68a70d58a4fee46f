"""The options of a training run, each declared once for Python, config.json and the command line."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import timm

from .command_line import path
from .errors import UserError
from .stochastic_depth import SCHEDULES

MODELS = tuple(timm.list_models(module="cifar_resnet"))
DATASETS = ("cifar10", "cifar100", "synthetic")
LR_SCHEDULES = ("steps", "one-cycle")
PAPER_EPOCHS = 500
# Groups of options in --help.
RUN, COMPUTATION, OUTPUT = "training", "computation", "output"
AT_LEAST_1 = (lambda value: value >= 1, "at least 1")


def option(
    default: Any,
    group: str,
    help: str,
    choices: tuple[str, ...] | None = None,
    valid: tuple[Callable[[Any], bool], str] | None = None,
    free: bool = False,
) -> Any:
    """A field of `Options`, with its `choices`, or with a test for `valid` values and its description.

    A `free` one does not affect the weights, so a resumed run may change it.
    """
    return field(default=default, metadata=dict(group=group, help=help, choices=choices, valid=valid, free=free))


@dataclass(frozen=True)
class Options:
    """The options of a run. The defaults are the authors' protocol on CIFAR-10.

    Raises UserError for a value of the wrong type or one that is not valid.
    """

    model: str = option("cifar_resnet110_sd", RUN, "one of timm_sd's networks", MODELS)
    dataset: str = option("cifar10", RUN, "the data set", DATASETS)
    data_dir: Path = option(Path("data"), RUN, "folder with torchvision's CIFAR files", free=True)
    download: bool = option(False, RUN, "download the CIFAR files to --data-dir", free=True)
    epochs: int = option(PAPER_EPOCHS, RUN, "passes over the training images", valid=AT_LEAST_1)
    batch_size: int = option(128, RUN, "images per step, across all processes", valid=AT_LEAST_1)
    lr: float = option(0.1, RUN, "peak learning rate", valid=(lambda lr: 0 < lr <= 1e30, "in (0, 1e30]"))
    lr_schedule: str = option("steps", RUN, "steps (the authors') or one-cycle (for short runs)", LR_SCHEDULES)
    weight_decay: float = option(
        1e-4, RUN, "applied to every parameter", valid=(lambda decay: 0 <= decay <= 1e30, "in [0, 1e30]")
    )
    drop_path: float | None = option(
        None, RUN, "1 - p_L; if omitted, the network's own", valid=(lambda rate: 0 <= rate < 1, "in [0, 1)")
    )
    drop_path_schedule: str = option("linear", RUN, "linear (the paper's) or uniform", SCHEDULES)
    seed: int = option(
        0, RUN, "seed for everything random in the run", valid=(lambda seed: 0 <= seed < 2**32, "in [0, 2^32)")
    )
    sync_bn: bool = option(False, COMPUTATION, "normalize over the whole batch instead of each GPU's part")
    grad_checkpointing: bool = option(False, COMPUTATION, "recompute blocks in the backward pass to save memory")
    cuda_graphs: bool = option(False, COMPUTATION, "replay blocks as CUDA graphs; no effect without CUDA")
    output: Path | None = option(
        None, OUTPUT, "the run's folder; if omitted, one in output/ named after its options", free=True
    )
    resume: bool = option(False, OUTPUT, "continue from the folder's newest checkpoint", free=True)
    checkpoint_steps: int | None = option(
        None, OUTPUT, "steps between checkpoints, in addition to one after each epoch", valid=AT_LEAST_1, free=True
    )
    keep_checkpoints: int = option(2, OUTPUT, "number of checkpoints to keep", valid=AT_LEAST_1, free=True)
    log_with: str | None = option(None, OUTPUT, "one of Accelerate's trackers: tensorboard, wandb, ...", free=True)

    def __post_init__(self) -> None:
        kinds = get_type_hints(Options)
        for declared in fields(Options):
            name, value, kind = declared.name, getattr(self, declared.name), kinds[declared.name]
            if not _is_a(value, kind):
                raise UserError(f"{flag(name)} {value!r}: it must be of type {getattr(kind, '__name__', kind)}")
            choices, valid = declared.metadata["choices"], declared.metadata["valid"]
            if choices and value not in choices:
                raise UserError(f"{flag(name)} {value}: it must be one of {', '.join(choices)}")
            if valid and value is not None and not valid[0](value):
                raise UserError(f"{flag(name)} {value}: it must be {valid[1]}")
        if self.output_dir == self.output_dir.parent:
            raise UserError(f"--output {self.output}: a run needs a folder of its own")
        if self.cuda_graphs and self.grad_checkpointing:
            raise UserError("--cuda-graphs keeps every activation: omit --grad-checkpointing")

    @property
    def output_dir(self) -> Path:
        """The run's folder as an absolute path."""
        named = ("model", "dataset", "seed")
        others = [
            f"-{name.replace('_', '-')}{getattr(self, name)}"
            for name in BOUND_OPTIONS
            if name not in named and getattr(self, name) != getattr(Options, name)
        ]
        default = Path("output") / f"{self.model}-{self.dataset}-seed{self.seed}{''.join(others)}"
        return (self.output or default).expanduser().absolute()

    @property
    def data_tag(self) -> str:
        """The network's name with the tag of its data configuration, as registered with timm."""
        return f"{self.model}.{'cifar10' if self.dataset == 'synthetic' else self.dataset}"

    @property
    def weights_tag(self) -> str:
        """The name of the run's weights. The tag is the data set alone for the paper's recipe, else it says more."""
        recipe = ("epochs", "batch_size", "lr", "lr_schedule", "weight_decay", "drop_path", "drop_path_schedule")
        is_papers = all(getattr(self, name) == getattr(Options, name) for name in recipe)
        return f"{self.model}.{'' if is_papers else f'e{self.epochs}_'}{self.dataset}"


BOUND_OPTIONS = tuple(declared.name for declared in fields(Options) if not declared.metadata["free"])


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all the options to a parser, as arguments for `Options`."""
    kinds = get_type_hints(Options)
    groups = {title: parser.add_argument_group(title) for title in (RUN, COMPUTATION, OUTPUT)}
    for declared in fields(Options):
        kind = (get_args(kinds[declared.name]) or (kinds[declared.name],))[0]
        add = groups[declared.metadata["group"]].add_argument
        if kind is bool:
            add(flag(declared.name), action="store_true", help=declared.metadata["help"])
        else:
            add(
                flag(declared.name),
                type=path if kind is Path else kind,
                default=declared.default,
                choices=declared.metadata["choices"],
                help=declared.metadata["help"],
            )


def _is_a(value: object, kind: type) -> bool:
    """Whether a value has a type; integers count as floats too, bools as neither."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind) and abs(value) < 2**53)
