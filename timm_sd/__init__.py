"""Stochastic depth for timm: importing this package registers the `cifar_resnet*` networks."""

from .cifar_resnet import CifarResNet
from .stochastic_depth import (
    StochasticDepth,
    draw_gates,
    load_survival,
    stochastic_blocks,
    survival_probabilities,
    use_gates,
)

__version__ = "0.1.0"

__all__ = [
    "CifarResNet",
    "StochasticDepth",
    "draw_gates",
    "load_survival",
    "stochastic_blocks",
    "survival_probabilities",
    "use_gates",
]
