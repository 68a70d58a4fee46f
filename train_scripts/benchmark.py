"""Measure time and memory, as ratios within one run: `python train_scripts/benchmark.py --data-dir data`.

Variants are interleaved step by step, so that background load affects all of them. Times are means over the steps,
since each step has its own gates. Peak memory is measured on the same steps, run again in a separate process.
"""

import start  # noqa: F401

# isort: split
from timm_sd import extras  # noqa: F401

# isort: split
import argparse
import multiprocessing
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import benchmark_gpu
import benchmark_gpu_tables
import benchmark_timm
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from benchmark_timm import NONE, Measured, perfect_seconds
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm, trange

from timm_sd import draw_gates, gates, register_depth, use_gates
from timm_sd.command_line import Parser, one_line_errors, path, say
from timm_sd.files import writing
from timm_sd.report import figures
from timm_sd.skip.benchmark import now
from timm_sd.train import data, machine
from timm_sd.train.learner import Learner
from timm_sd.train.options import Options

PARTS = ("data", "step", "depth", "timm")
DEPTHS = (20, 56, 110, 1202, 2402, 4802)
CHECKPOINTED_FROM = 1202  # and deeper ones only so: at batch 128, 2402 layers would take about 24 GiB without it
Step = Callable[[int], None]


class PeerBlock(nn.Module):
    """A residual block with a peer's stochastic depth: the branch is always computed, and then perhaps zeroed."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, drop: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.drop(self.branch(x)), inplace=True)


def put_in(network: nn.Module, make_drop: Callable[[float], nn.Module]) -> None:
    """Make a network's blocks drop the way a peer does."""
    names = {block: name for name, block in network.named_modules()}
    for gate in gates(network):
        peer = PeerBlock(gate.block.branch, gate.block.shortcut, make_drop(1 - gate.survival))
        network.set_submodule(names[gate.block], peer)


PEERS = {
    "timm DropPath": lambda drop: DropPath(drop, scale_by_keep=True),
    "torchvision, mode batch": lambda drop: TorchvisionStochasticDepth(drop, "batch"),
}


def survival_of(network: nn.Module) -> list[float]:
    return [gate.survival for gate in gates(network)]


def make_learner(model: str, batch_size: int, **options) -> Learner:
    return Learner(Accelerator(), Options(model, "synthetic", batch_size=batch_size, **options))


def learner_step(learner: Learner) -> Step:
    """The trainer's own step, on the same batch every time."""
    learner.begin()
    batch = next(learner.batches(epoch=1))
    learner.model.train()

    def step(t: int) -> None:
        learner.step(*batch, draw_gates(learner.survival, seed=0, step=t), learner.options.lr)

    return step


def plain_step(model: str, batch_size: int) -> Step:
    """A straightforward step of the same network and gates: default layout and optimizer, loss read at every step."""
    accelerator = Accelerator()
    network = timm.create_model(model).to(accelerator.device).train()
    survival = survival_of(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images = torch.randn(batch_size, 3, 32, 32, device=accelerator.device)
    labels = torch.randint(10, (batch_size,), device=accelerator.device)

    def step(t: int) -> None:
        with use_gates(network, draw_gates(survival, seed=0, step=t)):
            with accelerator.autocast():
                loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        loss.item()

    return step


def make_step(kind: str, model: str, batch_size: int) -> Step:
    """A function that runs training step t of this kind, `model` being the plain network."""
    torch.manual_seed(0)
    name = model if kind.startswith("constant depth") else f"{model}_sd"
    if kind.endswith("plain loop"):
        return plain_step(name, batch_size)
    learner = make_learner(name, batch_size, grad_checkpointing="checkpointing" in kind, cuda_graphs="graphs" in kind)
    if kind in PEERS:
        put_in(learner.network, PEERS[kind])
        learner.gates, learner.survival = [], []
    return learner_step(learner)


def time_steps(steps: dict[Hashable, Step], count: int, warm_up: int = 2) -> dict[Hashable, list[float]]:
    """Seconds of each of `count` steps after warm-up, the kinds taking turns."""
    seconds = {kind: [] for kind in steps}
    for t in trange(-warm_up, count, unit="step", leave=False, disable=None):
        for kind, step in steps.items():
            started = now()
            step(max(t, 0))
            if t >= 0:
                seconds[kind].append(now() - started)
    return seconds


def peak_memory(make_step: Callable[..., Step], args: tuple, steps: Iterable[int]) -> float:
    """MiB reserved on a GPU for the steps, or by which this process's resident memory grows at its peak.

    The former includes everything (network, data, graphs), since graphs reserve their memory before they are replayed.
    """
    machine.use_all_cores()
    step = make_step(*args)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, since creating the data is not part of the steps
    before = resident_memory("VmRSS")
    for t in steps:
        step(t)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**20
    return (resident_memory("VmHWM") - before) / 2**20


def resident_memory(field: str) -> int:
    """Bytes of this process's memory: "VmRSS" now, "VmHWM" at its peak. Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status).group(1))


def in_own_process(function: Callable, *args):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def clock_stages(network: nn.Module) -> list[float]:
    """A list to which every training step of the network adds the seconds of each stage, forward and backward."""
    seconds = [0.0] * len(network.stages)

    def clock(stage: int, sign: int) -> None:
        seconds[stage] += sign * now()

    for index, stage in enumerate(network.stages):

        def enter(_, args, index=index) -> None:
            args[0].register_hook(lambda _: clock(index, 1))
            clock(index, -1)

        def leave(_, args, output, index=index) -> None:
            clock(index, 1)
            output.register_hook(lambda _: clock(index, -1))

        stage.register_forward_pre_hook(enter)
        stage.register_forward_hook(leave)
    return seconds


def compare_steps(model: str, batch_size: int, count: int) -> float:
    """Print a table of all kinds of training step; return the seconds of one with stochastic depth."""
    kinds = ["constant depth", "stochastic depth", "constant depth, plain loop", "stochastic depth, plain loop", *PEERS]
    if torch.cuda.is_available():
        kinds += ["constant depth, CUDA graphs", "stochastic depth, CUDA graphs"]
    memory = {kind: in_own_process(peak_memory, make_step, (kind, model, batch_size), range(count)) for kind in kinds}

    # Separate from the steps that are timed, so that they do not include the clock's hooks.
    clocked = make_learner(model, batch_size)
    stage_seconds = clock_stages(clocked.network)
    steps = {kind: make_step(kind, model, batch_size) for kind in kinds}
    stochastic = survival_of(timm.create_model(f"{model}_sd"))
    clocked_step = learner_step(clocked)
    clocked_step(0)
    stage_seconds[:] = [0.0] * len(stage_seconds)
    seconds = time_steps(steps | {"clocked": clocked_step}, count)
    mean = {kind: statistics.mean(times) for kind, times in seconds.items()}

    # The time that the blocks dropped by these steps take in a step that drops none.
    dropped = 1 - torch.stack([draw_gates(stochastic, 0, t) for t in range(count)]).double().mean(0)
    shares = dropped.view(len(stage_seconds), -1).mean(1).tolist()
    perfect = perfect_seconds(mean["constant depth"], [total / (count + 2) for total in stage_seconds], shares)

    say(f"\nA training step of {model}, batch {batch_size}, {count} steps")
    say(f"{'':32} {'s/step':>9} {'images/s':>9} {'ratio':>6} {'MiB':>7} {'ratio':>6}")
    for kind in kinds:
        say(
            f"{kind:32} {mean[kind]:9.4f} {batch_size / mean[kind]:9.0f} {mean[kind] / mean['constant depth']:6.3f}"
            f" {memory[kind]:7.0f} {memory[kind] / memory['constant depth']:6.3f}"
        )
    ms = ", ".join(f"{1e3 * total / (count + 2) / (len(stochastic) // 3):.2f}" for total in stage_seconds)
    ratio = perfect / mean["constant depth"]
    say(f"{'perfect skipping, computed':32} {perfect:9.4f} {batch_size / perfect:9.0f} {ratio:6.3f}")
    say(f"a block takes {ms} ms in each group; share of them dropped: {', '.join(f'{share:.3f}' for share in shares)}")
    say(f"stochastic depth takes {mean['stochastic depth'] / perfect:.3f} times as long as perfect skipping")
    for kind in kinds[:2]:
        say(f"{kind} has {mean[f'{kind}, plain loop'] / mean[kind]:.3f} times the images/s of the plain loop")
    return mean["stochastic depth"]


def compare_data(data_dir: Path, batch_size: int, rounds: int = 5, batches: int = 100) -> float:
    """Print the throughput of our batches and of a DataLoader's; return the seconds per batch of ours."""
    device = Accelerator().device
    trainval_set, _ = data.load("cifar10", data_dir)
    training_set, _ = data.split(trainval_set, 0, "cifar10")
    training_set = training_set.to(device)
    standardize = data.Standardize.of(timm.create_model("cifar_resnet20.cifar10"), device)
    config = timm.create_model("cifar_resnet20.cifar10").pretrained_cfg
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
            v2.RandomCrop(32, padding=data.MAX_SHIFT),
            v2.RandomHorizontalFlip(),
        ]
    )
    peer = CIFAR10(data_dir, train=True, transform=transform)
    seconds = {"here": 0.0, "DataLoader": 0.0}
    for epoch in range(rounds):
        started = now()
        for _ in data.training_batches(training_set, batch_size, standardize, seed=0, epoch=epoch + 1):
            pass
        seconds["here"] += now() - started

        loader = iter(DataLoader(peer, batch_size, shuffle=True, num_workers=2, pin_memory=device.type == "cuda"))
        for _ in range(10):  # while the workers start
            next(loader)
        started = now()
        for _ in range(batches):
            images, labels = next(loader)
            images.to(device, non_blocking=True)
            labels.to(device, non_blocking=True)
        seconds["DataLoader"] += now() - started
        del loader
    rate = len(training_set) * rounds / seconds["here"]
    peer_rate = batches * batch_size * rounds / seconds["DataLoader"]
    say(f"\nData, batch {batch_size}")
    say(f"on the device, standardized, shifted and flipped: {rate:.0f} images/s")
    say(f"torchvision's CIFAR10, transforms.v2 and DataLoader with 2 workers: {peer_rate:.0f} images/s")
    say(f"ratio {rate / peer_rate:.1f}")
    return batch_size / rate


def compare_depths(batch_size: int, count: int) -> None:
    """Print time and memory of a step by depth.

    Time is per active block. Memory is per block, since gradients and momentum are those of all blocks.
    """
    cases = []
    for depth in DEPTHS:
        register_depth(depth)
        kinds = ["constant depth", "stochastic depth"] if depth <= CHECKPOINTED_FROM else []
        if depth >= CHECKPOINTED_FROM:
            kinds += ["constant depth, checkpointing", "stochastic depth, checkpointing"]
        cases += [(kind, f"cifar_resnet{depth}", batch_size) for kind in kinds]
    memory = {case: in_own_process(peak_memory, make_step, case, range(count)) for case in cases}
    seconds = time_steps({case: make_step(*case) for case in cases}, count, warm_up=1)

    say(f"\nDepth, batch {batch_size}, {count} steps")
    say(f"{'':48} {'active':>7} {'s/step':>9} {'ms/active':>9} {'MiB':>7} {'MiB/block':>9}")
    for case in cases:
        kind, model, _ = case
        survival = survival_of(timm.create_model(model if kind.startswith("constant") else f"{model}_sd"))
        drawn = torch.stack([draw_gates(survival, 0, t) for t in range(count)])
        active, mean = drawn.double().sum(1).mean().item(), statistics.mean(seconds[case])
        say(
            f"{model + ', ' + kind:48} {active:7.1f} {mean:9.3f} {1e3 * mean / active:9.2f} {memory[case]:7.0f}"
            f" {memory[case] / len(survival):9.3f}"
        )


def measure_timm(model: str, rates: Sequence[float], batch_size: int, count: int) -> dict[float, dict[str, Measured]]:
    """Measure all kinds of training step of a timm model, all drop path rates in one run.

    Peak memory is that of the step that drops the least.
    """
    none = (NONE, 0.0)  # the same for all rates
    kinds = benchmark_timm.kinds(model)
    cases = {rate: {kind: none if kind == NONE else (kind, rate) for kind in kinds} for rate in rates}
    distinct = dict.fromkeys(case for of_rate in cases.values() for case in of_rate.values())
    survival = {0.0: [], **{rate: benchmark_timm.survival_of(model, rate) for rate in rates}}

    flops, memory = {}, {}
    for kind, rate in tqdm(distinct, f"memory of {model}", leave=False, disable=None):
        flops[kind, rate] = benchmark_timm.count_flops(kind, model, rate, batch_size, range(count))
        # Twice, since the first step's optimizer has no momentum yet.
        steps = 2 * [benchmark_timm.fullest_step(kind, survival[rate], batch_size, count)]
        args = (kind, model, rate, batch_size)
        memory[kind, rate] = in_own_process(peak_memory, benchmark_timm.make_step, args, steps)

    # Separate from the steps that are timed, so that they do not include the clock.
    clocked_step, branch_seconds = benchmark_timm.make_clocked_step(model, max(rates), batch_size, now)
    steps = {case: benchmark_timm.make_step(case[0], model, case[1], batch_size) for case in distinct}
    clocked_step(0)
    branch_seconds[:] = [0.0] * len(branch_seconds)
    seconds = time_steps(steps | {"clocked": clocked_step}, count, warm_up=1)
    branch_seconds = [total / (count + 1) for total in branch_seconds]
    mean = {case: statistics.mean(times) for case, times in seconds.items()}

    measured = {}
    for rate, of_rate in cases.items():
        measured[rate] = {}
        for kind, case in of_rate.items():
            dropped = benchmark_timm.dropped(kind, survival[rate], batch_size, range(count))
            perfect = perfect_seconds(mean[none], branch_seconds, dropped)
            share = (mean[none] - perfect) / sum(branch_seconds)
            measured[rate][kind] = Measured(seconds[case], perfect, share, flops[case], memory[case])
    return measured


def compare_timm(models: Sequence[str], rates: Sequence[float], batch_size: int, count: int, plot: Path | None) -> None:
    """Print a table for each model and drop path rate, and plot the highest rate."""
    at_highest = {}
    for model in models:
        for rate, of_rate in measure_timm(model, rates, batch_size, count).items():
            say(f"\nA training step of {model} at drop path rate {rate:g}, batch {batch_size}, {count} steps")
            say(benchmark_timm.table(of_rate, batch_size))
            if rate == max(rates):
                at_highest[model] = of_rate
    say(
        "\nratios are relative to DropPath, with 95% intervals; `dropped` is the share of samples dropped in these"
        "\nsteps, weighted by the branches' time; perfect skipping would save all that time at no cost, and take"
        "\n`perfect` seconds per step; `saved` is the share of that saving that is achieved, both compared with no"
        "\ndrop path"
    )
    if plot is not None:
        figure = benchmark_timm.draw_times(at_highest, max(rates))
        with writing(plot, "choose another --plot"):
            figures.save(figure, plot)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--model", default="cifar_resnet110", help="the network of constant depth")
    parser.add_argument("--batch-size", type=int, default=128, help="for the parts data and step")
    parser.add_argument("--steps", type=int, default=64, help="number of steps of each kind")
    parser.add_argument("--depth-batch-size", type=int, default=8)
    parser.add_argument("--depth-steps", type=int, default=3)
    parser.add_argument("--timm-models", nargs="+", default=benchmark_timm.MODELS, metavar="MODEL")
    parser.add_argument("--timm-rates", nargs="+", type=float, default=benchmark_timm.RATES, metavar="RATE")
    parser.add_argument("--timm-batch-size", type=int, default=8)
    parser.add_argument("--timm-steps", type=int, default=6)
    parser.add_argument("--plot", type=path, help="PNG or SVG file to plot the timm models at the highest rate")
    parser.add_argument("--data-dir", type=path, default=Path("data"), help="folder with torchvision's CIFAR-10 files")
    parser.add_argument("--gpu", action="store_true", help="instead, check and measure all that needs a GPU")
    parser.add_argument("--minutes", type=float, default=4, help="time for --gpu")
    parser.add_argument("--gpu-models", nargs="+", metavar="MODEL", help="--gpu for these timm models, compiled too")
    parser.add_argument("--gpu-tables", action="store_true", help="instead, show what --gpu has found")
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g}: it must be positive")
    if args.timm_steps < 2:
        parser.error(f"--timm-steps {args.timm_steps}: intervals need at least 2")
    if not all(0 < rate < 1 for rate in args.timm_rates):
        parser.error(f"--timm-rates {' '.join(map(str, args.timm_rates))}: they must lie between 0 and 1")
    if args.plot is not None:
        if "timm" not in args.parts:
            parser.error("--plot requires the part timm")
        if args.plot.suffix not in (".png", ".svg"):
            parser.error(f"--plot {args.plot}: it must end in .png or .svg")
        if not args.plot.parent.is_dir():
            parser.error(f"--plot {args.plot}: no such folder: {args.plot.parent}")
    return args


def measure(args: argparse.Namespace) -> None:
    """Measure and print the parts."""
    accelerator = machine.start()
    if "timm" in args.parts:
        for model in args.timm_models:
            benchmark_timm.kinds(model)  # raises now, not minutes later, if the model cannot be measured
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU"
    say(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__},"
        f" mixed precision {accelerator.mixed_precision}"
    )
    batch_seconds = compare_data(args.data_dir, args.batch_size) if "data" in args.parts else None
    step_seconds = compare_steps(args.model, args.batch_size, args.steps) if "step" in args.parts else None
    if batch_seconds and step_seconds:
        say(f"the data takes {100 * batch_seconds / step_seconds:.2f}% of a training step with stochastic depth")
    if "depth" in args.parts:
        compare_depths(args.depth_batch_size, args.depth_steps)
    if "timm" in args.parts:
        compare_timm(args.timm_models, args.timm_rates, args.timm_batch_size, args.timm_steps, args.plot)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        if args.gpu_tables:
            benchmark_gpu_tables.show()
        elif args.gpu or args.gpu_models:
            benchmark_gpu.run(args)
        else:
            measure(args)


if __name__ == "__main__":
    main()
