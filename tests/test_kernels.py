"""The engine's kernels, run by Triton's interpreter, against autograd; and compiled for a GPU."""

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import SCRIPTS
from torch.multiprocessing.reductions import StorageWeakRef

from timm_sd import register_depth

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds for Linux only")

import triton.language as tl

from timm_sd.train.gpu import engine, inference, kernels
from timm_sd.train.gpu.engine import Engine, bordered, inside

pytestmark = pytest.mark.usefixtures("registry")  # depths 8 and 14
IMAGES = (3, 2)  # of a full batch and of the last one


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    """There are few rows of partial sums in these tests, and yet loops over them shall go on."""
    monkeypatch.setattr(kernels, "ROWS", tl.constexpr(2))
    monkeypatch.setattr(kernels, "GRADIENTS", tl.constexpr(1))


def network_and_engine():
    """A ResNet-14, whose blocks have three widths, with stride 1 and (but for the first) with 2."""
    register_depth(14)
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet14_sd").to(memory_format=torch.channels_last).train()
    made = Engine(network, 1e-4, IMAGES, torch.float32)
    made.load(torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True))
    return network, made


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, IMAGES), (torch.float16, IMAGES[1:])])
def test_kernels_agree_with_autograd_in_float64(dtype, sizes, monkeypatch):
    """What `benchmark.py --gpu` checks on a GPU: blocks, stem, optimizer and inference, with tighter limits."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import benchmark_gpu_checks as checks

    monkeypatch.setitem(checks.LIMITS, torch.float16, 3e-3)
    monkeypatch.setitem(checks.LIMITS, torch.float32, 1e-5)
    monkeypatch.setattr(checks, "INFERENCE_LIMIT", 1e-5)
    found = {}
    checks.check_kernels(sizes, dtype, torch.device("cpu"), math.inf, found)
    assert len(found) == len(sizes) * (5 + 2) + 1  # five kinds of block, the stem and the optimizer
    for name, case in found.items():
        for of, error in case["errors"].items():
            assert error is not None, (name, of)  # not NaN
            assert error < case["limit"], (name, of)


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
