"""Packages of others whose models have drop paths, compared with their conversions: python tests/packages.py [NAME ...]

Not a part of the test suite, since it downloads these packages. Each is installed in a temporary folder of its own,
pinned and without dependencies such as PyTorch, torchvision and timm, which are those of the environment. A line is
printed for each of its models; the exit status is 1 if one of them differs from its conversion.
"""

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from in_folder import main
from torch import Tensor, nn

Models = Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]
BATCH = 5


class Package(NamedTuple):
    requirements: str  # the package itself first
    models: Callable[[], Models]


def images(*size: int, channels: int = 3) -> tuple[Tensor]:
    return (torch.randn(BATCH, channels, *size),)


def hiera() -> Models:
    from hiera import Hiera

    options = dict(embed_dim=8, stages=(1, 2), q_pool=1, mask_unit_size=(2, 2), mask_unit_attn=(True, False))
    yield (
        "Hiera",
        Hiera(input_size=(32, 32), num_classes=4, drop_path_rate=0.5, head_init_scale=1.0, **options),
        images(32, 32),
    )


def fastervit() -> Models:
    from fastervit.models.faster_vit import FasterViT

    model = FasterViT(
        dim=8,
        in_dim=8,
        depths=[1, 2, 2, 2],
        window_size=[7, 7, 2, 2],
        ct_size=1,
        mlp_ratio=2,
        num_heads=[1, 1, 2, 2],
        resolution=64,
        drop_path_rate=0.5,
        num_classes=4,
        layer_scale=1.0,
        hat=[False, False, True, False],
    )
    yield "FasterViT", model, images(64, 64)


def segmentation_models_pytorch() -> Models:
    from segmentation_models_pytorch.encoders.mix_transformer import MixVisionTransformerEncoder

    encoder = MixVisionTransformerEncoder(
        out_channels=[3, 0, 8, 16, 24, 32],
        patch_size=4,
        embed_dims=[8, 16, 24, 32],
        num_heads=[1, 2, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        depths=[1, 1, 2, 1],
        drop_path_rate=0.5,
    )
    yield "MixVisionTransformer", encoder, images(64, 64)


def open_clip() -> Models:
    from open_clip.timm_model import TimmModel

    model = TimmModel("test_vit", embed_dim=8, image_size=32, proj="linear", drop_path=0.5)
    yield "TimmModel", model, images(32, 32)


def monai() -> Models:
    from monai.networks.nets.swin_unetr import SwinTransformer

    swin = dict(
        depths=(1, 1, 1, 2), num_heads=(1, 1, 2, 2), patch_size=(2, 2), embed_dim=8, window_size=(2, 2), in_chans=1
    )
    for version in (False, True):
        model = SwinTransformer(**swin, drop_path_rate=0.5, spatial_dims=2, use_v2=version)
        yield f"SwinTransformer v{1 + version}", model, images(32, 32, channels=1)


def kornia() -> Models:
    from kornia.feature.dedode.transformer.layers.block import Block
    from kornia.models.tiny_vit import TinyViT

    tiny = dict(embed_dims=[8, 16, 16, 16], depths=[1, 1, 2, 1], num_heads=[2, 2, 2, 2], window_sizes=[4, 4, 4, 2])
    yield "TinyViT", TinyViT(64, num_classes=4, drop_path_rate=0.5, **tiny), images(64, 64)
    # Above a rate of 0.1, these blocks drop a fixed number of samples by themselves, and do not call their drop paths.
    blocks = nn.Sequential(*(Block(16, 2, mlp_ratio=2, drop_path=0.1, init_values=1.0) for _ in range(2)))
    yield "DeDoDe", blocks, (torch.randn(BATCH, 6, 16),)


def timm_3d() -> Models:
    import timm_3d

    for name, options in (
        ("convnext_atto", dict(depths=(1, 1, 1, 2), dims=(8, 8, 16, 16))),
        ("maxvit_tiny_tf_224", dict(img_size=(32, 32, 32), depths=(1, 2), embed_dim=(32, 32), stem_width=8)),
    ):
        model = timm_3d.create_model(name, num_classes=4, drop_path_rate=0.5, **options)
        yield name, model, images(32, 32, 32)


def lightly() -> Models:
    import timm
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
    from lightly.models.utils import add_stochastic_depth_to_blocks, update_drop_path_rate
    from torchvision.models import VisionTransformer

    vit = timm.create_model("test_vit", img_size=32, num_classes=4)
    update_drop_path_rate(vit, 0.5, mode="uniform")
    yield "MaskedVisionTransformerTIMM", MaskedVisionTransformerTIMM(vit), images(32, 32)
    # Its drop paths are inside of Sequentials, behind the layers that were there.
    vit = VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)
    add_stochastic_depth_to_blocks(vit, prob=0.5)
    yield "torchvision's ViT", vit, images(32, 32)


def dynamic_network_architectures() -> Models:
    from dynamic_network_architectures.architectures.dinov2_eva import EvaBlock
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder

    norm = dict(norm_op=nn.InstanceNorm2d, norm_op_kwargs=dict(affine=True))
    options = dict(norm, conv_bias=True, nonlin=nn.LeakyReLU, stochastic_depth_p=0.5, return_skips=True)
    encoder = ResidualEncoder(1, 2, [8, 16], nn.Conv2d, [3, 3], [1, 2], [2, 2], **options)
    yield "ResidualEncoder", encoder, images(16, 16, channels=1)
    blocks = (EvaBlock(16, 2, mlp_ratio=2.0, drop_path=0.5, num_prefix_tokens=1) for _ in range(2))
    yield "EvaBlock", nn.Sequential(*blocks), (torch.randn(BATCH, 6, 16),)


def spandrel() -> Models:
    from spandrel.architectures.HAT import HAT
    from spandrel.architectures.SwinIR import SwinIR

    options = dict(img_size=8, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=4, mlp_ratio=2.0)
    yield "SwinIR", SwinIR(drop_path_rate=0.5, **options), images(8, 8)
    yield "HAT", HAT(drop_path_rate=0.5, squeeze_factor=4, **options), images(8, 8)


def deepinv() -> Models:
    from deepinv.models import SCUNet, SwinIR

    options = dict(embed_dim=12, depths=(2, 2), num_heads=(2, 2), window_size=4, drop_path_rate=0.5, pretrained=None)
    yield "SwinIR", SwinIR(img_size=8, upsampler="", **options), images(8, 8)
    model = SCUNet(config=[1, 1, 1, 1, 1, 1, 2], dim=64, drop_path_rate=0.5, input_resolution=64, pretrained=None)
    yield "SCUNet", model, images(64, 64)


def x_metaformer() -> Models:
    from x_metaformer import CAFormer, ConvFormer

    for cls in (CAFormer, ConvFormer):
        model = cls(in_channels=3, depths=(1, 2), dims=(16, 16), drop_path_rate=0.5)
        yield cls.__name__, model, images(16, 16)


def sam2() -> Models:
    from sam2.modeling.backbones.hieradet import Hiera

    options = dict(embed_dim=8, stages=(1, 2, 1), q_pool=1, window_spec=(4, 2, 2), global_att_blocks=(2,))
    yield "Hiera", Hiera(num_heads=1, drop_path_rate=0.5, **options), images(32, 32)


EINOPS = "einops==0.8.2"
PACKAGES = {
    "hiera-transformer": Package("hiera-transformer==0.1.4", hiera),
    "fastervit": Package("fastervit==1.0.0", fastervit),
    "segmentation-models-pytorch": Package("segmentation-models-pytorch==0.6.0", segmentation_models_pytorch),
    "open-clip-torch": Package("open-clip-torch==3.3.0 ftfy==6.3.1 wcwidth==0.9.4 regex==2026.11.19", open_clip),
    "monai": Package(f"monai==1.6.1 {EINOPS}", monai),
    "kornia": Package("kornia==0.9.0 kornia-rs==0.2.0", kornia),
    "timm-3d": Package("timm-3d==1.0.1", timm_3d),
    "lightly": Package("lightly==1.6.0", lightly),
    "dynamic-network-architectures": Package(
        f"dynamic-network-architectures==0.4.4 {EINOPS}", dynamic_network_architectures
    ),
    "spandrel": Package(f"spandrel==0.4.2 {EINOPS}", spandrel),
    "deepinv": Package(
        "deepinv==0.5.0 requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3 certifi idna"
        f" natsort==8.4.0 h5py==3.16.0 {EINOPS}",
        deepinv,
    ),
    "x-metaformer": Package(f"x-metaformer==0.3.1 {EINOPS}", x_metaformer),
    "sam2": Package(
        "sam2==1.1.0 hydra-core==1.3.8 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 iopath==0.1.10"
        " portalocker==4.4.2",
        sam2,
    ),
}


def compare_here(name: str) -> bool:
    """Compare the models of a package that is installed; print a line for each and return whether all agree."""
    from same_samples import Comparison  # slow to import, and the process that only starts others does not need it

    torch.manual_seed(0)
    agree = True
    for model_name, model, inputs in PACKAGES[name].models():
        comparison = Comparison(model, inputs, "row")
        results = {kept: comparison.run(kept) for kept in ("some", "none")}
        some = results["some"]
        state = [f"{kept} kept: {result.message}" for kept, result in results.items() if not result.ok] or ["ok"]
        agree &= state == ["ok"]
        versions = f"{name} {importlib.metadata.version(name)}, {model_name}"
        print(f"{versions}: {some.drop_path_calls} drop path calls, {some.gates} gates, {'; '.join(state)}", flush=True)
        if some.left:
            print(f"    left: {' '.join(some.left)}. {some.message}", flush=True)
    return agree


if __name__ == "__main__":
    requirements = {name: each.requirements for name, each in PACKAGES.items()}
    sys.exit(main(__file__, __doc__.splitlines()[0], requirements, compare_here))
