"""Every family of transformers that has a class of its own for drop paths, each as a tiny model with random weights.

`FAMILIES` names them as the folders of `transformers.models`. `tiny` builds one, with the arguments of a forward pass.
Dinat is missing: it needs natten, which has no build for the CPU. LeViT, which drops samples without any such class,
and HGNet-V2, whose `drop_path` is an ordinary dropout, are no such families.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

BATCH = 5
VIT = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8)
DINO = dict(VIT, mlp_ratio=2)
SWIN = dict(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2, mlp_ratio=2.0)
PYRAMID = dict(
    num_encoder_blocks=2,
    depths=[2, 2],
    hidden_sizes=[8, 16],
    patch_sizes=[7, 3],
    strides=[4, 2],
    num_attention_heads=[1, 2],
    mlp_ratios=[2, 2],
)
CONVNEXT = dict(num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], layer_scale_init_value=1.0)
TEXT = dict(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
# The backbone of Grounding DINO is a Swin with drop paths, but these are tested by themselves.
GROUNDING = dict(
    backbone_config=transformers.SwinConfig(**SWIN, drop_path_rate=0.0, out_features=["stage1", "stage2"]),
    text_config=transformers.BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    num_queries=6,
    encoder_layers=2,
    decoder_layers=1,
    d_model=32,  # its group norms have 32 groups
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    encoder_attention_heads=4,  # its fusion layers have half as many
    decoder_attention_heads=2,
    num_feature_levels=2,
    encoder_n_points=2,
    decoder_n_points=2,
    max_text_len=8,
    dropout=0.0,
    disable_custom_kernels=True,
)


class Family(NamedTuple):
    """A model and its configuration by the names of their classes, and the arguments of a forward pass."""

    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    rate: str | None = "drop_path_rate"  # the option for the drop path's rate, None if it cannot be given there


def images(size: int = 16, height: int | None = None) -> Callable[[], dict[str, Tensor]]:
    return lambda: dict(pixel_values=torch.randn(BATCH, 3, height or size, size))


def videos(name: str, frames: int, size: int = 16) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(BATCH, frames, 3, size, size)}


def tokens() -> Tensor:
    return torch.randint(5, 60, (BATCH, 7))


def pairs() -> dict[str, Tensor]:
    """An image with its prompt, and the prompt's own image and mask, as SegGPT takes them."""
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: torch.randn(BATCH, 3, 16, 16) for name in names}


FAMILIES = dict(
    beit=Family("BeitModel", "BeitConfig", dict(VIT, intermediate_size=32, use_relative_position_bias=True), images()),
    bit=Family(
        "BitModel",
        "BitConfig",
        dict(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_groups=2),
        images(32),
    ),
    clap=Family(
        "ClapAudioModel",
        "ClapAudioConfig",
        dict(
            window_size=2,
            num_mel_bins=8,
            spec_size=32,
            hidden_size=16,
            depths=[2, 2],
            num_attention_heads=[2, 2],
            hidden_dropout_prob=0.0,
            patch_embeds_hidden_size=8,
            num_hidden_layers=2,
            mlp_ratio=2.0,
        ),
        lambda: dict(input_features=torch.randn(BATCH, 1, 128, 8)),
    ),
    convnext=Family("ConvNextModel", "ConvNextConfig", CONVNEXT, images(32)),
    convnextv2=Family("ConvNextV2Model", "ConvNextV2Config", CONVNEXT, images(32)),
    cvt=Family(
        "CvtModel",
        "CvtConfig",
        dict(
            patch_sizes=[7, 3],
            patch_stride=[4, 2],
            patch_padding=[2, 1],
            embed_dim=[8, 16],
            num_heads=[1, 2],
            depth=[2, 2],
            mlp_ratio=[2.0, 2.0],
            attention_drop_rate=[0.0, 0.0],
            drop_rate=[0.0, 0.0],
            qkv_bias=[True, True],
            cls_token=[False, True],
            qkv_projection_method=["dw_bn", "dw_bn"],
            kernel_qkv=[3, 3],
            padding_kv=[1, 1],
            stride_kv=[2, 2],
            padding_q=[1, 1],
            stride_q=[1, 1],
        ),
        images(32),
        rate=None,  # a list with a rate for each stage, of which its first stage ignores its own
    ),
    data2vec=Family(
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        dict(VIT, intermediate_size=32, use_shared_relative_position_bias=True),
        images(),
    ),
    dinov2=Family("Dinov2Model", "Dinov2Config", DINO, images()),
    dinov2_with_registers=Family("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, images()),
    dinov3_convnext=Family(
        "DINOv3ConvNextModel",
        "DINOv3ConvNextConfig",
        dict(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 2, 1], layer_scale_init_value=1.0),
        images(32),
    ),
    dinov3_vit=Family("DINOv3ViTModel", "DINOv3ViTConfig", dict(VIT, intermediate_size=32), images()),
    donut=Family("DonutSwinModel", "DonutSwinConfig", SWIN, images(32)),
    eomt=Family(
        "EomtForUniversalSegmentation", "EomtConfig", dict(DINO, num_blocks=1, num_queries=4, num_labels=3), images()
    ),
    eomt_dinov3=Family(
        "EomtDinov3ForUniversalSegmentation",
        "EomtDinov3Config",
        dict(VIT, intermediate_size=32, num_blocks=1, num_queries=4, num_labels=3),
        images(),
    ),
    florence2=Family(
        "models.florence2.modeling_florence2.Florence2VisionBackbone",
        "models.florence2.configuration_florence2.Florence2VisionConfig",
        dict(
            depths=(1, 1),
            patch_size=(7, 3),
            patch_stride=(4, 2),
            patch_padding=(3, 1),
            patch_prenorm=(False, True),
            embed_dim=(8, 16),
            num_heads=(2, 2),
            num_groups=(2, 2),
            window_size=4,
            mlp_ratio=2.0,
        ),
        lambda: dict(hidden_states=torch.randn(BATCH, 3, 32, 32)),
    ),
    focalnet=Family(
        "FocalNetModel",
        "FocalNetConfig",
        dict(
            image_size=32,
            embed_dim=8,
            hidden_sizes=[8, 16],
            depths=[2, 2],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
            mlp_ratio=2.0,
            use_layerscale=True,
        ),
        images(32),
    ),
    glpn=Family("GLPNModel", "GLPNConfig", dict(PYRAMID, sr_ratios=[2, 1]), images(32)),
    grounding_dino=Family(
        "GroundingDinoModel",
        "GroundingDinoConfig",
        GROUNDING,
        lambda: dict(images(32)(), input_ids=tokens()),
        rate="fusion_droppath",
    ),
    hiera=Family(
        "HieraModel",
        "HieraConfig",
        dict(
            embed_dim=8,
            image_size=[32, 32],
            depths=[2, 2],
            num_heads=[1, 2],
            num_query_pool=1,
            masked_unit_size=[2, 2],
            masked_unit_attention=[True, False],
            mlp_ratio=2.0,
        ),
        images(32),
    ),
    maskformer=Family(
        "models.maskformer.modeling_maskformer_swin.MaskFormerSwinModel", "MaskFormerSwinConfig", SWIN, images(32)
    ),
    mgp_str=Family(
        "MgpstrModel",
        "MgpstrConfig",
        dict(
            image_size=[8, 16],
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            mlp_ratio=2.0,
            max_token_length=4,
        ),
        images(16, height=8),
    ),
    mm_grounding_dino=Family(
        "MMGroundingDinoModel",
        "MMGroundingDinoConfig",
        GROUNDING,
        lambda: dict(images(32)(), input_ids=tokens()),
        rate="fusion_droppath",
    ),
    pixio=Family("PixioModel", "PixioConfig", DINO, images()),
    poolformer=Family("PoolFormerModel", "PoolFormerConfig", dict(PYRAMID, padding=[2, 1], mlp_ratio=2.0), images(32)),
    pvt=Family(
        "PvtModel",
        "PvtConfig",
        dict(PYRAMID, image_size=32, patch_sizes=[4, 2], sequence_reduction_ratios=[2, 1]),
        images(32),
    ),
    pvt_v2=Family("PvtV2Model", "PvtV2Config", dict(PYRAMID, image_size=32, sr_ratios=[2, 1]), images(32)),
    qianfan_ocr=Family(
        "QianfanOCRVisionModel",
        "QianfanOCRVisionConfig",
        dict(VIT, intermediate_size=32, image_size=(16, 16), patch_size=(8, 8)),
        images(),
    ),
    radio=Family("RadioModel", "RadioConfig", dict(DINO, mlp_ratio=2.0, max_img_size=32), images()),
    rf_detr=Family(
        "models.rf_detr.modeling_rf_detr.RfDetrDinov2Backbone",
        "models.rf_detr.configuration_rf_detr.RfDetrDinov2Config",
        dict(DINO, image_size=32, num_windows=2, out_features=["stage2", "stage3"]),
        images(32),
    ),
    sapiens2=Family(
        "Sapiens2Model",
        "Sapiens2Config",
        dict(
            VIT,
            intermediate_size=32,
            num_register_tokens=2,
            num_key_value_attention_heads=1,
            num_first_full_attention_layers=1,
            num_last_full_attention_layers=1,
        ),
        images(),
    ),
    segformer=Family("SegformerModel", "SegformerConfig", dict(PYRAMID, sr_ratios=[2, 1]), images(32)),
    seggpt=Family(
        "SegGptModel",
        "SegGptConfig",
        dict(
            VIT,
            image_size=[32, 16],
            mlp_dim=32,
            pretrain_image_size=16,
            merge_index=0,
            intermediate_hidden_state_indices=[1, 2],
        ),
        pairs,
    ),
    swiftformer=Family(
        "SwiftFormerModel",
        "SwiftFormerConfig",
        dict(depths=[1, 2], embed_dims=[8, 16], mlp_ratio=2, downsamples=[True, True], layer_scale_init_value=1.0),
        images(32),
    ),
    swin=Family("SwinModel", "SwinConfig", SWIN, images(32)),
    swin2sr=Family(
        "Swin2SRModel",
        "Swin2SRConfig",
        dict(SWIN, image_size=8, patch_size=1),
        images(8),
        rate=None,  # its stages pass no rate on
    ),
    swinv2=Family("Swinv2Model", "Swinv2Config", dict(SWIN, pretrained_window_sizes=[0, 0]), images(32)),
    timesformer=Family(
        "TimesformerModel",
        "TimesformerConfig",
        dict(VIT, intermediate_size=32, num_frames=3),
        videos("pixel_values", 3),
        rate=None,  # must be an int
    ),
    tipsv2=Family("Tipsv2VisionModel", "Tipsv2VisionConfig", DINO, images()),
    videomt=Family(
        "VideomtForUniversalSegmentation",
        "VideomtConfig",
        dict(DINO, num_blocks=1, num_queries=4, num_labels=3),
        videos("pixel_values_videos", 2),
    ),
    vitdet=Family(
        "VitDetModel",
        "VitDetConfig",
        dict(
            DINO,
            image_size=32,
            pretrain_image_size=32,
            window_size=2,
            window_block_indices=[0, 1],
            residual_block_indices=[1],
            use_relative_position_embeddings=True,
        ),
        images(32),
    ),
    vjepa2=Family(
        "VJEPA2Model",
        "VJEPA2Config",
        dict(
            crop_size=16,
            patch_size=8,
            frames_per_clip=4,
            hidden_size=24,
            num_attention_heads=2,
            num_hidden_layers=3,
            mlp_ratio=2.0,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=2,
            pred_mlp_ratio=2.0,
            pred_num_mask_tokens=2,
        ),
        videos("pixel_values_videos", 4),
    ),
    x_clip=Family(
        "XCLIPVisionModel",
        "XCLIPVisionConfig",
        dict(
            VIT,
            intermediate_size=32,
            num_frames=3,
            mit_hidden_size=16,
            mit_intermediate_size=32,
            mit_num_attention_heads=2,
        ),
        lambda: dict(pixel_values=torch.randn(BATCH * 3, 3, 16, 16)),  # all frames of a video are rows
    ),
)


def tiny(name: str, rate: float = 0.5) -> tuple[nn.Module, dict[str, Tensor]]:
    """A family's model in training mode, and the keyword arguments of a forward pass.

    The rate is that of the last layer, where the family's rate grows with the depth.
    """
    family = FAMILIES[name]
    torch.manual_seed(0)
    options = family.options if family.rate is None else {**family.options, family.rate: rate}
    model = _named(family.model)(_named(family.config)(**options)).train()
    if family.rate is None:
        _set_rate(model, rate)
    return model, family.inputs()


def _named(name: str) -> Any:
    """A class that is in transformers itself or, with dots, in a module of it."""
    value: Any = transformers
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _set_rate(model: nn.Module, rate: float) -> None:
    """Give every block of a model a drop path with this rate."""
    for block in list(model.modules()):
        old = getattr(block, "drop_path", None)
        if isinstance(old, nn.Module):
            classes = vars(sys.modules[type(block).__module__])
            block.drop_path = next(cls for name, cls in classes.items() if name.endswith("DropPath"))(rate)


def families() -> set[str]:
    """The families with a drop path's class, as found in the source of transformers."""
    folder = Path(transformers.__file__).parent / "models"
    files = folder.glob("*/modeling_*.py")
    return {file.parent.name for file in files if re.search(r"^class \w*DropPath\b", file.read_text(), re.MULTILINE)}
