"""What `test_distributed.py` launches in each process: a run whose steps are noted in rank*.json beside its folder."""

import json
import os
import signal
import sys
from pathlib import Path

from timm_sd import data, training
from timm_sd.options import Options

BATCH_SIZE = 64  # of 189 training images, so the last batch's 61 divide unevenly


def main(output: str, name: str = "", rank: str = "", at: str = "", options: str = "{}") -> None:
    """A signal of that name goes to process `rank` before its step `at`, counted from 0 in this launch.

    More options are given as JSON.
    """
    load, step = data.load, training.Run.step
    data.load = lambda *args: tuple(part[:size] for part, size in zip(load(*args), (210, 51), strict=True))
    notes = dict(steps=[])
    runs = []

    def noted(run, images, labels, gates, batch_size):
        runs[:] = [run]
        index = len(notes["steps"])
        if [str(run.accelerator.process_index), str(index)] == [rank, at]:
            os.kill(os.getpid(), signal.Signals[name])
        step(run, images, labels, gates, batch_size)
        # Images are told apart by their pixels, in any order and place: their sum over the shifts is not enough.
        notes["steps"].append(
            dict(gates=gates.tolist(), labels=labels.tolist(), images=images.mean((1, 2, 3)).tolist(), of=batch_size)
        )

    training.Run.step = noted
    fixed = dict(epochs=2, batch_size=BATCH_SIZE, output=Path(output), resume=True)
    training.train(Options("cifar_resnet20_sd", "synthetic", **fixed, **json.loads(options)))
    run = runs[0]
    notes["processes"] = run.accelerator.num_processes
    notes["wrapper"] = type(run.model).__name__
    notes["unused"] = run.model.find_unused_parameters
    notes["parameters"] = [parameter.detach().numpy().tobytes().hex() for parameter in run.network.parameters()]
    notes["buffers"] = [buffer.numpy().tobytes().hex() for buffer in run.plain.buffers()]
    Path(f"{output}-rank{run.accelerator.process_index}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(*sys.argv[1:])
