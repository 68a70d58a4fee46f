"""What skipping a model's drop paths has saved so far."""

from collections import Counter

from torch import nn

from .step import DropPathGate


def summary(model: nn.Module) -> str:
    """A few lines: how many calls of drop paths skip, which do not and why, and the share of the work skipped so far.

    Samples are counted in training, except in compiled steps in mode "count". FLOPs are those of the branches' modules,
    relative to the whole model's, as counted in the example that it was converted with.
    """
    own = [module for module in model.modules() if isinstance(module, DropPathGate)]
    notes = [note for module in model.modules() for note in vars(module).get("not_skipped", ())]
    if not own:
        return "\n".join(["no drop path is skipped", *notes])
    modes = Counter(gate.mode for gate in own).items()
    lines = [f'{count} calls of drop paths are skipped in mode "{mode}"' for mode, count in modes] + notes
    samples = sum(gate.samples for gate in own)
    if samples:
        dropped = sum(gate.samples - gate.computed for gate in own) / samples
        flops = sum(gate.flops * (1 - gate.computed / gate.samples) for gate in own if gate.samples)
        lines.append(f"skipped so far: {dropped:.1%} of the samples in branches, {flops:.1%} of the model's FLOPs")
    else:
        lines.append("no training step so far")
    return "\n".join(lines)
