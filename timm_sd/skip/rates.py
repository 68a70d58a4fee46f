"""The rates of a model's drop paths: how they are spread over its blocks, and where an Identity stands in for one.

Families differ in both, so their own constructors are asked: a model like the given one, created without weights and
with a rate of 1, has drop paths in all the right places, each with its share of the rate.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Real
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import timm
import torch
from timm.layers import DropPath
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from torch import nn
from torch.overrides import TorchFunctionMode

from ..gate import check_choice, gates
from .drop_paths import Kind, drop_probability, kind_of

Model = TypeVar("Model", bound=nn.Module)

# From the rate and a block's share of it: its relative depth, or 1 in families that drop all blocks alike.
SCHEDULES = {
    "linear": lambda rate, share: rate * share,
    "uniform": lambda rate, share: rate,
    "quadratic": lambda rate, share: rate * share**2,
    "exponential": lambda rate, share: 1 - (1 - rate) ** share,
}
COMPOSITE = re.compile("MaxVitLayer|MaxxVitBlock|ParallelThingsBlock|MobileVit(V2)?Block")  # blocks made of blocks
INITIALIZATION = {"trunc_normal_", "normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}


class Place(NamedTuple):
    """An attribute that holds a drop path, or an Identity or None that stands in for one."""

    owner: nn.Module | None
    attribute: str
    like: tuple[type, str]  # the owner's class and the attribute
    block: str
    probability: float | None  # None without a drop path


_kinds: dict[type, Kind] = {}  # it takes milliseconds to find out what a class does
_created: WeakKeyDictionary[nn.Module, dict[str, Place]] = WeakKeyDictionary()


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
            block with drop paths. Then `rate` is not used.

    Returns:
        The same model.

    Raises:
        ValueError: A probability outside [0, 1), an unknown schedule, a wrong number of probabilities, or a model that
            has no places for drop paths or whose own schedule is not known. The model is then unchanged.
    """
    _check_rate("rate", rate)
    networks = list(_networks(model)) or [model]
    shares = [(network, place, share) for network in networks for place, share in _shares(network)]
    if not shares:
        found = "gates, not drop paths" if gates(model) else "no drop paths and no known places for them"
        raise ValueError(f"{type(model).__name__} has {found}: create it with the rate, if its constructor takes one")
    if isinstance(schedule, str) or not hasattr(schedule, "__len__"):
        check_choice("schedule", schedule, list(SCHEDULES))
        curve = SCHEDULES[schedule]
        # At a rate of 0, drop paths are added all the same, for later steps. What has 0 at any rate stays as it is.
        new = [(p, curve(rate, share)) for _, p, share in shares if p.probability is not None or curve(0.5, share)]
    else:
        blocks = list(dict.fromkeys((network, place.block) for network, place, _ in shares))
        if len(schedule) != len(blocks):
            raise ValueError(f"{len(schedule)} drop probabilities, but there are {len(blocks)} blocks with drop paths")
        for index, probability in enumerate(schedule):
            _check_rate(f"schedule[{index}]", probability)
        given = dict(zip(blocks, map(float, schedule), strict=True))
        new = [(place, given[network, place.block]) for network, place, _ in shares]
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
        kind = _kind(drop_path)
        setattr(drop_path, kind.attribute, 1 - probability if kind.survival else probability)
    return model


def _check_rate(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}, but it must lie in [0, 1)")


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in a model whose constructors are known."""
    if _constructor(module):
        yield module
    else:
        for child in module.children():
            yield from _networks(child)


def _constructor(module: nn.Module) -> Callable[[], nn.Module] | None:
    """What creates a timm or transformers model like this one with a rate of 1."""
    own = vars(module)  # getattr would find those of a model within a wrapper
    architecture = (own.get("pretrained_cfg") or {}).get("architecture")
    if architecture and timm.is_model(architecture):
        return partial(timm.create_model, architecture, drop_path_rate=1.0)
    rate = getattr(own.get("config"), "drop_path_rate", None)
    if rate is None or not hasattr(module, "config_class"):
        return None
    if not isinstance(rate, Real):
        raise ValueError(f"{type(module).__name__} has a rate for each stage: set them in its config")
    config = copy.deepcopy(module.config)
    vars(config)["drop_path_rate"] = 1.0  # TimeSformer's would accept only an int
    return partial(type(module), config)


class _WithoutWeights(TorchFunctionMode):
    """Skips the initialization of weights, most of the time that it takes to create a model on the meta device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            function is torch.linspace
        ):  # older versions of timm compute their rates on the default device, and read them
            kwargs = {"device": "cpu"} | kwargs
        if function.__name__ in INITIALIZATION and args and args[0].is_meta:
            return args[0]
        return function(*args, **kwargs)


def _create(network: nn.Module) -> dict[str, Place]:
    """The places of a model like this one that is created with a rate of 1; none if its constructor is not known."""
    if network not in _created and (constructor := _constructor(network)):
        try:
            with torch.device("meta"), _WithoutWeights():
                created = constructor()
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{type(network).__name__} cannot be created with a drop path rate: {error}") from error
        _created[network] = {name: place._replace(owner=None) for name, place in _places(created).items()}
    return _created.get(network, {})


def _places(network: nn.Module) -> dict[str, Place]:
    """What holds a drop path or stands in for one, by name, in order."""
    places, outer = {}, "-"
    network = network.model if isinstance(network, FeatureGetterNet) else network
    for name, owner in network.named_modules():
        if COMPOSITE.search(type(owner).__name__) and not name.startswith(outer):
            outer = f"{name}."
        block = outer if name.startswith(outer) else name
        values = {attribute: None for attribute, value in vars(owner).items() if value is None} | owner._modules
        for attribute, value in values.items():
            kind = _kind(value)
            absent = value is None or type(value) is nn.Identity
            if kind or (absent and attribute.rstrip("0123456789").endswith("drop_path")):
                probability = drop_probability(value, kind) if kind else None
                key = f"{name}.{attribute}".replace(".", "_")  # as timm's features_only does
                places[key] = Place(owner, attribute, (type(owner), attribute), block, probability)
    return places


def _kind(module: nn.Module | None) -> Kind | None:
    if module is not None and (kind := _kinds.get(type(module)) or kind_of(module)):
        return _kinds.setdefault(type(module), kind)
    return None


def _shares(network: nn.Module) -> Iterator[tuple[Place, float]]:
    """The places of a network that can have a drop path, with their shares of the rate: NaN if not known."""
    places = _places(network)
    created = _create(network) if places else {}
    pruned = isinstance(network, (FeatureDictNet, FeatureGetterNet, FeatureHookNet))
    same = created.keys() >= places.keys() if pruned else created.keys() == places.keys()
    if same:
        shares = {name: created[name].probability or 0.0 for name in places}
    elif rule := _rule(places, created):
        shares = rule(places)
    else:
        shares = dict.fromkeys(places, math.nan) if created else _rising(places)
        created = {}  # so that no drop paths are added
    # Some places never get one, since their blocks have no shortcut, for instance. But if there is only one place like
    # that, it is in the first block and got none for having a rate of 0.
    without = {(place.like, place.block) for place in created.values() if place.probability is None}
    blocks = Counter(like for like, _ in without)
    for name, place in places.items():
        gets_one = same and created[name].probability is not None
        if place.probability is not None or gets_one or (created and blocks[place.like] <= 1):
            yield place, shares[name]


def _rule(places: dict[str, Place], created: dict[str, Place]) -> Callable[[dict[str, Place]], dict[str, float]] | None:
    """The rule for a network that consists of the same blocks as its namesake, but has another depth, for instance."""
    if {place.like for place in places.values()} <= {place.like for place in created.values()}:
        for rule in _rising, lambda places: dict.fromkeys(places, 1.0):
            if all(abs(share - (created[name].probability or 0)) < 1e-6 for name, share in rule(created).items()):
                return rule
    return None


def _rising(places: dict[str, Place]) -> dict[str, float]:
    """From 0 at the first block to 1 at the last, which torchvision's EfficientNets do not reach."""
    blocks = list(dict.fromkeys(place.block for place in places.values()))
    below_1 = any(place.like[0].__module__ == "torchvision.models.efficientnet" for place in places.values())
    last = len(blocks) if below_1 else max(len(blocks) - 1, 1)
    depth = {block: index / last for index, block in enumerate(blocks)}
    return {name: depth[place.block] for name, place in places.items()}
