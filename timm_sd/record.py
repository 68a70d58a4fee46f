"""A run as its folder tells it, in config.json and metrics.jsonl alone."""

import json
import math
import shlex
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import timm

from .data import TRAINING_IMAGES
from .errors import UserError
from .options import Options
from .run_folder import FREE_OPTIONS, Progress, RunFolder, read_config

BOUND_OPTIONS = [field.name for field in fields(Options) if field.name not in FREE_OPTIONS]


@dataclass(frozen=True)
class Record:
    """A finished run: its config.json, and the figures of every epoch."""

    path: Path
    config: dict
    history: list[dict[str, float]]

    @classmethod
    def read(cls, path: Path) -> "Record":
        """What a folder tells. Raises UserError if it holds no run, an unfinished one, or files of several."""
        metrics = RunFolder(path).metrics
        try:
            history = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            epochs = [figures["epoch"] for figures in history]
        except FileNotFoundError:
            history = epochs = []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{metrics} is damaged: train.py --resume writes it again") from error
        record = cls(path, read_config(path), history)
        asked = record.options.epochs
        if epochs != list(range(1, asked + 1)):
            raise UserError(
                f"{path} holds an unfinished run, {len(epochs)} of {asked} epochs: train.py --resume goes on with it"
            )
        return record

    @cached_property
    def options(self) -> Options:
        """What the run was asked to be, without what leaves its weights alone."""
        return Options(**{name: value for name, value in self.config["options"].items() if name in BOUND_OPTIONS})

    @property
    def mixed_precision(self) -> str:
        """Accelerate's name of the precision it was trained in."""
        return self.config["options"]["mixed_precision"]

    @property
    def environments(self) -> list[dict]:
        """Where it ran, as `training.environment` says it."""
        return self.config["environments"]

    @property
    def best(self) -> dict[str, float]:
        """The figures of the lowest validation error."""
        return Progress(self.history).best

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last epoch."""
        return self.history[-1]

    @property
    def seconds(self) -> float:
        """Of all epochs, evaluation included."""
        return sum(figures["seconds"] for figures in self.history)

    @property
    def steps(self) -> int:
        """An epoch."""
        return math.ceil(TRAINING_IMAGES[self.options.dataset] / self.options.batch_size)

    @cached_property
    def survival(self) -> list[float]:
        """The survival probabilities p_1..p_L."""
        options = self.options
        network = timm.create_model(
            options.tag,
            drop_path_rate=options.drop_path,
            drop_path_schedule=options.drop_path_schedule,
            device="meta",
        )
        return network.survival_probabilities

    @property
    def depth(self) -> int:
        """The network's layers with weights, 2L + 2."""
        return 2 * len(self.survival) + 2

    @property
    def command(self) -> str:
        """What trains it again."""
        defaults = Options()
        environment = self.environments[0]
        words = ["accelerate", "launch"]
        if environment["processes"] > 1:
            words += ["--multi_gpu", "--num_processes", environment["processes"]]
        if self.mixed_precision != "no":
            words += ["--mixed_precision", self.mixed_precision]
        if environment["dynamo_backend"] != "NO":
            words += ["--dynamo_backend", environment["dynamo_backend"].lower()]
        words += ["train_scripts/train.py", "--model", self.options.model]
        for name in BOUND_OPTIONS:
            value = getattr(self.options, name)
            if name != "model" and value != getattr(defaults, name):
                words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
        return shlex.join(map(str, words))
