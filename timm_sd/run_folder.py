"""What a run leaves on disk, every file of it whole at any moment:

    config.json         the options, and the environments it ran in
    metrics.jsonl       a line of figures for each epoch
    model.safetensors   the weights of the lowest validation error
    summary.json        the result and the weights' SHA-256, once the run is finished
    checkpoints/        the last few states to go on from

A checkpoint holds the whole truth of its moment, figures and best weights included. metrics.jsonl and model.safetensors
lay it out for the reader, anew when a run is resumed, so they never tell of steps that were lost.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from .errors import UserError

BEST_FILE = "best.safetensors"
PROGRESS_FILE = "progress.json"

# What these say leaves the weights alone, so a resumed run may say something else.
FREE_OPTIONS = ("data_dir", "download", "output", "resume", "checkpoint_steps", "keep_checkpoints", "log_with")


@dataclass
class Progress:
    """How far a run has come: the figures of the epochs done, and what the next line is made of.

    Of the epoch in hand, `steps` of which are done: `sums`, a row of each process's sums over its images;
    `active_blocks`, summed over the steps; and `seconds`.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    sums: list[list[float]] = field(default_factory=list)
    active_blocks: int = 0
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """The epoch in hand, from 1."""
        return len(self.history) + 1

    @property
    def best(self) -> dict[str, float]:
        """The figures of the lowest validation error, the first of equals."""
        return min(self.history, key=lambda figures: figures["validation_error"])


class RunFolder:
    """The files of one run. All but `load` are for the main process alone; all raise UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.weights = path / "model.safetensors"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"

    def open(self, options: dict, environment: dict, resume: bool) -> tuple[Path | None, str]:
        """Begin a run, or with `resume` go on with the one that is there.

        Returns its newest checkpoint, None at the beginning, and in words how the environment differs from the one
        that wrote it. A run of other options is not touched, nor is any without `resume`.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            newest = self.newest()
            if newest is None or not resume:
                if newest or self.metrics.exists() or self.weights.exists():
                    go_on = "--resume goes on with it, or " if newest else ""
                    raise UserError(f"{self.path} already holds a run: {go_on}choose another --output")
                _write_json(self.config, {"options": options, "environments": [environment]})
                return None, ""

        config = read_config(self.path)
        bound = {name: value for name, value in options.items() if name not in FREE_OPTIONS}
        if differing := _differences(config["options"], bound):
            raise UserError(f"{self.path} holds a run of another configuration ({differing}): choose another --output")
        differing = _differences(config["environments"][-1], environment)
        if differing:
            config["environments"].append(environment | {"since": newest.name})
            with self._writing():
                _write_json(self.config, config)
        return newest, differing

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        return max(self.checkpoints.glob("epoch-*"), default=None)

    def load(self, checkpoint: Path, accelerator: Accelerator) -> Progress:
        """Bring what `accelerator` prepared into the state of a checkpoint."""
        try:
            accelerator.load_state(checkpoint)
            return Progress(**json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
            raise UserError(f"{checkpoint} is damaged: delete it to go on from the one before it") from error

    def save(self, accelerator: Accelerator, progress: Progress, keep: int, best: nn.Module | None = None) -> None:
        """Write a checkpoint and lay it out, then delete all but the newest `keep`.

        `best` has the best weights if they are new; otherwise they are those of the checkpoint before.
        """
        checkpoint = self.checkpoints / f"epoch-{progress.epoch:05d}-step-{progress.steps:06d}"
        if checkpoint.exists():  # of a run that was resumed and stopped before another step
            return
        partial = self.checkpoints / "partial"
        before = self.newest()
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
                    shutil.copyfile(before / BEST_FILE, partial / BEST_FILE)
                _write_json(partial / PROGRESS_FILE, asdict(progress))
                for file in partial.iterdir():
                    _sync(file)
                _sync(partial)
                os.rename(partial, checkpoint)
                _sync(self.checkpoints)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            self.lay_out(checkpoint, progress)
            for old in sorted(self.checkpoints.glob("epoch-*"))[:-keep]:
                shutil.rmtree(old)

    def lay_out(self, checkpoint: Path, progress: Progress) -> None:
        """Make metrics.jsonl and model.safetensors say what the checkpoint says."""
        if not progress.history:
            return
        with self._writing():
            _write(self.metrics, "".join(json.dumps(figures) + "\n" for figures in progress.history).encode())
            _write(self.weights, (checkpoint / BEST_FILE).read_bytes())

    def finish(self, summary: dict) -> None:
        """Write the result of the run, with the SHA-256 of its weights."""
        with self._writing():
            sha256 = hashlib.sha256(self.weights.read_bytes()).hexdigest()
            _write_json(self.summary, summary | {"sha256": sha256})

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError):
                raise
            if isinstance(error, OSError):
                reason = error.strerror
            elif isinstance(error, SafetensorError):
                reason = str(error)
            else:  # torch.save, which does not say
                reason = "the disk may be full"
            raise UserError(
                f"cannot write to {self.path} ({reason}): make room or choose another --output;"
                " checkpoints that are there are whole, and --resume goes on from them"
            ) from error


def read_config(path: Path) -> dict:
    """The config.json of a run's folder, with `options` and `environments`. Raises UserError if there is none."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config["options"], dict) or not isinstance(config["environments"][0], dict):
            raise TypeError
        return config
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} holds no run: its config.json is missing, damaged or not a run's") from error


def read_summary(path: Path) -> dict:
    """The summary.json of a run's folder. Raises UserError if there is none, so the run has not finished."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        if not isinstance(summary["sha256"], str):
            raise TypeError
        return summary
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


def _write_json(file: Path, value: dict) -> None:
    _write(file, (json.dumps(value, indent=2) + "\n").encode())


def _write(file: Path, content: bytes) -> None:
    """Replace a file's content, or on failure leave it as it was."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_bytes(content)
        _sync(partial)
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Have the system write a file or a folder to the disk, so that a crash after this leaves it whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
