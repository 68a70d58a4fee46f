"""`benchmark.py --gpu` on the paper's networks: eager, with `--cuda-graphs` and with `--fused`."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from benchmark_timm import Step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from timm_sd import draw_gates
from timm_sd.errors import UserError
from timm_sd.skip.benchmark import now
from timm_sd.train import data
from timm_sd.train.gpu.engine import IMAGE_CHANNELS, SIZE, Engine, bordered
from timm_sd.train.gpu.fused import FusedLearner, fill
from timm_sd.train.learner import Learner
from timm_sd.train.options import Options
from timm_sd.train.run_folder import RunFolder
from timm_sd.train.training import Run

EAGER, CUDA_GRAPHS, FUSED = KINDS = ("eager", "cuda_graphs", "fused")
PROFILED = 2  # steps
TOP = 10  # kernels by time


def keep_images(data_dir: Path, few: tuple[int, int] | None) -> str:
    """Read the images once for all runs, and return the data set's name; with `few`, so many to learn and to test.

    Without the files of CIFAR-10, they are as many synthetic images, each of them ten times.
    """
    try:
        dataset, parts = "cifar10", data.load("cifar10", data_dir)
    except UserError:
        dataset, parts = "synthetic", data.load("synthetic", data_dir)
        parts = [data.ImageSet(p.images.repeat(10, 1, 1, 1), p.labels.repeat(10)) for p in parts]
    if few is not None:
        parts = [part[:number] for part, number in zip(parts, few, strict=True)]
    data.load = lambda *_: tuple(parts)
    return dataset


def options_for(model: str, kind: str, dataset: str, batch_size: int, output: Path | None = None) -> Options:
    """The options of a run of two epochs."""
    return Options(
        model,
        dataset,
        epochs=2,
        batch_size=batch_size,
        lr_schedule="one-cycle",
        cuda_graphs=kind == CUDA_GRAPHS,
        fused=kind == FUSED,
        output=output,
    )


def make_step(model: str, kind: str, dataset: str, batch_size: int) -> Step:
    """A function that runs training step t, on the same batch every time."""
    learner = Learner(Accelerator(), options_for(model, kind, dataset, batch_size))
    images, labels, size = batch = next(learner.batches(epoch=1))
    lr = learner.options.lr
    if kind == FUSED:
        dtype = torch.bfloat16 if learner.accelerator.mixed_precision == "bf16" else torch.float32
        engine = Engine(learner.network, learner.options.weight_decay, [size], dtype)
        engine.load(learner.optimizer)
        framed = bordered(size, SIZE, IMAGE_CHANNELS, dtype, images.device)
        fill(framed, iter([(images, labels)]))
        return lambda t: engine.step(framed, labels, draw_gates(learner.survival, 0, t), lr)
    learner.begin()
    learner.model.train()
    return lambda t: learner.step(*batch, draw_gates(learner.survival, 0, t), lr)


def time_steps(
    models: dict[str, str],
    dataset: str,
    batch_size: int,
    block: int,
    most: int | None,
    until: float,
    found: dict,
) -> None:
    """Milliseconds per step of each kind, in turns of `block` steps, since waiting for each would hide pipelining.

    There are at least two turns, and at most `most`, after one to warm up. Raises RuntimeError at the end if some kinds
    could not be measured.
    """
    steps, failed = {}, []
    for network, model in models.items():
        for kind in KINDS:
            if time.monotonic() > until and steps:
                continue
            try:
                steps[network, kind] = make_step(model, kind, dataset, batch_size)
            except Exception as error:  # of any type, as in a part: the others are measured all the same
                failed.append(f"{network}, {kind}: {type(error).__name__}: {error}")
    times = {case: [] for case in steps}
    for turn in count(-1):
        if not steps or (turn >= 2 and (turn == most or time.monotonic() > until)):
            break
        for case, step in steps.items():
            started = now()
            for t in range(block):
                step(max(turn, 0) * block + t)
            if turn >= 0:
                times[case].append(1e3 * (now() - started) / block)
    if steps:
        found.update(batch_size=batch_size, steps=block * turn)
    for (network, kind), ms in times.items():
        of_network = found.setdefault(network, {"intervals": {}})
        of_network[kind] = statistics.mean(ms)
        of_network["intervals"][kind] = 1.96 * statistics.stdev(ms) / len(ms) ** 0.5
    if failed:
        raise RuntimeError("; ".join(failed))


def train_epochs(models: dict[str, str], dataset: str, batch_size: int, until: float, found: dict) -> None:
    """Two epochs of training in both ways, from the same seed: their metrics, and seconds with everything in."""
    longest = 0.0
    for network, model in models.items():
        for kind in (CUDA_GRAPHS, FUSED):
            started = time.monotonic()
            if started + longest > until:  # a run does not stop between measurements
                return
            found.setdefault(network, {})[kind] = epochs_of(model, kind, dataset, batch_size)
            found["dataset"] = dataset
            longest = max(longest, time.monotonic() - started)


def epochs_of(model: str, kind: str, dataset: str, batch_size: int) -> list[dict[str, float]]:
    """The metrics of each epoch, its `seconds` from one checkpoint to the next."""
    with TemporaryDirectory() as folder:
        options = options_for(model, kind, dataset, batch_size, Path(folder) / "run")
        accelerator = Accelerator()
        learner = (FusedLearner if kind == FUSED else Learner)(accelerator, options)
        run = Run(accelerator, options, RunFolder(options.output_dir), learner)
        moments = []

        def noting(function: Callable) -> Callable:
            def call(*args) -> None:
                function(*args)
                moments.append(now())

            return call

        run.begin, run.end_epoch = noting(run.begin), noting(run.end_epoch)
        try:
            run.train()
        finally:
            run.folder.close()
    seconds = [end - begin for begin, end in pairwise(moments)]
    names = ("train_loss", "train_error", "validation_error", "test_error")
    return [
        {"seconds": taken} | {name: line[name] for name in names}
        for taken, line in zip(seconds, run.progress.history, strict=True)
    ]


def profile_kernels(model: str, dataset: str, batch_size: int, until: float, found: dict) -> None:
    """The kernels of a training step: launches and microseconds in all, and of those that take the longest."""
    for kind in (CUDA_GRAPHS, FUSED):
        if time.monotonic() > until:
            return
        step = make_step(model, kind, dataset, batch_size)
        step(0)
        on_gpu = Accelerator().device.type == "cuda"
        now()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for t in range(PROFILED):
                step(t)
            now()
        launches, microseconds = Counter(), Counter()
        for event in profiler.events():
            if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
                launches[event.name] += 1
                microseconds[event.name] += event.time_range.elapsed_us()
        found[kind] = dict(
            launches=launches.total() / PROFILED,
            microseconds=microseconds.total() / PROFILED,
            kernels={
                name: dict(launches=launches[name] / PROFILED, microseconds=total / PROFILED)
                for name, total in microseconds.most_common(TOP)
            },
        )
