"""Training runs that tests start in separate processes."""

import functools
import json
import os
import signal
import sys
from pathlib import Path

from timm_sd.train import data, training
from timm_sd.train.learner import Learner
from timm_sd.train.options import Options

load = functools.cache(data.load)  # drawing the synthetic images takes longer than training on a few of them


def load_few(learning: int, test: int):
    """A stand-in for `data.load` that returns only the first `learning` and `test` images."""
    return lambda *args: tuple(part[:size] for part, size in zip(load(*args), (learning, test), strict=True))


few = load_few(100, 50)
uneven = load_few(210, 51)  # 189 to train on; no set divides evenly between two processes


def killed_while_moving_a_checkpoint(output: Path) -> None:
    """Start a run of two epochs, and kill it while it moves the checkpoint of the first into place."""
    os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    resumed(output)


def resumed(output: Path) -> None:
    """Start or resume the same run, and finish it."""
    data.load = few
    training.train(Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=32, output=output, resume=True))


def noted(output: str | Path, name: str = "", rank: str = "", at: str = "", options: str = "{}") -> None:
    """Run one of two training processes, and note its steps in a file next to the run's folder.

    Signal `name` is sent to process `rank` just before its step `at`, counted from 0 in this launch. Further options
    are given as JSON.
    """
    step = Learner.step
    data.load = uneven
    notes = dict(steps=[])
    noted_learner = []

    def note_and_step(learner, images, labels, batch_size, gates, lr):
        noted_learner[:] = [learner]
        index = len(notes["steps"])
        if [str(learner.accelerator.process_index), str(index)] == [rank, at]:
            os.kill(os.getpid(), signal.Signals[name])
        step(learner, images, labels, batch_size, gates, lr)
        # The mean over channels and pixels tells different images apart.
        notes["steps"].append(
            dict(gates=gates.tolist(), labels=labels.tolist(), images=images.mean((1, 2, 3)).tolist(), of=batch_size)
        )

    Learner.step = note_and_step
    fixed = dict(epochs=2, batch_size=64, output=Path(output), resume=True)
    training.train(Options("cifar_resnet20_sd", "synthetic", **fixed, **json.loads(options)))
    (learner,) = noted_learner
    notes["processes"] = learner.accelerator.num_processes
    notes["wrapper"] = type(learner.model).__name__
    notes["unused"] = learner.model.find_unused_parameters
    notes["parameters"] = [parameter.detach().numpy().tobytes().hex() for parameter in learner.network.parameters()]
    notes["buffers"] = [buffer.numpy().tobytes().hex() for buffer in learner.plain.buffers()]
    Path(f"{output}-rank{learner.accelerator.process_index}.json").write_text(json.dumps(notes))


def noted_without_torchrun(rank: int, port: int, errors: Path, *arguments) -> None:
    """Run `noted` in the environment that torchrun sets up, given a store's port, with standard error in a file."""
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    noted(*arguments)


if __name__ == "__main__":
    noted(*sys.argv[1:])
