"""The files that a run writes, each complete at any moment:

    config.json         the options, the environments it ran in, and how timm creates the network
    metrics.jsonl       one line of metrics per epoch
    model.safetensors   the weights with the lowest validation error
    summary.json        the result and the weights' SHA-256, once the run is finished
    checkpoints/        the last few states to resume from
    lock                held by the process that trains or publishes

A checkpoint is self-contained: it includes the configuration, metrics and best weights, and the SHA-256 of each of its
files. The files next to it are copies for the reader. Resuming rewrites them, so they never include steps that were
lost.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import nn

from ..errors import UserError
from ..files import check_sums, parse_json, read_json, sha256, sync, write, write_json, write_sums, writing
from .metrics import SUMS, check_metrics
from .options import BOUND_OPTIONS, DEFAULTS, Options

BEST_FILE = "best.safetensors"
CONFIG_FILE = "config.json"
PROGRESS_FILE = "progress.json"
WAY_OUT = (
    "choose another --output, or free up space if the disk is full; existing checkpoints are intact, and --resume"
    " continues from them"
)


def write_metrics(file: Path, history: list[dict[str, float]]) -> None:
    """Write one line of metrics per epoch."""
    write(file, "".join(json.dumps(line) + "\n" for line in history).encode())


def summarize(options: Options, history: list[dict[str, float]]) -> dict[str, object]:
    """The result of a run; the paper reports the test error at the lowest validation error."""
    best = Progress(history).best
    return dict(
        model=options.model,
        dataset=options.dataset,
        seed=options.seed,
        epochs=options.epochs,
        best_epoch=best["epoch"],
        validation_error=best["validation_error"],
        test_error=best["test_error"],
        last_test_error=history[-1]["test_error"],
        seconds=sum(line["seconds"] for line in history),
    )


@dataclass
class Progress:
    """How far a run has come: the metrics of the finished epochs, and the totals so far of the current one.

    Of the current epoch, `steps` are done; `sums` has one row per process, in the order of `SUMS`; `active_blocks` is
    summed over the steps; and `seconds` have passed.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    sums: list[list[float]] = field(default_factory=list)
    active_blocks: int = 0
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """The current epoch, from 1."""
        return len(self.history) + 1

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the epoch with the lowest validation error, the first of ties."""
        return min(self.history, key=lambda line: line["validation_error"])

    @property
    def name(self) -> str:
        """The name of a checkpoint at this point."""
        return f"epoch-{self.epoch:05d}-step-{self.steps:06d}"


class RunFolder:
    """The files of one run. All methods but `load` are for the main process only; all raise UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG_FILE
        self.metrics = path / "metrics.jsonl"
        self.weights = path / "model.safetensors"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.lock = FileLock(path / "lock")
        self.configuration: dict = {}
        self.last: Path | None = None  # the newest checkpoint, if any

    def acquire(self) -> None:
        """Lock the folder until `close`, so that only one process at a time trains or publishes in it."""
        with writing(self.path, "choose a folder that is writable, on a file system that has locks"):
            try:
                self.lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(
                    f"another process is training or publishing in {self.path}: wait for it, or choose another folder"
                ) from error

    def open(self, options: dict, environment: dict, network: dict, resume: bool) -> tuple[Progress, str, Path | None]:
        """Lock the folder until `close`, and start a run in it or, with `resume`, continue the existing one.

        `network` is what timm needs to create the network from the folder, as in `local-dir:FOLDER`.

        Returns its progress, in words how the environment differs from the previous one, and the checkpoint to load,
        None for a new run. An existing run is never touched without `resume` or with other options.
        """
        with writing(self.path, WAY_OUT):
            self.path.mkdir(parents=True, exist_ok=True)
            self.acquire()
            everything = self._all_checkpoints()
            if not everything or not resume:
                if everything or self.metrics.exists() or self.weights.exists():
                    way_out = "continue it with --resume, or " if everything else ""
                    raise UserError(f"{self.path} already has a run: {way_out}choose another --output")
                self.configuration = {"options": options, "environments": [environment], **network}
                write_json(self.config, self.configuration)
                return Progress(), "", None

        self.last = everything[-1]
        self.configuration, progress = self._read(self.last)
        bound = {name: options[name] for name in (*BOUND_OPTIONS, "mixed_precision")}
        if differing := _differences(DEFAULTS | self.configuration["options"], bound):
            raise UserError(f"{self.path} has a run with different options ({differing}): choose another --output")
        if progress.epoch > options["epochs"]:  # finished: it takes no step here
            return progress, "", self.last
        environments = self.configuration["environments"]
        before = {"fused": False} | environments[-1]  # older runs do not say so
        known = {name: value for name, value in environment.items() if name in before}
        if differing := _differences(before, known):
            environments.append(environment | {"since": self.last.name})
        return progress, differing, self.last

    def close(self) -> None:
        """Unlock the folder."""
        self.lock.release()

    def load(self, checkpoint: Path, accelerator: Accelerator) -> None:
        """Restore what `accelerator` prepared from a checkpoint."""
        try:
            accelerator.load_state(checkpoint)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any type: PyTorch and Accelerate trust what they read
            raise UserError(f"{checkpoint} cannot be loaded ({type(error).__name__}: {error})") from error

    def save(self, accelerator: Accelerator, progress: Progress, keep: int, best: nn.Module | None = None) -> None:
        """Write a checkpoint and update the files next to it, then delete all but the newest `keep`.

        `best` has the best weights if they are new; otherwise they are copied from the previous checkpoint.
        """
        checkpoint = self.checkpoints / progress.name
        if checkpoint == self.last:  # a run that was resumed and stopped before another step
            return
        partial = self.checkpoints / "partial"
        with writing(self.path, WAY_OUT):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                accelerator.save_state(partial)
                if best is not None:
                    # safetensors refuses channels_last tensors.
                    weights = {name: tensor.contiguous() for name, tensor in best.state_dict().items()}
                    save_file(weights, partial / BEST_FILE)
                elif progress.history:
                    try:
                        check_sums(self.last)
                    except (OSError, ValueError) as error:
                        raise self._damaged(self.last, error) from error
                    shutil.copyfile(self.last / BEST_FILE, partial / BEST_FILE)
                write_json(partial / CONFIG_FILE, self.configuration)
                write_json(partial / PROGRESS_FILE, asdict(progress))
                write_sums(partial)
                for file in partial.iterdir():
                    sync(file)
                sync(partial)
                os.rename(partial, checkpoint)
                sync(self.checkpoints)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            self.last = checkpoint
            self.lay_out(progress)
            for old in self._all_checkpoints()[:-keep]:
                shutil.rmtree(old)

    def finish(self, summary: dict) -> None:
        """Write the result of the run, including the SHA-256 of its weights."""
        with writing(self.path, WAY_OUT):
            write_json(self.summary, summary | {"sha256": sha256(self.weights)})

    def read_metrics(self) -> list[dict[str, float]]:
        """The metrics of finished epochs. Raises OSError, ValueError or TypeError if they are missing or damaged."""
        history = [parse_json(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
        check_metrics(history)
        return history

    def _all_checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        found = {path: re.fullmatch(r"epoch-(\d+)-step-(\d+)", path.name) for path in self.checkpoints.glob("epoch-*")}
        numbers = {path: tuple(map(int, match.groups())) for path, match in found.items() if match and path.is_dir()}
        return sorted(numbers, key=numbers.get)

    def _read(self, checkpoint: Path) -> tuple[dict, Progress]:
        """The configuration and progress of a checkpoint, after checking that none of its files has changed."""
        try:
            check_sums(checkpoint)
            config, progress = read_config(checkpoint), Progress(**read_json(checkpoint / PROGRESS_FILE))
            check_metrics(progress.history)
            if progress.name != checkpoint.name or torch.tensor(progress.sums).shape[1:] != (len(SUMS),):
                raise ValueError(f"{PROGRESS_FILE} is from {progress.name}")
            if type(progress.active_blocks) is not int or type(progress.seconds) not in (int, float):
                raise ValueError(f"{PROGRESS_FILE} has values of the wrong type")
            if progress.history and not (checkpoint / BEST_FILE).is_file():
                raise ValueError(f"{BEST_FILE} is missing")
        except (FileNotFoundError, ValueError, TypeError, RuntimeError, UserError) as error:
            raise self._damaged(checkpoint, error) from error
        except OSError as error:
            raise UserError(f"cannot read {checkpoint} ({error.strerror})") from error
        try:
            log = self.read_metrics()
        except (OSError, ValueError, TypeError):  # lost or damaged: it will be rewritten
            log = []
        if any(line != logged for line, logged in zip(progress.history, log, strict=False)):
            raise UserError(
                f"{checkpoint} and {self.metrics} are from different runs: move away the one that does not belong here"
            )
        return config, progress

    def _damaged(self, checkpoint: Path, reason: object) -> UserError:
        older = [path for path in self._all_checkpoints() if path != checkpoint]
        way_out = (
            f"move it away to resume from {older[-1].name}"
            if older
            else "there is no older one, so train again with another --output"
        )
        return UserError(f"{checkpoint} is damaged ({reason}): {way_out}")

    def lay_out(self, progress: Progress) -> None:
        """Make config.json, metrics.jsonl and model.safetensors agree with the last checkpoint."""
        with writing(self.path, WAY_OUT):
            write_json(self.config, self.configuration)
            if progress.history:
                write_metrics(self.metrics, progress.history)
                write(self.weights, (self.last / BEST_FILE).read_bytes())


def read_config(path: Path) -> dict:
    """The config.json of a run's folder, with `options` and `environments`. Raises UserError if it is not valid."""
    try:
        config = read_json(path / CONFIG_FILE)
        options, environments = config["options"], config["environments"]
        if not isinstance(options, dict) or "model" not in options or not environments:
            raise TypeError
        if not all(isinstance(where, dict) for where in environments):
            raise TypeError
        return config
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} has no run: its config.json is missing, damaged or not from a run") from error


def read_options(path: Path) -> Options:
    """The options of a folder's run, without those that do not affect its weights.

    An option that is newer than the run has its default, which is what the run did.

    Raises UserError if the folder contains no run, or one with other values than this version of the package has.
    """
    options = DEFAULTS | read_config(path)["options"]
    values = {name: options[name] for name in BOUND_OPTIONS}
    try:
        return Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{path / 'config.json'} is from another version or damaged: {error}") from error


def read_summary(path: Path) -> dict:
    """A finished run's summary.json. Raises UserError if it is missing (the run is unfinished) or damaged."""
    try:
        return read_json(path / "summary.json")
    except FileNotFoundError as error:
        raise UserError(f"{path} is unfinished (no summary.json): training with --resume finishes it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'summary.json'} is damaged: training with --resume rewrites it") from error


def _differences(before: dict, now: dict) -> str:
    """In words, the entries of `now` that differ from those of `before`."""
    return ", ".join(
        f"{name} was {before.get(name)} and is now {value}" for name, value in now.items() if before.get(name) != value
    )
