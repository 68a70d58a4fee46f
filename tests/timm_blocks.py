"""Every class of timm's residual blocks that can have a `DropPath`, each in a small model that uses it.

`block_calls` returns blocks with the arguments that their model calls them with. `all_block_classes` finds the classes
in timm's source instead, so that a test notices the blocks of a later timm that `EXAMPLES` lacks.
"""

import inspect
import re
import sys
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import DropPath
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg
from timm.models.cait import LayerScaleBlockClassAttn
from timm.models.cspnet import CspStagesCfg
from torch import nn

# A DropPath inside one of these belongs to the block around it.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

VIT = dict(img_size=32, depth=2, embed_dim=32, num_heads=2)
STAGES = dict(depths=(1, 1, 1, 2), dims=(8, 16, 24, 32))
EMBEDS = dict(depths=(1, 1, 1, 2), embed_dims=(16, 32, 48, 64))
LAYERS = dict(layers=(1, 1, 1, 2), channels=(8, 16, 24, 32))
SWIN = dict(img_size=64, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2))
MAXVIT = dict(img_size=64, stem_width=(16, 32), embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 2))
XCEPTION = dict(block_cfg=[dict(in_chs=i, out_chs=o, stride=s) for i, o, s in ((64, 16, 2), (16, 16, 1), (16, 24, 2))])

# Model names, with arguments that make the model small. Without any, it is small already or its size is fixed.
EXAMPLES = dict(
    beit_base_patch16_224=VIT,
    test_byobnet=dict(
        blocks=[
            *(ByoBlockCfg(type, d=2, c=16, gs=0) for type in ("basic", "bottle", "dark", "edge")),
            ByoBlockCfg("self_attn", d=2, c=16, gs=0, self_attn_layer="lambda", self_attn_kwargs=dict(r=3)),
            *(ByoBlockCfg(type, d=2, c=16, s=1, gs=0) for type in ("rep", "one")),
        ]
    ),
    # By default, CaiT's class attention has no DropPath.
    cait_xxs24_224=dict(VIT, block_layers_token=partial(LayerScaleBlockClassAttn, drop_path=0.5)),
    coat_tiny=dict(img_size=64, embed_dims=(16, 16, 16, 16), serial_depths=(1, 1, 1, 1), parallel_depth=2),
    convit_tiny=dict(VIT, depth=3, local_up_to_layer=2),
    test_convnext=STAGES,
    convnext_atto=STAGES,
    cpubone_nano={},
    crossvit_tiny_240=dict(
        img_size=48, img_scale=(1, 1), depth=((1, 1, 0), (1, 1, 0)), embed_dim=(16, 32), num_heads=(2, 2)
    ),
    csatv2=dict(dims=(8, 16, 24, 32), depths=(1, 1, 2, 2), transformer_depths=(0, 0, 1, 1), transformer_drop_path=True),
    cspresnet50=dict(
        stages=CspStagesCfg((2, 1, 1), out_chs=(16, 16, 16), block_type=("bottle", "dark", "edge"), block_ratio=0.5),
    ),
    cspnext_tiny=dict(depths=(1, 1, 1, 2), channels=(16, 16, 16, 16)),
    davit_tiny=dict(EMBEDS, num_heads=(2, 2, 2, 2)),
    deepseek_vit_412m=dict(VIT, img_size=28, downsample_ratio=1),
    edgenext_xx_small=dict(STAGES, depths=(1, 2, 2, 2), heads=(2, 2, 2, 2)),
    efficientformer_l1=dict(EMBEDS, img_size=224, num_vit=1),
    efficientformerv2_s0=dict(EMBEDS, img_size=64, num_vit=1),
    efficientvim_m1=dict(embed_dim=(16, 24, 32), depths=(1, 1, 2)),
    eva02_tiny_patch14_224=dict(VIT, img_size=28),
    eva_giant_patch14_224=dict(VIT, img_size=28, use_post_norm=True),
    fasternet_t0=dict(embed_dim=8, depths=(1, 1, 1, 2)),
    fastvit_sa12=dict(layers=(1, 1, 1, 2), embed_dims=(8, 16, 32, 64)),
    focalnet_tiny_srf=dict(mlp_ratio=1),
    gcvit_xxtiny=dict(img_size=64, embed_dim=16),
    gemma4_vit_167m=dict(VIT, img_size=48, head_dim=16, intermediate_size=64),
    hgnetv2_b0=dict(head_hidden_size=16),
    hiera_tiny_224=dict(img_size=(64, 64), embed_dim=16, stages=(1, 1, 1, 2)),
    sam2_hiera_tiny=dict(embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,)),
    iformer_t=dict(STAGES, depths=(1, 1, 3, 3), attn_groups=(0, 0, 1, 1)),
    iformer_s=dict(STAGES, depths=(1, 1, 3, 3), attn_groups=(0, 0, 1, 1), layer_scale_init_value=0.1),
    inception_next_atto=STAGES,
    levit_128s=dict(img_size=64, embed_dim=(16, 24, 32), depth=(1, 1, 2)),
    lowformer_b0=dict(width_list=[8, 8, 16, 24, 32], depth_list=[0, 1, 1, 1, 2], head_widths=(16, 16)),
    test_mambaout=STAGES,
    test_coatnet=MAXVIT,
    test_maxvit=MAXVIT,
    coatnext_nano_rw_224=MAXVIT,
    maxvit_tiny_pm_256=MAXVIT,
    maxvit_nano_rw_256=dict(MAXVIT, transformer_use_nchw_attn=True),
    poolformer_s12={},
    caformer_s18={},
    mixer_s32_224=dict(img_size=64),
    resmlp_12_224=dict(img_size=64),
    gmlp_ti16_224=dict(img_size=64),
    # All blocks of EfficientNets and MobileNets, which share a module. This model accepts any `block_args`.
    mobilenetv5_base=dict(
        block_args=decode_arch_def(
            [
                ["ds_r2_k3_s2_e1_c16", "cn_r2_k3_s1_e1_c16_skip", "er_r1_k3_s1_e2_c16"],
                ["ir_r2_k3_s2_e2_c16_se0.25", "ir_r1_k3_s1_e2_c16_cc2"],
                ["uir_r2_a3_k3_s2_e2_c16", "mqa_r1_k3_h2_s2_d8_c16", "uir_r1_a0_k0_s1_e2_c16"],
            ]
        ),
        norm_layer=nn.BatchNorm2d,
        use_msfa=False,
        num_features=16,
    ),
    mobilevit_xxs={},
    mobilevitv2_050={},
    mvitv2_tiny=dict(img_size=64),
    naflexvit_base_patch16_gap=VIT,
    naflexvit_base_patch16_map=dict(VIT, rope_type="axial"),
    nest_tiny=dict(img_size=64, mlp_ratio=1),
    nextvit_small=dict(depths=(1, 1, 5, 2)),
    test_nfnet=dict(depths=(1, 1, 1, 2)),
    dm_nfnet_f0=dict(depths=(1, 1, 1, 2), channels=(32, 32, 32, 32), group_size=8),
    pit_ti_224=dict(img_size=64, base_dims=(16, 16, 16), depth=(1, 1, 2), heads=(1, 2, 2)),
    pvt_v2_b0=dict(EMBEDS, num_heads=(1, 2, 2, 2)),
    qwen3_vit_88m=VIT,
    # Its blocks have no sum: the stage concatenates the output of their DropPath with their input.
    rdnet_tiny=dict(
        num_init_features=16,
        growth_rates=(8, 8, 8),
        num_blocks_list=(2, 2, 2),
        is_downsample_block=(None, True, True),
        block_type=("Block", "Block", "BlockESE"),
    ),
    regnetx_002=dict(w0=8, wa=8, wm=2, depth=6),
    regnetv_040=dict(w0=8, wa=8, wm=2, depth=6, group_size=8),
    res2net50_26w_4s=LAYERS,
    # Its DropPath acts on the block's input, after the branch has been computed. Only a downsampling shortcut sees it.
    resnest14d=dict(channels=(8, 16, 24, 32), layers=(1, 1, 1, 2)),
    test_resnet={},
    resnet18=LAYERS,
    resnet50=LAYERS,
    resnetv2_18=LAYERS,
    resnetv2_50=LAYERS,
    resnetv2_50d=dict(LAYERS, preact=False),
    rexnet_100=dict(width_mult=0.5),
    sequencer2d_s=dict(layers=(1, 1, 1, 2), embed_dims=(16, 16, 16, 16), hidden_sizes=(4, 4, 4, 4)),
    skresnet18=LAYERS,
    skresnet50=LAYERS,
    starnet_s050=dict(depths=(1, 1, 1, 2)),
    swiftformer_xs=dict(layers=[1, 1, 1, 2], embed_dims=[8, 16, 24, 32]),
    swin_tiny_patch4_window7_224=SWIN,
    swinv2_tiny_window8_256=SWIN,
    swinv2_cr_tiny_224=SWIN,
    tiny_vit_5m_224=dict(EMBEDS, depths=(2, 1, 1, 2), num_heads=(2, 2, 2, 2)),
    tnt_s_patch16_224=dict(img_size=32, depth=2, embed_dim=32, inner_dim=8, num_heads_inner=2, num_heads_outer=2),
    tresnet_m=dict(layers=[1, 2, 2, 1], width_factor=0.25),
    twins_svt_small=dict(img_size=64, embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 2, 2), depths=(2, 2, 2, 2)),
    visformer_tiny=dict(img_size=64, embed_dim=32, init_channels=8, depth=(1, 1, 2), num_heads=2),
    test_vit=VIT,
    test_vit2=VIT,
    vit_base_patch16_rpn_224=VIT,
    vit_base_patch16_xp_224=VIT,
    vit_dpwee_patch16_reg1_gap_256=VIT,
    vit_small_patch16_18x2_224=VIT,
    vit_base_patch16_18x2_224=VIT,
    vit_relpos_small_patch16_224=VIT,
    vit_relpos_small_patch16_rpn_224=VIT,
    vit_srelpos_small_patch16_224=VIT,
    samvit_base_patch16=dict(VIT, img_size=64, depth=3, neck_chans=16, window_size=3, global_attn_indexes=(2,)),
    volo_d1_224=dict(img_size=64, mlp_ratio=1),
    ese_vovnet39b=dict(stem_chs=[8, 8, 8], stage_conv_chs=[8, 8, 8, 8], stage_out_chs=[16, 16, 16, 16]),
    xception41=XCEPTION,
    xception41p=XCEPTION,
    xcit_nano_12_p16_224=VIT,
)

# Classes that `all_block_classes` finds, but that have no DropPath of their own in any timm model
NOT_BLOCKS = {
    "OsaStage": "makes the DropPaths of its OsaBlocks",
    "XceptionAligned": "makes the DropPaths of its modules",
    "ClassAttentionBlock": "XCiT passes it no rate",
    "ClassBlock": "VOLO passes it a rate of 0",
    "LocalRepresentation": "SwiftFormer passes it no rate",
    "MbConvLNBlock": "ViTamin passes it no rate",
    "Outlooker": "VOLO passes it no rate",
}


class Call(NamedTuple):
    block: nn.Module
    args: tuple
    kwargs: dict[str, Any]


@contextmanager
def one_thread():
    """Compute on one thread. More do not help with tensors this small, and if other processes keep the cores busy,
    waiting for each other takes ten times as long as the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def block_calls(name):
    """Blocks of the model `name` with the arguments of a forward pass, the last call of each kind.

    All of them used a DropPath with a rate above 0. They are in training mode.
    """
    model = small_model(name)
    calls, used, hooks = [], set(), []

    def before_block(block, args, kwargs):
        calls.append(Call(block, cloned(args), cloned(kwargs)))

    def before_drop_path(drop_path, args):
        used.add(drop_path)

    for block in model.modules():
        if own := drop_paths(block):
            hooks.append(block.register_forward_pre_hook(before_block, with_kwargs=True))
            hooks += [drop_path.register_forward_pre_hook(before_drop_path) for drop_path in own if drop_path.drop_prob]
    with torch.no_grad():
        model.eval()(*inputs(name))
    for hook in hooks:
        hook.remove()
    model.train()
    calls = [call for call in calls if has_sum(call.block) and not used.isdisjoint(drop_paths(call.block))]
    return list({kind(call): call for call in calls}.values())


def small_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **{"drop_path_rate": 0.5, "num_classes": 4, **EXAMPLES[name]})
    for parameter in model.parameters():
        if parameter.abs().max() < 0.01:  # a final scale that starts near zero would hide the branch
            nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # some have a rate by default, and two passes would differ
            module.p = 0.0
    return model


def inputs(name):
    """The model's arguments for a forward pass of six images."""
    size = EXAMPLES[name].get("img_size", 64)
    images = torch.randn(6, 3, *(size if isinstance(size, tuple) else (size, size)))
    if name.startswith("naflexvit"):  # one to four patches: each image has its own mask and rope
        coordinates = torch.cartesian_prod(torch.arange(2), torch.arange(2)).expand(6, -1, -1)
        return images.reshape(6, 4, -1), coordinates, torch.ones(6, 4, dtype=torch.bool).tril()
    if name in ("test_vit2", "vit_base_patch16_18x2_224"):  # one mask for all samples
        return images, torch.ones(5, 5, dtype=torch.bool).tril()
    return (images,)


def drop_paths(block):
    """The DropPaths that belong to a block: its children, or in containers among them. A container itself has none."""
    return [] if isinstance(block, CONTAINERS) else list(_drop_paths_below(block))


def _drop_paths_below(module):
    for child in module.children():
        if isinstance(child, DropPath):
            yield child
        elif isinstance(child, CONTAINERS):
            yield from _drop_paths_below(child)


def has_sum(block):
    """Whether a block has a shortcut. Some of byobnet's and vovnet's have none, but use their DropPath all the same."""
    match type(block).__module__:
        case "timm.models.byobnet":
            return getattr(block, "shortcut", block) is not None
        case "timm.models.vovnet":
            return block.residual
    return True


def kind(call):
    """The kind of a call: what the block is made of and the types of its arguments, but no sizes."""
    modules = [
        (name, type(module), *((key, bool(value)) for key, value in vars(module).items() if is_switch(value)))
        for name, module in call.block.named_modules()
    ]
    tensors = [name for name, _ in [*call.block.named_parameters(), *call.block.named_buffers()]]
    given = [*map(type, call.args), *((name, type(value)) for name, value in call.kwargs.items())]
    return type(call.block), *modules, *tensors, *given


def is_switch(value):
    return value is None or isinstance(value, int)


def cloned(value):
    match value:
        case torch.Tensor():
            return value.detach().clone()
        case list() | tuple():
            return type(value)(map(cloned, value))
        case dict():
            return {key: cloned(item) for key, item in value.items()}
    return value


def all_block_classes():
    """timm's classes whose `__init__`, or that of a base class, creates a DropPath or stores one that it is given."""
    modules = [module for name, module in sys.modules.items() if re.match(r"timm\.(models|layers)\b", name)]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    classes = [cls for cls in classes if issubclass(cls, nn.Module) and any(map(_holds_drop_path, cls.__mro__))]
    return sorted(classes, key=lambda cls: (cls.__module__, cls.__name__))


@cache
def _holds_drop_path(cls):
    if not cls.__module__.startswith("timm.") or "__init__" not in vars(cls):
        return False
    return re.search(r"\bDropPath\(|self\.\w*drop_path\d* = ", inspect.getsource(cls.__init__)) is not None
