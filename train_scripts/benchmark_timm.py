"""`benchmark.py --parts timm`: a timm model's training step with different forms of drop path.

All kinds of step use the same model with the same probabilities:

    "no drop path"            every branch is computed and kept
    "DropPath"                timm's own: every branch is computed, and then zeroed for some samples
    "DINOv2's form"           ViTs only: a branch is computed for a random subset of the samples
    "row", "count", "batch"   the model converted by `skip_drop_path`, in each mode
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from timm_sd import draw_gates, gates, skip_drop_path, use_gates
from timm_sd.errors import UserError
from timm_sd.gate import MODES
from timm_sd.skip.benchmark import DROP_PATH, paired_ratio

MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50")
RATES = (0.1, 0.4)
NONE, DINOV2 = "no drop path", "DINOv2's form"
COLORS = {DROP_PATH: "0.72", "row": "#0072B2", "count": "#009E73", "batch": "#E69F00"}  # Okabe and Ito's
Step = Callable[[int], None]


class Measured(NamedTuple):
    """The measurements of one kind of training step."""

    times: list[float]  # seconds of each step
    perfect: float  # seconds, if what it drops took no time
    dropped: float  # share of the samples, weighted by the time of the branches
    flops: float
    memory: float  # MiB

    @property
    def seconds(self) -> float:
        return statistics.mean(self.times)

    def ratio(self, base: "Measured") -> tuple[float, float]:
        """The time relative to another kind of step's, and half of its 95% interval, from steps that took turns."""
        return paired_ratio(self.times, base.times)


class DinoV2Block(nn.Module):
    """A ViT block as DINOv2 trains it: a branch that drops more than a tenth of the samples skips a fixed number."""

    SMALLEST_RATE = 0.1  # up to this rate, DropPath

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention = nn.Sequential(block.norm1, block.attn, block.ls1)
        mlp = nn.Sequential(block.norm2, block.mlp, block.ls2)
        self.branches = nn.ModuleList([attention, mlp])
        self.drop_paths = nn.ModuleList([block.drop_path1, block.drop_path2])

    @staticmethod
    def kept(batch_size: int, rate: float) -> int:
        """The number of samples, rounded down where mode "count" rounds to the nearest."""
        return max(1, int(batch_size * (1 - rate)))

    def forward(self, x: Tensor) -> Tensor:
        for branch, drop_path in zip(self.branches, self.drop_paths, strict=True):
            x = self.add(x, branch, drop_path)
        return x

    def add(self, x: Tensor, branch: nn.Module, drop_path: nn.Module) -> Tensor:
        rate = getattr(drop_path, "drop_prob", 0.0)
        if not self.training or rate <= self.SMALLEST_RATE:
            return x + drop_path(branch(x))
        rows = torch.randperm(len(x), device=x.device)[: self.kept(len(x), rate)]
        residual = branch(x[rows]).flatten(1).to(x.dtype)
        return x.flatten(1).index_add(0, rows, residual, alpha=len(x) / len(rows)).view_as(x)


def perfect_seconds(constant: float, parts: list[float], dropped: list[float]) -> float:
    """Seconds of a step of `constant` seconds, `parts` of them in branches, that saves a share of each."""
    return constant - sum(seconds * share for seconds, share in zip(parts, dropped, strict=True))


def kinds(model: str) -> list[str]:
    """The kinds of step that a model supports: "row" and "count" require no BatchNorm, and DINOv2's form a ViT.

    Raises UserError if timm has no such model, or the model has no classifier, no DropPath or one that cannot be
    skipped.
    """
    if not timm.is_model(model):
        raise UserError(f"--timm-models {model}: timm has no such model")
    refused = {}
    for kind in (DINOV2, *MODES):
        try:
            make_network(kind, model, 0.1)
        except (RuntimeError, TypeError, ValueError) as error:  # for a wrong tag, no drop path rate, and the rest
            refused[kind] = error
    if "batch" in refused:  # the mode that supports the most models
        raise UserError(f"--timm-models {model}: {refused['batch']}")
    return [kind for kind in (NONE, DROP_PATH, DINOV2, *MODES) if kind not in refused]


def make_network(kind: str, model: str, rate: float) -> nn.Module:
    """The network for one kind of step. Raises ValueError if the model does not support it."""
    return convert(timm.create_model(model, drop_path_rate=0.0 if kind == NONE else rate), kind)


def convert(network: nn.Module, kind: str) -> nn.Module:
    """A timm model with its DropPath, turned into one for this kind of step. Raises ValueError as `make_network`."""
    if not network.num_classes:
        raise ValueError("it has no classifier")
    if kind in MODES:
        skip_drop_path(network, kind, strict=True)
        if not gates(network):
            raise ValueError("it has no DropPath")
    if kind == DINOV2:
        if not isinstance(network, VisionTransformer) or any(type(block) is not Block for block in network.blocks):
            raise ValueError("it is not made of ViT blocks")
        network.blocks = nn.Sequential(*map(DinoV2Block, network.blocks))
    return network.train()


def survival_of(model: str, rate: float) -> list[float]:
    """The survival probability of each DropPath call, in order."""
    return [gate.survival for gate in gates(make_network("batch", model, rate))]


def draw(kind: str, survival: Sequence[float], batch_size: int, t: int) -> Tensor:
    """The gates of step t, in the shape that their mode requires."""
    return draw_gates(survival, 0, t, None if kind == "batch" else batch_size, kind)


def dropped(kind: str, survival: Sequence[float], batch_size: int, steps: Iterable[int]) -> list[float]:
    """For each DropPath call, the share of the samples that these steps drop; for DropPath itself, the expected one."""
    if kind == NONE:
        return [0.0] * len(survival)
    if kind in MODES:
        drawn = torch.stack([draw(kind, survival, batch_size, t) for t in steps]).double()
        return (1 - drawn.view(len(drawn), len(survival), -1).mean((0, 2))).tolist()
    rates = [1 - p for p in survival]
    if kind == DROP_PATH:
        return rates
    dropped = (1 - DinoV2Block.kept(batch_size, rate) / batch_size for rate in rates)
    return [share if rate > DinoV2Block.SMALLEST_RATE else rate for share, rate in zip(dropped, rates, strict=True)]


def fullest_step(kind: str, survival: Sequence[float], batch_size: int, count: int) -> int:
    """The step among 0 to `count` - 1 that drops the least, and so needs the most memory."""
    return min(range(count), key=lambda t: sum(dropped(kind, survival, batch_size, [t])))


def make_pass(network: nn.Module, kind: str, batch_size: int, open_all: bool = False) -> Step:
    """A function that runs the forward and backward pass of step t, on the same batch every time.

    With `open_all`, no gate drops anything.
    """
    accelerator = Accelerator()
    own = gates(network)
    survival = [1.0 if open_all else gate.survival for gate in own]
    device = next(network.parameters()).device
    images = torch.randn(batch_size, *network.pretrained_cfg["input_size"], device=device)
    labels = torch.randint(network.num_classes, (batch_size,), device=device)

    def make(t: int) -> None:
        values = draw(kind, survival, batch_size, t) if own else torch.empty(0, dtype=torch.bool)
        with use_gates(own, values):
            with accelerator.autocast():
                loss = F.cross_entropy(network(images), labels)
            loss.backward()

    return make


def make_step(kind: str, model: str, rate: float, batch_size: int) -> Step:
    """A function that runs training step t."""
    torch.manual_seed(0)
    network = make_network(kind, model, rate).to(Accelerator().device)
    return training_step(sgd(network), make_pass(network, kind, batch_size))


def sgd(network: nn.Module) -> Optimizer:
    """The optimizer of a network."""
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def training_step(optimizer: Optimizer, make: Step) -> Step:
    """A pass of a network followed by a step of its optimizer."""

    def step(t: int) -> None:
        make(t)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_clocked_step(model: str, rate: float, batch_size: int, now: Callable[[], float]) -> tuple[Step, list[float]]:
    """A training step that drops nothing, and the seconds that the branch of each DropPath call has taken."""
    torch.manual_seed(0)
    network = make_network("batch", model, rate).to(Accelerator().device)
    seconds = clock_branches(network, now)
    return training_step(sgd(network), make_pass(network, "batch", batch_size, open_all=True)), seconds


def clock_branches(network: nn.Module, now: Callable[[], float]) -> list[float]:
    """A list to which every training step of the network adds the seconds of each gate's branch, forward and backward.

    A branch's backward pass lasts from the gradient of its output to that of its first input. Each branch must have a
    drop path of its own.
    """
    seconds = [0.0] * len(gates(network))

    blocks = (module for module in network.modules() if "skipping" in vars(module))
    plans = ((block, plan) for block in blocks for plan in block.skipping.plans.values())
    branches = ((block, branch) for block, plan in plans for branch in plan.branches)
    for index, (block, branch) in enumerate(branches):

        def clock(sign: int, *_: object, index: int = index) -> None:
            seconds[index] += sign * now()

        def start(_, args: tuple, clock: Callable = clock) -> tuple:
            clock(-1)
            x = args[0].view_as(args[0])  # its gradient is that of the branch alone, without the shortcut's
            x.register_hook(partial(clock, 1))
            return x, *args[1:]

        def stop(_, args: tuple, clock: Callable = clock) -> None:
            clock(1)
            args[0].register_hook(partial(clock, -1))

        (first, _), *_ = branch.entries
        block.get_submodule(first).register_forward_pre_hook(start)
        block.get_submodule(branch.drop_path).register_forward_pre_hook(stop)
    return seconds


def count_conv_backward(grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *args, **_) -> int:
    """FLOPs of a convolution's backward pass, from shapes: those of the forward pass for each gradient needed.

    PyTorch's own count ignores groups, so it multiplies those of a depthwise convolution by its number of channels.
    """
    *_, transposed, _, _, needed = args
    return sum(needed[:2]) * conv_flop_count(x, weight, grad, transposed)


def count_flops(kind: str, model: str, rate: float, batch_size: int, steps: Sequence[int]) -> float:
    """The mean FLOPs of these steps, forward and backward, counted on tensors that have shapes but no data."""
    network = make_network(kind, model, rate).to("meta")  # timm 1.0.16 cannot create all of its models there
    make = make_pass(network, kind, batch_size)
    if kind not in MODES or kind == "count":
        steps = steps[:1]  # all are alike
    own_count = {torch.ops.aten.convolution_backward: count_conv_backward}
    with FlopCounterMode(display=False, custom_mapping=own_count) as counter:
        for t in steps:
            make(t)
    return counter.get_total_flops() / len(steps)


def table(measured: dict[str, Measured], batch_size: int) -> str:
    """The kinds of step of one model at one rate, one line each."""
    base, none = measured[DROP_PATH], measured[NONE]
    lines = [
        f"{'':14} {'s/step':>9} {'images/s':>9} {'ratio':>6} {'95%':>7} {'FLOPs':>6} {'MiB':>7} {'ratio':>6}"
        f" {'dropped':>8} {'perfect':>8} {'saved':>7}"
    ]
    for kind, of_kind in measured.items():
        _, perfect, dropped, flops, memory = of_kind
        seconds, (ratio, interval) = of_kind.seconds, of_kind.ratio(base)
        saved = f"{(none.seconds - seconds) / (none.seconds - perfect):.1%}" if dropped else "-"
        lines.append(
            f"{kind:14} {seconds:9.3f} {batch_size / seconds:9.2f} {ratio:6.3f} {f'±{interval:.3f}':>7}"
            f" {flops / base.flops:6.3f} {memory:7.0f} {memory / base.memory:6.3f}"
            f" {dropped:8.3f} {perfect:8.3f} {saved:>7}"
        )
    return "\n".join(lines)


def draw_times(measured: dict[str, dict[str, Measured]], rate: float) -> Figure:
    """One bar per model and kind of step at one drop path rate, marked with perfect skipping of the same samples."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.2
    for place, of_model in enumerate(measured.values()):
        base = of_model[DROP_PATH].seconds
        shown = [kind for kind in COLORS if kind in of_model]
        for index, kind in enumerate(shown):
            position = place + width * (index - (len(shown) - 1) / 2)
            ratio = of_model[kind].seconds / base
            axes.bar(position, ratio, 0.92 * width, color=COLORS[kind])
            top = ratio
            if kind != DROP_PATH:
                top = max(ratio, of_model[kind].perfect / base)
                ends = position - 0.46 * width, position + 0.46 * width
                perfect = axes.hlines(of_model[kind].perfect / base, *ends, colors="black", linewidth=1.8)
            axes.text(position, top + 0.012, f"{ratio:.2f}", ha="center", fontsize=8.5)
    names = {DROP_PATH: "timm's DropPath"}
    handles = [Patch(color=color, label=names.get(kind, f'mode "{kind}"')) for kind, color in COLORS.items()]
    perfect.set_label("perfect skipping")
    figure.legend(
        handles=[*handles, perfect], loc="outside upper center", ncols=5, frameon=False, fontsize=9, handlelength=1.4
    )
    axes.set_xticks(range(len(measured)), [model.split("_patch")[0] for model in measured])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"time of a training step at\ndrop path rate {rate:g}, DropPath = 1")
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
