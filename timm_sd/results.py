"""What runs show: which of them may be compared, and the page that puts them beside the paper."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import paper
from .errors import UserError
from .figures import CONSTANT, STOCHASTIC, Groups, curves, kind, training_seconds
from .record import BOUND_OPTIONS, Record

TEMPLATE = "results.md.jinja"


def check_alike(records: Sequence[Record], but: Sequence[str]) -> None:
    """Raise a UserError that names two runs and what they differ in, beside the options `but`."""
    first = records[0]
    for record in records[1:]:
        theirs = [getattr(record.options, name) for name in BOUND_OPTIONS] + [record.mixed_precision]
        ours = [getattr(first.options, name) for name in BOUND_OPTIONS] + [first.mixed_precision]
        for name, one, other in zip([*BOUND_OPTIONS, "mixed_precision"], ours, theirs, strict=True):
            if name not in but and one != other:
                raise UserError(
                    f"{first.path} and {record.path} are not to be mixed, they differ in {name} ({one}, {other}):"
                    " draw them apart"
                )


def compare(records: Sequence[Record]) -> Groups:
    """The runs of constant and of stochastic depth, or of one of them, which may differ in their seed alone.

    Raises UserError if there is another difference, in depth for example, or the same run twice.
    """
    check_alike(records, but=("model", "seed", "drop_path", "drop_path_schedule"))
    groups = {}
    for group in (CONSTANT, STOCHASTIC):
        chosen = [record for record in records if kind(record) == group]
        if not chosen:
            continue
        groups[group] = chosen
        check_alike(chosen, but=("seed",))
        for index, record in enumerate(chosen):
            for other in chosen[:index]:
                if record.options.seed == other.options.seed:
                    raise UserError(f"{other.path} and {record.path} are the same run, of seed {record.options.seed}")
    depths = {record.depth for record in records}
    if len(depths) > 1:
        raise UserError(f"these runs are of different depths ({', '.join(map(str, sorted(depths)))}): draw them apart")
    return groups


def same_machine(groups: Groups) -> bool:
    """Whether there are both groups, and their times can be compared."""
    machines = {
        (environment["device"], environment["processor"], environment["processes"], environment["threads"])
        for records in groups.values()
        for record in records
        for environment in record.environments
    }
    return len(groups) == 2 and len(machines) == 1


def page(groups: Groups, command: str) -> str:
    """results.md: each run beside the paper, and what the runs say to each of its claims.

    `command` is what made it.
    """
    records = [record for group in groups.values() for record in group]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    values = {
        group: dict(
            error=np.mean([record.best["test_error"] for record in chosen]),
            loss=np.mean([record.last["train_loss"] for record in chosen]),
            gradient=curves(chosen, "conv1_gradient").mean(),
            last_gradient=curves(chosen, "conv1_gradient")[:, -1].mean(),
            active=curves(chosen, "active_blocks").mean(),
            seconds=training_seconds(chosen),
        )
        for group, chosen in groups.items()
    }
    return environment.get_template(TEMPLATE).render(
        records=records,
        constant=values.get(CONSTANT),
        stochastic=values.get(STOCHASTIC),
        blocks=len(records[0].survival),
        expected=sum(groups[STOCHASTIC][0].survival) if STOCHASTIC in groups else None,
        same_machine=same_machine(groups),
        epochs=records[0].options.epochs,
        seeds=min(map(len, groups.values())),
        published=paper.TEST_ERROR,
        published_seconds=paper.SECONDS,
        duration=lambda seconds: str(timedelta(seconds=round(seconds))),
        command=command,
    )
