"""The paper's CIFAR figures, drawn from the records of runs.

Runs are compared in groups, "constant depth" and "stochastic depth" or just one of them. The runs of a group differ
only in their seed. Several are drawn as their mean and a band from the lowest to the highest.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..errors import UserError
from ..files import write
from ..gate import draw_gates
from ..paper import datasets
from .record import Record

CONSTANT, STOCHASTIC = "constant depth", "stochastic depth"
Groups = dict[str, Sequence[Record]]

# Distinguishable by hue for color-blind readers (Okabe and Ito's blue and vermilion), and by line and marker in gray.
COLORS = {CONSTANT: "#0072B2", STOCHASTIC: "#D55E00"}
LINES = {CONSTANT: "--", STOCHASTIC: "-"}
THIN_LINES = {CONSTANT: ":", STOCHASTIC: "-."}
MARKERS = {CONSTANT: "s", STOCHASTIC: "o"}
GRAY = "0.4"
# Of the sweep: constant depth, the schedules, and survival probabilities that were given.
SWEEP = {
    CONSTANT: (COLORS[CONSTANT], dict(linestyle="none", marker="s")),
    "linear": (COLORS[STOCHASTIC], dict(linestyle="-", marker="o")),
    "uniform": ("#009E73", dict(linestyle=":", marker="^")),
    "quadratic": ("#CC79A7", dict(linestyle="--", marker="D")),
    "exponential": ("#E69F00", dict(linestyle="-.", marker="v")),
    "given": ("0.2", dict(linestyle="none", marker="x")),
}


def kind(record: Record) -> str:
    """Whether a run has constant or stochastic depth."""
    return STOCHASTIC if record.stochastic else CONSTANT


def curves(records: Sequence[Record], name: str) -> np.ndarray:
    """One metric of every epoch, of shape (runs, epochs)."""
    return np.array([[line[name] for line in record.history] for record in records])


def training_seconds(records: Sequence[Record]) -> float:
    """Seconds per epoch without evaluation, the median over epochs and runs.

    Only the epochs before a run moved to another machine count.
    """
    seconds = [r.dataset.training_images / line["images_per_second"] for r in records for line in r.before_move]
    return float(np.median(seconds))


def save(figure: Figure, file: Path) -> None:
    """Write a PNG or an SVG; the same figure and Matplotlib version give the same bytes."""
    picture = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "timm-sd"}):
        metadata = {"Software": None} if file.suffix == ".png" else {"Date": None, "Creator": None}
        figure.savefig(picture, dpi=150, metadata=metadata, format=file.suffix[1:])
    write(file, picture.getvalue())


def _new_figure(columns: int = 1, width: float = 7) -> tuple[Figure, Axes | np.ndarray]:
    figure = Figure(figsize=(width, 4.3), layout="constrained")
    return figure, figure.subplots(1, columns)


def _epochs(axes: Axes, label: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _plain_log(axes: Axes) -> None:
    """A logarithmic axis with plain numbers, also between powers of ten if it spans a decade or so."""
    if not any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        return
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(plain)
    if high < 40 * low:
        axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_minor_formatter(plain if high < 40 * low else NullFormatter())


def _draw(axes: Axes, group: str, records: Sequence[Record], name: str, **style) -> None:
    values = curves(records, name)
    epochs = np.arange(1, values.shape[1] + 1)
    axes.plot(epochs, values.mean(0), color=COLORS[group], **{"linestyle": LINES[group], **style})
    if len(values) > 1:
        axes.fill_between(epochs, values.min(0), values.max(0), color=COLORS[group], alpha=0.2, linewidth=0)


def learning_curves(groups: Groups) -> Figure:
    """Figure 3: test error (left) and training loss (right, logarithmic) by epoch.

    Each run has a point at its epoch of lowest validation error, labeled with the mean test error there; dotted lines
    mark the epochs at which the learning rate drops.
    """
    figure, axes = _new_figure()
    _epochs(axes, "test error (%)")
    losses = axes.twinx()
    losses.set_ylabel("training loss (cross-entropy)")
    best = {group: [record.best for record in records] for group, records in groups.items()}
    first = next(iter(groups.values()))[0]
    epochs_in_all = first.options.epochs
    errors = {group: float(np.mean([line["test_error"] for line in lines])) for group, lines in best.items()}
    for group, records in groups.items():
        _draw(axes, group, records, "test_error", linewidth=2, label=f"test error, {group}")
        thin = dict(linewidth=1, linestyle=THIN_LINES[group])
        _draw(losses, group, records, "train_loss", label=f"training loss, {group}", **thin)
        epochs = [line["epoch"] for line in best[group]]
        points = [line["test_error"] for line in best[group]]
        label = "at the lowest validation error"
        axes.plot(epochs, points, MARKERS[group], color=COLORS[group], markersize=7, zorder=4, label=label)
    _plain_log(losses)
    drops = first.dataset.lr_drops if first.options.lr_schedule == "steps" else ()
    for index, epoch in enumerate(sorted({math.ceil(drop * epochs_in_all) for drop in drops} - {1})):
        axes.axvline(epoch, color=GRAY, linewidth=1, linestyle=":", label=None if index else "learning rate ÷ 10")
    # In a long run, the first epochs would squash the rest.
    seen = [curves(records, "test_error")[:, epochs_in_all // 20 :] for records in groups.values()]
    top = 1.1 * max(1, *(each.max() for each in seen))
    axes.set_ylim(0, top)
    height = 0.0
    for group in sorted(errors, key=errors.get):
        # To the right of the last epoch, where no lines are, and clear of the axis and of each other.
        height = max(errors[group] / top, height + 0.07)
        label = dict(color=COLORS[group], fontweight="bold", va="center")
        axes.text(1.02 * epochs_in_all, height * top, f"{errors[group]:.2f}%", **label)
    axes.set_xlim(1 - 0.05 * epochs_in_all, 1.18 * epochs_in_all)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= epochs_in_all])
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def gradients(groups: Groups) -> Figure:
    """Figure 7: mean absolute gradient of the first convolution, averaged over each epoch's steps."""
    figure, axes = _new_figure()
    _epochs(axes, "mean absolute gradient of the first convolution")
    for group, records in groups.items():
        _draw(axes, group, records, "conv1_gradient", label=group)
    _plain_log(axes)
    axes.legend()
    return figure


def drawn_gates(record: Record) -> np.ndarray:
    """Which gates were open in each step of a run, of shape (epochs, steps, L), redrawn from its seed.

    Raises UserError if their number differs from the run's log.
    """
    epochs = record.options.epochs
    steps = math.ceil(record.dataset.training_images / record.options.batch_size)
    gates = [draw_gates(record.survival, record.options.seed, step).numpy() for step in range(epochs * steps)]
    gates = np.array(gates).reshape(epochs, steps, -1)
    if not np.allclose(gates.sum(2).mean(1), curves([record], "active_blocks")[0]):
        raise UserError(f"{record.path}: metrics.jsonl is from another run, its active blocks do not match the seed")
    return gates


def survival(records: Sequence[Record]) -> Figure:
    """Figure 2: survival probability by block, and the share of each run's steps in which its gate was open."""
    expected = np.array(records[0].survival)
    blocks = np.arange(1, len(expected) + 1)
    figure, axes = _new_figure()
    axes.set_xlabel("residual block b")
    axes.set_ylabel("probability")
    axes.grid(alpha=0.3)
    axes.plot(blocks, expected, color="0.2", label="survival probability $p_b$")
    active = []
    for index, record in enumerate(records):
        gates = drawn_gates(record)
        active.append(gates.sum(2).mean())
        axes.plot(
            blocks,
            gates.mean((0, 1)),
            MARKERS[STOCHASTIC],
            color=COLORS[STOCHASTIC],
            markersize=3.5,
            label=None if index else "share of training steps with an open gate",
        )
    axes.set_ylim(0, 1.05)
    axes.legend(
        loc="lower left",
        title=f"active blocks out of {len(expected)}: {expected.sum():.2f} expected, {np.mean(active):.2f} measured",
    )
    return figure


def times(groups: Groups) -> Figure:
    """Seconds per epoch of both groups (left), and their ratio next to the published ones (right).

    Both also show perfect skipping if all blocks cost the same: the share of blocks that were active.
    """
    constant, stochastic = (training_seconds(groups[group]) for group in (CONSTANT, STOCHASTIC))
    records = groups[STOCHASTIC]
    share = curves(records, "active_blocks").mean() / len(records[0].survival)
    images = records[0].dataset.training_images
    perfect = "perfect skipping\nof equal blocks"
    figure, (left, right) = _new_figure(2, width=10)
    names = ("constant\ndepth", "stochastic\ndepth", perfect)
    seconds = (constant, stochastic, share * constant)
    bars = left.bar(names, seconds, color=(COLORS[CONSTANT], COLORS[STOCHASTIC], "0.75"), hatch=("//", "", ""))
    left.bar_label(bars, [f"{value:.3g} s\n{images / value:.0f} images/s" for value in seconds], padding=3)
    left.set_ylabel("training time per epoch (s)")
    left.margins(y=0.2)
    ratios = {f"these runs,\n{records[0].options.depth} layers": (stochastic / constant, ""), perfect: (share, "")}
    for who, (slow, fast) in datasets.SECONDS.items():
        ratios[f"{who},\n110 layers"] = fast / slow, f" ({fast:g} s vs. {slow:g} s)"
    bars = right.barh(list(ratios), [ratio for ratio, _ in ratios.values()], color=(COLORS[STOCHASTIC], *["0.75"] * 3))
    labels = [f"{ratio:.3f}{seconds}" for ratio, seconds in ratios.values()]
    right.bar_label(bars, labels, label_type="center")
    right.invert_yaxis()
    right.set_xlabel("time of stochastic depth relative to constant depth")
    return figure


def sweep(records: Sequence[Record]) -> Figure:
    """Figure 8: test error at the best validation error against p_L for each schedule, and against depth.

    The left plot is for the depth with the most runs, the right one for constant depth and linear decay to p_L = 0.5.
    """
    figure, (left, right) = _new_figure(2, width=10)
    depths = Counter(record.options.depth for record in records)
    depth = max(depths, key=lambda depth: (depths[depth], depth))
    runs = defaultdict(list)
    for record in records:
        runs[record.schedule if record.stochastic else CONSTANT].append(record)
    for name, (color, style) in SWEEP.items():
        at_depth = [record for record in runs[name] if record.options.depth == depth]
        _draw_errors(left, at_depth, lambda record: record.survival[-1], name, color, **style)
    left.set_xlabel(f"$p_L$, survival probability of the last block ({depth} layers)")
    halved = [record for record in runs["linear"] if record.survival[-1] == 0.5]
    for group, name, kind_ in ((runs[CONSTANT], CONSTANT, CONSTANT), (halved, "linear, $p_L$ = 0.5", STOCHASTIC)):
        style = dict(linestyle=LINES[kind_], marker=MARKERS[kind_])
        _draw_errors(right, group, lambda record: record.options.depth, name, COLORS[kind_], **style)
    right.set_xlabel("layers")
    for axes in (left, right):
        axes.set_ylabel("test error (%)")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def _draw_errors(
    axes: Axes, records: Sequence[Record], position: Callable[[Record], float], label: str, color: str, **style: str
) -> None:
    """Mean test errors by `position`, with bars from the lowest to the highest of several runs."""
    errors = defaultdict(list)
    for record in records:
        errors[position(record), record.traits["drop_path_schedule"]].append(record.best["test_error"])
    if errors:
        places, groups = zip(*sorted((place, group) for (place, _), group in errors.items()), strict=True)
        means = [np.mean(group) for group in groups]
        below = [mean - min(group) for group, mean in zip(groups, means, strict=True)]
        above = [max(group) - mean for group, mean in zip(groups, means, strict=True)]
        axes.errorbar(places, means, (below, above), color=color, capsize=3, label=label, **style)
