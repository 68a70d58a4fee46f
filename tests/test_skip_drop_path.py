"""Converted timm models against timm's own DropPath with the same samples dropped."""

import copy
import pickle
import re
import warnings
from itertools import count
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import timm_blocks
import torch
import torch.distributed as dist
from timm.layers import DropPath, LayerScale
from timm.models.tiny_vit import TinyVitBlock
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.multiprocessing import start_processes
from torch.utils.flop_counter import FlopCounterMode

from timm_sd import draw_gates, gates, skip_drop_path, use_gates

ROOT = Path(__file__).parents[1]
BATCH_NORM = nn.modules.batchnorm._BatchNorm


class ForcedDropPath(nn.Module):
    """timm's DropPath, except that `draw` chooses the samples: it multiplies its input by 0 or 1 / p.

    It drops nothing in the calls whose numbers, from 0, are in `spared`.
    """

    def __init__(self, drop_path, masks, draw, spared):
        super().__init__()
        self.drop_path, self.masks, self.draw, self.spared, self.calls = drop_path, masks, draw, spared, count()

    def forward(self, x):
        if next(self.calls) in self.spared:
            return x
        keep = 1 - self.drop_path.drop_prob
        mask, keep = self.draw(len(x), keep)
        self.masks.append((self.drop_path, mask))
        scale = 1 / keep if self.drop_path.scale_by_keep and keep else 1.0
        return x * (scale * mask).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def drawing(mode, closed):
    """A function of batch size and p that returns which samples are kept, and the p to scale by."""
    generator = torch.Generator().manual_seed(3)

    def draw(batch_size, p):
        if closed:
            return torch.zeros(batch_size, dtype=torch.bool), p
        if mode == "batch":
            return (torch.rand(1, generator=generator) < 0.6).expand(batch_size), p
        if mode == "row":
            return torch.rand(batch_size, generator=generator) < 0.6, p
        k = max(1, int(batch_size * p))
        return torch.randperm(batch_size, generator=generator) < k, k / batch_size

    return draw


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = value.values()
    return [t for item in value for t in tensors(item)] if hasattr(value, "__iter__") else []


def doubled(value):
    if isinstance(value, (tuple, list)):
        return type(value)(map(doubled, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def results(block, args, kwargs):
    """Outputs, and gradients of inputs and parameters for a loss that weights every output differently."""
    leaves = []

    def leaf(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        leaves.append(value.clone().requires_grad_())
        return leaves[-1].clone()  # a block may change it in place

    outputs = tensors(block(*map(leaf, args), **{key: leaf(value) for key, value in kwargs.items()}))
    generator = torch.Generator().manual_seed(7)
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    parameters = {name: parameter.grad for name, parameter in block.named_parameters()}
    return outputs, [tensor.grad for tensor in leaves], parameters


def assert_close(found, expected):
    if expected is None:
        assert found is None or not found.any()
        return
    found = torch.zeros_like(expected) if found is None else found
    atol = 1e-6 * max(1.0, expected.abs().max().item())  # some blocks compute parts in float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


def randomized(block):
    """Change the initial parameters, since layer scales and last normalizations often start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return block


# Classes with a DropPath that is not skipped, and why, as in docs/any-timm-model.md.
LEFT = {
    "coat.ParallelBlock": "its branch is used elsewhere",
    "edgenext.SplitTransposeBlock": "within the branch of another DropPath",
    "efficientvim.EfficientViMBlock": "its branch is used elsewhere",
    "mvitv2.MultiScaleBlock": "its branch is used elsewhere",
    "nextvit.NextTransformerBlock": "does not go straight into a sum",
    "rdnet.DenseBlock": "cannot be traced",
    "resnest.ResNestBottleneck": "does not go straight into a sum|used more than once",
    "rexnet.LinearBottleneck": "used more than once",
    "vision_transformer.ParallelThingsBlock": "inside a Sequential",
    "vision_transformer_sam.Block": "used more than once",
}
# Which calls of a DropPath are not skipped, where others are
SPARED = {"coat.ParallelBlock": (0, 1, 2), "edgenext.SplitTransposeBlock": (0,), "efficientvim.EfficientViMBlock": (1,)}
SKIPPED, WARNED = set(), set()


def name_of(cls):
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


@pytest.mark.parametrize("name", timm_blocks.EXAMPLES)
@timm_blocks.one_thread()
def test_blocks_compute_what_timms_do(name):
    """Outputs and gradients of every kind of block, in every mode, with some or all gates closed."""
    for block, args, kwargs in timm_blocks.block_calls(name):
        cls = name_of(type(block))
        randomized(block).double()
        args, kwargs = doubled(args), {key: doubled(value) for key, value in kwargs.items()}
        for mode, closed in (("row", False), ("row", True), ("count", False), ("batch", False), ("batch", True)):
            original, skipping = copy.deepcopy(block).train(), nn.Sequential(copy.deepcopy(block)).train()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                skip_drop_path(skipping, mode, allow_batch_norm=True)
            reasons = [str(warning.message) for warning in warned]
            assert all(re.search(LEFT.get(cls, "nothing"), reason) for reason in reasons), (cls, reasons)
            if reasons:
                WARNED.add(cls)
            if mode != "batch":
                for module in (*original.modules(), *skipping.modules()):
                    if isinstance(module, BATCH_NORM):
                        module.eval()
            own = gates(skipping)
            skipped = {id(gate.drop_path) for gate in own}
            masks, draw = [], drawing(mode, closed)
            for path, module in list(original.named_modules()):
                if isinstance(module, DropPath):
                    ours = skipping[0].get_submodule(path)
                    ours.forward = nn.Identity().forward  # calls that are not skipped drop nothing
                    if id(ours) in skipped:
                        original.set_submodule(path, ForcedDropPath(module, masks, draw, SPARED.get(cls, ())))
                    else:
                        module.forward = nn.Identity().forward
            expected = results(original, args, kwargs)
            assert len(masks) == len(own)
            for gate, (_, mask) in zip(own, masks, strict=True):
                gate.provided = mask[0] if mode == "batch" else mask
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = results(skipping[0], args, kwargs)
            for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
                assert_close(ours, theirs)
            for key, gradient in expected[2].items():
                assert_close(found[2][key], gradient)
                assert (found[2][key] is None) <= (gradient is None), f"{key} has no gradient"
            for (key, ours), theirs in zip(
                skipping[0].state_dict().items(), original.state_dict().values(), strict=True
            ):
                # A skipped BatchNorm does not update its statistics; timm's does.
                if "running" not in key and "tracked" not in key:
                    assert torch.equal(ours, theirs), key
        if own:
            SKIPPED.add(cls)


def test_every_block_class_of_timm_is_covered():
    """By the tests above, which must run first."""
    classes = {name_of(cls) for cls in timm_blocks.all_block_classes() if cls.__name__ not in timm_blocks.NOT_BLOCKS}
    assert classes <= SKIPPED | WARNED, classes - SKIPPED - WARNED
    assert set(LEFT) == WARNED
    assert len(SKIPPED - WARNED) >= 98
    page = (ROOT / "docs" / "any-timm-model.md").read_text()
    assert f"{len(SKIPPED - WARNED)} of the {len(SKIPPED | WARNED)} block classes" in page
    assert all(f"`{cls}`" in page for cls in LEFT)


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
    "CoaT": "coat_tiny",
    "EdgeNeXt": "edgenext_xx_small",
    "MViT v2": "mvitv2_tiny",
    "SAM": "samvit_base_patch16",
    "EfficientViM": "efficientvim_m1",
    "NextViT": "nextvit_small",
    "RDNet": "rdnet_tiny",
    "ResNeSt": "resnest14d",
    "ReXNet": "rexnet_100",
    "ViTs made of `ParallelThingsBlock`": "vit_small_patch16_18x2_224",
}


def modes_of(name):
    """What README.md says of a model."""
    with torch.device("meta"):
        model = timm.create_model(name, **{"drop_path_rate": 0.5, **timm_blocks.EXAMPLES.get(name, {})})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            skip_drop_path(model)
            modes = '`"row"`, `"count"`, `"batch"`'
        except ValueError:  # a BatchNorm in a branch
            skip_drop_path(model, "batch")
            modes = '`"batch"`'
    if not gates(model):
        return "not yet: a warning says so"
    return f"in part: {modes}" if warned else modes


def test_readme_says_what_is_covered():
    (table,) = re.findall(r"\| models \| modes.*\n.*\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())
    listed = {}
    for names, modes in re.findall(r"\| (.*?)(?:, \.\.\.)?(?: \(.*\))? \| (.*) \|", table):
        listed |= dict.fromkeys(names.split(", "), modes)
    assert listed == {family: modes_of(name) for family, name in FAMILIES.items()}


# FLOPs


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **dict(timm_blocks.EXAMPLES[name], drop_path_rate=0.5, num_classes=4, **kwargs))


def images(name, batch_size=6):
    size = timm_blocks.EXAMPLES[name].get("img_size", 64)
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(2))


# For each model, the modules of a branch that take FLOPs, by the name of the DropPath.
BRANCHES = {
    "test_vit": dict(drop_path1=["attn"], drop_path2=["mlp"]),
    "swin_tiny_patch4_window7_224": dict(drop_path1=["attn"], drop_path2=["mlp"]),
    "convnext_atto": dict(drop_path=["conv_dw", "mlp"]),
    "resnet50": dict(drop_path=["conv1", "conv2", "conv3"]),
}


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    counts = {name.partition(".")[2]: sum(per.values()) for name, per in counter.get_flop_counts().items()}
    return counter.get_total_flops(), counts


@pytest.mark.parametrize("mode", ["row", "count", "batch"])
@pytest.mark.parametrize("name", BRANCHES)
def test_flops_are_those_of_the_kept_samples(name, mode):
    model = small(name).train()
    x = images(name)
    total, by_module = flops(model, x)
    skip_drop_path(model, mode, allow_batch_norm=True)
    own = gates(model)
    batch_size = None if mode == "batch" else len(x)
    values = draw_gates([gate.survival for gate in own], 4, 0, batch_size, mode)
    with use_gates(model, values):
        model(x)  # the first pass finds out which inputs have one row per sample
    paths = {module: path for path, module in model.named_modules()}
    expected = total
    assert own
    for gate, value in zip(own, values, strict=True):
        block, _, drop_path = paths[gate.drop_path].rpartition(".")
        branch = sum(by_module[f"{block}.{module}"] for module in BRANCHES[name][drop_path])
        dropped = 1 - value.double().mean().item()
        expected -= branch * dropped
    assert expected < total
    with use_gates(model, values):
        assert flops(model, x)[0] == round(expected)


# Probabilities, gates and modes


def test_gates_are_listed_in_order_of_execution():
    for name in ("test_vit", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "edgenext_xx_small", "test_maxvit"):
        model = small(name).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            skip_drop_path(model, "row", allow_batch_norm=True)
        called = []
        for gate in gates(model):
            gate.register_forward_pre_hook(lambda gate, args, called=called: called.append(gate))
        model(images(name))
        assert called == gates(model), name


def test_probabilities_are_read_at_every_step():
    model = skip_drop_path(small("test_vit").train(), "row")
    (first, *_), drop_path = gates(model), model.blocks[1].drop_path1
    assert [gate.survival for gate in gates(model)] == [0.5, 0.5]
    drop_path.drop_prob = 0.25
    assert first.survival == 0.75
    first.survival = 0.9
    assert drop_path.drop_prob == pytest.approx(0.1)
    for gate in gates(model):
        gate.drop_path.drop_prob = 0.0
    before = torch.get_rng_state()
    model(images("test_vit"))
    assert torch.equal(torch.get_rng_state(), before), "gates that cannot close were drawn"


@pytest.mark.parametrize("mode", ["row", "count", "batch"])
def test_samples_are_dropped_as_often_as_drop_path_does(mode):
    block = skip_drop_path(small("test_vit").train(), mode).blocks[1]
    (gate, _) = block.drop_path_gates
    rows, steps, size = [], 400, 5
    block.attn.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(steps):
            block(torch.randn(size, 4, 32))
    share = sum(rows) / steps / size
    expected = int(size * gate.survival) / size if mode == "count" else gate.survival
    deviation = (0.25 / (steps if mode == "batch" else steps * size)) ** 0.5
    assert share == pytest.approx(expected, abs=0 if mode == "count" else 4 * deviation)
    assert len(set(rows)) == dict(row=size, count=1, batch=1)[mode]


def test_scale_by_keep_is_followed():
    model = skip_drop_path(small("test_vit").train(), "row")
    block, x = model.blocks[1], torch.randn(4, 4, 32)
    outputs = []
    for scale_by_keep in (True, False):
        block.drop_path1.scale_by_keep = scale_by_keep
        block.drop_path2.drop_prob = 1.0  # it keeps nothing
        with use_gates(block, torch.tensor([[True] * 4, [False] * 4])):
            outputs.append(block(x) - x)
    torch.testing.assert_close(outputs[0], 2 * outputs[1])


def test_a_drop_path_in_evaluation_mode_drops_nothing():
    model = skip_drop_path(small("test_vit").train(), "batch")
    for gate in gates(model):
        gate.drop_path.eval()
    x = images("test_vit")
    torch.testing.assert_close(model(x), model.eval()(x))


def test_inference_is_the_same_to_the_bit():
    for name in BRANCHES:
        model = small(name).eval()
        x = images(name)
        with torch.inference_mode():
            expected = model(x)
            assert torch.equal(skip_drop_path(model, "batch")(x), expected)


# What is refused or left unchanged


def test_batch_norm_is_refused_where_it_would_see_fewer_samples():
    model = small("resnet50")
    for mode in ("row", "count"):
        with pytest.raises(ValueError, match=r'layer\d.\d has a BatchNorm2d in its branch.*use mode="batch"'):
            skip_drop_path(model, mode)
        assert not gates(model), "the model was changed all the same"
    assert gates(skip_drop_path(model, "row", allow_batch_norm=True))


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode='pixel', but it must be one of 'batch', 'row', 'count'"):
        skip_drop_path(small("test_vit"), "pixel")


def test_strict():
    model = small("vit_small_patch16_18x2_224")
    with pytest.raises(ValueError, match=r"ParallelThingsBlock.*inside a Sequential.*\(blocks\.1\)"):
        skip_drop_path(model, strict=True)
    with pytest.warns(UserWarning, match="computed in full") as warned:
        assert skip_drop_path(model) is model
    assert len(warned) == 1
    assert not gates(model)


def test_a_model_without_drop_path_is_left_alone():
    model = timm.create_model("test_vit")
    state = repr(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(skip_drop_path(model, strict=True)) == state


def test_converting_again_changes_the_mode():
    model = skip_drop_path(skip_drop_path(small("test_vit"), "row"), "batch")
    assert [gate.mode for gate in gates(model)] == ["batch", "batch"]
    model.train()(images("test_vit")).sum().backward()


class Chooses(nn.Module):
    """A block whose forward method depends on its arguments and attributes."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop_path, self.twice = nn.Linear(4, 4), DropPath(0.5), False

    def forward(self, x, mask=None, scale: float = 1.0):
        branch = self.linear(x) * scale
        if mask is not None:
            branch = branch * mask
        if self.twice:
            branch = branch + branch
        return x + self.drop_path(branch)


def test_the_real_call_is_followed():
    """With numbers, attributes that change later, and masks with and without one row per sample."""
    block = skip_drop_path(nn.Sequential(Chooses()))[0].train()
    x = torch.randn(4, 4)
    gate = torch.tensor([[True, False, True, True]])
    masks = torch.rand(4, 1), torch.rand(4, 4), torch.rand(1, 4), torch.rand(4)
    for twice in (False, True, False):
        block.twice = twice
        for mask in (None, *masks):
            for scale in (1.0, 3.0):
                with use_gates(block, gate):
                    found = block(x, mask, scale=scale)
                branch = block.linear(x) * scale * (1 if mask is None else mask) * (1 + twice)
                torch.testing.assert_close(found, x + 2 * gate.T * branch)


def test_conditions_on_the_image_size_are_followed():
    """TinyViT pads an image to whole windows, and takes one of the size of a window as it is."""
    block = randomized(TinyVitBlock(8, num_heads=2, window_size=4, drop_path=0.5)).double()
    converted = skip_drop_path(nn.Sequential(copy.deepcopy(block)), strict=True)
    kept = torch.tensor([[True, False, True], [False, True, True]])
    for drop_path, mask in zip((block.drop_path1, block.drop_path2), kept, strict=True):
        drop_path.forward = lambda x, mask=mask: x * 2 * mask.view(-1, *[1] * (x.ndim - 1))
    for size in ((4, 4), (8, 12), (6, 8), (8, 6), (12, 8), (4, 4)):
        x = torch.randn(3, *size, 8, dtype=torch.float64)
        with use_gates(converted, kept):
            torch.testing.assert_close(converted(x), block(x))


class Checks(nn.Module):
    """A block that refuses inputs of some shapes."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop_path = nn.Linear(4, 4), DropPath(0.5)

    def forward(self, x):
        expected = False
        if x.ndim == 3:
            expected = True
        branch = self.linear(x)
        if x.shape[1] > 2:
            branch = 2 * branch
        assert expected, "not three dimensions"
        assert x.shape[1] < 5, "too long"
        return x + self.drop_path(branch)


def test_assertions_on_shapes_are_assumed_to_pass():
    """At conversion, when there are no shapes. Later they are the block's own."""
    block = skip_drop_path(nn.Sequential(Checks()), strict=True)[0]
    kept = torch.tensor([[True, False, True]])
    for length, factor in ((2, 1), (3, 2), (4, 2)):
        x = torch.randn(3, length, 4)
        for each in (block, copy.deepcopy(block)):
            with use_gates(each, kept):
                torch.testing.assert_close(each(x), x + 2 * factor * kept.T.unsqueeze(2) * block.linear(x))
    for shape, message in (((3, 4), "not three"), ((3, 5, 4), "too long")):
        with pytest.warns(UserWarning, match=message), pytest.raises(AssertionError, match=message):
            block(torch.randn(shape))


class SeveralWays(nn.Module):
    """A block that goes a way of its own for each length of `way`."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop_path = nn.Linear(4, 4), nn.BatchNorm1d(4), DropPath(0.5)

    def forward(self, x, mask, way):
        branch = self.linear(x)
        if way.shape[0] == 1:
            branch = branch * mask
        if way.shape[0] == 2:
            branch = branch * mask.unsqueeze(1)
        if way.shape[0] == 3:
            return x
        if way.shape[0] == 4:
            branch = branch * float(branch.detach().sum())
        if way.shape[0] == 5:
            branch = self.norm(branch)
        return x + self.drop_path(branch)


def test_each_way_through_a_block_is_planned_on_its_own():
    block = skip_drop_path(nn.Sequential(SeveralWays()), strict=True)[0]
    x, mask, kept = torch.randn(4, 4), torch.rand(4), torch.tensor([[True, False, False, False]])
    for way, reason in ((4, "cannot be traced"), (5, "BatchNorm in its branch")):
        with pytest.warns(UserWarning, match=f"SeveralWays computes what its DropPath drops: .*{reason}"):
            block(x, mask, torch.zeros(way))
    factors = {0: 1, 1: mask, 2: mask.unsqueeze(1), 3: 0, 6: 1}
    for way, factor in [*factors.items()] * 2:
        with use_gates(block, kept), warnings.catch_warnings():
            warnings.simplefilter("error")
            found = block(x, mask, torch.zeros(way))
        torch.testing.assert_close(found, x + 2 * kept.T * block.linear(x) * factor)


class Variants(nn.Module):
    """Forward methods whose graph depends on the block's attributes, or whose DropPath cannot be skipped."""

    def __init__(self, way, inner=None):
        super().__init__()
        self.linear, self.inner, self.drop_path, self.way = nn.Linear(4, 4), inner or nn.Identity(), DropPath(0.5), way

    def forward(self, x):
        return getattr(self, self.way)(x)

    def attribute(self, x):  # ParallelScalingBlock reads its dropout's p like this
        return x + self.drop_path(self.linear(x) * self.inner.p)

    def children_in_a_loop(self, x):
        branch = x
        for _, child in self.inner.named_children():
            branch = child(branch)
        return x + self.drop_path(branch)

    def pooled(self, x):
        return x + self.drop_path(self.linear(x.mean(1, keepdim=True)))

    def pooled_product(self, x):
        y = self.linear(x)
        return x + y + self.drop_path(self.linear((x * y).mean(1, keepdim=True)))

    def outer(self, x):
        return x + self.drop_path(self.linear(x.expand(-1, 6, -1)))

    def scaled(self, x):
        return x + self.inner(self.drop_path(self.linear(x)))

    def square(self, x):
        branch = self.drop_path(self.linear(x))
        return x + branch * branch

    def no_grad(self, x):
        with torch.no_grad():
            gate = self.linear(x).sigmoid()
        return x + self.drop_path(self.linear(x) * gate)

    def random(self, x):
        return x if self.training and torch.rand(()) < 0.5 else x + self.drop_path(self.linear(x))

    def used_before(self, x):
        branch = self.linear(x)
        shortcut = branch + 1
        branch.mul_(2)
        return shortcut + self.drop_path(self.linear(branch))

    def flattened(self, x):
        branch = self.inner(x)
        branch.mul_(2)
        return x + self.drop_path(self.linear(branch))

    def elements(self, x):
        both = self.inner(x)
        return both[0] + self.drop_path(self.linear(both[1]))

    def same_for_all_samples(self, x):
        return x + self.drop_path(self.linear(self.linear.weight.unsqueeze(0)))

    def same_for_all_samples_2d(self, x):
        return x + self.drop_path(self.linear(self.linear.weight))

    def alias(self, x):
        before = x
        x += 1
        return before + self.drop_path(self.linear(x))

    def view(self, x):
        return x + self.drop_path(self.linear(x.flatten(1).mul_(2)))

    def shape(self, x):
        return x + self.drop_path(self.linear(x)) if x.shape[1] == 4 else x

    def set_of_shapes(self, x):
        return x + self.drop_path(self.linear(x)) * (x.shape[1] in {4, 8})

    def set_of_dimensions(self, x):
        return x + self.drop_path(self.linear(x)) * (x.ndim in {2, 4})

    def endless(self, x):
        length = x.shape[0]
        while True:
            if length % 8 == 0:
                break
            length = length + 1
        return x + self.drop_path(self.linear(x))

    def inner_shape(self, x):
        branch = self.linear(x)
        return x if branch.shape[1] == 8 else x + self.drop_path(branch)

    def nameless_error(self, x):
        if not x.shape[1] == 4:
            raise ValueError
        return x + self.drop_path(self.linear(x))

    def checked_values(self, x):
        assert x.ndim == 2, "not two dimensions"
        return self.values(x)

    def values(self, x):
        return x if x.sum() > 0 else x + self.drop_path(self.linear(x))

    def batch_size(self, x):
        return x + self.drop_path(self.linear(x) / x.shape[0])


@pytest.mark.parametrize(
    ("way", "first", "second"),
    [
        ("attribute", nn.Dropout(0.25), nn.Dropout(0.75)),
        ("children_in_a_loop", nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))),
        ("scaled", LayerScale(4, 2.0), nn.Linear(4, 4)),
    ],
)
def test_blocks_of_a_class_are_not_mixed_up(way, first, second):
    x, kept = torch.randn(4, 4), torch.tensor([True, False, True, True])
    for inner in (first, second):
        block = Variants(way, inner)
        expected = copy.deepcopy(block)
        expected.drop_path.forward = lambda branch: branch * kept.view(-1, 1) * 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            skip_drop_path(nn.Sequential(block))
        if own := gates(block):
            with use_gates(block, kept.unsqueeze(0)):
                torch.testing.assert_close(block(x), expected(x))
            assert len(own) == 1
        else:
            assert inner is second, "the first can be skipped"
            assert way == "scaled", "only what need not be linear is refused"


@pytest.mark.parametrize(
    "way",
    [
        *("square", "no_grad", "random", "used_before", "flattened", "elements", "alias", "view", "shape"),
        *("set_of_shapes", "set_of_dimensions", "endless", "inner_shape", "nameless_error", "values", "batch_size"),
    ],
)
def test_what_cannot_be_skipped_is_refused(way):
    with pytest.raises(ValueError, match=r"cannot be skipped.*drop_path of Variants, because"):
        skip_drop_path(nn.Sequential(Variants(way, nn.Flatten())), strict=True)


def test_the_reason_is_not_an_assertion_that_calls_pass():
    with pytest.raises(ValueError, match="variables cannot be used as inputs to control flow"):
        skip_drop_path(nn.Sequential(Variants("checked_values")), strict=True)


def test_a_batch_norm_that_comes_later_is_refused():
    block = skip_drop_path(nn.Sequential(Variants("children_in_a_loop", nn.Sequential(nn.Linear(4, 4)))))[0]
    block.inner = nn.Sequential(nn.BatchNorm1d(4))
    for same in (block, copy.deepcopy(block)):
        with pytest.warns(UserWarning, match='BatchNorm in its branch needs mode="batch"'):
            same(torch.randn(4, 4))


def test_a_call_that_cannot_be_skipped_leaves_other_blocks_alone():
    first, second = (skip_drop_path(nn.Sequential(Chooses()))[0] for _ in "ab")
    x = torch.randn(4, 4)
    with pytest.warns(UserWarning, match="neither a tensor nor a plain value"):
        first(x, scale=np.float32(1))
    for block in (first, second):
        with use_gates(block, torch.zeros(1, 4, dtype=torch.bool)):
            assert torch.equal(block(x), x)


@pytest.mark.parametrize("way", ["same_for_all_samples", "same_for_all_samples_2d"])
def test_a_branch_must_have_a_row_for_each_sample(way):
    """DropPath would take its dimension 0 for the samples, too."""
    block = Variants(way)
    skip_drop_path(nn.Sequential(block))
    with use_gates(block, torch.tensor([[True, False, True, True]])), pytest.raises(RuntimeError):
        block(torch.ones(4, 4, 4))


@pytest.mark.parametrize("mode", ["row", "count", "batch"])
def test_an_empty_batch(mode):
    block = Variants("scaled")
    skip_drop_path(nn.Sequential(block), mode)
    assert block(torch.ones(0, 4)).shape == (0, 4)


class SizedLinear(nn.Linear):
    def forward(self, x, size):
        return super().forward(x.unflatten(1, size)).flatten(1, 2)


class Resized(nn.Module):
    """A block whose branches depend on a size and a scale that come from a module."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.resize = SizedLinear(4, 4), SizedLinear(4, 4), Resize()
        self.drop_path = DropPath(0.5)

    def forward(self, x):
        x, size, scales = self.resize(x)
        x = x + self.drop_path(self.first(x, (size[0], 3)) * scales[0])
        return x + self.drop_path(self.second(x, size) * scales[1])


class Resize(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.rand(2, 4))

    def forward(self, x):
        return x[:, :6], (2, 3), self.scales.exp()


@pytest.mark.parametrize(
    ("mode", "gate"), [("row", [1, 0, 0, 0]), ("row", [0] * 4), ("count", [1, 0, 1, 0]), ("batch", 0)]
)
def test_a_branch_may_take_what_is_not_a_tensor_and_elements_of_one(mode, gate):
    gate = torch.tensor(gate, dtype=torch.bool)
    block, plain = Resized(), Resized()
    plain.load_state_dict(block.state_dict())
    plain.drop_path.forward = lambda branch: branch * gate.view(-1, 1, 1) * 2
    skip_drop_path(nn.Sequential(block), mode, strict=True)
    x = torch.randn(4, 7, 4)
    with use_gates(block, torch.stack([gate, gate])):
        found = results(block, [x], {})
    torch.testing.assert_close(found, results(plain, [x], {}))


class FourSamples(Chooses):
    """A block whose branch works for four samples only."""

    def forward(self, x, mask):
        return x + self.drop_path((self.linear(x) * mask).view(4, 4))


def test_a_branch_that_needs_the_whole_batch_is_computed_in_full():
    block = skip_drop_path(nn.Sequential(FourSamples()))[0].train()
    x, mask = torch.randn(4, 4), torch.rand(4)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="cannot tell which inputs"):
        found = block(x, mask)
    torch.manual_seed(0)
    torch.testing.assert_close(found, x + block.drop_path(block.linear(x) * mask))


@pytest.mark.parametrize("way", ["pooled", "pooled_product"])
@pytest.mark.parametrize(("mode", "gate"), [("row", [1, 0, 1, 0]), ("count", [1, 0, 1, 0]), ("batch", 1)])
def test_a_branch_may_be_broadcast(mode, gate, way):
    gate = torch.tensor(gate, dtype=torch.bool)
    block, plain = Variants(way), Variants(way)
    plain.load_state_dict(block.state_dict())
    plain.drop_path.forward = lambda branch: branch * gate.view(-1, 1, 1) * 2
    skip_drop_path(nn.Sequential(block), mode)
    with use_gates(block, gate.unsqueeze(0)), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = results(block, [torch.ones(4, 6, 4)], {})
    torch.testing.assert_close(found, results(plain, [torch.ones(4, 6, 4)], {}))


@pytest.mark.parametrize(("mode", "gate"), [("row", [1, 0, 1, 0]), ("count", [1, 0, 1, 0]), ("batch", 1)])
def test_a_shortcut_may_not_be_broadcast(mode, gate):
    """A closed gate returns the shortcut."""
    block = Variants("outer")
    skip_drop_path(nn.Sequential(block), mode)
    with use_gates(block, torch.tensor([gate], dtype=torch.bool)), pytest.raises(RuntimeError, match="expanded size"):
        block(torch.ones(4, 1, 4))


# Together with other features


def test_copies_and_pickles(tmp_path):
    model = skip_drop_path(small("test_vit")).train()
    values = draw_gates([0.5, 0.5], 0, 0, 6)
    x = images("test_vit")
    with use_gates(model, values):
        expected = model(x)
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.save(model, tmp_path / "model.pt")
    others.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for other in others:
        assert isinstance(other.blocks[1], timm.models.vision_transformer.Block)
        assert all(gate.provided is None for gate in gates(other))
        assert list(other.state_dict()) == list(small("test_vit").state_dict())
        with torch.no_grad():
            for parameter in other.parameters():
                parameter *= 2  # a copy has weights of its own
        with use_gates(other, values):
            assert not torch.allclose(other(x), expected)
            doubled = {key: value * 2 for key, value in model.state_dict().items()}
            other.load_state_dict(doubled)
            found = other(x)
        reference = copy.deepcopy(model)
        reference.load_state_dict(doubled)
        with use_gates(reference, values):
            assert torch.equal(found, reference(x))


def test_moving_average():
    model = skip_drop_path(small("test_vit")).train()
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight += 1
    average.update(model)
    difference = model.blocks[1].mlp.fc1.weight - average.module.blocks[1].mlp.fc1.weight
    torch.testing.assert_close(difference, torch.full_like(difference, 0.5))
    plain = small("test_vit").eval()
    plain.load_state_dict(average.module.state_dict())
    x = images("test_vit")
    assert torch.equal(average.module(x), plain(x))


def test_weights_loaded_before_and_after():
    x, source = images("test_vit"), small("test_vit").eval()
    torch.manual_seed(5)
    before, after = (timm.create_model("test_vit", **timm_blocks.VIT, num_classes=4, drop_path_rate=0.3) for _ in "ab")
    before.load_state_dict(source.state_dict())
    skip_drop_path(before)
    skip_drop_path(after).load_state_dict(source.state_dict())
    assert torch.equal(before.eval()(x), source(x))
    assert torch.equal(after.eval()(x), source(x))


@pytest.mark.parametrize("mode", ["row", "count", "batch"])
def test_gradient_checkpointing(mode):
    model = skip_drop_path(small("test_vit"), mode).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    for network in (model, checkpointed):
        torch.manual_seed(3)
        network(images("test_vit")).square().sum().backward()
    for ours, theirs in zip(checkpointed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def train_under_ddp(rank, init_file, mode):
    warnings.simplefilter("error", UserWarning)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(skip_drop_path(small("test_vit").train(), mode))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for _ in range(4):
        model(images("test_vit", 2) + rank).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    others = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(others, flat)
    assert torch.equal(others[0], others[1])
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_ddp_does_not_need_find_unused_parameters(tmp_path, mode):
    start_processes(train_under_ddp, (tmp_path / "init", mode), nprocs=2, start_method="forkserver")


def compiled_graphs(model, name, steps, **options):
    """The number of graphs in `steps` steps of compiled training. The model keeps the gradients of the last one."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, **options)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(steps):
            model.zero_grad()
            compiled(images(name)).square().sum().backward()
    return len(graphs)


def test_count_compiles_in_one_graph():
    model = skip_drop_path(small("test_vit"), "count").train()
    eager = copy.deepcopy(model)
    torch.manual_seed(0)
    assert compiled_graphs(model, "test_vit", 2, fullgraph=True) == 1
    torch.manual_seed(0)
    for _ in range(2):
        eager.zero_grad()
        eager(images("test_vit")).square().sum().backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dynamic", [None, True])
def test_count_compiles_for_every_probability(dynamic):
    """Blocks that are compiled one by one share their code but not their probability, and a schedule changes it."""
    model = skip_drop_path(small("test_vit", depth=3), "count").train()
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=dynamic)
    x = images("test_vit", 10)
    for step, rate in enumerate((0.5, 0.8, 0.3)):  # 10 * (1 - 0.8) is less than 2
        for network in (model, eager):
            for index, gate in enumerate(gates(network)):
                gate.drop_path.drop_prob = rate + 0.05 * index
            torch.manual_seed(step)
            network.zero_grad()
            network(x).square().sum().backward()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_training_compiles_to_a_bounded_number_of_graphs(mode):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **(timm_blocks.VIT | dict(depth=12)), drop_path_rate=0.5)
    assert compiled_graphs(skip_drop_path(model, mode).train(), "test_vit", 20) <= 24


@pytest.mark.parametrize("mode", ["row", "count", "batch"])
def test_autocast(mode):
    model = skip_drop_path(small("test_vit"), mode).train()
    values = draw_gates([0.5, 0.5], 1, 0, None if mode == "batch" else 6, mode)
    with use_gates(model, values):
        expected = model(images("test_vit"))
        with torch.autocast("cpu", torch.bfloat16):
            found = model(images("test_vit"))
    found.float().sum().backward()
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_channels_last_is_kept(mode):
    model = skip_drop_path(small("convnext_atto"), mode).to(memory_format=torch.channels_last).train()
    formats = []
    for gate in gates(model):
        gate.register_forward_hook(
            lambda gate, args, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    model(images("convnext_atto").to(memory_format=torch.channels_last))
    assert formats
    assert all(formats)


def test_features_only():
    features = small("swin_tiny_patch4_window7_224", features_only=True).train()
    expected = copy.deepcopy(features)
    own = gates(skip_drop_path(features, "row"))
    values = torch.ones(len(own), 6, dtype=torch.bool)
    for drop_path in (module for module in expected.modules() if isinstance(module, DropPath)):
        drop_path.forward = lambda x, p=drop_path.drop_prob: x / (1 - p)
    x = images("swin_tiny_patch4_window7_224")
    with use_gates(features, values):
        for ours, theirs in zip(features(x), expected(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_swins_input_size_set_afterwards():
    models = [small("swin_tiny_patch4_window7_224").train() for _ in range(2)]
    skip_drop_path(models[0], "batch")(images("swin_tiny_patch4_window7_224"))
    for model in models:
        model.set_input_size((96, 96), window_size=(6, 6))
    for drop_path in (module for module in models[1].modules() if isinstance(module, DropPath)):
        drop_path.forward = lambda x, p=drop_path.drop_prob: x / (1 - p)
    x = torch.randn(2, 3, 96, 96)
    with use_gates(models[0], torch.ones(len(gates(models[0])), dtype=torch.bool)):
        torch.testing.assert_close(models[0](x), models[1](x))


def test_classifier_and_parameter_groups():
    plain, model = small("test_vit"), skip_drop_path(small("test_vit"))
    for network in (plain, model):
        network.reset_classifier(7)
    assert model.train()(images("test_vit")).shape == (6, 7)
    groups = [
        [(group["lr_scale"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]
        for optimizer in (create_optimizer_v2(m, "adamw", lr=0.1, layer_decay=0.5) for m in (plain, model))
    ]
    assert groups[0] == groups[1]


def test_exports(tmp_path):
    for model, x in (
        (skip_drop_path(small("test_vit")), images("test_vit", 2)),
        (timm.create_model("cifar_resnet20_sd"), torch.randn(2, 3, 32, 32)),
    ):
        model.eval()
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
