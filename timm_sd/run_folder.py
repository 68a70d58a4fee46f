"""What a run leaves on disk, every file of it whole at any moment:

    config.json         the options, and the environments it ran in
    metrics.jsonl       a line of metrics for each epoch
    model.safetensors   the weights of the lowest validation error
    summary.json        the result and the weights' SHA-256, once the run is finished
    checkpoints/        the last few states to resume from
    lock                held by the process that trains

A checkpoint holds the whole truth of its moment, configuration, metrics and best weights included, and the SHA-256 of
each of its files. What is beside it lays that out for the reader, anew when a run is resumed, so it never tells of
steps that were lost.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from .errors import UserError
from .files import check_sums, parse_json, read_json, read_sums, sha256, sync, write, write_json, write_sums
from .options import BOUND_OPTIONS, Options

BEST_FILE = "best.safetensors"
CONFIG_FILE = "config.json"
PROGRESS_FILE = "progress.json"
METRICS = (
    "epoch",
    "lr",
    "train_loss",
    "train_error",
    "active_blocks",
    "conv1_gradient",
    "images_per_second",
    "validation_error",
    "test_error",
    "seconds",
)
POSITIVE = ("lr", "images_per_second", "seconds")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_metrics(history: list[dict[str, float]]) -> None:
    """Raise ValueError or TypeError unless it has the metrics of epochs 1, 2, ..., each a number that can be."""
    for epoch, line in enumerate(history, start=1):
        possible = isinstance(line, dict) and line.keys() == set(METRICS) and line["epoch"] == epoch
        for name, value in line.items() if possible else ():
            highest = 100 if name.endswith("_error") else 1e300
            possible &= type(value) in (int, float) and 0 <= value <= highest and (value > 0 or name not in POSITIVE)
        if not possible:
            raise ValueError(f"line {epoch} is not the metrics of epoch {epoch}")


def summarise(options: Options, history: list[dict[str, float]]) -> dict[str, object]:
    """The result of a run: the paper's number is the test error at the lowest validation error."""
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
    """How far a run has come: the metrics of the epochs done, and what the next line is made of.

    Of the current epoch, `steps` of which are done: `sums`, a row of each process's sums over its images;
    `active_blocks`, summed over the steps; and `seconds`.
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
        """The metrics of the lowest validation error, the first of equals."""
        return min(self.history, key=lambda line: line["validation_error"])

    @property
    def name(self) -> str:
        """What a checkpoint of this moment is called."""
        return f"epoch-{self.epoch:05d}-step-{self.steps:06d}"


class RunFolder:
    """The files of one run. All but `load` are for the main process alone; all raise UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG_FILE
        self.metrics = path / "metrics.jsonl"
        self.weights = path / "model.safetensors"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.lock = FileLock(path / "lock")
        self.configuration: dict = {}
        self.last: Path | None = None  # the checkpoint of the present moment, if there is one

    def open(self, options: dict, environment: dict, resume: bool) -> tuple[Progress, str]:
        """Take the folder until `close`, and begin a run in it, or with `resume` continue the one that is there.

        Returns how far that has come, and in words how the environment differs from the one before. `last` is then the
        checkpoint to load, None at the beginning. A run of other options is not touched, nor is any without `resume`.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(f"another process is training in {self.path}: choose another --output") from error
            everything = self._all_checkpoints()
            if not everything or not resume:
                if everything or self.metrics.exists() or self.weights.exists():
                    way_out = "--resume continues it, or " if everything else ""
                    raise UserError(f"{self.path} already holds a run: {way_out}choose another --output")
                self.configuration = {"options": options, "environments": [environment]}
                write_json(self.config, self.configuration)
                return Progress(), ""

        self.last = everything[-1]
        self.configuration, progress = self._read(self.last)
        bound = {name: options[name] for name in (*BOUND_OPTIONS, "mixed_precision")}
        if differing := _differences(self.configuration["options"], bound):
            raise UserError(f"{self.path} holds a run of another configuration ({differing}): choose another --output")
        environments = self.configuration["environments"]
        if differing := _differences(environments[-1], environment):
            environments.append(environment | {"since": self.last.name})
        self._lay_out(progress)
        return progress, differing

    def close(self) -> None:
        """Let other processes have the folder."""
        self.lock.release()

    def load(self, checkpoint: Path, accelerator: Accelerator) -> None:
        """Bring what `accelerator` prepared into the state of a checkpoint."""
        try:
            accelerator.load_state(checkpoint)
        except (OSError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
            raise self._damaged(checkpoint, error) from error

    def save(self, accelerator: Accelerator, progress: Progress, keep: int, best: nn.Module | None = None) -> None:
        """Write a checkpoint and lay it out, then delete all but the newest `keep`.

        `best` has the best weights if they are new; otherwise they are those of the checkpoint before.
        """
        checkpoint = self.checkpoints / progress.name
        if checkpoint == self.last:  # a run that was resumed and stopped before another step
            return
        partial = self.checkpoints / "partial"
        with self._writing():
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                accelerator.save_state(partial)
                if best is not None:
                    # safetensors refuses channels_last tensors.
                    weights = {name: tensor.contiguous() for name, tensor in best.state_dict().items()}
                    save_file(weights, partial / BEST_FILE)
                elif progress.history:
                    shutil.copyfile(self.last / BEST_FILE, partial / BEST_FILE)
                    if sha256(partial / BEST_FILE) != read_sums(self.last)[BEST_FILE]:
                        raise self._damaged(self.last, f"{BEST_FILE} has changed")
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
            self._lay_out(progress)
            for old in self._all_checkpoints()[:-keep]:
                shutil.rmtree(old)

    def finish(self, summary: dict) -> None:
        """Write the result of the run, with the SHA-256 of its weights."""
        with self._writing():
            write_json(self.summary, summary | {"sha256": sha256(self.weights)})

    def read_metrics(self) -> list[dict[str, float]]:
        """The metrics of every epoch done. Raises OSError, ValueError or TypeError if they are missing or damaged."""
        history = [parse_json(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
        check_metrics(history)
        return history

    def _all_checkpoints(self) -> list[Path]:
        """From the oldest to the newest."""
        found = {path: re.fullmatch(r"epoch-(\d+)-step-(\d+)", path.name) for path in self.checkpoints.glob("epoch-*")}
        numbers = {path: tuple(map(int, match.groups())) for path, match in found.items() if match}
        return sorted(numbers, key=numbers.get)

    def _read(self, checkpoint: Path) -> tuple[dict, Progress]:
        """The configuration and the progress of a checkpoint, every file of which is found to be as it was written."""
        try:
            check_sums(checkpoint)
            config, progress = read_config(checkpoint), Progress(**read_json(checkpoint / PROGRESS_FILE))
            check_metrics(progress.history)
            if progress.name != checkpoint.name or torch.tensor(progress.sums).shape[1:] != (3,):
                raise ValueError(f"{PROGRESS_FILE} is that of {progress.name}")
        except (OSError, ValueError, TypeError, UserError) as error:
            raise self._damaged(checkpoint, error) from error
        try:
            log = self.read_metrics()
        except (OSError, ValueError, TypeError):  # lost, or damaged: it is written anew
            log = []
        if any(line != logged for line, logged in zip(progress.history, log, strict=False)):
            raise UserError(
                f"{checkpoint} and {self.metrics} are of different runs: move the one that does not belong here away"
            )
        return config, progress

    def _damaged(self, checkpoint: Path, reason: object) -> UserError:
        older = [path for path in self._all_checkpoints() if path != checkpoint]
        way_out = (
            f"move it away, and --resume continues from {older[-1].name}"
            if older
            else "there is no older one, so train again with another --output"
        )
        return UserError(f"{checkpoint} is damaged ({reason}): {way_out}")

    def _lay_out(self, progress: Progress) -> None:
        """Make config.json, metrics.jsonl and model.safetensors say what the last checkpoint says."""
        with self._writing():
            write_json(self.config, self.configuration)
            if progress.history:
                write(self.metrics, "".join(json.dumps(line) + "\n" for line in progress.history).encode())
                write(self.weights, (self.last / BEST_FILE).read_bytes())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", ()))):  # since torch 2.8
                raise
            if isinstance(error, OSError):
                reason = error.strerror
                no_room = error.errno in NO_ROOM
            else:  # the safetensors library's and torch.save's, of which the latter does not say
                reason = str(error) if isinstance(error, SafetensorError) else "the disk may be full"
                no_room = True
            way_out = "make room or choose another --output" if no_room else "choose another --output"
            raise UserError(
                f"cannot write to {self.path} ({reason}): {way_out};"
                " checkpoints that are there are whole, and --resume continues from them"
            ) from error


def read_config(path: Path) -> dict:
    """The config.json of a run's folder, with `options` and `environments`. Raises UserError if there is none."""
    try:
        config = read_json(path / CONFIG_FILE)
        if not isinstance(config["options"], dict) or not all(isinstance(it, dict) for it in config["environments"]):
            raise TypeError
        config["environments"][0]
        return config
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} holds no run: its config.json is missing, damaged or not a run's") from error


def read_sha256(path: Path) -> str:
    """Of a finished run's weights, as its summary.json says. Raises UserError if there is none."""
    try:
        digest = read_json(path / "summary.json")["sha256"]
        if not isinstance(digest, str):
            raise TypeError
        return digest
    except FileNotFoundError as error:
        raise UserError(f"{path} holds an unfinished run, without summary.json: train.py --resume ends it") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path / 'summary.json'} is damaged: train.py --resume writes it again") from error


def _differences(there: dict, here: dict) -> str:
    """In words, the entries of `here` that `there` has not."""
    return ", ".join(
        f"{name} is {there.get(name)} there and {value} here"
        for name, value in here.items()
        if there.get(name) != value
    )
