"""`set_drop_path` gives every family the probabilities that its own library gives it."""

import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath
from timm_blocks import EXAMPLES, one_thread
from torch import nn
from torchvision.ops import StochasticDepth

import timm_sd
from timm_sd.skip.places import WithoutWeights
from timm_sd.skip.rates import set_drop_path

# With the arguments of `EXAMPLES`, they have other blocks than by default, and these do not follow a simple rule.
OTHER_BLOCKS = """
    test_byobnet cait_xxs24_224 crossvit_tiny_240 csatv2 cspresnet50 davit_tiny efficientformerv2_s0
    eva_giant_patch14_224 iformer_t iformer_s lowformer_b0 maxvit_nano_rw_256 mobilenetv5_base
    naflexvit_base_patch16_map nextvit_small resnetv2_50d swiftformer_xs xcit_nano_12_p16_224
""".split()
VIT = dict(img_size=32, depth=5, embed_dim=32, num_heads=2)
# The default rates of torchvision's families. Not all of them take another one.
TORCHVISION = dict(
    swin_t=0.2, swin_v2_t=0.2, convnext_tiny=0.1, efficientnet_b0=0.2, efficientnet_v2_s=0.2, maxvit_t=0.2,
    mvit_v1_b=0.2, mvit_v2_s=0.2, swin3d_t=0.1,
)  # fmt: skip


def create(name, rate, **kwargs):
    with torch.device("meta"), WithoutWeights():
        return timm.create_model(name, drop_path_rate=rate, **copy.deepcopy(kwargs))


def rates(model):
    """The probabilities of the drop paths that drop anything, by name."""
    drop_paths = [(n, m) for n, m in model.named_modules() if isinstance(m, (DropPath, StochasticDepth))]
    found = {name: m.drop_prob if isinstance(m, DropPath) else m.p for name, m in drop_paths}
    return {name: p for name, p in found.items() if p}


def by_block(model):
    return [[round(m.drop_prob, 6) for m in block.modules() if isinstance(m, DropPath)] for block in model.blocks]


def close(own):
    return pytest.approx(own, rel=1e-6)  # timm rounds to float32


@pytest.mark.parametrize("name", EXAMPLES)
def test_linear_is_timms_own(name):
    arguments = {} if name in OTHER_BLOCKS else EXAMPLES[name]
    model, own = create(name, 0.0, **arguments), create(name, 0.4, **arguments)
    assert set_drop_path(model, 0.4) is model
    assert rates(model) == close(rates(own))
    assert any(rates(own).values())
    set_drop_path(own, 0.1)
    set_drop_path(model, 0.1)
    assert rates(model) == close(rates(own))


@pytest.mark.parametrize("name", ["davit_tiny", "xcit_nano_12_p16_224", "mobilenetv5_base"])
def test_unknown_places_are_refused(name):
    model = create(name, 0.0, **EXAMPLES[name])
    with pytest.raises(ValueError, match="no known places for them: create it with the rate"):
        set_drop_path(model, 0.4)
    assert not rates(model)


def test_an_unknown_schedule_is_refused_but_rates_can_be_given():
    model = create("davit_tiny", 0.4, **EXAMPLES["davit_tiny"])
    before = rates(model)
    with pytest.raises(ValueError, match=r"how DaVit spreads the rate is not known.* create it with drop_path_rate="):
        set_drop_path(model, 0.4)
    assert rates(model) == before
    set_drop_path(model, 0.2, "uniform")
    assert rates(model) == dict.fromkeys(before, 0.2)


@pytest.mark.parametrize("name", TORCHVISION)
def test_linear_is_torchvisions_own(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    own = rates(model)
    set_drop_path(model, 0.0)
    assert not rates(model)
    set_drop_path(model, TORCHVISION[name])
    assert rates(model) == close(own)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2)])
@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "efficientnet_b0", "mobilenetv4_conv_small"])
def test_linear_is_timms_own_in_feature_extractors(name, indices):
    arguments = dict(features_only=True, out_indices=indices)
    model, own = create(name, 0.0, **arguments), create(name, 0.4, **arguments)
    set_drop_path(model, 0.4)
    assert rates(model) == close(rates(own))


def test_schedules():
    model = create("test_vit", 0.0, **VIT)
    depths = np.arange(5) / 4
    for schedule, expected in dict(
        linear=0.4 * depths, quadratic=0.4 * depths**2, exponential=1 - 0.6**depths, uniform=np.full(5, 0.4)
    ).items():
        set_drop_path(model, 0.4, schedule)
        first = 2 if schedule == "uniform" else 0  # the first block needs none until then
        assert by_block(model) == [[round(p, 6)] * (2 if b else first) for b, p in enumerate(expected.tolist())]
    set_drop_path(model, 0.4)
    assert by_block(model) == [[round(p, 6)] * 2 for p in (0.4 * depths).tolist()]


def test_schedules_follow_the_familys_own():
    model = create("mixer_s32_224", 0.0)  # the same rate everywhere
    for schedule in "linear", "quadratic", "exponential", "uniform":
        set_drop_path(model, 0.4, schedule)
        assert by_block(model) == [[0.4]] * 8
    model = create("efficientnet_b0", 0.0)  # block b of 16 has b / 16 of the rate
    set_drop_path(model, 0.4, "exponential")
    assert max(rates(model).values()) == pytest.approx(1 - 0.6 ** (15 / 16))


@pytest.mark.parametrize("as_given", [list, np.array, torch.tensor])
def test_probabilities_for_each_block(as_given):
    model = create("test_vit", 0.0, **VIT)
    probabilities = [0.3, 0.0, 0.1, 0.0, 0.2]
    set_drop_path(model, 0.4, as_given(probabilities))
    assert by_block(model) == [[p, p] for p in probabilities]


def test_a_block_made_of_blocks_counts_as_one():
    model = create("test_maxvit", 0.0)
    set_drop_path(model, 0.0, [0.1, 0.2, 0.3, 0.4])
    of_blocks = [{m.drop_prob for m in stage.modules() if isinstance(m, DropPath)} for stage in model.stages]
    assert of_blocks == [{0.1}, {0.2}, {0.3}, {0.4}]


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_blocks_without_a_shortcut_get_no_drop_path(name):
    model, own = create(name, 0.0), create(name, 0.4)
    set_drop_path(model, 0.4, "uniform")
    assert rates(model) == dict.fromkeys(rates(own), 0.4)


def small_vit(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=4, **VIT, **kwargs)


@one_thread()
def test_function_and_state_dict_are_unchanged():
    model = small_vit().eval()
    x, keys = torch.randn(4, 3, 32, 32), list(model.state_dict())
    before = model(x)
    set_drop_path(model, 0.9, "uniform")
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model.train()(x), before)


@one_thread()
def test_trains_as_if_created_with_the_rate():
    x, outputs = torch.randn(8, 3, 32, 32), []
    for model in set_drop_path(small_vit(), 0.5), small_vit(drop_path_rate=0.5):
        torch.manual_seed(1)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("skips", [False, True])
@one_thread()
def test_a_rate_per_step(skips):
    model = set_drop_path(small_vit(), 0.0)
    drop_paths = [m for m in model.modules() if isinstance(m, DropPath)]
    assert len(drop_paths) == 8
    if skips:
        timm_sd.skip_drop_path(model, strict=True)
    x = torch.randn(64, 3, 32, 32)
    state = torch.get_rng_state()
    for step in [0, 1, 4, 0, 2]:
        assert set_drop_path(model, 0.2 * step) is model
        assert by_block(model) == [[], *([round(0.2 * step * depth / 4, 6)] * 2 for depth in (1, 2, 3, 4))]
        assert torch.equal(torch.get_rng_state(), state)
    assert [m for m in model.modules() if isinstance(m, DropPath)] == drop_paths
    plain = model.eval()(x)
    for rate in 0.0, 0.99:
        changed = (set_drop_path(model.train(), rate, "linear")(x) - plain).abs().amax(1) > 1e-5
        assert changed.float().mean().item() == pytest.approx(float(rate > 0), abs=0.05)
    if skips:
        assert {gate.survival for gate in timm_sd.gates(model)} == {1 - 0.99 * depth / 4 for depth in (1, 2, 3, 4)}


def test_a_converted_model_cannot_get_more_drop_paths():
    model = timm_sd.skip_drop_path(set_drop_path(small_vit(), 0.5))
    before = rates(model)
    with pytest.raises(ValueError, match="call set_drop_path before skip_drop_path"):
        set_drop_path(model, 0.5, "uniform")  # the first block has none
    assert rates(model) == before


def test_wrapped_models():
    model, own = create("mixer_s32_224", 0.0), create("mixer_s32_224", 0.4)
    set_drop_path(torch.compile(nn.Sequential(model, nn.Flatten())), 0.4)
    assert rates(model) == close(rates(own))
    towers = nn.ModuleList(create("test_vit", 0.0, **VIT) for _ in range(2))
    set_drop_path(towers, 0.4)
    assert by_block(towers[0]) == by_block(towers[1]) == [[], [0.1] * 2, [0.2] * 2, [0.3] * 2, [0.4] * 2]


def test_other_networks():
    class Block(nn.Module):
        def __init__(self, drop_path):
            super().__init__()
            self.drop_path = drop_path

    class Net(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.blocks = nn.ModuleList(Block(make()) for _ in range(5))

    for make in DropPath, partial(StochasticDepth, 0.2, "row"):
        model = set_drop_path(Net(make), 0.4)
        assert list(rates(model).values()) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="Net has no drop paths and no known places for them"):
        set_drop_path(Net(nn.Identity), 0.4, "uniform")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0,), r"rate=1.0, but it must lie in \[0, 1\)"),
        ((-0.1,), "rate=-0.1"),
        ((float("nan"),), "rate=nan"),
        ((0.4, "cosine"), "schedule='cosine', but it must be one of 'linear', 'uniform'"),
        ((0.4, 3), "schedule=3"),
        ((0.4, [0.1] * 4), "4 drop probabilities, but there are 5 blocks with drop paths"),
        ((0.4, [0.1] * 4 + [1.0]), r"schedule\[4\]=1.0, but"),
        ((0.4, [float("nan")] * 5), r"schedule\[0\]=nan"),
    ],
)
def test_wrong_arguments(arguments, message):
    model = create("test_vit", 0.2, **VIT)
    before = rates(model)
    with pytest.raises(ValueError, match=message) as error:
        set_drop_path(model, *arguments)
    assert "\n" not in str(error.value)
    assert rates(model) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg11", "VGG has no drop paths and no known places for them"),
        ("ghostnet_050", "GhostNet cannot be created with a drop path rate"),
        ("cifar_resnet20", "CifarResNet has gates, not drop paths: create it with the rate"),
    ],
)
def test_models_without_places(name, message):
    with torch.device("meta"), WithoutWeights():
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=message) as error:
        set_drop_path(model, 0.4)
    assert "\n" not in str(error.value)
