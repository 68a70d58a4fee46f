"""The rates of a model's drop paths: how likely each of its blocks is to be dropped."""

import math
from collections.abc import Sequence
from typing import TypeVar

from timm.layers import DropPath
from torch import nn

from ..gate import check_choice, gates
from .places import known_kind, networks, shares

Model = TypeVar("Model", bound=nn.Module)

# From the rate and a block's share of it: its relative depth, or 1 in families that drop all blocks alike.
SCHEDULES = {
    "linear": lambda rate, share: rate * share,
    "uniform": lambda rate, share: rate,
    "quadratic": lambda rate, share: rate * share**2,
    "exponential": lambda rate, share: 1 - (1 - rate) ** share,
}


def set_drop_path(model: Model, rate: float, schedule: str | Sequence[float] = "linear") -> Model:
    """Set the probabilities of a model's drop paths in place; a model created without any gets timm's `DropPath`.

    "linear" gives the probabilities that the model's own library gives it for `drop_path_rate=rate` (torchvision:
    `stochastic_depth_prob=rate`). In most families, they rise from 0 at the first block to `rate` at the last. With s
    for a block's share of the rate there, "quadratic" gives rate * s**2, "exponential" 1 - (1 - rate)**s, and "uniform"
    the rate itself. In other networks that have drop paths, s rises evenly from 0 to 1.

    The rate can change at every step, before or after `skip_drop_path`:

        for step, (images, target) in enumerate(loader):
            timm_sd.set_drop_path(model, 0.4 * min(1, step / warmup_steps))

    Args:
        model: A model of timm, torchvision or transformers, or another with drop paths, wrapped or not.
        rate: The drop probability that the schedule reaches, in [0, 1).
        schedule: "linear", "uniform", "quadratic" or "exponential"; or the drop probabilities themselves, one for each
            block with drop paths, in order. Then `rate` is not used.

    Returns:
        The same model.

    Raises:
        ValueError: A probability outside [0, 1), an unknown schedule, a wrong number of probabilities, or a model that
            has no places for drop paths or whose own schedule is not known. The model is then unchanged.
    """
    _check_rate("rate", rate)
    parts = list(networks(model)) or [model]
    found = [(part, place, share) for part in parts for place, share in shares(part)]
    if not found:
        has = "gates, not drop paths" if gates(model) else "no drop paths and no known places for them"
        raise ValueError(f"{type(model).__name__} has {has}: create it with the rate, if its constructor takes one")
    if isinstance(schedule, str) or not hasattr(schedule, "__len__"):
        check_choice("schedule", schedule, list(SCHEDULES))
        curve = SCHEDULES[schedule]
        # At a rate of 0, drop paths are added all the same, for later steps. What has 0 at any rate stays as it is.
        new = [(p, curve(rate, share)) for _, p, share in found if p.probability is not None or curve(0.5, share)]
    else:
        blocks = list(dict.fromkeys((part, place.block) for part, place, _ in found))
        if len(schedule) != len(blocks):
            raise ValueError(f"{len(schedule)} drop probabilities, but there are {len(blocks)} blocks with drop paths")
        for index, probability in enumerate(schedule):
            _check_rate(f"schedule[{index}]", probability)
        given = dict(zip(blocks, map(float, schedule), strict=True))
        new = [(place, given[part, place.block]) for part, place, _ in found]
    if any(math.isnan(probability) for _, probability in new):
        raise ValueError(
            f"how {type(model).__name__} spreads the rate is not known, since its blocks are not those of its namesake"
            ' in timm: create it with drop_path_rate=, or choose "uniform" or the probabilities as the schedule'
        )
    if gates(model) and any(place.probability is None for place, _ in new):
        raise ValueError("some blocks have no drop path yet: call set_drop_path before skip_drop_path")
    for place, probability in new:
        if place.probability is None:
            setattr(place.owner, place.attribute, DropPath().train(place.owner.training))
        drop_path = getattr(place.owner, place.attribute)
        kind = known_kind(drop_path)
        setattr(drop_path, kind.attribute, 1 - probability if kind.survival else probability)
    return model


def _check_rate(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}, but it must lie in [0, 1)")
