"""Which runs may be compared, and the page of their results."""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import numpy as np

from ..errors import UserError
from .figures import CONSTANT, STOCHASTIC, Groups, curves, kind, training_seconds
from .record import Record

RUN_COLUMNS = (
    "network",
    "p_L",
    "seed",
    "epochs",
    "test error at the best validation error",
    "last test error",
    "published",
    "time",
    "hardware",
)
CAPTIONS = {
    "figure3": "Test error (thick, left) and training loss (thin, right) by epoch, as in the paper's Figure 3",
    "figure2": "Survival probability by block and the share of steps it was active, as in the paper's Figure 2",
    "figure7": "Mean absolute gradient of the first convolution by epoch, as in the paper's Figure 7",
    "figure8": "Test error against p_L and against depth, as in the paper's Figure 8",
    "time": "Training time per epoch, and its ratio next to the published ones",
}


def check_alike(records: Sequence[Record], but: Sequence[str]) -> None:
    """Raise a UserError naming two runs that are the same, or that differ in a trait that is not among `but`."""
    first = records[0]
    for record in records[1:]:
        for trait, value in record.traits.items():
            if trait not in but and value != first.traits[trait]:
                raise UserError(
                    f"{first.path} and {record.path} cannot be compared, they differ in {trait}"
                    f" ({first.traits[trait]}, {value}): plot them separately"
                )
    for index, record in enumerate(records):
        for other in records[:index]:
            if record.traits == other.traits:
                raise UserError(f"{other.path} and {record.path} are the same run, with seed {record.options.seed}")


def compare(records: Sequence[Record]) -> Groups:
    """The runs of constant and stochastic depth, or just one of them; those of a group may differ only in their seed.

    Raises UserError if there is another difference, such as in depth, or the same run twice.
    """
    check_alike(records, but=("seed", "p_L", "drop_path_schedule"))
    groups = {}
    for group in (CONSTANT, STOCHASTIC):
        if chosen := [record for record in records if kind(record) == group]:
            check_alike(chosen, but=("seed",))
            groups[group] = chosen
    return groups


def same_machine(groups: Groups) -> bool:
    """Whether there are both groups and their times can be compared: all runs have epochs on the same machine."""
    records = [record for group in groups.values() for record in group]
    machines = {record.machine for record in records}
    return len(groups) == 2 and len(machines) == 1 and all(record.before_move for record in records)


def page(groups: Groups, sweep: Sequence[Record], figures: Sequence[str], command: str) -> str:
    """results.md: each run next to the published result, constant next to stochastic depth, and the figures.

    `figures` are the keys of `CAPTIONS` that were drawn; `command` is the command that made the page.
    """
    compared = [record for group in groups.values() for record in group]
    records = compared + [record for record in sweep if record.path not in {record.path for record in compared}]
    blocks = [
        "# Results",
        "Generated from the runs' logs by",
        f"```\n{command}\n```",
        table(RUN_COLUMNS, map(row, records)),
    ]
    commands = "\n".join(record.command for record in records)
    blocks += ["The commands that trained them, with the data in `data/` (or `--download`):", f"```\n{commands}\n```"]
    if len(groups) == 2:
        blocks.append(table(["mean over the runs", *groups], comparison(groups)))
    for name, caption in CAPTIONS.items():
        if name in figures:
            blocks += [f"![{caption}]({name}.png)", f"*{caption}.*"]
    return "\n\n".join(blocks) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def row(record: Record) -> list[object]:
    """A run's row in the table of runs."""
    options = record.options
    schedule = f", {record.schedule}" if record.stochastic and record.schedule != "linear" else ""
    moved = record.before_move != record.history
    return [
        f"`{options.model}`, {', '.join([options.dataset, *record.regularizers])}",
        f"{record.survival[-1]:g}{schedule}",
        options.seed,
        options.epochs,
        f"**{record.best['test_error']:.2f}%** (epoch {record.best['epoch']})",
        f"{record.history[-1]['test_error']:.2f}%",
        "{:.2f}% ({})".format(*record.published) if record.published else "",
        "on several machines" if moved else timedelta(seconds=round(record.summary["seconds"])),
        ", then ".join(map(machine, record.environments)),
    ]


def machine(where: dict) -> str:
    """A machine in a few words."""
    processes = f"{where['processes']} x " if where["processes"] > 1 else ""
    on_cpu = where["device"] == "cpu"
    return processes + (f"{where['processor']} (CPU), threads: {where['threads']}" if on_cpu else where["device"])


def comparison(groups: Groups) -> list[list[object]]:
    """The rows that compare constant and stochastic depth."""

    def line(name: str, value: Callable[[list[Record]], str]) -> list[object]:
        return [name, *(value(chosen) for chosen in groups.values())]

    def gradient(epoch: int) -> Callable[[list[Record]], str]:
        return lambda chosen: f"{curves(chosen, 'conv1_gradient').mean(0)[epoch]:.3g}"

    return [
        line("runs", lambda chosen: str(len(chosen))),
        line(
            "test error at the best validation error",
            lambda chosen: f"{np.mean([record.best['test_error'] for record in chosen]):.2f}%",
        ),
        line("training loss in the last epoch", lambda chosen: f"{curves(chosen, 'train_loss')[:, -1].mean():.4f}"),
        line(
            "seconds per epoch on the machine where they began, without evaluation (median)",
            lambda chosen: f"{training_seconds(chosen):.4g}" if same_machine(groups) else "",
        ),
        line("active blocks", lambda chosen: f"{curves(chosen, 'active_blocks').mean():.2f}"),
        line("mean absolute gradient of the first convolution, first epoch", gradient(0)),
        line("the same, last epoch", gradient(-1)),
    ]
