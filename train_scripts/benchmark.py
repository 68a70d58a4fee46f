"""Time and memory of a training step, stochastic against constant depth: `python train_scripts/benchmark.py`.

The two networks take turns step by step, so that whatever else the machine does falls on both. Stochastic depth's time
is the mean over the gates of a run's first steps. Peak memory is that of the same steps, made again by each
network in a process of its own.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import psutil
import timm
import torch
import torch.nn.functional as F
from tqdm import trange

from timm_sd import draw_gates, use_gates
from timm_sd.training import use_all_cores


def make_step(name: str, batch_size: int) -> Callable[[int], None]:
    """A function that makes training step t of a network on random images."""
    torch.manual_seed(0)
    network = timm.create_model(name).to(memory_format=torch.channels_last).train()
    survival = network.survival_probabilities
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))

    def step(t: int) -> None:
        with use_gates(network, draw_gates(survival, seed=0, step=t)):
            F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(name: str, batch_size: int, steps: int) -> float:
    """MiB by which the process's resident memory grows at its peak over `steps` training steps."""
    use_all_cores()
    step = make_step(name, batch_size)
    before = psutil.Process().memory_info().rss
    for t in range(steps):
        step(t)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--model", default="cifar_resnet110", help="the plain network; the other is MODEL_sd")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    names = args.model, f"{args.model}_sd"

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(peak_memory, (name, args.batch_size, args.steps)) for name in names}

    use_all_cores()
    steps = {name: make_step(name, args.batch_size) for name in names}
    seconds = {name: [] for name in names}
    for t in trange(-2, args.steps, unit="step", leave=False, disable=None):
        for name, step in steps.items():
            started = time.perf_counter()
            step(max(t, 0))
            if t >= 0:  # the first steps warm up
                seconds[name].append(time.perf_counter() - started)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}, {args.steps} steps")
    for name in names:
        mean, median = statistics.mean(seconds[name]), statistics.median(seconds[name])
        print(f"{name:20} {mean:.3f} s a step (median {median:.3f}), peak memory {memory[name]:.0f} MiB")
    plain, stochastic = (statistics.mean(seconds[name]) for name in names)
    print(f"ratio of time {stochastic / plain:.3f}, of peak memory {memory[names[1]] / memory[names[0]]:.3f}")


if __name__ == "__main__":
    main()
