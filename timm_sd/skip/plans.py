"""The plan for a call of a block: for each drop path, the longest branch that is proven to be skipped rightly."""

from collections.abc import Iterator

import torch
from torch import nn

from .branches import Call, Calls, Drop, Observed, branch_of, entries, observe
from .drop_paths import Kind
from .proof import Example, Masks
from .step import BLOCK, Branch, Plan, rows_of_call, samples_of_call

Left = dict[tuple[str, int], str]
"""Why calls of drop paths, or parts of their branches, are not skipped; by the drop path's name and the call's number."""


def plan_call(
    block: nn.Module, kinds: dict[str, Kind], whole: bool | None, args: tuple, kwargs: dict
) -> tuple[Plan, Left]:
    """The plan for a call of a block, and what it leaves.

    Args:
        block: The block.
        kinds: The kind of each of its drop paths, by name.
        whole: Whether gates keep all samples or none, as in mode "batch"; None for only those of branches that compute
            statistics over the batch. Otherwise, each sample must be computed independently of the others.
        args: The arguments of the call, with at least four samples.
        kwargs: Its keyword arguments.
    """
    try:
        return _plan(Example(block, kinds, args, kwargs, torch.float64), whole)
    except RuntimeError:  # parts of some blocks are float32, whatever they are given
        return _plan(Example(block, kinds, args, kwargs, torch.float32), whole)


def _plan(example: Example, whole: bool | None) -> tuple[Plan, Left]:
    seen = observe(example.block, list(example.kinds), example.args, example.kwargs)
    example.norms, device = seen.norms, example.values[0].device.type
    rows = rows_of_call(example.values)
    some = {(drop.name, drop.number): (torch.arange(drop.rows) + i) % 5 < 2 for i, drop in enumerate(seen.drops)}

    def disprove(branches: list[Branch], masks: Masks) -> str | None:
        own = {call: masks[call] for call in ((branch.drop_path, branch.call) for branch in branches)}
        return example.disprove(Plan(tuple(branches), rows), own)

    def prove(branches: list[Branch]) -> tuple[list[Branch], str | None]:
        """The branches, with devices on which they are known to work without rows; why they cannot be skipped."""
        none = {call: torch.zeros_like(mask) for call, mask in some.items()}
        by_row = {(b.drop_path, b.call) for b in branches if not (whole or (whole is None and b.norms))}
        masks = {call: mask if call in by_row else none[call] for call, mask in some.items()}
        why = disprove(branches, none) or (by_row and disprove(branches, masks)) or None
        for index, branch in enumerate(branches) if not why else ():
            empty = [*branches[:index], branch._replace(empty_on=device), *branches[index + 1 :]]
            if not disprove(empty, none):
                branches = empty
        return branches, why

    best = [next(_options(drop, seen, example.values), None) for drop in seen.drops]
    if all(best):
        chosen, why = prove([branch for branch, _ in best])
        if not why:
            return Plan(tuple(chosen), rows), {
                c: f"only part of its branch: not {names}" for c, (_, names) in zip(some, best) if names
            }
    chosen, left = [], {}
    for call, drop in zip(some, seen.drops, strict=True):
        left[call] = "nothing is computed for it alone"
        for branch, names in _options(drop, seen, example.values):
            branches, why = prove([branch])
            if why:
                left[call] = why
                continue
            chosen += branches
            if names:
                left[call] = f"{names} {left[call]}"
            else:
                del left[call]
            break
    if chosen and (why := prove(chosen)[1]):
        chosen, left = [], dict.fromkeys(some, why)
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
        names = {call.child for call in branch}
        norms = tuple(norm for norm in seen.norms if any(f"{norm}.".startswith(f"{name}.") for name in names))
        skipped = begin if alone else {(call.child, call.number) for call in branch}
        left = ", ".join(call.child for call in calls if (call.child, call.number) not in skipped)
        if begin:
            yield Branch(drop.name, drop.number, begin, alone, (samples, drop.rows), None, norms), left
