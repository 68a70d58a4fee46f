"""Tables and a plot from results/gpu.json, which `benchmark.py --gpu` writes: `benchmark.py --gpu-tables`."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from timm_sd.command_line import say
from timm_sd.errors import UserError
from timm_sd.files import read_json, writing
from timm_sd.report import figures
from timm_sd.report.figures import COLORS, CONSTANT, STOCHASTIC

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "gpu.json"
PLOT = ROOT / "docs" / "gpu-speed.svg"
KINDS = {"eager": "eager", "cuda_graphs": "`--cuda-graphs`", "fused": "`--fused`"}
NETWORKS = {"constant": CONSTANT, "stochastic_depth": STOCHASTIC}


def read() -> dict | None:
    """The measurements, or None if there are none. Raises UserError if the file is damaged."""
    try:
        return read_json(RESULTS)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{RESULTS}: {error}: restore or delete it") from error


def show() -> None:
    """Print the tables, and draw the plot."""
    results = read()
    if results is None:
        raise UserError(f"{RESULTS} does not exist: run benchmark.py --gpu on a machine with an NVIDIA GPU first")
    say(tables(results))
    if any(network in results.get("step_ms", {}) for network in NETWORKS):
        with writing(PLOT, "make its folder writable"):
            figures.save(draw_steps(results["step_ms"], results["device"]), PLOT)
        say(f"\n{PLOT}")


def tables(results: dict) -> str:
    """The measurements in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [f"{results['device']}, {versions}"]
    for name, make in TABLES.items():
        if name in results:
            parts.append(make(results[name]))
    if "failed" in results:
        parts.append("\n".join(["Failed:", "", *(f"- {name}: {why}" for name, why in results["failed"].items())]))
    return "\n\n".join(parts)


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def error(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.1e}"


def kernels(found: dict) -> str:
    rows = []
    for name, case in found.items():
        errors = ", ".join(f"{of} {error(value)}" for of, value in case["errors"].items())
        holds = all(value is not None and value <= case["limit"] for value in case["errors"].values())
        rows.append((name, errors, f"{case['limit']:g}", "yes" if holds else "**no**"))
    return table(["kernels", "relative errors", "limit", "within"], rows)


def network(found: dict) -> str:
    rows = [
        [
            f"`{model}`",
            *(f"{error(case['engine'][name])} ({error(case['autograd'][name])})" for name in case["engine"]),
            "yes" if case["bit_equal"] else "**no**",
        ]
        for model, case in found.items()
    ]
    names = next(iter(found.values()))["engine"]
    return table(["a step, relative errors (and autograd's)", *names, "bit-equal"], rows)


def step_ms(found: dict) -> str:
    networks = [name for name in NETWORKS if name in found]
    rows = []
    for kind, name in KINDS.items():
        of = [(found[name].get(kind), found[name]["intervals"].get(kind)) for name in networks]
        cells = ["" if ms is None else f"{ms:.2f} ± {interval:.2f}" for ms, interval in of]
        both = len(of) == 2 and None not in (of[0][0], of[1][0])
        rows.append((name, *cells, f"{of[1][0] / of[0][0]:.3f}" if both else ""))
    head = [f"ms per step, batch {found['batch_size']}, {found['steps']} steps", *(NETWORKS[name] for name in networks)]
    return table([*head, "ratio"], rows)


def epochs(found: dict) -> str:
    rows = [
        [
            NETWORKS[name],
            KINDS[kind],
            number,
            f"{line['seconds']:.2f}",
            f"{line['train_loss']:.4f}",
            *(f"{line[error]:.2f}%" for error in ("train_error", "validation_error", "test_error")),
        ]
        for name in NETWORKS
        for kind, lines in found.get(name, {}).items()
        for number, line in enumerate(lines, start=1)
    ]
    errors = ("training", "validation", "test")
    return table([f"epochs of {found['dataset']}", "", "epoch", "s", "loss", *(f"{of} error" for of in errors)], rows)


def profile(found: dict) -> str:
    rows = []
    for kind, case in found.items():
        rows.append((f"**{KINDS[kind]}, all**", f"{case['launches']:.0f}", f"{case['microseconds']:.0f}"))
        rows += [
            (f"`{name[:60]}`", f"{of['launches']:.0f}", f"{of['microseconds']:.0f}")
            for name, of in case["kernels"].items()
        ]
    return table(["kernels of a step", "launches", "µs"], rows)


def timm_models(found: dict) -> str:
    rows = []
    for model, forms in found.items():
        for form, of_rates in forms.items():
            for rate, case in of_rates.items():
                where = f"{form}, drop path {rate}, batch {case['batch_size']}, {case['steps']} steps"
                rows.append((f"**`{model}`**, {where}", *[""] * 4))
                for kind, of in case["kinds"].items():
                    memory = "" if of["mib"] is None else f"{of['mib']:,.0f}"
                    saved = "" if of["saved"] is None else f"{of['saved']:.0%}"
                    rows.append((kind, f"{of['ms']:.1f}", f"{of['ratio']:.3f} ± {of['interval']:.3f}", memory, saved))
    return table(["timm models", "ms per step", "ratio to DropPath", "MiB", "of perfect skipping"], rows)


TABLES = dict(
    kernels=kernels, network=network, step_ms=step_ms, epochs=epochs, profile=profile, timm_models=timm_models
)


def draw_steps(found: dict, device: str) -> Figure:
    """One bar for each kind of step and network, with its time."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    networks = [name for name in NETWORKS if name in found]
    width = 0.38
    for place, name in enumerate(networks):
        for row, kind in enumerate(KINDS):
            if kind in found[name]:
                position = row + width * (place - (len(networks) - 1) / 2)
                ms = found[name][kind]
                label = NETWORKS[name]
                axes.barh(position, ms, 0.92 * width, color=COLORS[label], label=label)
                axes.annotate(f"{ms:.1f}", (ms, position), (3, 0), textcoords="offset points", va="center", fontsize=9)
    by_label = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(by_label.values(), by_label.keys(), frameon=False)
    axes.set_yticks(range(len(KINDS)), [name.strip("`") for name in KINDS.values()])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"ms per training step of 110 layers, batch {found['batch_size']}, {device}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
