"""Stochastic depth for timm: importing this package registers the `cifar_resnet*` networks."""

from .gate import Gate, draw_gates, gates, use_gates
from .paper.cifar_resnet import CifarResNet, register_depth
from .paper.stochastic_depth import StochasticDepth, survival_probabilities
from .skip.convert import restore_drop_path, skip_drop_path
from .skip.drop_paths import register_drop_path
from .skip.rates import set_drop_path
from .skip.summary import summary

__version__ = "0.2.0"

__all__ = [
    "CifarResNet",
    "Gate",
    "StochasticDepth",
    "draw_gates",
    "gates",
    "register_depth",
    "register_drop_path",
    "restore_drop_path",
    "set_drop_path",
    "skip_drop_path",
    "summary",
    "survival_probabilities",
    "use_gates",
]
