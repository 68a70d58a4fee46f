"""SIGKILL a training run at random moments, resume it each time, and compare the result with an uninterrupted run.

`python tests/sigkill.py --kills 20`, or with `--data-dir data` on the real CIFAR-10. Every other kill waits until a
checkpoint is being written, and every third hits two processes that were started in the same folder at once. This takes
minutes, so it is not part of the test suite, which tries every moment of writing on a smaller run.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "train_scripts" / "train.py"
TIMES = ("seconds", "images_per_second")


def start(folder: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "--model", "cifar_resnet20_sd", *flags, "--output", folder, "--resume"]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end_of(folder: Path) -> tuple[bytes, list[dict]]:
    """A finished run's weights and metrics, without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
    return (folder / "model.safetensors").read_bytes(), metrics


def kill(rivals: list[subprocess.Popen], folder: Path, delay: float, while_writing: bool) -> None:
    """Kill the processes after `delay` seconds; with `while_writing`, not until a checkpoint is half written."""
    moment = time.monotonic() + delay
    while any(run.poll() is None for run in rivals):
        if time.monotonic() >= moment and (not while_writing or (folder / "checkpoints" / "partial").exists()):
            for run in rivals:
                run.kill()
            return
        time.sleep(0.001)


def check_end(run: subprocess.Popen) -> int:
    """Check that a process was killed, finished, or was refused as the second in a folder; return its status."""
    _, errors = run.communicate()
    refused = "another process is training or publishing in" in errors and errors.count("\n") == 1
    assert run.returncode in ((1, -signal.SIGKILL) if refused else (0, -signal.SIGKILL)), errors
    assert refused or not errors, errors
    return run.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10; synthetic images unless given")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    flags = ["--data-dir", args.data_dir] if args.data_dir else ["--dataset", "synthetic"]
    flags += ["--epochs", args.epochs, "--checkpoint-steps", 5]
    moments = random.Random(args.seed)
    work = Path(tempfile.mkdtemp())

    began = time.monotonic()
    assert check_end(start(work / "whole", flags)) == 0
    longest = time.monotonic() - began
    whole = end_of(work / "whole")
    print(f"never interrupted: {longest:.0f} s", flush=True)

    kills = runs = half_written = fights = refused = 0
    while kills < args.kills:
        folder = work / f"run{runs}"
        killed = True
        while killed:
            fight = kills % 3 == 2
            rivals = [start(folder, flags) for _ in range(1 + fight)]
            if kills < args.kills:
                kill(rivals, folder, moments.uniform(0, min(longest, 25)), while_writing=kills % 2 == 1)
            statuses = [check_end(run) for run in rivals]
            killed = min(statuses) < 0
            if killed:
                kills += 1
                fights += fight
                refused += 1 in statuses
                left = sorted(path.name for path in folder.glob("checkpoints/*"))
                half_written += "partial" in left
                print(f"kill {kills} of run {runs}: checkpoints {', '.join(left) or 'none'}", flush=True)
        assert 0 in statuses, "a resumed run failed"
        assert end_of(folder) == whole, f"run {runs} ended otherwise"
        print(f"run {runs} ends with the same weights and metrics", flush=True)
        runs += 1
    print(
        f"{kills} kills, {half_written} of them with a half-written checkpoint and {fights} of two processes, of which"
        f" {refused} had one refused by then; {runs} runs: all ends are the same"
    )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
