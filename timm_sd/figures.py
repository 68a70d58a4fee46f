"""The paper's CIFAR figures, drawn from runs: each function makes one of them of records, each list of which are runs
that differ in their seed alone.

Constant depth is blue and dashed and stochastic depth orange and solid, so they differ in grey and to the colour-blind.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .errors import UserError
from .record import Record
from .stochastic_depth import draw_gates

STYLES = {
    "constant depth": dict(color="#0072B2", linestyle="--", marker="s"),
    "stochastic depth": dict(color="#D55E00", linestyle="-", marker="o"),
}
DROP = 0.5  # a learning rate below this share of the epoch's before has dropped


def kind(record: Record) -> str:
    """The key of `STYLES` for a run."""
    return "constant depth" if record.survival[-1] == 1 else "stochastic depth"


def curves(records: Sequence[Record], figure: str) -> np.ndarray:
    """One figure of every epoch of runs, of shape (runs, epochs)."""
    return np.array([[line[figure] for line in record.history] for record in records])


def save(figure: Figure, file: Path) -> None:
    """Write a PNG or an SVG, the same bytes for the same figure."""
    with mpl.rc_context({"svg.hashsalt": "timm-sd", "svg.fonttype": "none"}):
        metadata = {"Software": None} if file.suffix == ".png" else {"Date": None, "Creator": None}
        figure.savefig(file, dpi=150, metadata=metadata)


def _axes(ylabel: str, **subplots) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots(**subplots)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _plot(axes: Axes, records: Sequence[Record], name: str, label: str, **style) -> None:
    """Mean and, over several runs, the band from the lowest to the highest."""
    values = curves(records, name)
    epochs = np.arange(1, values.shape[1] + 1)
    axes.plot(epochs, values.mean(0), label=label, **style)
    if len(values) > 1:
        axes.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)


def learning_curves(groups: Sequence[Sequence[Record]]) -> Figure:
    """Figure 3: test error (left) and training loss (right, logarithmic) by epoch."""
    figure, axes = _axes("test error (%)")
    losses = axes.twinx()
    losses.set_yscale("log")
    losses.set_ylabel("training loss (thin, cross-entropy)")
    for records in groups:
        style = dict(STYLES[kind(records[0])])
        marker = style.pop("marker")
        _plot(axes, records, "test_error", kind(records[0]), linewidth=1.8, **style)
        _plot(losses, records, "train_loss", "", linewidth=0.9, alpha=0.7, **style)
        for record in records:
            best = record.best
            axes.plot(best["epoch"], best["test_error"], marker, color=style["color"], markersize=7, zorder=3)
    _label_best(axes, groups)
    for epoch in learning_rate_drops(groups[0][0]):
        axes.axvline(epoch, color="0.4", linewidth=0.8, linestyle=":")
        axes.annotate(
            "learning rate ÷ 10", (epoch, 1), (3, -3), xycoords=("data", "axes fraction"),
            textcoords="offset points", rotation=90, va="top", fontsize=7, color="0.4",
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    return figure


def _label_best(axes: Axes, groups: Sequence[Sequence[Record]]) -> None:
    """The mean test error at the best validation error, the higher one's label above and the lower one's below."""
    means = [np.mean([record.best["test_error"] for record in records]) for records in groups]
    for records, mean in zip(groups, means, strict=True):
        above = mean == max(means)
        axes.annotate(
            f"{mean:.2f}%",
            (np.mean([record.best["epoch"] for record in records]), mean),
            (0, 12 if above else -12),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            color=STYLES[kind(records[0])]["color"],
            fontweight="bold",
        )


def learning_rate_drops(record: Record) -> list[int]:
    """The epochs that are the first at a learning rate under half of the one before, in the authors' schedule."""
    if record.options.lr_schedule != "steps":
        return []
    rates = [line["lr"] for line in record.history]
    return [first for first, (before, rate) in enumerate(pairwise(rates), start=2) if rate < DROP * before]


def gradients(groups: Sequence[Sequence[Record]]) -> Figure:
    """Figure 7: mean absolute gradient of the first convolution, a mean over each epoch's steps."""
    figure, axes = _axes("mean absolute gradient of the first convolution")
    axes.set_yscale("log")
    for records in groups:
        style = dict(STYLES[kind(records[0])])
        style.pop("marker")
        _plot(axes, records, "conv1_gradient", kind(records[0]), **style)
    axes.legend()
    return figure


def drawn_gates(record: Record) -> np.ndarray:
    """Which gates were open in each step of each epoch of a run, of shape (epochs, steps, L), drawn again.

    Raises UserError if they are not those that its log counted.
    """
    survival, epochs, steps = record.survival, record.options.epochs, record.steps
    gates = [draw_gates(survival, record.options.seed, step).numpy() for step in range(epochs * steps)]
    gates = np.array(gates).reshape(epochs, steps, -1)
    if not np.allclose(gates.sum(2).mean(1), curves([record], "active_blocks")[0]):
        raise UserError(f"{record.path}: its log's active_blocks are not those of its seed, so it is another run's")
    return gates


def survival(records: Sequence[Record]) -> Figure:
    """Figure 2: survival probability by block, and how often each gate was open in each run."""
    expected = np.array(records[0].survival)
    blocks = np.arange(1, len(expected) + 1)
    figure, axes = _axes("probability")
    axes.set_xlabel("residual block b")
    axes.plot(blocks, expected, color="0.2", label="survival probability $p_b$")
    active = []
    for record in records:
        gates = drawn_gates(record)
        active.append(gates.sum(2).mean())
        axes.plot(blocks, gates.mean((0, 1)), "o", markersize=3.5, color=STYLES["stochastic depth"]["color"], alpha=0.7)
    axes.plot(
        [], [], "o", markersize=3.5, color=STYLES["stochastic depth"]["color"], label="share of steps it was open"
    )
    axes.set_ylim(0, 1.05)
    axes.legend(
        loc="lower left",
        title=f"active blocks of {len(expected)}: {expected.sum():.2f} expected, {np.mean(active):.2f} measured",
    )
    return figure
