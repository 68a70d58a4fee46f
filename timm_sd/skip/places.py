"""Where a model's drop paths belong, and which share of the rate each of them gets.

Families differ in both, so their own constructors are asked: a model like the given one, created without weights and
with a rate of 1, has drop paths in all the right places, each with its share as its probability.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Real
from typing import NamedTuple
from weakref import WeakKeyDictionary

import timm
import torch
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import one_line
from .drop_paths import Kind, drop_probability, kind_of

COMPOSITE = re.compile("MaxVitLayer|MaxxVitBlock|ParallelThingsBlock|MobileVit(V2)?Block")  # blocks made of blocks
INITIALIZATION = {"trunc_normal_", "normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}


class Place(NamedTuple):
    """An attribute that holds a drop path, or an Identity or None that stands in for one."""

    owner: nn.Module
    attribute: str
    like: tuple[type, str]  # the owner's class and the attribute
    block: str
    probability: float | None  # None without a drop path


_kinds: dict[type, Kind] = {}  # it takes milliseconds to find out what a class does
_created: WeakKeyDictionary[nn.Module, dict[str, Place]] = WeakKeyDictionary()


def networks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in a model whose constructors are known."""
    if _constructor(module):
        yield module
    else:
        for child in module.children():
            yield from networks(child)


def known_kind(module: nn.Module | None) -> Kind | None:
    """`kind_of`, which tries each class only once."""
    if module is not None and (kind := _kinds.get(type(module)) or kind_of(module)):
        return _kinds.setdefault(type(module), kind)
    return None


def shares(network: nn.Module) -> Iterator[tuple[Place, float]]:
    """The places of a network that can have a drop path, with their shares of the rate: NaN if not known."""
    places = _places(network)
    created = _create(network) if places else {}
    pruned = isinstance(network, (FeatureDictNet, FeatureGetterNet, FeatureHookNet))
    same = created.keys() >= places.keys() if pruned else created.keys() == places.keys()
    if same:
        share_of = {name: created[name].probability or 0.0 for name in places}
    elif rule := _rule(places, created):
        share_of = rule(places)
    else:
        share_of = dict.fromkeys(places, math.nan) if created else _rising(places)
        created = {}  # so that no drop paths are added
    # Some places never get one, for instance since their blocks have no shortcut. But where only one block of a kind is
    # without, that is the first, whose rate is 0.
    without = {(place.like, place.block) for place in created.values() if place.probability is None}
    blocks = Counter(like for like, _ in without)
    for name, place in places.items():
        gets_one = same and created[name].probability is not None
        if place.probability is not None or gets_one or (created and blocks[place.like] <= 1):
            yield place, share_of[name]


def _places(network: nn.Module) -> dict[str, Place]:
    """All places of a network by name, in order."""
    places, outer = {}, "-"
    network = network.model if isinstance(network, FeatureGetterNet) else network
    for name, owner in network.named_modules():
        if COMPOSITE.search(type(owner).__name__) and not name.startswith(outer):
            outer = f"{name}."
        block = outer if name.startswith(outer) else name
        values = {attribute: None for attribute, value in vars(owner).items() if value is None} | owner._modules
        for attribute, value in values.items():
            kind = known_kind(value)
            absent = value is None or type(value) is nn.Identity
            if kind or (absent and attribute.rstrip("0123456789").endswith("drop_path")):
                probability = drop_probability(value, kind) if kind else None
                key = f"{name}.{attribute}".replace(".", "_")  # as timm's features_only does
                places[key] = Place(owner, attribute, (type(owner), attribute), block, probability)
    return places


def _constructor(module: nn.Module) -> Callable[[], nn.Module] | None:
    """A function that creates a timm or transformers model like this one with a rate of 1."""
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


def _create(network: nn.Module) -> dict[str, Place]:
    """The places of a model like this one that is created with a rate of 1; none if its constructor is not known."""
    if network not in _created and (constructor := _constructor(network)):
        try:
            with torch.device("meta"), WithoutWeights():
                created = constructor()
        except Exception as error:
            reason = one_line(str(error))
            raise ValueError(f"{type(network).__name__} cannot be created with a drop path rate: {reason}") from error
        _created[network] = _places(created)
    return _created.get(network, {})


class WithoutWeights(TorchFunctionMode):
    """Skips the initialization of weights, most of the time that it takes to create a model on the meta device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.linspace:  # older versions of timm read their rates from the default device
            kwargs = {"device": "cpu"} | kwargs
        if function.__name__ in INITIALIZATION and args and args[0].is_meta:
            return args[0]
        return function(*args, **kwargs)


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
