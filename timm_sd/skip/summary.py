"""A summary of the work that skipping a model's drop paths has saved so far."""

from collections import Counter

from torch import nn

from .drop_path_gate import DropPathGate

ROUNDED = 0.2  # how far mode "count" may be from the rates, relatively, before the summary says so


class Summary:
    """A summary of a model that goes on counting, but does not keep the model alive."""

    def __init__(self, model: nn.Module) -> None:
        own = [module for module in model.modules() if isinstance(module, DropPathGate)]
        self.modes = Counter(gate.mode for gate in own)
        self.tallies = [gate.tally for gate in own]
        self.notes = [note for module in model.modules() for note in vars(module).get("not_skipped", ())]

    def __str__(self) -> str:
        if not self.modes:
            return "\n".join(["no drop path is skipped", *self.notes])
        lines = [f'{count} calls of drop paths are skipped in mode "{mode}"' for mode, count in self.modes.items()]
        drawn = [tally for tally in self.tallies if tally.samples]
        if drawn:
            total = sum(tally.samples for tally in drawn)
            samples = 1 - sum(tally.computed for tally in drawn) / total
            asked = 1 - sum(tally.expected for tally in drawn) / total
            flops = sum(tally.flops * (1 - tally.computed / tally.samples) for tally in drawn)
            end = f"skipped so far: {samples:.1%} of the samples in branches, {flops:.1%} of the model's FLOPs"
            if self.modes.keys() == {"count"} and abs(samples - asked) > ROUNDED * asked:
                end += f' (the rates ask for {asked:.1%}: mode "count" rounds, less so in larger batches)'
        else:
            end = "no training step so far"
        return "\n".join([*lines, *self.notes, end])


def summary(model: nn.Module) -> str:
    """A few lines: how many calls of drop paths skip, which do not and why, and the share of the work skipped so far.

    Samples are counted in training, except in compiled steps in mode "count". FLOPs are those of the branches' modules,
    relative to the whole model's, as counted in the example that it was converted with.
    """
    return str(Summary(model))
