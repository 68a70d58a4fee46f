"""The options of a training run, each declared once for Python, config.json and the command line."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import timm
from torch import nn

from ..command_line import path
from ..errors import UserError
from ..paper.cifar_resnet import is_depth, register_depth
from ..paper.datasets import DATASETS
from ..paper.stochastic_depth import SCHEDULES, survival_probabilities

LR_SCHEDULES = ("steps", "one-cycle")
# Groups of options in --help.
RUN, REGULARIZATION, COMPUTATION, OUTPUT = "training", "regularization", "computation", "output"
COUNT = (lambda value: value >= 1, "positive")
FRACTION = (lambda value: 0 <= value < 1, "in [0, 1)")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
ALPHA = (lambda value: value == 0 or 1e-6 <= value <= 1e6, "0, or in [1e-6, 1e6]")  # others overflow


def is_model(name: str) -> bool:
    """Whether a name is that of a CIFAR ResNet, registered or not."""
    match = re.fullmatch(r"cifar_resnet([1-9][0-9]{,4})(_sd)?", name)
    return match is not None and is_depth(int(match[1]))


def schedule(text: str) -> str | tuple[float, ...]:
    """Argument type: a schedule's name, or survival probabilities separated by commas, or a file of them."""
    if text in SCHEDULES:
        return text
    try:
        numbers = text if "," in text else path(text).read_text(encoding="utf-8")
        return tuple(float(number) for number in re.split(r"[\s,]+", numbers.strip()))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(
            f"it must be {', '.join(SCHEDULES)}, probabilities separated by commas, or a file of them ({reason})"
        ) from error


def option(
    default: Any,
    group: str,
    help: str,
    choices: tuple[str, ...] | None = None,
    valid: tuple[Callable[[Any], bool], str] | None = None,
    free: bool = False,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A field of `Options`, with its `choices`, or with a test for `valid` values and its description.

    A `free` one does not affect the weights, so a resumed run may change it. `parse` is the argument type on the
    command line if it is not the field's own.
    """
    return field(
        default=default, metadata=dict(group=group, help=help, choices=choices, valid=valid, free=free, parse=parse)
    )


@dataclass(frozen=True)
class Options:
    """The options of a run. The defaults are the authors' protocol on CIFAR-10.

    Raises UserError for a value of the wrong type or one that is not valid.
    """

    model: str = option(
        "cifar_resnet110_sd",
        RUN,
        "cifar_resnetN or cifar_resnetN_sd, for any depth N = 6n + 2",
        valid=(is_model, "cifar_resnetN or cifar_resnetN_sd, where N = 6n + 2"),
    )
    dataset: str = option("cifar10", RUN, "the data set", tuple(DATASETS))
    data_dir: Path = option(Path("data"), RUN, "folder with torchvision's files", free=True)
    download: bool = option(False, RUN, "download the files to --data-dir", free=True)
    epochs: int | None = option(
        None,
        RUN,
        "passes over the training images; if omitted, the paper's: 500, and 50 for svhn; 20 for synthetic",
        valid=COUNT,
    )
    batch_size: int = option(128, RUN, "images per step, across all processes", valid=COUNT)
    lr: float = option(0.1, RUN, "peak learning rate", valid=(lambda lr: lr > 0, "positive"))
    lr_schedule: str = option("steps", RUN, "steps (the authors') or one-cycle (for short runs)", LR_SCHEDULES)
    weight_decay: float = option(1e-4, RUN, "applied to every parameter", valid=NOT_NEGATIVE)
    drop_path: float | None = option(None, RUN, "1 - p_L; if omitted, the network's own", valid=FRACTION)
    drop_path_schedule: str | tuple = option(
        "linear",
        RUN,
        f"{', '.join(SCHEDULES)}, or the probabilities p_1,...,p_L or a file of them",
        parse=schedule,
    )
    seed: int = option(
        0, RUN, "seed for everything random in the run", valid=(lambda seed: 0 <= seed < 2**32, "in [0, 2^32)")
    )
    label_smoothing: float = option(0.0, REGULARIZATION, "share of the label spread over all classes", valid=FRACTION)
    random_erasing: float = option(
        0.0,
        REGULARIZATION,
        "probability that a rectangle of an image is erased",
        valid=(lambda p: 0 <= p <= 1, "in [0, 1]"),
    )
    mixup: float = option(0.0, REGULARIZATION, "alpha of mixup", valid=ALPHA)
    cutmix: float = option(0.0, REGULARIZATION, "alpha of CutMix; with mixup, each batch gets one of them", valid=ALPHA)
    dropout: float = option(0.0, REGULARIZATION, "probability of dropout before the classifier", valid=FRACTION)
    ema_decay: float = option(
        0.0,
        REGULARIZATION,
        "decay per step of a moving average of the weights, which is then evaluated and saved instead of them",
        valid=FRACTION,
    )
    sync_bn: bool = option(False, COMPUTATION, "normalize over the whole batch instead of each GPU's part")
    grad_checkpointing: bool = option(False, COMPUTATION, "recompute blocks in the backward pass to save memory")
    cuda_graphs: bool = option(False, COMPUTATION, "replay blocks as CUDA graphs; no effect without CUDA")
    fused: bool = option(
        False, COMPUTATION, "train with fused Triton kernels, on one NVIDIA GPU in bfloat16", free=True
    )
    output: Path | None = option(
        None, OUTPUT, "the run's folder; if omitted, one in output/ named after its options", free=True
    )
    resume: bool = option(False, OUTPUT, "continue from the folder's newest checkpoint", free=True)
    checkpoint_steps: int | None = option(
        None, OUTPUT, "steps between checkpoints, in addition to one after each epoch", valid=COUNT, free=True
    )
    keep_checkpoints: int = option(2, OUTPUT, "number of checkpoints to keep", valid=COUNT, free=True)
    log_with: str | None = option(None, OUTPUT, "one of Accelerate's trackers: tensorboard, wandb, ...", free=True)

    def __post_init__(self) -> None:
        kinds = get_type_hints(Options)
        for declared in fields(Options):
            name, value, kind = declared.name, getattr(self, declared.name), kinds[declared.name]
            if not _is_a(value, kind) or (isinstance(value, tuple) and not all(_is_a(p, float) for p in value)):
                kinds_of_value = [each.__name__ for each in get_args(kind) or (kind,) if each is not NoneType]
                raise UserError(f"{flag(name)} {value!r}: it must be of type {' or '.join(kinds_of_value)}")
            choices, valid = declared.metadata["choices"], declared.metadata["valid"]
            if choices and value not in choices:
                raise UserError(f"{flag(name)} {value}: it must be one of {', '.join(choices)}")
            if valid and value is not None and not valid[0](value):
                raise UserError(f"{flag(name)} {value}: it must be {valid[1]}")
        if self.epochs is None:
            short = self.dataset == "synthetic"  # which is for a first try
            object.__setattr__(self, "epochs", 20 if short else DATASETS[self.dataset].epochs)
        if isinstance(self.drop_path_schedule, tuple) and self.drop_path is not None:
            raise UserError("--drop-path has no effect on given probabilities: omit it")
        try:
            survival_probabilities((self.depth - 2) // 2, 1.0, self.drop_path_schedule)
        except ValueError as error:
            raise UserError(f"--drop-path-schedule: {error}") from error
        if self.output_dir == self.output_dir.parent:
            raise UserError(f"--output {self.output}: a run needs a folder of its own")
        if self.cuda_graphs and self.grad_checkpointing:
            raise UserError("--cuda-graphs keeps every activation: omit --grad-checkpointing")
        unsupported = [name for name in self.changed if GROUPS[name] in (REGULARIZATION, COMPUTATION)]
        if self.fused and unsupported:
            raise UserError(f"--fused does without {', '.join(map(flag, unsupported))}: omit one or the other")

    @property
    def depth(self) -> int:
        """The network's layers with weights, 2L + 2."""
        return int(re.search(r"[0-9]+", self.model)[0])

    def create_model(self, device: str | None = None) -> nn.Module:
        """The network, not trained, with the data set's configuration."""
        register_depth(self.depth)
        network = timm.create_model(self.data_tag, device=device, **self.model_args)
        if self.dataset == "synthetic":  # which has the configuration of CIFAR-10, but for the classes
            network.pretrained_cfg |= dict(tag="synthetic", label_names=DATASETS[self.dataset].labels)
        return network

    @property
    def model_args(self) -> dict[str, object]:
        """The arguments of `timm.create_model` besides the network's name."""
        args = dict(drop_path_rate=self.drop_path, drop_path_schedule=self.drop_path_schedule)
        return {name: value for name, value in args.items() if value is not None}

    @property
    def changed(self) -> list[str]:
        """The names of the options that are not the paper's, without model, data set, seed and those that are free."""
        papers = DEFAULTS | {"epochs": DATASETS[self.dataset].epochs}
        return [
            name
            for name in BOUND_OPTIONS
            if name not in ("model", "dataset", "seed") and getattr(self, name) != papers[name]
        ]

    @property
    def output_dir(self) -> Path:
        """The run's folder as an absolute path."""
        values = {name: getattr(self, name) for name in self.changed}
        if isinstance(self.drop_path_schedule, tuple):
            values["drop_path_schedule"] = "-given"  # a name of 54 numbers would be too long
        changed = [f"-{name.replace('_', '-')}{value}" for name, value in values.items()]
        default = Path("output") / f"{self.model}-{self.dataset}-seed{self.seed}{''.join(changed)}"
        return (self.output or default).expanduser().absolute()

    @property
    def data_tag(self) -> str:
        """The network's name with the tag of its data configuration, as registered with timm."""
        return f"{self.model}.{'cifar10' if self.dataset == 'synthetic' else self.dataset}"

    @property
    def weights_tag(self) -> str:
        """The name of the run's weights. The tag is the data set alone for the paper's recipe, else it says more."""
        recipe = [name for name in self.changed if GROUPS[name] != COMPUTATION]
        words = [name.replace("_", "-") for name in recipe if GROUPS[name] == REGULARIZATION]
        tag = "_".join([f"e{self.epochs}", *words, self.dataset] if recipe else [self.dataset])
        return f"{self.model}.{tag}"


BOUND_OPTIONS = tuple(declared.name for declared in fields(Options) if not declared.metadata["free"])
DEFAULTS = {
    name: getattr(Options, name) for name in BOUND_OPTIONS if name != "model"
}  # all but the model, which every run states
GROUPS = {declared.name: declared.metadata["group"] for declared in fields(Options)}


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all the options to a parser, as arguments for `Options`."""
    kinds = get_type_hints(Options)
    groups = {title: parser.add_argument_group(title) for title in (RUN, REGULARIZATION, COMPUTATION, OUTPUT)}
    for declared in fields(Options):
        kind = (get_args(kinds[declared.name]) or (kinds[declared.name],))[0]
        add = groups[declared.metadata["group"]].add_argument
        if kind is bool:
            add(flag(declared.name), action="store_true", help=declared.metadata["help"])
        else:
            add(
                flag(declared.name),
                type=declared.metadata["parse"] or (path if kind is Path else kind),
                default=declared.default,
                choices=declared.metadata["choices"],
                help=declared.metadata["help"],
            )


def _is_a(value: object, kind: type) -> bool:
    """Whether a value has a type; integers count as floats too, bools as neither."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind) and abs(value) < 2**53)
