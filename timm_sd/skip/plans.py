"""The plan for a call of a block: for each drop path, the longest branch that is proven to be skipped rightly."""

from collections.abc import Iterator

import torch
from torch import nn

from .branches import Call, Calls, Drop, Observed, branch_of, entries
from .drop_paths import Kind
from .proof import Example
from .step import BLOCK, Branch, Plan, rows_of_call, samples_of_call


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
    for dtype in (torch.float64, torch.float32):  # parts of some blocks are float32, whatever they are given
        try:
            return _plan(Example(block, kinds, args, kwargs, dtype), whole)
        except Exception as error:  # whatever a forward method raises
            why = f"{type(error).__name__}: {error}".splitlines()[0]
    return Plan((), ()), {"its drop paths": why}


def _plan(example: Example, whole: bool | None) -> tuple[Plan, dict[str, str]]:
    seen, device, rows = example.seen, example.values[0].device.type, rows_of_call(example.values)
    # Some samples are kept, but neither the first nor the last: dropping those changes more.
    some = {
        (drop.name, drop.number): torch.tensor(
            [0 < row < drop.rows - 1 and (row + i) % 3 > 0 for row in range(drop.rows)]
        )
        for i, drop in enumerate(seen.drops)
    }
    none = {call: torch.zeros_like(mask) for call, mask in some.items()}

    def prove(branches: list[Branch]) -> tuple[list[Branch], str | None]:
        """The branches, with their normalizations and what is known of them without rows, and why they are wrong."""
        calls = [(branch.drop_path, branch.call) for branch in branches]

        def disprove(branches: list[Branch], by_row: set) -> str | None:
            masks = {call: (some if call in by_row else none)[call] for call in calls}
            return example.disprove(Plan(tuple(branches), rows), masks)

        if why := disprove(branches, set()):
            return branches, why
        for i, (branch, call) in enumerate(zip(branches, calls, strict=True)):
            norms = example.norms_of(Plan((branch,), rows), {call: none[call]})
            branches = [*branches[:i], branch._replace(norms=norms), *branches[i + 1 :]]
        by_row = {c for c, b in zip(calls, branches, strict=True) if not (whole or (whole is None and b.norms))}
        if by_row and (why := disprove(branches, by_row)):
            return branches, why
        for i, branch in enumerate(branches):
            empty = [*branches[:i], branch._replace(empty_on=device), *branches[i + 1 :]]
            if not branch.alone and not disprove(empty, set()):
                branches = empty
        return branches, None

    options = [list(_options(drop, seen, example.values)) for drop in seen.drops]
    if all(options):
        branches, why = prove([best for (best, _), *_ in options])
        if not why:
            left = {call[0]: f"not {names}" for call, ((_, names), *_) in zip(some, options, strict=True) if names}
            return Plan(tuple(branches), rows), left
    chosen, left = [], {}
    for (name, _), of_drop in zip(some, options, strict=True):
        failed = None
        for branch, names in of_drop:
            branches, why = prove([branch])
            failed = failed or why
            if not why:
                chosen += branches
                failed = f"not {names}" if names else None
                break
        else:
            failed = failed or "nothing is computed for it alone"
        if failed:
            left[name] = failed
    if len(chosen) > 1 and (why := prove(chosen)[1]):
        chosen, left = [], {"its drop paths": why}
    return Plan(tuple(chosen), rows), left


def _options(drop: Drop, seen: Observed, values: list[torch.Tensor]) -> Iterator[tuple[Branch, str]]:
    """What a drop path's branch may be, each with the calls that would be left out, the best first."""
    calls, samples = branch_of(drop, seen), samples_of_call(values)
    argument = {position: 1 for position, x in enumerate(values) if x.ndim and len(x) == samples}
    kinds: list[tuple[list[Call], Calls, bool]] = [(calls, entries(drop, calls, seen), False)]
    if len(seen.drops) == 1:
        kinds.append((calls, {BLOCK: argument}, False))
    kinds.append((calls, entries(drop, calls, seen, alone=True), True))
    kinds += [(calls[start:], entries(drop, calls[start:], seen), False) for start in range(1, len(calls))]
    for branch, begin, alone in kinds:
        skipped = begin if alone else {(call.child, call.number) for call in branch}
        left = ", ".join(call.child for call in calls if (call.child, call.number) not in skipped)
        if begin:
            names = tuple(dict.fromkeys(call.child for call in branch))
            yield Branch(drop.name, drop.number, begin, alone, names, (samples, drop.rows)), left
