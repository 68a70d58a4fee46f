"""Write docs/accuracy.md and its figure from the log of `accuracy.py`: `python train_scripts/accuracy_page.py`."""

import start  # noqa: F401

# isort: split
from timm_sd import extras  # noqa: F401

# isort: split
from pathlib import Path

import numpy as np
from accuracy import ARMS, BATCH_SIZE, EPOCHS, EXACT_STEPS, LOG, MARGIN, NETWORKS, RATE, SEEDS, read
from benchmark_timm import COLORS, NONE
from matplotlib.figure import Figure

from timm_sd.command_line import Parser, one_line_errors, say
from timm_sd.errors import UserError
from timm_sd.files import write, writing
from timm_sd.gate import MODES
from timm_sd.report import figures
from timm_sd.skip.benchmark import DROP_PATH

PAGE = Path("docs/accuracy.md")
STUDENT = 2.776  # the t for 95%, two-sided, with SEEDS - 1 degrees of freedom
STYLES = {DROP_PATH: ("black", "-"), **{mode: (COLORS[mode], "-") for mode in MODES}, NONE: ("0.6", "--")}

TEXT = """# Accuracy

Does a network train as well if dropped branches are skipped? Here a small ViT and a small ConvNeXt are trained from
scratch on CIFAR-10 with drop path rate {rate:g}: with timm's `DropPath`, with each mode of `skip_drop_path`, and
without drop path. Each of these has {seeds} seeds. A seed has the same initial weights, batches and augmentation in all
of them.

![Test error by epoch: mean of {seeds} seeds, with 95% intervals](accuracy.svg)

*Test error by epoch on the 10,000 test images. Lines are means of {seeds} seeds, bands are their 95% intervals.*

A margin of **{margin:g} percentage point** was set before the first run: a mode is as good as `DropPath` if the
95% interval of the difference in test error after the last epoch, paired by seed, ends below it. Intervals are
Student's, with {freedom} degrees of freedom.

{tables}
FLOPs are those of a forward pass in training, for the gates that were drawn. Times would say nothing, since the machine
had other work to do.

## With the same gates, the same losses

In float64, a network with a drop path and a converted one have the same losses at every step if they are given the same
gates. The largest relative difference in {exact_steps} steps:

{exact}
## What this does not show

- Differences below about {finest:.1f} points: five seeds cannot tell them from noise.
- Longer training, larger networks, other batch sizes and rates. {epochs} epochs leave drop path little to regularize.

## Reproducing it

Both networks are timm's classes: a ViT with patches of 8 pixels, width 64, 6 blocks, 2 heads and MLPs of twice the
width, and a ConvNeXt with patches of 2 pixels, depths 1, 1, 3, 1 and widths 16 to 128. They are trained by AdamW with a
peak learning rate of 0.002 (one epoch of warmup, then half a cosine), weight decay 0.05 and gradients clipped to norm
1, on batches of {batch_size}, shifted and flipped, for {epochs} epochs of all 50,000 images, in float32 (torch {torch},
timm {timm}). A run takes a few minutes in one thread.

```
python train_scripts/accuracy.py --data-dir data
python train_scripts/accuracy_page.py
```

The first command logs every run in [`results/accuracy.jsonl`](../results/accuracy.jsonl), the second writes this page.
"""


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half of its 95% interval, over the seeds in the first dimension."""
    return values.mean(0), STUDENT * values.std(0, ddof=1) / len(values) ** 0.5


def table(errors: dict[str, np.ndarray], flops: dict[str, float]) -> str:
    """One network's arms: errors of shape (seeds, epochs), in percent, and relative FLOPs."""
    lines = [
        "| | test error | difference to `DropPath` | within the margin | FLOPs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        mean, half = interval(errors[arm][:, -1])
        cells = [f"`{arm}`" if arm == DROP_PATH else f'`"{arm}"`' if arm in MODES else arm, f"{mean:.2f} ± {half:.2f}%"]
        if arm == DROP_PATH:
            cells += ["", ""]
        else:
            mean, half = interval(errors[arm][:, -1] - errors[DROP_PATH][:, -1])
            within = "yes" if mean + half < MARGIN else "no" if mean - half > MARGIN else "not shown"
            cells += [f"{mean:+.2f} ± {half:.2f}", within]
        lines.append(f"| {' | '.join(cells)} | {flops[arm]:.3f} |")
    return "\n".join(lines) + "\n"


def draw(errors: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Test error by epoch, one panel for each network."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, len(errors))
    epochs = np.arange(1, EPOCHS + 1)
    for axes, (network, of_arms) in zip(panels, errors.items(), strict=True):
        for arm, of_arm in of_arms.items():
            color, line = STYLES[arm]
            mean, half = interval(of_arm)
            axes.plot(epochs, mean, line, color=color, linewidth=1.6, label=f'"{arm}"' if arm in MODES else arm)
            axes.fill_between(epochs, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)
        axes.set_title(network)
        axes.set_xlabel("epoch")
        axes.set_ylabel("test error (%)")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(ARMS), frameon=False)
    return figure


def main() -> None:
    Parser(__doc__).parse_args()
    with one_line_errors():
        runs = {(run["network"], run["arm"], run["seed"]): run for run in read()}
        wanted = [(network, arm, seed) for network in NETWORKS for arm in ARMS for seed in range(SEEDS)]
        wanted += [(network, mode, None) for network in NETWORKS for mode in MODES]
        if missing := [key for key in wanted if key not in runs]:
            raise UserError(f"{LOG} has no run of {missing[0]} and {len(missing) - 1} others: run accuracy.py first")
        per_arm = {n: {arm: [runs[n, arm, seed] for seed in range(SEEDS)] for arm in ARMS} for n in NETWORKS}
        errors = {n: {arm: np.array([run["errors"] for run in of[arm]]) for arm in ARMS} for n, of in per_arm.items()}
        flops = {n: {arm: np.mean([run["flops"] for run in of[arm]]) for arm in ARMS} for n, of in per_arm.items()}
        paired = [e[mode][:, -1] - e[DROP_PATH][:, -1] for e in errors.values() for mode in MODES]
        modes = " | ".join(f'`"{mode}"`' for mode in MODES)
        exact = [f"| | {modes} |", "| --- |" + " --- |" * len(MODES)]
        for network in NETWORKS:
            differences = (runs[network, mode, None]["difference"] for mode in MODES)
            exact.append(f"| {network} | {' | '.join(f'{each:.0e}' if each else '0' for each in differences)} |")
        some = runs[wanted[0]]
        page = TEXT.format(
            rate=RATE,
            seeds=SEEDS,
            freedom=SEEDS - 1,
            margin=MARGIN,
            tables="\n".join(f"**{n}**\n\n{table(errors[n], flops[n])}" for n in NETWORKS),
            exact="\n".join(exact) + "\n",
            exact_steps=EXACT_STEPS,
            finest=max(interval(each)[1] for each in paired),
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            torch=some["torch"].partition("+")[0],
            timm=some["timm"],
        )
        with writing(PAGE, "run it from a checkout"):
            figures.save(draw(errors), PAGE.with_suffix(".svg"))
            write(PAGE, page.encode())
        say(PAGE)


if __name__ == "__main__":
    main()
