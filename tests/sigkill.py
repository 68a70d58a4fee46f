"""SIGKILL a training run at random moments, resume it each time, and compare its end with a run never interrupted.

`python tests/sigkill.py --kills 20`, or with `--data-dir data` on the real CIFAR-10. Every other kill waits for a
checkpoint that is being written. This takes minutes, so it is not part of the test suite, which tries every moment of
writing on a smaller run.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "train_scripts" / "train.py"
TIMES = ("seconds", "images_per_second")


def start(folder: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "--model", "cifar_resnet20_sd", *flags, "--output", folder, "--resume"]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)


def end_of(folder: Path) -> tuple[bytes, list[dict]]:
    """Weights and metrics of a finished run, times aside."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    figures = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
    return (folder / "model.safetensors").read_bytes(), figures


def kill(run: subprocess.Popen, folder: Path, delay: float, while_writing: bool) -> bool:
    """Kill after `delay` seconds and, if asked, once a checkpoint is half written; False if the run ended before."""
    moment = time.monotonic() + delay
    while run.poll() is None:
        if time.monotonic() >= moment and (not while_writing or (folder / "checkpoints" / "partial").exists()):
            run.kill()
            return run.wait() < 0
        time.sleep(0.001)
    return False


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
    assert start(work / "whole", flags).wait() == 0
    longest = time.monotonic() - began
    whole = end_of(work / "whole")
    print(f"never interrupted: {longest:.0f} s", flush=True)

    kills = runs = half_written = 0
    while kills < args.kills:
        folder = work / f"run{runs}"
        killed = True
        while killed:
            run = start(folder, flags)
            killed = kills < args.kills and kill(run, folder, moments.uniform(0, min(longest, 25)), kills % 2 == 1)
            if killed:
                kills += 1
                left = sorted(path.name for path in folder.glob("checkpoints/*"))
                half_written += "partial" in left
                print(f"kill {kills} of run {runs}: checkpoints {', '.join(left) or 'none'}", flush=True)
        assert run.wait() == 0, "a resumed run failed"
        assert end_of(folder) == whole, f"run {runs} ended otherwise"
        print(f"run {runs} ends with the same weights and metrics", flush=True)
        runs += 1
    print(f"{kills} kills, {half_written} of them with a half-written checkpoint, {runs} runs: all ends are the same")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
