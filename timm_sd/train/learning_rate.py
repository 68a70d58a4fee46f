"""Learning rates: the authors' schedule, and one for short runs."""

from collections.abc import Sequence

from ..paper.datasets import DATASETS
from .options import Options

ONE_CYCLE_RISE = 0.2  # fraction of all steps


def learning_rate(options: Options, epoch: int, step: int, steps: int) -> float:
    """A run's learning rate at a step of an epoch of so many steps. Both count from 1."""
    if options.lr_schedule == "steps":
        return stepwise(epoch, options.epochs, options.lr, DATASETS[options.dataset].lr_drops)
    return one_cycle((epoch - 1) * steps + step, options.epochs * steps, options.lr)


def stepwise(epoch: int, epochs: int, initial: float, drops: Sequence[float]) -> float:
    """The authors' learning rate: `initial`, divided by 10 at each of `drops`, which are fractions of the epochs.

    Epochs count from 1: with 500 and drops at 0.5 and 0.75, epoch 250 is the first at a tenth and epoch 375 the first
    at a hundredth.
    """
    return initial / 10 ** sum(epoch >= drop * epochs for drop in drops)


def one_cycle(step: int, steps: int, peak: float) -> float:
    """A learning rate for short runs: it rises linearly to `peak` over a fifth of the steps, then falls linearly.

    Steps count from 1; the step after the last one would have 0.
    """
    rise = ONE_CYCLE_RISE * steps
    return peak * min(step / rise, (steps + 1 - step) / (steps + 1 - rise))
