"""Time and memory of a timm model in each mode of `skip_drop_path`: `python -m timm_sd --benchmark MODEL`."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..command_line import Parser
from ..errors import UserError
from ..gate import MODES, gates
from .convert import skip_drop_path

DROP_PATH = "DropPath"  # timm's own, which computes every branch
SECONDS, LEAST_TURNS = 60, 5
Step = Callable[[], None]


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("Time training steps of a timm model with DropPath and with each mode of skip_drop_path, in turns.")
    parser.prog = "python -m timm_sd --benchmark"
    parser.add_argument("model", metavar="MODEL", help="its name in timm")
    parser.add_argument("--drop-path", type=float, default=0.1, metavar="RATE")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="height and width; the model's own by default")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    options = parser.parse_args(args)
    if not 0 < options.drop_path < 1:
        parser.error(f"--drop-path {options.drop_path:g}: it must lie between 0 and 1")
    if options.batch_size < 1 or (options.img_size or 1) < 1:
        parser.error("--batch-size and --img-size: they must be positive")
    return options


def benchmark(args: Sequence[str]) -> Iterator[str]:
    """Run the command with these arguments; yields its output line by line.

    Raises UserError if timm has no such model, the model has no drop path or does not take it, or nothing can be
    skipped.
    """
    options = parse_args(args)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    networks, refused = {DROP_PATH: create(options)}, {}
    if gates(networks[DROP_PATH]):
        raise UserError(f"{options.model} skips by itself: train_scripts/benchmark.py compares it with DropPath")
    for mode in MODES:
        try:
            networks[mode] = skip_drop_path(create(options), mode, strict=True)
        except ValueError as error:
            refused[mode] = str(error).partition(": use")[0]  # what follows is for Python code
    if "batch" in refused:  # the mode that supports the most models
        raise UserError(f"{options.model}: {refused['batch']}")
    channels, *size = networks[DROP_PATH].pretrained_cfg["input_size"]
    size = [options.img_size] * 2 if options.img_size else size
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    yield (
        f"{options.model}, drop path rate {options.drop_path:g}, batch size {options.batch_size},"
        f" {'x'.join(map(str, size))} pixels, {'bfloat16' if options.amp else 'float32'} on {device.type}{threads}"
    )
    images = torch.randn(options.batch_size, channels, *size, device=device)
    steps = {kind: make_step(network.to(device).train(), images, options.amp) for kind, network in networks.items()}
    try:
        memory = {kind: saved_bytes(step) for kind, step in steps.items()}  # also warms up
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"images of {'x'.join(map(str, images.shape))}: {error}") from error
    times = take_turns(steps)
    yield f"{'':10} {'ms/step':>9} {'ratio':>6} {'95%':>7} {'MiB kept for backward':>22} {'samples skipped':>16}"
    for kind, network in networks.items():
        ratio, interval = paired_ratio(times[kind], times[DROP_PATH])
        tallies = [gate.tally for gate in gates(network)]
        skipped = 1 - sum(t.computed for t in tallies) / sum(t.samples for t in tallies) if tallies else 0.0
        yield (
            f"{kind:10} {1000 * statistics.mean(times[kind]):9.1f} {ratio:6.3f} {f'±{interval:.3f}':>7}"
            f" {memory[kind] / 2**20:22.0f} {skipped:16.1%}"
        )
    yield from (f'mode "{mode}" is refused: {why}' for mode, why in refused.items())
    yield advice(times)


def create(options: argparse.Namespace) -> nn.Module:
    """The model with its drop path, as timm's train.py creates it. Raises UserError if that is not possible."""
    sizes = [{"img_size": options.img_size}, {}] if options.img_size else [{}]  # few convolutional networks take it
    for size in sizes:
        try:
            return timm.create_model(options.model, drop_path_rate=options.drop_path, **size)
        except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
            reason = error
    raise UserError(f"{options.model} with drop path rate {options.drop_path:g}: {reason}")


def make_step(network: nn.Module, images: Tensor, amp: bool) -> Step:
    """A function that runs a training step, with AdamW and an arbitrary loss."""
    optimizer = torch.optim.AdamW(network.parameters())

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            output = network(images)
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(step: Step) -> int:
    """The memory of all tensors that a step's forward pass keeps for its backward pass, weights among them."""
    sizes = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(sizes.values())


def take_turns(steps: dict[str, Step]) -> dict[str, list[float]]:
    """The seconds of each step of each kind. They take turns, so that other load on the machine falls on all."""
    times = {kind: [] for kind in steps}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[DROP_PATH]) < LEAST_TURNS:
        for kind, step in steps.items():
            started = now()
            step()
            times[kind].append(now() - started)
    return times


def now() -> float:
    """The time in seconds, once the device has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def paired_ratio(times: list[float], base: list[float]) -> tuple[float, float]:
    """The ratio of the mean times of at least five steps that took turns, and half of its 95% interval."""
    ratio = statistics.mean(times) / statistics.mean(base)
    errors = [ours - ratio * theirs for ours, theirs in zip(times, base, strict=True)]
    freedom = len(errors) - 1
    student = 1.96 + 2.372 / freedom + 2.823 / freedom**2  # within 2% of Student's t
    return ratio, student * statistics.stdev(errors) / statistics.mean(base) / len(errors) ** 0.5


def advice(times: dict[str, list[float]]) -> str:
    """Which mode to use: "row", which has the distribution of DropPath, unless another is faster beyond the noise."""
    best, *others = (mode for mode in MODES if mode in times)
    for mode in others:
        ratio, interval = paired_ratio(times[mode], times[best])
        best = mode if ratio + interval < 1 else best
    ratio, interval = paired_ratio(times[best], times[DROP_PATH])
    if ratio + interval >= 1:
        return "no mode is faster than DropPath beyond the noise: keep DropPath"
    return f'use timm_sd.skip_drop_path(model, "{best}"): a step takes {ratio:.2f} of the time'
