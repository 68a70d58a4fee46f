"""Which runs may be compared, and the page that compares them with the paper."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import paper
from .errors import UserError
from .figures import CONSTANT, STOCHASTIC, Groups, curves, kind, training_seconds
from .record import Record

TEMPLATE = "results.md.jinja"
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
    """results.md: each run next to the paper's, the figures, and what the compared runs show about each of its claims.

    `figures` are the keys of `CAPTIONS` that were drawn; `command` is the command that made the page.
    """
    compared = [record for group in groups.values() for record in group]
    records = compared + [record for record in sweep if record.path not in {record.path for record in compared}]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    comparable = same_machine(groups)
    values = {
        group: dict(
            error=np.mean([record.best["test_error"] for record in chosen]),
            loss=np.mean([record.history[-1]["train_loss"] for record in chosen]),
            gradients=curves(chosen, "conv1_gradient").mean(0),
            active=curves(chosen, "active_blocks").mean(),
            seconds=training_seconds(chosen) if comparable else None,
        )
        for group, chosen in groups.items()
    }
    return environment.get_template(TEMPLATE).render(
        records=records,
        constant=values.get(CONSTANT),
        stochastic=values.get(STOCHASTIC),
        blocks=len(records[0].survival),
        expected=sum(groups[STOCHASTIC][0].survival) if STOCHASTIC in groups else None,
        same_machine=comparable,
        moved=any(len(record.before_move) < len(record.history) for record in compared),
        epochs=records[0].options.epochs,
        papers_epochs=records[0].protocol.epochs,
        runs={group: len(chosen) for group, chosen in groups.items()},
        published=[groups[group][0].published for group in (STOCHASTIC, CONSTANT) if group in groups],
        published_seconds=paper.SECONDS,
        duration=lambda seconds: str(timedelta(seconds=round(seconds))),
        figures={name: CAPTIONS[name] for name in CAPTIONS if name in figures},
        command=command,
    )
