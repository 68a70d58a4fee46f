"""The CIFAR ResNets of He et al. (arXiv:1512.03385, section 4.2) for timm, plain and with stochastic depth.

A network of depth 6n + 2 is a 3x3 convolution to 16 channels, three groups of n residual blocks with 16, 32 and 64
channels at 32x32, 16x16 and 8x8 pixels, global average pooling and a linear classifier. Shortcuts have no parameters
(option A). Huang et al. train depths 110 and 1202 with stochastic depth.
"""

from collections import OrderedDict
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..gate import MODES, check_choice
from .datasets import DATASETS, DataSet
from .pretrained import check_architecture, check_values, names, resolve, source
from .stochastic_depth import StochasticDepth, survival_probabilities

__all__ = ["CifarResNet"]

CHANNELS = (16, 32, 64)
POOLINGS = ("avg", "max", "avgmax", "catavgmax", "")

# Whether a block is computed is decided at run time, which FX cannot trace.
register_notrace_module(StochasticDepth)


class PaddedPool(nn.Module):
    """Option A at the first block of a wider group: average pooling, then zeros for the new channels."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        # ceil_mode: odd sizes are rounded up, as in the branch's convolution.
        self.pool = nn.AvgPool2d(stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}"


def residual_block(in_channels: int, channels: int, survival: float, mode: str, **dd) -> StochasticDepth:
    """A block of two 3x3 convolutions, the first with stride 2 where the number of channels changes."""
    stride = 1 if in_channels == channels else 2
    branch = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False, **dd),
            bn1=nn.BatchNorm2d(channels, **dd),
            act1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(channels, channels, 3, padding=1, bias=False, **dd),
            bn2=nn.BatchNorm2d(channels, **dd),
        )
    )
    shortcut = nn.Identity() if stride == 1 else PaddedPool(stride, channels - in_channels)
    return StochasticDepth(branch, shortcut, nn.ReLU(inplace=True), survival, mode)


class CifarResNet(nn.Module):
    """A ResNet of depth 6n + 2 with L = 3n residual blocks, each a `StochasticDepth`."""

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_schedule: str | Sequence[float] = "linear",
        drop_path_mode: str = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            depth: Number of layers with weights, 6n + 2.
            num_classes: Number of classes, 0 for no classifier.
            in_chans: Number of input channels.
            global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none (with num_classes=0).
            drop_rate: Dropout probability before the classifier.
            drop_path_rate: 1 - p_L, in [0, 1): 0 is constant depth.
            drop_path_schedule: "linear", the paper's decay from p_0 = 1 to p_L; "uniform", "quadratic" or "exponential"
                (see `survival_probabilities`); or the probabilities p_1..p_L, and then drop_path_rate is not used.
            drop_path_mode: "batch", one gate per block for the whole mini-batch, as in the paper; "row", one per
                sample; or "count", one per sample with a fixed number of them open (see `timm_sd.gate`).
            device: The device of parameters and buffers.
            dtype: Their dtype.

        Raises:
            ValueError: An argument has an invalid value.
        """
        super().__init__()
        _check_depth(depth)
        if in_chans < 1:
            raise ValueError(f"in_chans={in_chans!r}, but it must be at least 1")
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate={drop_rate!r}, but it must lie in [0, 1]")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate!r}, but it must lie in [0, 1)")
        check_choice("drop_path_mode", drop_path_mode, MODES)
        _check_head(num_classes, global_pool)
        if num_classes and not global_pool:
            raise ValueError(f"global_pool='' requires num_classes=0, but num_classes={num_classes!r}")

        dd = {"device": device, "dtype": dtype}
        n = (depth - 2) // 6
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        survival = survival_probabilities(3 * n, 1 - drop_path_rate, drop_path_schedule)
        self.conv1 = nn.Conv2d(in_chans, CHANNELS[0], 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0], **dd)
        self.act1 = nn.ReLU(inplace=True)

        self.stages = nn.Sequential()
        self.feature_info = []
        channels = CHANNELS[0]
        for stage, width in enumerate(CHANNELS):
            blocks = nn.Sequential()
            for p in survival[stage * n : (stage + 1) * n]:
                blocks.append(residual_block(channels, width, p, drop_path_mode, **dd))
                channels = width
            self.stages.append(blocks)
            self.feature_info.append(dict(num_chs=width, reduction=2**stage, module=f"stages.{stage}"))

        self.num_features = CHANNELS[-1]
        self._create_classifier(num_classes, global_pool)
        self.init_weights()

    def _create_classifier(self, num_classes: int, global_pool: str) -> None:
        pool, classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.global_pool, self.fc = pool, classifier.to(self.conv1.weight)  # its device and dtype
        self.head_hidden_size = self.num_features * pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialization: Torch 7's defaults, except for the convolutions.

        Convolutions are He-normal (std = sqrt(2 / fan_in)); batch normalization scales are uniform in (0, 1), shifts 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                nn.init.uniform_(module.weight)
            elif isinstance(module, nn.Linear):
                module.reset_parameters()
            elif isinstance(module, StochasticDepth):
                module.set_buffer(module.gate.probability)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        check_values(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that group the parameters by depth, per stage (coarse) or per block."""
        return dict(stem=r"^conv1|bn1", blocks=r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input and recompute the block in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer from features to logits, or `nn.Identity` with num_classes=0."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier with a new one for `num_classes` classes (0: none), and the pooling unless it is None.

        As elsewhere in timm, and unlike in the constructor, a classifier without pooling is allowed: it is then applied
        to the last dimension.

        Raises ValueError for a negative number of classes or an unknown pooling.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        _check_head(num_classes, global_pool)
        self.num_classes = num_classes
        self._create_classifier(num_classes, global_pool)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of the three groups, after the final features unless `intermediates_only`.

        Args:
            x: Images of shape (B, in_chans, H, W).
            indices: Which groups: the last n for an int, all for None.
            norm: Accepted for timm's interface; there is no final normalization.
            stop_early: Do not compute groups after the last one requested.
            output_fmt: Must be "NCHW".
            intermediates_only: Return only the list.

        Raises:
            ValueError: An output format other than "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt}, but it must be NCHW")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self._stem(x)
        intermediates = []
        for index, stage in enumerate(self.stages):
            if index <= max_index or not stop_early:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint_seq(stage, x)
                else:
                    x = stage(x)
                if index in take_indices:
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the groups after the last of `indices`, and if there are any the classifier; return the indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: max_index + 1]
        self.num_features = self.head_hidden_size = CHANNELS[max_index]
        if prune_head or max_index + 1 < len(CHANNELS):
            self.reset_classifier(0, "")
        return take_indices

    def _stem(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv1(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images of shape (B, in_chans, H, W) to features of shape (B, 64, H / 4, W / 4)."""
        x = self._stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x, flatten=True)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits of shape (B, num_classes), or with `pre_logits` to the classifier's input."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape (B, in_chans, H, W) to logits of shape (B, num_classes)."""
        features = self.forward_features(x)  # its own line for torch.compile: see `_call` in stochastic_depth.py
        return self.forward_head(features)


def is_depth(depth: int) -> bool:
    """Whether there is a network of this depth, 6n + 2 with n >= 1."""
    return isinstance(depth, int) and depth >= 8 and depth % 6 == 2


def _check_depth(depth: int) -> None:
    if not is_depth(depth):
        raise ValueError(f"depth={depth!r}, but it must be 6n + 2 for some n >= 1")


def _check_head(num_classes: int, global_pool: str) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes!r}, but it must be at least 0")
    check_choice("global_pool", global_pool, POOLINGS)


def _cfg(dataset: DataSet) -> dict:
    return dict(
        num_classes=len(dataset.labels),
        label_names=dataset.labels,
        mean=dataset.mean,
        std=dataset.std,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        interpolation="bilinear",
        first_conv="conv1",
        classifier="fc",
        license="apache-2.0",
        paper_name="Deep Networks with Stochastic Depth",
        paper_ids="arXiv:1603.09382",
    )


DEPTHS = (20, 32, 44, 56, 110, 152, 1202)

default_cfgs = {}


def register_depth(depth: int) -> None:
    """Register `cifar_resnet{depth}` and `cifar_resnet{depth}_sd` with timm, unless they already are.

    Importing the package does this for the depths 20, 32, 44, 56, 110, 152 and 1202. Raises ValueError unless the depth
    is 6n + 2.
    """
    _check_depth(depth)
    if timm.is_model(f"cifar_resnet{depth}"):
        return
    _register(f"cifar_resnet{depth}", f"ResNet-{depth} with constant depth (He et al.).", depth=depth)
    _register(
        f"cifar_resnet{depth}_sd",
        f"ResNet-{depth} with stochastic depth, linear decay to p_L = 0.5 (Huang et al.).",
        depth=depth,
        drop_path_rate=0.5,
    )


def _register(name: str, description: str, **model_args) -> None:
    """Register a network with timm, as `@register_model` on a function of that name would."""

    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: str | dict | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict | None = None,
        **kwargs,
    ) -> CifarResNet:
        overlay = pretrained_cfg_overlay or {}
        if pretrained:
            cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
            overlay = overlay | resolve(cfg, kwargs.get("cache_dir"))
        return build_model_with_cfg(
            CifarResNet,
            name,
            pretrained,
            pretrained_cfg,
            overlay,
            pretrained_filter_fn=check_architecture,
            feature_cfg=dict(out_indices=(0, 1, 2), flatten_sequential=True),
            **{**model_args, **kwargs},
        )

    real = {key: dataset for key, dataset in DATASETS.items() if key != "synthetic"}
    tags = {tag: _cfg(dataset) | source(tag) for key, dataset in real.items() for tag in names(name, key)}
    default_cfgs.update(generate_default_cfgs(tags))
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = description
    globals()[name] = register_model(entrypoint)


for _depth in DEPTHS:
    register_depth(_depth)
