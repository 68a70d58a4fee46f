"""The engine's kernels, run by Triton's interpreter, against autograd; and compiled for a GPU."""

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from timm_sd import register_depth

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds for Linux only")

import triton.language as tl

from timm_sd import engine, inference, kernels
from timm_sd.engine import Engine, bordered, inside

pytestmark = pytest.mark.usefixtures("registry")  # depths 8 and 14
IMAGES = (3, 2)  # of a full batch and of the last one


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    """There are few rows of partial sums in these tests, and yet loops over them shall go on."""
    monkeypatch.setattr(kernels, "ROWS", tl.constexpr(2))
    monkeypatch.setattr(kernels, "GRADIENTS", tl.constexpr(1))


def network_and_engine(dtype: torch.dtype = torch.float32):
    """A ResNet-14, whose blocks have three widths, with stride 1 and (but for the first) with 2."""
    register_depth(14)
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet14_sd").to(memory_format=torch.channels_last).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.3)
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            module.running_var[0] = 1e-4
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    made = Engine(network, 1e-4, IMAGES, dtype)
    poison(made)
    made.load(optimizer)
    return network, made


def poison(made: Engine) -> None:
    """Put NaN wherever a step must write before it reads. Borders and the zeros between spread gradients stay."""
    groups = {block.group for block in made.blocks}
    flat = [made.partial_sums, *(t for layer in made.layers for t in (layer.y, layer.moments, layer.running))]
    flat += [t for group in groups for t in (group.g, group.dz)]
    whole = [made.stem_out, *(t for block in made.blocks for t in (block.hidden, block.out))]
    whole += [group.dy for group in groups]
    for tensor in flat:
        tensor.fill_(np.nan)
    for tensor in whole:
        inside(tensor).fill_(np.nan)
    for group in groups:
        if group.spread is not None:
            inside(group.spread)[:, ::2, ::2] = np.nan
    for slot in made.parameters.slots:
        slot.gradients[:, : np.prod(slot.shape)] = np.nan


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def summed(slot: engine.Slot, images: int) -> list[torch.Tensor]:
    """The gradients of a slot's parameters."""
    partial = slot.gradients[: slot.rows(images), : np.prod(slot.shape)]
    return slot.split(partial.sum(0).view(slot.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("index", [0, 2, 3, 4, 5])
def test_a_block_agrees_with_autograd_in_float64(dtype, images, index):
    """Outputs, all gradients and running statistics; autograd rounds what the kernels store."""

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return t if dtype == torch.float32 else t + (t.to(dtype).double() - t).detach()

    network, made = network_and_engine(dtype)
    block = made.blocks[index]
    module = copy.deepcopy([*network.stages[0], *network.stages[1], *network.stages[2]][index]).double()
    branch = module.branch
    for conv in (branch.conv1, branch.conv2):
        conv.weight.data = conv.weight.data.to(dtype).double()
    size = block.first.size
    x = torch.randn(images, block.first.channels_in, size * block.stride, size * block.stride).relu().to(dtype)
    g = torch.randn(images, block.first.channels, size, size).to(dtype)

    exact = x.double().requires_grad_()
    hidden = rounded(branch.act1(branch.bn1(rounded(branch.conv1(exact)))))
    out = torch.relu(branch.bn2(rounded(branch.conv2(hidden))) + rounded(module.shortcut(exact)))
    out.backward(g.double())

    inside(block.x)[:images] = x.permute(0, 2, 3, 1)
    block.group.g.view(IMAGES[0], size, size, -1)[:images] = g.permute(0, 2, 3, 1)
    block.forward(made.partial_sums, images)
    out_by_kernels = inside(block.out)[:images].permute(0, 3, 1, 2).clone()
    block.backward(made.partial_sums, images)
    dx = block.dx[: x.numel() // x.shape[1]].view(images, *x.shape[2:], -1).permute(0, 3, 1, 2)

    pairs = [(out_by_kernels, out), (dx, exact.grad)]
    for layer, conv, bn in ((block.first, branch.conv1, branch.bn1), (block.second, branch.conv2, branch.bn2)):
        (weight,), (scale, shift) = summed(layer.weight, images), summed(layer.affine, images)
        pairs += [(weight, conv.weight.grad), (scale, bn.weight.grad), (shift, bn.bias.grad)]
        pairs += [(layer.running[0], bn.running_mean), (layer.running[1], bn.running_var)]
    errors = [relative(ours, theirs.detach()) for ours, theirs in pairs]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    assert all(error < tolerance for error in errors), errors  # NaN is not
    for tensor in (block.hidden, block.out, block.group.dy):  # borders are still zero
        border = tensor.clone()
        inside(border).zero_()
        assert not border.any()


def test_the_engine_keeps_what_its_graphs_read(monkeypatch, large_tiles):
    """A graph keeps addresses: all tensors that its kernels were given must live as long as the engine."""
    given = []

    class Recorder:
        def __getattr__(self, name):
            return Grid()

    class Grid:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                given.extend(StorageWeakRef(arg.untyped_storage()) for arg in args if isinstance(arg, torch.Tensor))

            return launch

    def capture(device, launches):
        for launch in launches:
            launch()
        return [lambda: None for _ in launches]  # like a graph, it does not hold the function

    monkeypatch.setattr(engine, "kernels", Recorder())
    monkeypatch.setattr(engine, "on_device", capture)
    monkeypatch.setattr(inference, "on_device", capture)
    _, made = network_and_engine()
    evaluation = inference.Inference(made, 2)
    gc.collect()
    assert len(given) > 100
    assert not any(storage.expired() for storage in given)
    del evaluation


@pytest.mark.parametrize("index", [0, 2])
def test_a_dropped_block_is_its_shortcut(index):
    """With stride 1, and with stride 2."""
    network, made = network_and_engine()
    block = made.blocks[index]
    module = [*network.stages[0], *network.stages[1]][index].double()
    images, size = IMAGES[1], block.first.size
    x = torch.randn(images, 16, 32, 32).relu()
    g = torch.randn(images, block.first.channels, size, size)
    exact = x.double().requires_grad_()
    module.shortcut(exact).backward(g.double())
    inside(block.x)[:images] = x.permute(0, 2, 3, 1)
    block.group.g.view(IMAGES[0], size, size, -1)[:images] = g.permute(0, 2, 3, 1)
    block.skip(images)
    block.skip_backward(images)
    assert relative(inside(block.out)[:images].permute(0, 3, 1, 2), module.shortcut(x.double()).detach()) < 1e-6
    dx = block.dx[: images * 32 * 32].view(images, 32, 32, 16).permute(0, 3, 1, 2)
    assert relative(dx, exact.grad) < 1e-6


def test_inference_agrees_with_the_network(large_tiles):
    network, made = network_and_engine()
    network.eval().double()
    images = torch.randn(5, 3, 32, 32)
    logits = network(images.double())
    labels = logits.argmax(1)
    labels[3] = (labels[3] + 1) % 10
    ours = bordered(5, 32, 4, torch.float32, torch.device("cpu"))
    inside(ours)[..., :3] = images.permute(0, 2, 3, 1)
    evaluation = inference.Inference(made, batch_size=3)
    assert evaluation.error(ours, labels) == pytest.approx(20)  # the second batch is filled up
    features = inside(evaluation.buffers[64][0])[:2].permute(0, 3, 1, 2)
    assert relative(features, network.forward_features(images[3:].double()).detach()) < 1e-5


def test_every_kernel_fits_on_an_h100():
    """All that the engine launches compile for it with no spill, and the convolutions use its matrix units."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {
        *("convolve", "normalize", "sum_gradient", "normalize_backward", "hidden_gradient", "input_gradient"),
        *("weight_gradient", "sgd", "infer"),
    }
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 227 * 1024, kernel
        products = ("convolve", "hidden_gradient", "input_gradient", "weight_gradient", "infer")
        if kernel["kernel"] in products and kernel["constants"].get("IN") != 4:
            assert kernel["wgmma"], kernel
