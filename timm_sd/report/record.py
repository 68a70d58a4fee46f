"""A finished run, read from its folder's config.json and metrics.jsonl alone."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import UserError
from ..gate import gates
from ..paper import datasets
from ..train.options import BOUND_OPTIONS, GROUPS, REGULARIZATION, Options, flag
from ..train.run_folder import Progress, RunFolder, read_config, read_options, summarize

# The facts in every environment. All but the first also have "since", the checkpoint that was resumed there.
MACHINE = ("device", "processor", "processes", "threads")  # what the speed depends on most
VERSIONS = ("dynamo_backend", "timm_sd", "python", "torch", "torchvision", "timm", "accelerate")


@dataclass(frozen=True)
class Record:
    """A finished run: its options, the `machine.environment` of each place it ran in, and the metrics of its epochs."""

    path: Path
    options: Options
    mixed_precision: str
    environments: list[dict]
    history: list[dict[str, float]]

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The run in a folder. Raises UserError if there is none, or it is unfinished or damaged."""
        config, options = read_config(path), read_options(path)
        for name in (*MACHINE, *VERSIONS):
            if any(name not in where for where in config["environments"]):
                raise UserError(f"{path / 'config.json'} is damaged: an environment has no {name}")
        precision = config["options"].get("mixed_precision")
        if precision not in ("no", "bf16"):
            raise UserError(f"{path / 'config.json'} is from another version or damaged: no valid mixed_precision")
        folder = RunFolder(path)
        try:
            history = folder.read_metrics()
        except FileNotFoundError:
            history = []
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder.metrics} is damaged ({error}): training with --resume rewrites it") from error
        if len(history) != options.epochs:
            raise UserError(
                f"{path} is unfinished ({len(history)} of {options.epochs} epochs): training with --resume finishes it"
            )
        return cls(path, options, precision, config["environments"], history)

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the epoch with the lowest validation error."""
        return Progress(self.history).best

    @property
    def machine(self) -> tuple[str | int, ...]:
        """The machine that the run began on."""
        return tuple(self.environments[0][name] for name in MACHINE)

    @property
    def other_facts(self) -> list[str]:
        """The names of facts about the environments that this version of the package does not know."""
        known = {*MACHINE, *VERSIONS, "git_commit", "numpy", "fused", "since"}
        return list({name: None for where in self.environments for name in where if name not in known})

    @property
    def before_move(self) -> list[dict[str, float]]:
        """The metrics of the epochs before the run moved to another machine: of all epochs if it did not."""
        for where in self.environments[1:]:
            if tuple(where[name] for name in MACHINE) != self.machine:
                return self.history[: int(where["since"].split("-")[1]) - 1]
        return self.history

    @property
    def summary(self) -> dict[str, object]:
        """The result, as in summary.json."""
        return summarize(self.options, self.history)

    @property
    def dataset(self) -> datasets.DataSet:
        """The data set, and how the authors use it."""
        return datasets.DATASETS[self.options.dataset]

    @cached_property
    def survival(self) -> list[float]:
        """The survival probabilities p_1..p_L."""
        return [gate.survival for gate in gates(self.options.create_model(device="meta"))]

    @property
    def stochastic(self) -> bool:
        """Whether the network has stochastic depth."""
        return min(self.survival) < 1

    @property
    def schedule(self) -> str:
        """The schedule of the survival probabilities, or "given" if the run was given the probabilities themselves."""
        schedule = self.options.drop_path_schedule
        return schedule if isinstance(schedule, str) else "given"

    @property
    def regularizers(self) -> list[str]:
        """Those other than stochastic depth, with their strength."""
        names = [name for name in self.options.changed if GROUPS[name] == REGULARIZATION]
        return [f"{name.replace('_', ' ')} {getattr(self.options, name):g}" for name in names]

    @property
    def traits(self) -> dict[str, object]:
        """Everything that defines the run: runs with equal traits are the same."""
        names = [name for name in BOUND_OPTIONS if name not in ("model", "drop_path", "drop_path_schedule")]
        return dict(
            depth=self.options.depth,
            p_L=self.survival[-1],
            drop_path_schedule=self.options.drop_path_schedule if self.stochastic else None,
            **{name: getattr(self.options, name) for name in names},
            mixed_precision=self.mixed_precision,
        )

    @property
    def published(self) -> tuple[float, str] | None:
        """The published test error in percent of this network on this data set, and its source; or None."""
        if self.stochastic and (self.survival[-1] != 0.5 or self.options.drop_path_schedule != "linear"):
            return None
        trained = "stochastic" if self.stochastic else "constant"
        return datasets.PUBLISHED.get((self.options.depth, trained, self.options.dataset))

    @property
    def command(self) -> str:
        """The command that reproduces the run."""
        environment = self.environments[0]
        launcher = []
        if environment["processes"] > 1:
            launcher += ["--multi_gpu", "--num_processes", environment["processes"]]
        if self.mixed_precision != "no":
            launcher += ["--mixed_precision", self.mixed_precision]
        if environment["dynamo_backend"] != "NO":
            launcher += ["--dynamo_backend", environment["dynamo_backend"].lower()]
        words = ["accelerate", "launch", *launcher] if launcher else ["python"]
        if environment["processes"] > 1 and environment["device"] == "cpu":  # --multi_gpu then needs no GPU
            words = ["ACCELERATE_USE_CPU=1", *words]
        words += ["train_scripts/train.py", "--model", self.options.model]
        for name in ("dataset", "seed", *self.options.changed):
            value = getattr(self.options, name)
            if value != getattr(Options, name):
                value = ",".join(map(str, value)) if isinstance(value, tuple) else value
                words += [flag(name)] + ([] if value is True else [value])
        if environment.get("fused"):
            words.append("--fused")
        return shlex.join(map(str, words))
