"""`benchmark.py --gpu` on timm models: the steps of `benchmark_timm`, at a batch that fills the GPU.

All kinds of a model share its parameters and their optimizer, so the memory of a step is that of its kind alone.
"""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import timm
import torch
from accelerate import Accelerator
from benchmark_timm import (
    DINOV2,
    DROP_PATH,
    NONE,
    Measured,
    Step,
    clock_branches,
    convert,
    dropped,
    make_pass,
    perfect_seconds,
    sgd,
    training_step,
)
from timm.layers import DropPath
from torch import nn

from timm_sd import gates
from timm_sd.skip.benchmark import now

CLOCKED = "clocked"  # drops nothing, and notes the seconds of each branch
KINDS = (NONE, DROP_PATH, CLOCKED, "row", "count", DINOV2, "batch")  # the most important first, should time run out
EAGER, COMPILED = "eager", "compiled"
RATES = {"swin_base": (0.5,), "convnext_base": (0.5,), "resnet50": (0.1,)}  # by the beginning of a model's name
OTHER_RATES = (0.1, 0.4)
WARM_UP = {EAGER: 2, COMPILED: 8}  # steps; some compile another graph, as their gates need it
GROWTH = 1.03  # of throughput, for which a batch is doubled again


def measure_models(
    models: list[str], forms: tuple[str, ...], batches: tuple[int, int], most: int | None, until: float, found: dict
) -> None:
    """Measure models one after another, each in an equal share of what is left of the time.

    Raises RuntimeError at the end if some could not be measured.
    """
    failed = []
    for index, model in enumerate(models):
        began = time.monotonic()
        if began > until:
            break
        end = began + (until - began) / (len(models) - index)
        of_model = {}
        try:
            with torch._dynamo.config.patch(recompile_limit=64):  # the kinds run the same code
                measure_model(model, forms, batches, most, end, of_model)
        except Exception as error:  # of any type: the others are measured all the same
            failed.append(f"{model}: {type(error).__name__}: {error}")
        if of_model:
            found[model] = of_model
        gc.collect()
        torch.cuda.empty_cache()
    if failed:
        raise RuntimeError("; ".join(failed))


def measure_model(
    model: str, forms: tuple[str, ...], batches: tuple[int, int], most: int | None, until: float, found: dict
) -> None:
    """Measure a model at each of its drop path rates, eager or compiled, in at most `most` turns of all kinds.

    `batches` are the smallest and the largest that may be tried. Raises RuntimeError at the end if some kinds could not
    be measured.
    """
    rates = next((rates for name, rates in RATES.items() if model.startswith(name)), OTHER_RATES)
    torch.manual_seed(0)
    base = timm.create_model(model, drop_path_rate=max(rates))
    probabilities = [drop_path.drop_prob for drop_path in drop_paths(base)]
    networks = networks_of(base)
    branch_seconds = clock_branches(networks[CLOCKED], now)
    device = Accelerator().device
    base.to(device)
    for network in networks.values():
        share_parameters(network, base)
        network.to(device)
    optimizer = sgd(base)

    def make_step(kind: str, network: nn.Module, batch_size: int) -> Step:
        clocked = kind == CLOCKED
        return training_step(optimizer, make_pass(network, "batch" if clocked else kind, batch_size, clocked))

    batch_size = full_batch(lambda size: make_step(DROP_PATH, networks[DROP_PATH], size), *batches)
    cases, failed = [(form, rate) for form in forms for rate in rates], []
    for index, (form, rate) in enumerate(cases):
        began = time.monotonic()
        if began > until:
            break
        end = began + (until - began) / (len(cases) - index)
        steps, errors = {}, {}
        torch._dynamo.reset()
        for kind, network in networks.items():
            share = 0.0 if kind == NONE else rate / max(rates)
            for drop_path, probability in zip(drop_paths(network), probabilities, strict=True):
                drop_path.drop_prob = share * probability
            late = len(steps) > 2 and time.monotonic() > (began + end) / 2  # half of the time is for measuring
            if late or (form == COMPILED and kind == CLOCKED):  # a clock is for eager branches
                continue
            with attempt(kind, errors):
                step = make_step(kind, torch.compile(network) if form == COMPILED else network, batch_size)
                for t in range(WARM_UP[form]):
                    step(t)
                steps[kind] = step
        branch_seconds[:] = [0.0] * len(branch_seconds)
        times, memory = take_turns(steps, errors, most, end)
        failed += [f"{form}, {rate:g}, {kind}: {why}" for kind, why in errors.items()]
        turns = len(times[NONE])
        survival = [gate.survival for gate in gates(networks[CLOCKED])]
        found.setdefault(form, {})[f"{rate:g}"] = dict(
            batch_size=batch_size,
            steps=turns,
            kinds=summary(times, memory, [total / turns for total in branch_seconds], survival, batch_size),
        )
    if failed:
        raise RuntimeError("; ".join(failed))


@contextmanager
def attempt(kind: str, errors: dict[str, str]) -> Iterator[None]:
    """Note what fails, so that other kinds are measured all the same; except for those that they are compared to."""
    try:
        yield
    except Exception as error:  # of any type
        if kind in (NONE, DROP_PATH):
            raise
        errors[kind] = f"{type(error).__name__}: {error}"


def drop_paths(network: nn.Module) -> list[DropPath]:
    """A network's drop paths, in order."""
    return [module for module in network.modules() if isinstance(module, DropPath)]


def networks_of(base: nn.Module) -> dict[str, nn.Module]:
    """A copy of a model for each kind of step that it supports."""
    networks = {}
    for kind in KINDS:
        try:
            networks[kind] = convert(copy.deepcopy(base), "batch" if kind == CLOCKED else kind)
        except ValueError:
            if kind == CLOCKED:  # "batch" is the mode that supports the most models
                raise
    return networks


def share_parameters(network: nn.Module, base: nn.Module) -> None:
    """Give a network the parameters of another, which has the same ones in the same order."""
    for (name, _), parameter in zip(list(network.named_parameters()), base.parameters(), strict=True):
        module, _, own = name.rpartition(".")
        setattr(network.get_submodule(module), own, parameter)


def full_batch(make_step: Callable[[int], Step], first: int, last: int) -> int:
    """A batch size from `first` to `last`, doubled until it does not fit into memory or throughput grows no more."""
    highest, batch_size = 0.0, first
    while batch_size <= last:
        try:
            step = make_step(batch_size)
            step(0)
            started = now()
            for t in (1, 2):
                step(t)
            throughput = 2 * batch_size / (now() - started)
        except torch.OutOfMemoryError:
            if batch_size == first:
                raise
            break
        if throughput < GROWTH * highest:
            break
        highest, batch_size = throughput, 2 * batch_size
    del step
    torch.cuda.empty_cache()
    return batch_size // 2


def take_turns(
    steps: dict[str, Step], errors: dict[str, str], most: int | None, until: float
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds of each step, and the peak of memory in MiB, which is None on a CPU; of the kinds that do not fail."""
    on_gpu = Accelerator().device.type == "cuda"
    times, memory = {kind: [] for kind in steps}, dict.fromkeys(steps, 0.0 if on_gpu else None)
    for turn in count():
        if turn >= 2 and (turn == most or time.monotonic() > until):  # an interval needs two
            break
        for kind in [kind for kind in steps if kind not in errors]:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            started = now()
            with attempt(kind, errors):
                steps[kind](turn)
            times[kind].append(now() - started)
            if on_gpu:
                memory[kind] = max(memory[kind], torch.cuda.max_memory_allocated() / 2**20)
    return {kind: of_kind for kind, of_kind in times.items() if kind not in errors}, memory


def summary(
    times: dict[str, list[float]],
    memory: dict[str, float | None],
    branch_seconds: list[float],
    survival: list[float],
    batch_size: int,
) -> dict[str, dict[str, float | None]]:
    """For each kind, its time, also relative to DropPath, its memory, and what it has `saved` of perfect skipping.

    That is known for kinds that skip, if the clocked kind has run too.
    """
    measured = {}
    for kind in [kind for kind in times if kind != CLOCKED]:
        shares = dropped(kind, survival, batch_size, range(len(times[kind])))
        perfect = perfect_seconds(sum(times[NONE]) / len(times[NONE]), branch_seconds, shares)
        measured[kind] = Measured(times[kind], perfect, sum(shares), flops=0.0, memory=memory[kind])
    none, base = measured[NONE], measured[DROP_PATH]
    found = {}
    for kind, own in measured.items():
        ratio, interval = own.ratio(base)
        saved = None
        if CLOCKED in times and kind not in (NONE, DROP_PATH) and own.perfect < none.seconds:
            saved = (none.seconds - own.seconds) / (none.seconds - own.perfect)
        found[kind] = dict(ms=1e3 * own.seconds, ratio=ratio, interval=interval, mib=memory[kind], saved=saved)
    return found
