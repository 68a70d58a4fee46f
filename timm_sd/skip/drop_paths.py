"""Drop paths: a drop path is a module that drops whole samples at random in training, and does nothing else.

Almost every library has its own copy of timm's `DropPath`. Such a class is found by its name, and accepted only once a
copy of the module has been seen to behave like a drop path. Classes that cannot be tried are registered.
"""

import contextlib
import copy
import itertools
import re
from numbers import Real
from typing import NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..gate import Gate

NAME = re.compile("drop_?path|stoch(astic)?_?depth|drop_?(sample|branch|connect)", re.IGNORECASE)
SAMPLES = 512
SHAPES = ((12,), (3, 4), (2, 2, 3)) * 2  # of a sample in each draw: nn.Dropout1d acts like a drop path on the first
NOT_COPIED = {*vars(nn.Module()), "forward"}  # hooks, children, and a forward method set on the instance


class Kind(NamedTuple):
    """Where a drop path keeps its probability, and what it does to the samples that it keeps."""

    attribute: str  # holds the probability
    survival: bool  # whether that is the probability of keeping a sample rather than of dropping it
    scaled: bool  # whether kept samples are divided by the survival probability


_known: dict[type[nn.Module], Kind] = {DropPath: Kind("drop_prob", survival=False, scaled=True)}


def register_drop_path(
    cls: type[nn.Module], attribute: str = "drop_prob", survival: bool = False, scaled: bool = True
) -> None:
    """Declare that a class is a drop path, if it is not recognized as one. It is trusted; its subclasses are not.

    Args:
        cls: A class that in training zeroes each sample independently of the others, and in inference is the identity.
        attribute: The attribute or property that holds the probability.
        survival: Whether that is the probability of keeping a sample rather than of dropping it.
        scaled: Whether kept samples are divided by the survival probability.

    Raises:
        TypeError: `cls` is not a subclass of `nn.Module`.
        ValueError: `attribute` cannot be the name of an attribute.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and cls is not nn.Module):
        raise TypeError(f"cls={cls!r}, but it must be a subclass of torch.nn.Module")
    if not (isinstance(attribute, str) and attribute.isidentifier()):
        raise ValueError(f"attribute={attribute!r}, but it must be the name of an attribute")
    _known[cls] = Kind(attribute, bool(survival), bool(scaled))


def looks_like_drop_path(module: nn.Module) -> bool:
    """Whether its class or a base class is named like a drop path, and it has neither parameters nor children.

    Gates do not count as children, since converted drop paths hold theirs.
    """
    if isinstance(module, Gate) or not all(isinstance(child, Gate) for child in module.children()):
        return False
    named = any(NAME.search(cls.__name__) for cls in type(module).__mro__)
    return named and next(module.parameters(), None) is None


def has_own_forward(module: nn.Module) -> bool:
    """Whether an instance has another forward method than its class. Accelerate's hooks leave the class's behind."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a drop path; None for any other module, and for one that cannot be proven to be a drop path."""
    if has_own_forward(module) and "skipped" not in vars(module):  # neither the class's nor that of a converted one
        return None
    if type(module) in _known or not looks_like_drop_path(module):
        return _known.get(type(module))
    attributes = [name for name, value in _state(module).items() if _may_be_probability(value)]
    with torch.random.fork_rng(devices=[]):
        for kind in itertools.starmap(Kind, itertools.product(attributes, (False, True), (True, False))):
            with contextlib.suppress(Exception):  # a class that is merely named like one may do anything
                if getattr(module, "scale_by_keep", kind.scaled) == kind.scaled and _behaves_as(module, kind):
                    return kind
    return None


def drop_probability(module: nn.Module, kind: Kind) -> float:
    """The current probability with which a drop path of this kind drops a sample. None counts as 0."""
    value = getattr(module, kind.attribute)
    if value is None:
        return 0.0
    return 1 - float(value) if kind.survival else float(value)


def _state(module: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if name not in NOT_COPIED}


def _may_be_probability(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0  # an element of torch.linspace(0, rate, depth)
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def _behaves_as(module: nn.Module, kind: Kind) -> bool:
    """Whether a copy of the module, set to several probabilities, does exactly what a drop path of this kind does."""
    trial = object.__new__(type(module))  # deepcopy would follow hooks to the rest of the model
    nn.Module.__init__(trial)
    vars(trial).update(copy.deepcopy(_state(module)))
    names = set(vars(trial))
    torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
    x = torch.randn(SAMPLES, 12, dtype=torch.float32, device="cpu").repeat(len(SHAPES), 1, 1)
    for training, p in (False, 0.5), (True, 0.0), (True, 0.25), (True, 0.5):
        trial.train(training)
        setattr(trial, kind.attribute, 1 - p if kind.survival else p)
        given = x.clone()
        inputs = [draw.view(-1, *shape) for draw, shape in zip(given, SHAPES, strict=True)]
        outputs = [type(module).forward(trial, draw) for draw in inputs]
        if [(y.shape, y.dtype) for y in outputs] != [(draw.shape, draw.dtype) for draw in inputs]:
            return False
        y = torch.stack([output.flatten(1) for output in outputs])
        dropped = y[..., 0] == 0
        expected = x * ~dropped.unsqueeze(-1) / (1 - p if training and kind.scaled else 1)
        if not (y - expected).abs().max() < 1e-5 or not torch.equal(given, x) or set(vars(trial)) != names:
            return False  # it may also change its input, or keep something
        if not _drawn_independently(dropped.float(), p if training else 0.0):
            return False
    return True


def _drawn_independently(dropped: Tensor, p: float) -> bool:
    """Whether each sample was dropped with probability p, independently of the others, to five standard deviations.

    One gate for the batch or for each pair of samples fails, as does a fixed number of dropped samples.
    """
    if p == 0:
        return not dropped.any()
    spectrum = torch.fft.rfft(dropped - p)
    correlations = torch.fft.irfft(spectrum.abs() ** 2).mean(0) / (SAMPLES * p * (1 - p))  # of samples i and i + d
    number = dropped.sum(1)
    return bool(abs(dropped.mean() - p) < 0.05 and correlations[1:].abs().max() < 0.25 and number.min() < number.max())
