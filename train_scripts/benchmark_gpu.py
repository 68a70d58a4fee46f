"""`benchmark.py --gpu`: check and measure all that needs a GPU, in a few minutes, the most important first.

Each part has a limit of its own and stops between measurements when it is over. A part that fails is reported in one
line, and the next one runs. What was found is in results/gpu.json after each part, and printed at the end.

In Triton's interpreter and without a GPU, this is a dry run: tiny sizes on the CPU, and nothing is written.
"""

import argparse
import gc
import importlib.util
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import accelerate
import timm
import torch
from accelerate import Accelerator, PartialState
from benchmark_gpu_tables import RESULTS, read, tables

from timm_sd import __version__
from timm_sd.command_line import say
from timm_sd.errors import UserError, one_line
from timm_sd.files import write_json, writing
from timm_sd.train import machine

# The parts in order, and how they share the time: what one leaves, or takes too much, is shared by the rest.
SHARES = dict(kernels=26, network=12, step_ms=14, epochs=20, profile=6, timm_models=22)
TIMM_MODELS = ("vit_base_patch16_224", "vit_large_patch16_224")
Part = Callable[[float, dict], None]


@dataclass(frozen=True)
class Sizes:
    """How large the measurements are."""

    model: str = "cifar_resnet110"
    batches: tuple[int, int] = (128, 72)  # full, and the last one of an epoch of CIFAR-10
    checked_steps: int = 10  # twice, to be bit-equal
    block: int = 20  # steps that are timed at once
    most_turns: int | None = None
    images: tuple[int, int] | None = None  # to learn and to test, None for all
    timm_models: tuple[str, ...] = TIMM_MODELS
    timm_batches: tuple[int, int] = (32, 2048)  # the smallest and the largest to try


DRY = Sizes("cifar_resnet8", (2, 1), 1, 1, 2, (6, 2), ("test_vit",), (1, 2))


def run(args: argparse.Namespace) -> None:
    """Run all parts, or with --gpu-models that of timm models, and print what was found."""
    end = time.monotonic() + 60 * args.minutes
    if not importlib.util.find_spec("triton"):
        raise UserError("--gpu: Triton is not installed, which PyTorch's CUDA builds for Linux bring along")
    for model in args.gpu_models or ():
        if not timm.is_model(model):
            raise UserError(f"--gpu-models {model}: timm has no such model")
    names = ["timm_models"] if args.gpu_models else list(SHARES)
    say(tables(run_parts(names, args.data_dir, args.gpu_models, end)))


def start() -> bool:
    """Set up this process, and return whether this is a dry run. Raises UserError if neither is possible."""
    dry = os.environ.get("TRITON_INTERPRET") == "1"
    on_gpu = PartialState().device.type == "cuda"
    if dry == on_gpu or (on_gpu and torch.version.hip):
        raise UserError(
            "--gpu: it needs an NVIDIA GPU and no TRITON_INTERPRET; for a dry run, TRITON_INTERPRET=1 and no GPU"
        )
    machine.start(mixed_precision="no" if dry else "bf16")
    if dry:
        from timm_sd.train.gpu import engine

        say("dry run: the interpreter in place of a GPU")
        # Few programs for each kernel, since the interpreter runs one after another.
        engine.TILES = {
            16: engine.Tiles(1024, 1024, 1024, 1024, 2048, 4),
            32: engine.Tiles(256, 256, 256, 256, 512, 4),
            64: engine.Tiles(64, 64, 64, 128, 256, 8),
        }
        engine.CHUNK = 4096
    return dry


def make_parts(sizes: Sizes, data_dir: Path, gpu_models: list[str] | None) -> dict[str, Part]:
    """The function of each part, with the time at which it has to stop and a dict for its findings."""
    # Imported here since they import Triton.
    import benchmark_gpu_checks as checks
    import benchmark_gpu_cifar as cifar
    import benchmark_gpu_timm as of_timm

    from timm_sd.train import data

    dataset = cifar.keep_images(data_dir, sizes.images)
    images, _ = data.load(dataset, data_dir)
    device = Accelerator().device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = dict(stochastic_depth=f"{sizes.model}_sd", constant=sizes.model)
    batch_size = sizes.batches[0]
    of_step = (list(models.values()), images[:batch_size], dtype, device, sizes.checked_steps)
    forms = (of_timm.EAGER, of_timm.COMPILED) if gpu_models else (of_timm.EAGER,)
    of_models = (gpu_models or sizes.timm_models, forms, sizes.timm_batches, sizes.most_turns)
    return dict(
        kernels=partial(checks.check_kernels, sizes.batches, dtype, device),
        network=partial(checks.check_network, *of_step),
        step_ms=partial(cifar.time_steps, models, dataset, batch_size, sizes.block, sizes.most_turns),
        epochs=partial(cifar.train_epochs, models, dataset, batch_size),
        profile=partial(cifar.profile_kernels, sizes.model, dataset, batch_size),
        timm_models=partial(of_timm.measure_models, *of_models),
    )


def run_parts(names: list[str], data_dir: Path, gpu_models: list[str] | None, end: float) -> dict:
    """Run these parts in order until `end`, saving what each has found; return all of it."""
    dry = start()
    parts = make_parts(DRY if dry else Sizes(), data_dir, gpu_models)
    results = about()
    for index, name in enumerate(names):
        began = time.monotonic()
        limit = max(0.0, end - began) * SHARES[name] / sum(SHARES[later] for later in names[index:])
        say(f"{name}: up to {limit:.0f} s")
        found = {}
        try:
            parts[name](began + limit, found)
        except Exception as error:  # of any type: the other parts must run
            why = one_line(f"{type(error).__name__}: {error}")
            say(f"{name} failed: {why}")
            results.setdefault("failed", {})[name] = why
        if found:
            results[name] = found
        say(f"{name}: took {time.monotonic() - began:.0f} s")
        if not dry:
            save(results)
        gc.collect()
        if gpu_is_lost():  # to this process, for good
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                rest = pool.submit(run_parts, names[index + 1 :], data_dir, gpu_models, end)
                return merged(results, rest.result())
        torch.cuda.empty_cache()
    return results


def about() -> dict:
    """Where this is measured, and with what."""
    import triton

    versions = {library.__name__: str(library.__version__) for library in (torch, triton, timm, accelerate)}
    return dict(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "the interpreter",
        versions=versions | dict(timm_sd=__version__, cuda=torch.version.cuda),
        git_commit=machine.git_commit(),
    )


def gpu_is_lost() -> bool:
    """Whether an error, such as an access to a wrong address, keeps this process from using the GPU again."""
    try:
        torch.cuda.synchronize() if torch.cuda.is_initialized() else None
    except RuntimeError:
        return True
    return False


def merged(old: dict, new: dict) -> dict:
    """Older and newer results: the newer ones of each part and timm model, and only those of the same machine."""
    if any(old.get(key) != new[key] for key in ("device", "versions")):
        return new
    models = dict(old.get("timm_models", {}))
    for model, forms in new.get("timm_models", {}).items():
        models[model] = models.get(model, {}) | forms
    failed = {name: why for name, why in old.get("failed", {}).items() if name not in new}
    combined = dict(timm_models=models, failed=failed | new.get("failed", {}))
    return {name: value for name, value in (old | new | combined).items() if value or name not in combined}


def save(results: dict) -> None:
    """Add results to the file; if that fails, say so, since measuring goes on."""
    try:
        with writing(RESULTS, "the tables are printed at the end"):
            write_json(RESULTS, merged(read() or {}, results))
    except UserError as error:
        say(error)
