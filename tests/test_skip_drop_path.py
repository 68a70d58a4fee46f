"""Converted timm models against timm's own DropPath with the same samples dropped."""

import copy
import random
import re
import warnings
from functools import cache
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import timm_blocks
import torch
from forced import assert_drops_as_plain, check, drop_path_calls, forced, gated_calls
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import fx, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from timm_sd import draw_gates, gates, restore_drop_path, skip_drop_path, use_gates

ROOT = Path(__file__).parents[1]
BATCH_NORM = nn.modules.batchnorm._BatchNorm
MODES = "row", "count", "batch"


def warned(model, *args, **kwargs):
    """What a conversion warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert skip_drop_path(model, *args, **kwargs) is model
    return [str(warning.message) for warning in caught]


# Every block of timm

# Classes with a call of a DropPath that is not skipped, or not all of it: how many calls have a gate, and the reason
LEFT = {
    "coat.ParallelBlock": (3, 6, "nothing is computed for it alone"),
    "efficientvim.EfficientViMBlock": (3, 4, "nothing is computed for it alone"),
    "resnest.ResNestBottleneck": (0, 1, "ResNestBottleneck"),
    "vision_transformer.ParallelThingsBlock": (2, 4, "it is not called itself"),  # with a mask
    "vision_transformer_sam.Block": (2, 2, "not norm1"),
}


class Calls(nn.Module):
    """A model that calls its only block with the arguments that it gets."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, args, kwargs):
        return self.block(*args, **kwargs)


class Conversion(NamedTuple):
    """A block in float64 and its conversion, the rows in each call of its drop paths, and what is left."""

    name: str
    plain: nn.Module
    converted: nn.Module
    arguments: tuple
    calls: dict[tuple[str, int], int]
    messages: list[str]

    @property
    def batch_norms(self):
        return [
            module
            for model in (self.plain, self.converted)
            for module in model.modules()
            if isinstance(module, BATCH_NORM)
        ]


def name_of(cls):
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def doubled(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@cache
@timm_blocks.one_thread()
def conversions(name):
    """Each kind of call of a block in a model."""
    found = []
    for block, args, kwargs in timm_blocks.block_calls(name):
        plain, arguments = Calls(copy.deepcopy(block)).double().train(), tree_map(doubled, (args, kwargs))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # layer scales and last normalizations often start at zero
            for parameter in plain.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        calls, converted = drop_path_calls(plain, *arguments), copy.deepcopy(plain)
        messages = warned(converted, "row", arguments, allow_batch_norm=True)
        found.append(Conversion(name_of(type(block)), plain, converted, arguments, calls, messages))
    return found


@pytest.mark.parametrize("name", timm_blocks.EXAMPLES)
@timm_blocks.one_thread()
def test_blocks_compute_what_timms_do(name):
    """Outputs and gradients of every kind of block, in every mode."""
    for block in conversions(name):
        number, total, reason = LEFT[block.name] if block.messages else (len(block.calls), len(block.calls), "")
        assert (len(gates(block.converted)), len(block.calls)) == (number, total), block.name
        assert all(reason in message for message in block.messages)
        for mode in MODES if number else ():
            for gate in gates(block.converted):
                gate.mode = mode  # as converting again does, which takes longer
            for norm in block.batch_norms:
                norm.train(mode == "batch")  # otherwise, it would see other samples
            check(block.plain, block.converted, *block.arguments, rows=block.calls)


def test_every_block_class_of_timm_is_covered():
    classes = {name_of(cls) for cls in timm_blocks.all_block_classes() if cls.__name__ not in timm_blocks.NOT_BLOCKS}
    blocks = [block for name in timm_blocks.EXAMPLES for block in conversions(name)]
    tried, left = {block.name for block in blocks}, {block.name for block in blocks if block.messages}
    assert classes <= tried, classes - tried
    assert left == set(LEFT)
    page = (ROOT / "docs" / "any-timm-model.md").read_text()
    assert f"{len(tried - left)} of the {len(tried)} block classes" in page
    assert all(f"`{name}`" in page for name in LEFT)


# A model of each family in README.md's table
FAMILIES = {
    "ViT": "test_vit",
    "DeiT": "deit_tiny_distilled_patch16_224",
    "BEiT": "beit_base_patch16_224",
    "EVA": "eva02_tiny_patch14_224",
    "CaiT": "cait_xxs24_224",
    "Swin": "swin_tiny_patch4_window7_224",
    "Twins": "twins_svt_small",
    "PVT v2": "pvt_v2_b0",
    "GCViT": "gcvit_xxtiny",
    "Hiera": "hiera_tiny_224",
    "DaViT": "davit_tiny",
    "FocalNet": "focalnet_tiny_srf",
    "ConvNeXt": "convnext_atto",
    "MetaFormer": "caformer_s18",
    "MLP-Mixer": "mixer_s32_224",
    "MViT v2": "mvitv2_tiny",
    "ResNet": "resnet18",
    "ResNetV2": "resnetv2_18",
    "RegNet": "regnetx_002",
    "Res2Net": "res2net50_26w_4s",
    "CSPNet": "cspresnet50",
    "EfficientNet": "efficientnet_b0",
    "MobileNet": "mobilenetv3_small_050",
    "XCiT": "xcit_nano_12_p16_224",
    "MaxViT": "test_maxvit",
    "CoAtNet": "test_coatnet",
    "TinyViT": "tiny_vit_5m_224",
    "EdgeNeXt": "edgenext_xx_small",
    "NextViT": "nextvit_small",
    "RDNet": "rdnet_tiny",
    "ReXNet": "rexnet_100",
    "CoaT": "coat_tiny",
    "SAM": "samvit_base_patch16",
    "EfficientViM": "efficientvim_m1",
    "ResNeSt": "resnest14d",
}


def coverage(name):
    """What README.md says of a model: "whole", "in part" or "not yet", and its modes."""
    with torch.device("meta"):
        model = timm.create_model(name, **{"drop_path_rate": 0.5, **copy.deepcopy(timm_blocks.EXAMPLES.get(name, {}))})
    classes = {
        name_of(type(block))
        for block in model.modules()
        if any(drop_path.drop_prob for drop_path in timm_blocks.drop_paths(block)) and timm_blocks.has_sum(block)
    }
    assert classes
    blocks = [block for example in timm_blocks.EXAMPLES for block in conversions(example) if block.name in classes]
    assert {block.name for block in blocks} == classes
    if not any(gates(block.converted) for block in blocks):
        return "not yet", set()
    modes = {"batch"} if any(block.batch_norms for block in blocks) else set(MODES)
    return "in part" if any(block.messages for block in blocks) else "whole", modes


def test_readme_says_what_is_covered():
    (table,) = re.findall(r"\| models \| modes.*\n.*\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())
    listed = {}
    for names, cell in re.findall(r"\| (.*?)(?:, \.\.\.)?(?: \(.*\))? \| (.*) \|", table):
        state = next((state for state in ("in part", "not yet") if state in cell), "whole")
        listed |= dict.fromkeys(names.split(", "), (state, set(re.findall('"(row|count|batch)"', cell))))
    assert listed == {family: coverage(name) for family, name in FAMILIES.items()}


# What is computed


def small(name, **kwargs):
    torch.manual_seed(0)
    arguments = copy.deepcopy(timm_blocks.EXAMPLES.get(name, {})) | dict(drop_path_rate=0.5, num_classes=4) | kwargs
    return timm.create_model(name, **arguments).train()


def images(name, batch_size=6):
    size = timm_blocks.EXAMPLES.get(name, {}).get("img_size", 64)
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(2))


def drawn(model, batch_size, step=0):
    """Gates for `use_gates`."""
    own = gates(model)
    return draw_gates([gate.survival for gate in own], 4, step, batch_size, [gate.mode for gate in own])


# For each model, the modules of a branch that take FLOPs, by the name of the DropPath
BRANCHES = {
    "test_vit": dict(drop_path1=["attn"], drop_path2=["mlp"]),
    "swin_tiny_patch4_window7_224": dict(drop_path1=["attn"], drop_path2=["mlp"]),
    "convnext_atto": dict(drop_path=["conv_dw", "mlp"]),
    "resnet50": dict(drop_path=["conv1", "conv2", "conv3"]),
    "tinynet_e": dict(drop_path=["conv_pw", "conv_dw", "se", "conv_pwl"]),  # a small EfficientNet
}


# Branches whose code does not run without samples. It gets one that does not count.
NEVER_EMPTY = {("swin_tiny_patch4_window7_224", "drop_path1")}


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    counts = {name.partition(".")[2]: sum(per.values()) for name, per in counter.get_flop_counts().items()}
    return counter.get_total_flops(), counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BRANCHES)
def test_flops_are_those_of_the_kept_samples(name, mode):
    """In mode "batch", a ResNet's or EfficientNet's dropped branch takes none at all."""
    model, x = small(name), images(name)
    total, by_module = flops(model, x)
    skip_drop_path(model, mode, strict=True, allow_batch_norm=True)
    paths = {module: path for path, module in model.named_modules()}
    values, expected = drawn(model, len(x)), total
    for gate, value in zip(gates(model), values, strict=True):
        block, _, drop_path = paths[gate.drop_path].rpartition(".")
        branch = sum(by_module.get(f"{block}.{module}", 0) for module in BRANCHES[name][drop_path])
        kept = int(value.sum())
        computed = 2 if kept == 1 else kept  # one that does not count keeps a single row from being broadcast
        if kept == 0 and (name, drop_path) in NEVER_EMPTY:
            computed = 1
        expected -= branch * (1 - computed / len(x))
    assert 0 < expected < total
    with use_gates(model, values):
        assert flops(model, x)[0] == round(expected)


@pytest.mark.parametrize("name", ["resnet50", "tinynet_e"])
def test_batch_norms_in_a_dropped_branch_keep_their_statistics(name):
    """All others compute what they do in the plain model."""
    plain, x = small(name), images(name)
    model, before = skip_drop_path(copy.deepcopy(plain), "batch", strict=True), copy.deepcopy(plain)
    values = (torch.arange(len(gates(model))) % 2 == 0).unsqueeze(1).expand(-1, len(x))
    with forced(plain, model, values), use_gates(model, values):
        plain(x)
        model(x)
    names = {module: name for name, module in model.named_modules()}
    closed = [names[gate.drop_path].rpartition(".")[0] for gate in gates(model)[1::2]]
    dropped = set()
    for norm, module in model.named_modules():
        if isinstance(module, BATCH_NORM):
            if any(norm.startswith(f"{block}.") for block in closed) and "downsample" not in norm:
                dropped.add(norm)
            expected = (before if norm in dropped else plain).get_submodule(norm).state_dict()
            torch.testing.assert_close(dict(module.state_dict()), dict(expected))
    assert len(dropped) >= 3 * len(closed) - 1


def test_no_sample_is_computed_twice_or_in_vain():
    """The rows that reach each module of a branch, in mode "row"."""
    block = skip_drop_path(Block(8, 2, drop_path=0.5).train(), "row", strict=True)
    rows = []
    for module in block.norm1, block.attn, block.norm2, block.mlp:
        module.register_forward_hook(lambda _, args, output: rows.append((len(args[0]), len(output))))
    for kept, computed in ((0, 0), (1, 2), (2, 2), (3, 3), (5, 5), (6, 6)):
        rows.clear()
        with use_gates(block, torch.stack([torch.arange(6) < kept] * 2)):
            block(torch.randn(6, 3, 8))
        assert rows == [(computed, computed)] * 4


# Probabilities, gates and modes


@pytest.mark.parametrize(
    "name", ["test_vit", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "resnet50", "coat_tiny"]
)
def test_gates_are_listed_in_order_of_execution(name):
    model = small(name)
    warned(model)
    calls = list(drop_path_calls(restore_drop_path(copy.deepcopy(model)), images(name)))
    assert gates(model)
    assert list(gated_calls(model)) == [call for call in calls if call in gated_calls(model)]


def test_probabilities_are_read_at_every_step():
    model = skip_drop_path(small("test_vit"), "row")
    (first, *_), drop_path = gates(model), model.blocks[1].drop_path1
    assert [gate.survival for gate in gates(model)] == [0.5, 0.5]  # the first block has no drop paths
    assert first.drop_path is drop_path
    drop_path.drop_prob = 0.25
    assert first.survival == 0.75
    first.survival = 0.9
    assert drop_path.drop_prob == pytest.approx(0.1)
    for gate in gates(model):
        gate.drop_path.drop_prob = 0.0
    before = torch.get_rng_state()
    model(images("test_vit"))
    assert torch.equal(torch.get_rng_state(), before), "gates that cannot close were drawn"


def changed(block, batch_size, steps):
    """Which samples of the mini-batch a block changes, in each step."""
    torch.manual_seed(0)
    x = torch.randn(batch_size, 3, 8)
    with torch.no_grad():
        return torch.stack([(block(x) != x).flatten(1).any(1) for _ in range(steps)])


def with_one_branch(mode, rate=0.5):
    """A block of which only the first branch changes anything, and drops at this rate."""
    torch.manual_seed(0)
    block = skip_drop_path(Block(8, 2, drop_path=rate).train(), mode, strict=True)
    block.drop_path2.drop_prob = 0.0
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    return block


@pytest.mark.parametrize("p", [0.5, 0.8])
@pytest.mark.parametrize("mode", MODES)
def test_samples_are_dropped_as_often_as_drop_path_does(mode, p):
    """Each sample with probability 1 - p, and in the mode's own distribution of how many are."""
    steps, size = 600, 4
    kept = changed(with_one_branch(mode, 1 - p), size, steps)
    expected = dict(
        row=[comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)],
        count=[float(k == int(size * p + 0.5)) for k in range(size + 1)],
        batch=[1 - p, *[0] * (size - 1), p],
    )[mode]
    mean = sum(k * q for k, q in enumerate(expected)) / size
    assert kept.double().mean(0).tolist() == pytest.approx([mean] * size, abs=4 * (0.25 / steps) ** 0.5)
    frequencies = kept.sum(1).bincount(minlength=size + 1) / steps
    for k, q in enumerate(expected):
        assert frequencies[k] == pytest.approx(q, abs=4 * (q * (1 - q) / steps) ** 0.5)


def test_count_keeps_the_nearest_number_of_samples():
    """At least one, unless the probability is 0."""
    block = with_one_branch("count")
    for size, rate, kept in (
        *(
            (8, 0.1, 7),
            (5, 0.1, 5),
            (4, 0.125, 4),
            (15, 0.1, 14),
            (10, 0.95, 1),
            (3, 0.9, 1),
            (7, 0.5, 4),
            (6, 0.25, 5),
        ),
        *((1, 0.5, 1), (1, 0.9, 1), (2, 0.5, 1), (8, 1.0, 0), (1, 1.0, 0), (8, 0.0, 8)),
    ):
        block.drop_path1.drop_prob = rate
        assert set(changed(block, size, 5).sum(1).tolist()) == {kept}, (size, rate)


@pytest.mark.parametrize("mode", MODES)
def test_a_drop_probability_of_one_drops_everything(mode):
    block = skip_drop_path(Block(8, 2, drop_path=0.5).train(), mode)
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1.0
    x = torch.randn(5, 3, 8, requires_grad=True)
    y = block(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("drop_prob", [1.5, -0.5, float("nan")])
def test_an_impossible_probability_is_an_error_as_in_timm(mode, drop_prob):
    plain = Block(8, 2, drop_path=0.5).train()
    for block in plain, skip_drop_path(copy.deepcopy(plain), mode):
        block.drop_path1.drop_prob = drop_prob
        with pytest.raises(RuntimeError):
            block(torch.randn(5, 3, 8))
        block.drop_path1.drop_prob = 0.5
        block(torch.randn(5, 3, 8))


@pytest.mark.parametrize("mode", MODES)
def test_scale_by_keep_is_followed(mode):
    plain = Block(8, 2, drop_path=0.5).double().train()
    plain.drop_path1.scale_by_keep = False
    block = skip_drop_path(copy.deepcopy(plain), mode, strict=True)
    kept = torch.tensor([True, mode == "batch"] * 2)
    for _ in range(2):
        assert_drops_as_plain(plain, block, [kept, kept], torch.randn(4, 3, 8).double())
        for each in plain, block:
            each.drop_path1.scale_by_keep, each.drop_path2.scale_by_keep = True, False


@pytest.mark.parametrize("mode", MODES)
def test_a_drop_path_in_evaluation_mode_drops_nothing(mode):
    model, x = skip_drop_path(small("test_vit"), mode), images("test_vit")
    expected = model.eval()(x)
    for gate in gates(model.train()):
        gate.drop_path.eval()
    torch.testing.assert_close(model(x), expected)
    with use_gates(model, drawn(model, len(x))):
        torch.testing.assert_close(model(x), expected)


def test_inference_is_the_same_to_the_bit():
    for name in BRANCHES:
        plain, x = small(name).eval(), images(name)
        model = skip_drop_path(copy.deepcopy(plain), "batch")
        with torch.inference_mode():
            assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_and_a_single_sample(mode):
    block = skip_drop_path(Block(8, 2, drop_path=0.5).train(), mode)
    x = torch.randn(0, 3, 8, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.shape == (0, 3, 8)
    plain = restore_drop_path(copy.deepcopy(block)).double()
    block.double()
    for kept in ([True], [False]):
        if mode != "count" or kept[0]:
            assert_drops_as_plain(plain, block, [torch.tensor(kept)] * 2, torch.randn(1, 3, 8).double())


# What is refused, left or said


def test_batch_norm_is_refused_where_it_would_see_fewer_samples():
    model = small("resnet50")
    printed = repr(model)
    for mode in ("row", "count"):
        with pytest.raises(ValueError, match=r'layer\d.\d has a BatchNorm2d in its branch.*mode="batch"'):
            skip_drop_path(model, mode)
        assert repr(model) == printed, "the model was changed all the same"
    for mode in ("row", "count"):
        skip_drop_path(model, mode, allow_batch_norm=True)
        assert {gate.mode for gate in gates(model)} == {mode}
    assert {gate.mode for gate in gates(skip_drop_path(model, allow_batch_norm=True))} == {"row"}


@pytest.mark.parametrize(
    ("name", "modes", "message"),
    [
        ("resnet50", {"batch"}, "all 4 calls"),
        ("test_coatnet", {"row", "batch"}, r"\d+ of \d+ calls"),
        ("test_vit", {"row"}, None),
    ],
)
def test_auto_says_how_many_calls_have_a_gate_for_the_mini_batch(name, modes, message):
    model = small(name)
    messages = warned(model)
    assert {gate.mode for gate in gates(model)} == modes
    assert len(messages) == (message is not None)
    assert all(re.match(f"{message} .*one gate for the mini-batch", said) and "\n" not in said for said in messages)
    for mode in {"batch"} | modes - {"batch"}:
        assert not warned(small(name), mode, strict=True, allow_batch_norm=True)


def test_auto_gives_a_gate_for_the_mini_batch_where_there_is_a_batch_norm():
    model = small("test_coatnet")
    warned(model)
    names = {module: name for name, module in model.named_modules()}
    for gate in gates(model):
        block = model.get_submodule(names[gate.drop_path].rpartition(".")[0])
        assert gate.mode == ("batch" if type(block).__name__ == "MbConvBlock" else "row"), names[gate.drop_path]
    x = images("test_coatnet")
    with use_gates(model, drawn(model, len(x))):
        model(x).sum().backward()


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode='pixel', but it must be one of 'auto', 'row', 'count', 'batch'"):
        skip_drop_path(small("test_vit"), "pixel")


def test_strict():
    model = small("samvit_base_patch16")
    printed = repr(model)
    with pytest.raises(ValueError, match=r"drop_path1 of Block.*blocks\.1") as error:
        skip_drop_path(model, strict=True)
    assert "\n" not in str(error.value)
    assert repr(model) == printed
    assert not gates(model)
    (message,) = warned(model)
    assert message == str(error.value)
    assert gates(model)


class BatchDropPath(nn.Module):
    """Drops all samples or none, so it is no drop path."""

    def __init__(self, p):
        super().__init__()
        self.drop_prob = p

    def forward(self, x):
        return x * (torch.rand(()) > self.drop_prob) if self.training else x


class Residual(nn.Module):
    """The smallest block: a branch of one layer."""

    def __init__(self, drop_path=None, width=4):
        super().__init__()
        self.linear, self.drop_path = nn.Linear(width, width), drop_path or DropPath(0.5)

    def forward(self, x):
        return x + self.drop_path(self.linear(x))


class NeverCalls(Residual):
    def forward(self, x):
        return x + self.linear(x)


NOTHING_FOUND = {
    "no drop path": (
        lambda: timm.create_model("test_vit", img_size=32),
        "no drop path.*drop_path_rate=.*set_drop_path",
    ),
    "a class that only looks like one": (lambda: nn.Sequential(Residual(BatchDropPath(0.1))), "BatchDropPath"),
    "never called": (lambda: nn.Sequential(NeverCalls()), "nothing is skipped"),
    "an FX graph": (lambda: fx.symbolic_trace(nn.Sequential(Residual())), "FX graph"),
    "an FX feature extractor": (
        lambda: timm.create_model("test_convnext", drop_path_rate=0.4, features_only=True, feature_cls="fx"),
        "FX graph",
    ),
}


@pytest.mark.parametrize(("make", "message"), NOTHING_FOUND.values(), ids=NOTHING_FOUND)
def test_nothing_found_is_said(make, message):
    model = make()
    (said,) = warned(model)
    assert re.search(message, said), said
    assert "\n" not in said
    assert not gates(model)
    with pytest.raises(ValueError, match=message):
        skip_drop_path(model, strict=True)


def test_the_papers_networks_skip_by_themselves():
    model = timm.create_model("cifar_resnet20_sd")
    printed = repr(model)
    assert not warned(model, strict=True)
    assert repr(model) == printed


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = timm.create_model("test_vit", drop_path_rate=0.5)
    with pytest.raises(ValueError, match="meta device") as error:
        skip_drop_path(model)
    assert "\n" not in str(error.value)


# The example


class TwoInputs(Residual):
    """A block that noise does not tell how to call."""

    def forward(self, x, factor=None, *, shift):
        return x + self.drop_path(self.linear(x) * factor + shift)


FACTOR, SHIFT = torch.rand(4, 1), torch.rand(4)


def test_an_example_is_needed_if_noise_is_refused():
    with pytest.raises(ValueError, match=r"needs an example= \(TypeError: .*shift") as error:
        skip_drop_path(TwoInputs())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (Residual, torch.randn(4, 4)),
        (Residual, torch.randn(7, 3, 4)),
        (Residual, (torch.randn(4, 4),)),
        (Residual, dict(x=torch.randn(4, 4))),
        (TwoInputs, dict(x=torch.randn(4, 4), factor=FACTOR, shift=SHIFT)),
        (lambda: Calls(TwoInputs()), ((torch.randn(4, 4), FACTOR), dict(shift=SHIFT))),
    ],
    ids=["tensor", "tokens", "tuple", "dict", "several arguments", "nested"],
)
def test_examples(make, example):
    plain = make().double().train()
    example = tree_map(doubled, example)
    model = skip_drop_path(copy.deepcopy(plain), "row", example, strict=True)
    args, kwargs = (
        ((), example) if isinstance(example, dict) else (example if isinstance(example, tuple) else (example,), {})
    )
    size = len(torch.utils._pytree.tree_leaves(example)[0])
    for kept in ([True, False, True, True], [False] * 4):
        assert_drops_as_plain(plain, model, [torch.tensor((kept * 2)[:size])], *args, **kwargs)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(3, 4), "3 samples, but at least 4 are needed"),
        (torch.randn(4, 5), "does not run on the example.*shape"),
        (dict(y=torch.randn(4, 4)), "does not run on the example.*'y'"),
        ((torch.randn(4, 4),) * 2, "does not run on the example"),
    ],
)
def test_examples_that_do_not_work(example, message):
    model = Residual()
    printed = repr(model)
    with pytest.raises(ValueError, match=message) as error:
        skip_drop_path(model, example=example, strict=True)
    assert "\n" not in str(error.value)
    assert repr(model) == printed


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_conversion_without_gradients(context):
    plain = Block(8, 2, drop_path=0.5).double().train()
    model = copy.deepcopy(plain)
    with context():
        skip_drop_path(model, strict=True)
    check(plain, model, torch.randn(6, 3, 8).double())


class Remembers(Residual):
    """A block that changes its attributes and buffers and draws random numbers of all kinds."""

    def __init__(self):
        super().__init__()
        self.calls, self.history = 0, []
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("sum", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.history.append(random.random() + np.random.rand())
        self.sum += x.detach().sum()
        return super().forward(self.dropout(self.norm(x)))


def test_conversion_leaves_everything_as_it_was():
    model, x = nn.Sequential(Remembers(), nn.Linear(4, 4).eval()), torch.randn(4, 4)
    model[0].linear.weight.requires_grad_(False)
    model(x).sum().backward()
    block = model[0].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    skip_drop_path(model, example=x, strict=True, allow_batch_norm=True)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert (block.calls, len(block.history)) == (1, 1)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(gradients, (p.grad for p in model.parameters()), strict=True))
    assert not block.linear.weight.requires_grad
    assert [module.training for module in (model, block, block.norm, block.drop_path, model[1])] == [True, *[False] * 4]
    assert not any(gate.training for gate in gates(model))


# Changing and undoing it


@pytest.mark.parametrize("modes", [("row", "batch"), ("batch", "count"), ("count", "auto", "row")])
def test_converting_again_changes_the_mode(modes):
    plain = Block(8, 2, drop_path=0.5).double().train()
    model = copy.deepcopy(plain)
    for mode in modes:
        skip_drop_path(model, mode, strict=True)
    assert [gate.mode for gate in gates(model)] == [modes[-1]] * 2
    kept = torch.tensor([modes[-1] != "batch"] * 2 + [False] * 2)
    assert_drops_as_plain(plain, model, [kept, kept.flip(0)], torch.randn(4, 3, 8).double())
    assert repr(model) == repr(skip_drop_path(plain, modes[-1])), "traces of the first mode are left"


def traces(model):
    """All that is in a model's modules: attributes, and the number of hooks, children and buffers."""
    return [
        {key: len(value) if isinstance(value, dict) else type(value) for key, value in vars(module).items()}
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", ["test_vit", "resnet50", "samvit_base_patch16"])
def test_restoring_leaves_no_trace(name):
    plain, x = small(name), images(name, 4)
    model = copy.deepcopy(plain)
    hooks = [module.register_forward_hook(lambda *_: None) for module in model.children()]
    before, printed = traces(model), repr(model)
    warned(model, "batch")
    assert gates(model)
    assert repr(model) != printed
    assert restore_drop_path(model) is model
    assert (traces(model), repr(model), gates(model)) == (before, printed, [])
    for hook in hooks:
        hook.remove()
    outputs = []
    for each in model, plain:
        torch.manual_seed(3)
        outputs.append(each(x))
    assert torch.equal(*outputs)
    restore_drop_path(model)  # there is nothing to undo


def test_printing_shows_mode_and_rate():
    model = small("test_vit")
    skip_drop_path(model, "count")
    lines = [line for line in repr(model).splitlines() if "survival" in line]
    assert len(lines) == 2
    assert all("survival=0.5000, mode='count'" in line for line in lines)
    model.blocks[1].drop_path1.drop_prob = 0.25
    assert "survival=0.7500, mode='count'" in repr(model.blocks[1].drop_path1)
    assert "drop_prob=0.250" in repr(model.blocks[1].drop_path1)
