"""The plan for a call of a block: for each drop path, the longest branch that is proven to be skipped rightly."""

from collections.abc import Iterator

import torch
from torch import nn

from .branches import Call, branch_of, entries
from .drop_paths import Kind
from .plan import BLOCK, Branch, Plan, make_plan, samples_of_call
from .proof import Example


def plan_call(
    block: nn.Module, kinds: dict[str, Kind], whole: bool | None, args: tuple, kwargs: dict
) -> tuple[Plan, dict[str, str]]:
    """The plan for a call of a block, and for its drop paths, by name, why they or parts of their branches are left.

    Args:
        block: The block, in training mode.
        kinds: The kind of each of its drop paths, by name.
        whole: Whether gates keep all samples or none, as in mode "batch"; None for only those of branches that compute
            statistics over the batch. Otherwise, each sample must be computed independently of the others.
        args: The arguments of the call, with at least four samples.
        kwargs: Its keyword arguments.
    """
    # float32 is faster. float64 decides where rounding may be to blame; it is not for blocks with parts in float32.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-5), (torch.float32, 1e-4)):
        try:
            plan, left = _plan(Example(block, kinds, args, kwargs, dtype, tolerance), whole)
        except Exception as error:  # of any type, from a forward method
            plan, left = Plan((), ()), {"its drop paths": f"{type(error).__name__}: {error}".splitlines()[0]}
        else:
            if dtype == torch.float64 or not left:
                break
    return plan, left


def _plan(example: Example, whole: bool | None) -> tuple[Plan, dict[str, str]]:
    # Some samples are kept, but neither the first nor the last: dropping those changes more.
    some = {
        drop.key: torch.tensor([0 < row < drop.rows - 1 and (row + i) % 3 > 0 for row in range(drop.rows)])
        for i, drop in enumerate(example.seen.drops)
    }
    none = {call: torch.zeros_like(mask) for call, mask in some.items()}

    def disprove(branches: list[Branch]) -> str | None:
        batch = {b.end for b in branches if whole or (whole is None and b.norms)}
        why = example.disprove(branches, none)
        if why or batch == some.keys():
            return why
        return example.disprove(branches, some | {call: none[call] for call in batch})

    options = [list(_options(drop, example)) for drop in example.seen.drops]
    chosen, left = [of_drop[0] for of_drop in options if of_drop], {}
    if len(chosen) < len(options) or disprove([branch for branch, _ in chosen]):  # not all at once, so one by one
        chosen = []
        for drop, of_drop in zip(example.seen.drops, options, strict=True):
            why = "nothing is computed for it alone"
            for option in of_drop:
                failed = disprove([branch for branch, _ in (*chosen, option)])
                if not failed:
                    chosen.append(option)
                    break
                why = failed if option is of_drop[0] else why
            else:
                left[drop.child] = why
    left |= {branch.drop_path: f"not {names}" for branch, names in chosen if names}
    branches = [branch for branch, _ in chosen]
    for index, branch in enumerate(branches):
        empty = branch._replace(empty_on=(example.values[0].device.type, "meta"))
        trial = [*branches[:index], empty, *branches[index + 1 :]]
        if not branch.alone and not example.disprove(trial, none):
            branches = trial
    return make_plan(branches, example.values), left


def _options(drop: Call, example: Example) -> Iterator[tuple[Branch, str]]:
    """The possible branches of a drop path, each with the calls that would be left out, the best first."""
    seen, samples = example.seen, samples_of_call(example.values)
    calls = branch_of(drop, seen)
    argument = {position: 1 for position, x in enumerate(example.values) if x.ndim and len(x) == samples}
    options = [(calls, entries(drop, calls, seen), False)]
    if len(seen.drops) == 1:
        options.append((calls, {BLOCK: argument}, False))
    options.append((calls, entries(drop, calls, seen, alone=True), True))
    options += [(calls[start:], entries(drop, calls[start:], seen), False) for start in range(1, len(calls))]
    for branch, begin, alone in options:
        skipped = begin if alone else dict.fromkeys(call.key for call in branch)
        children = tuple(dict.fromkeys(child for child, _ in skipped))
        inside = "" if BLOCK in begin else tuple(f"{child}." for child in children)
        norms = tuple(norm for norm in example.norms if f"{norm}.".startswith(inside))
        left = ", ".join(call.child for call in calls if call.key not in skipped)
        if begin:
            yield Branch(drop.key, begin, alone, drop.rows == samples, children, norms), left
