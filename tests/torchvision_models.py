"""Every architecture of torchvision that has a `StochasticDepth`, each as a small model with random weights.

They are named after torchvision's smallest model of each architecture.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import convnext, efficientnet, maxvit, swin_transformer
from torchvision.models.video import mvit
from torchvision.models.video import swin_transformer as swin_transformer3d

BATCH = 5
RATE = 0.5  # of the last block; in all of these it grows with the depth
COMMON = dict(stochastic_depth_prob=RATE, num_classes=4)
SWIN = dict(COMMON, embed_dim=8, depths=[2, 2], num_heads=[2, 2], mlp_ratio=2.0)
SWIN_V2 = dict(block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2)
MVIT = dict(COMMON, spatial_size=(32, 32), temporal_size=4, dropout=0.0, residual_with_cls_embed=False)
# In the second block the channels change, in the third the number of tokens.
MVIT_BLOCKS = [
    mvit.MSBlockConfig(2, 8, 8, [], [3, 3, 3], [], [1, 4, 4]),
    mvit.MSBlockConfig(2, 8, 16, [], [3, 3, 3], [], [1, 4, 4]),
    mvit.MSBlockConfig(2, 16, 16, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
    mvit.MSBlockConfig(2, 16, 16, [], [3, 3, 3], [], [1, 2, 2]),
]
MVIT_V2_BLOCKS = [
    mvit.MSBlockConfig(2, 8, 8, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
    mvit.MSBlockConfig(2, 8, 16, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
    mvit.MSBlockConfig(2, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
]
CONVNEXT_BLOCKS = [convnext.CNBlockConfig(8, 16, 2), convnext.CNBlockConfig(16, None, 2)]
# The last model of a stage has a shortcut, and so a StochasticDepth that is used.
EFFICIENTNET_BLOCKS = [
    efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1),
    efficientnet.MBConvConfig(2, 3, 2, 8, 16, 2),
    efficientnet.MBConvConfig(2, 5, 1, 16, 16, 2),
]
EFFICIENTNET_V2_BLOCKS = [
    efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
    efficientnet.FusedMBConvConfig(2, 3, 2, 8, 16, 2),
    efficientnet.MBConvConfig(2, 3, 2, 16, 16, 2),
]
EFFICIENTNET = dict(COMMON, dropout=0.0, norm_layer=partial(nn.BatchNorm2d, eps=1e-3), last_channel=16)
MAXVIT = dict(stem_channels=8, partition_size=2, block_channels=[16, 16], block_layers=[1, 2], head_dim=8, mlp_ratio=2)

MODELS: dict[str, Callable[[], nn.Module]] = dict(
    swin_t=lambda: swin_transformer.SwinTransformer([4, 4], window_size=[4, 4], **SWIN),
    swin_v2_t=lambda: swin_transformer.SwinTransformer([4, 4], window_size=[4, 4], **SWIN, **SWIN_V2),
    convnext_tiny=lambda: convnext.ConvNeXt(CONVNEXT_BLOCKS, layer_scale=1.0, **COMMON),
    efficientnet_b0=lambda: efficientnet.EfficientNet(EFFICIENTNET_BLOCKS, **EFFICIENTNET),
    efficientnet_v2_s=lambda: efficientnet.EfficientNet(EFFICIENTNET_V2_BLOCKS, **EFFICIENTNET),
    maxvit_t=lambda: maxvit.MaxVit((32, 32), **MAXVIT, **COMMON),
    mvit_v1_b=lambda: mvit.MViT(
        block_setting=MVIT_BLOCKS, residual_pool=False, rel_pos_embed=False, proj_after_attn=False, **MVIT
    ),
    mvit_v2_s=lambda: mvit.MViT(
        block_setting=MVIT_V2_BLOCKS, residual_pool=True, rel_pos_embed=True, proj_after_attn=True, **MVIT
    ),
    swin3d_t=lambda: swin_transformer3d.SwinTransformer3d([2, 4, 4], window_size=[2, 4, 4], **SWIN),
)
VIDEOS = ("mvit_v1_b", "mvit_v2_s", "swin3d_t")


def tiny(name: str) -> tuple[nn.Module, tuple[Tensor]]:
    """A model in training mode, and the arguments of a forward pass."""
    torch.manual_seed(0)
    frames = (4,) if name in VIDEOS else ()
    return MODELS[name]().train(), (torch.randn(BATCH, 3, *frames, 32, 32),)
