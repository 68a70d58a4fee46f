"""`set_drop_path` gives every family of transformers the probabilities that its own constructor gives it."""

import re
from pathlib import Path

import pytest
import torch

import timm_sd
from timm_sd.skip.drop_paths import drop_probability, kind_of
from timm_sd.skip.places import WithoutWeights
from timm_sd.skip.rates import set_drop_path

transformers = pytest.importorskip("transformers")

MODELS = """
    BeitModel BitModel ClapAudioModel ConvNextModel ConvNextV2Model Data2VecVisionModel DINOv3ConvNextModel
    DINOv3ViTModel Dinov2Model Dinov2WithRegistersModel DonutSwinModel EomtDinov3ForUniversalSegmentation
    EomtForUniversalSegmentation Florence2VisionBackbone FocalNetModel GLPNModel HieraModel MaskFormerSwinModel
    MgpstrModel PixioModel PoolFormerModel PvtModel PvtV2Model QianfanOCRVisionModel RadioModel RfDetrDinov2Backbone
    Sapiens2Model SegGptModel SegformerModel SwiftFormerModel SwinModel Swinv2Model TimesformerModel Tipsv2VisionModel
    VJEPA2Model VideomtForUniversalSegmentation VitDetModel XCLIPVisionModel
""".split()
REFUSED = dict(
    CvtModel="CvtModel has a rate for each stage: set them in its config",
    LevitModel="LevitModel has no drop paths",  # its blocks draw by themselves
    Swin2SRModel="Swin2SRModel has no drop paths and no known places for them",  # its constructor ignores the rate
)
UNTESTED = {"DinatModel"}  # needs natten


def create(name, rate=None):
    cls = getattr(transformers, name)
    config = cls.config_class()
    if rate is not None:
        vars(config)["drop_path_rate"] = rate  # TimeSformer's config would accept only an int
    with torch.device("meta"), WithoutWeights():
        return cls(config)


def rates(model):
    """The probabilities of the drop paths that drop anything, by name."""
    kinds = [(name, module, kind_of(module)) for name, module in model.named_modules()]
    found = {name: drop_probability(module, kind) for name, module, kind in kinds if kind}
    return {name: p for name, p in found.items() if p}


@pytest.mark.parametrize("name", MODELS)
def test_linear_is_the_familys_own(name):
    model, own = create(name, 0.0), rates(create(name, 0.4))
    assert not rates(model)
    assert own
    assert set_drop_path(model, 0.4) is model
    assert rates(model) == pytest.approx(own, rel=1e-6)
    assert model.config.drop_path_rate == 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        set_drop_path(create(name), 0.4)


def test_every_family_is_here():
    families = {
        path.parent.name
        for path in (Path(transformers.__file__).parent / "models").glob("*/configuration_*.py")
        if re.search(r"^    drop_path_rate", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    tested = [getattr(transformers, name) for name in {*MODELS, *REFUSED, *UNTESTED}]
    assert {cls.__module__.split(".")[2] for cls in tested} == families


def test_within_another_model():
    model = create("GroundingDinoModel")  # has drop paths of its own, too, whose rate has another name
    before = {name: p for name, p in rates(model).items() if "backbone" not in name}
    set_drop_path(model, 0.4)
    own = rates(create("SwinModel", 0.4))
    backbone = {name: p for name, p in rates(model).items() if "backbone" in name}
    assert list(backbone.values()) == pytest.approx(list(own.values()))
    assert {name: p for name, p in rates(model).items() if "backbone" not in name} == before


def test_existing_drop_paths_keep_their_class():
    model = create("MgpstrModel", 0.1)
    set_drop_path(model, 0.3, "uniform")
    names = {type(model.get_submodule(name)).__name__ for name in rates(model)}
    assert names == {"MgpStrDropPath"}
    assert list(rates(model).values()) == [0.3] * 12


@pytest.mark.parametrize("skips", [False, True])
def test_a_rate_per_step(skips):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28)
    model = set_drop_path(transformers.Dinov2Model(config), 0.0).train()
    if skips:
        timm_sd.skip_drop_path(model, strict=True)
    images = torch.randn(64, 3, 28, 28)
    for rate in 0.0, 0.2, 0.9, 0.0:
        set_drop_path(model, rate)
        assert list(rates(model).values()) == ([rate] * 3 if rate else [])
        model(images).last_hidden_state.sum().backward()
