"""Replayed blocks against eager ones. Without CUDA, calling a function again stands in for replaying a graph."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from timm_sd import draw_gates, use_gates
from timm_sd.paper import stochastic_depth
from timm_sd.train import training
from timm_sd.train.gpu import cuda_graphs
from timm_sd.train.learner import Learner
from timm_sd.train.options import Options

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """On the CPU, a replay calls the captured function again and puts its result where the first one was."""
    if request.param == "cuda":
        monkeypatch.delenv("ACCELERATE_USE_CPU")
    else:

        def capture(function, pool):
            graphs = function.__self__
            result = {"_forward": "output", "_backward": "input_gradient"}[function.__name__]
            function()
            buffer = getattr(graphs, result).detach()

            def replay():
                with torch.enable_grad():
                    function()
                output = getattr(graphs, result)
                buffer.copy_(output.detach())
                output.data = buffer

            return replay

        monkeypatch.setattr(cuda_graphs, "capture", capture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(cuda_graphs, "side_stream", nullcontext)
    AcceleratorState._reset_state(True)
    yield torch.device(request.param)
    AcceleratorState._reset_state(True)


def make_twins(name, device):
    torch.manual_seed(0)
    eager = timm.create_model(name).to(device, memory_format=torch.channels_last).train()
    graphed = timm.create_model(name).to(device, memory_format=torch.channels_last)
    graphed.load_state_dict(eager.state_dict())
    images = torch.randn(6, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    cuda_graphs.graph_blocks(graphed, images)
    return eager, graphed


def batches(device):
    """Two full batches, a partial one and another full one."""
    generator = torch.Generator().manual_seed(1)
    for size in (6, 6, 4, 6):
        images = torch.randn(size, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (size,), generator=generator)
        yield images.to(device).contiguous(memory_format=torch.channels_last), labels.to(device)


@pytest.mark.parametrize("name", ["cifar_resnet20_sd", "cifar_resnet20"])
def test_graphed_training_equals_eager_training(device, name):
    """Weights, statistics and losses agree for all sorts of gates, with an optimizer that needs every gradient."""
    eager, graphed = make_twins(name, device)
    for key, value in eager.state_dict().items():
        assert torch.equal(value, graphed.state_dict()[key]), f"{key} was changed by the capture"
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True) for net in (eager, graphed)]
    patterns = [
        torch.ones(9, dtype=torch.bool),
        torch.arange(9) % 3 != 0,
        torch.arange(9) % 2 == 0,
        torch.arange(9) > 5,
    ]
    for (images, labels), gates in zip(batches(device), patterns, strict=True):
        losses = []
        for network, optimizer in zip((eager, graphed), optimizers, strict=True):
            with use_gates(network, gates):
                loss = F.cross_entropy(network(images), labels)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=network is eager)
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(eager.state_dict(), graphed.state_dict(), rtol=1e-3, atol=1e-5)


def test_kept_blocks_are_replayed_and_dropped_ones_are_not(device, monkeypatch):
    _, graphed = make_twins("cifar_resnet20_sd", device)
    replayed = []
    for index, block in enumerate(block for stage in graphed.stages for block in stage):
        graphs = block.forward.__self__
        for name in ("replay_forward", "replay_backward"):
            replay = getattr(graphs, name)
            monkeypatch.setattr(
                graphs, name, lambda replay=replay, event=(name, index): replayed.append(event) or replay()
            )
    gates = draw_gates([0.5] * 9, seed=3, step=0)
    images, labels = next(batches(device))
    with use_gates(graphed, gates):
        F.cross_entropy(graphed(images), labels).backward()
    kept = gates.nonzero().flatten().tolist()
    assert 0 < len(kept) < 9
    assert replayed == [("replay_forward", b) for b in kept] + [("replay_backward", b) for b in reversed(kept)]


def test_a_dropped_block_creates_no_gradients(device, monkeypatch):
    """Its gradients simply stay zero; eager training has to create the zeros."""
    _, graphed = make_twins("cifar_resnet20_sd", device)
    monkeypatch.setattr(stochastic_depth, "zero_gradients", None)
    addresses = [parameter.grad.data_ptr() for parameter in graphed.parameters()]
    images, labels = next(batches(device))
    with use_gates(graphed, torch.arange(9) % 2 == 0):
        F.cross_entropy(graphed(images), labels).backward()
    assert [parameter.grad.data_ptr() for parameter in graphed.parameters()] == addresses
    for index, block in enumerate(block for stage in graphed.stages for block in stage):
        assert all(parameter.grad.any() == (index % 2 == 0) for parameter in block.parameters())


def test_buffers_are_chained(device, monkeypatch):
    """Only the first block's input, the last block's output gradient and what skips a dropped block are copied."""
    _, graphed = make_twins("cifar_resnet20_sd", device)
    copies = []
    copy = cuda_graphs._copy

    def counted(source, buffer):
        copies.append(source.data_ptr() != buffer.data_ptr())
        copy(source, buffer)

    monkeypatch.setattr(cuda_graphs, "_copy", counted)
    images, labels = next(batches(device))
    for dropped, copied in ((None, 2), (1, 4), (3, 4), (8, 2)):
        gates = torch.ones(9, dtype=torch.bool)
        if dropped is not None:
            gates[dropped] = False
        copies.clear()
        with use_gates(graphed, gates):
            F.cross_entropy(graphed(images), labels).backward()
        assert len(copies) == 2 * gates.sum()
        assert sum(copies) == copied


def test_evaluation_does_not_use_the_graphs(device):
    eager, graphed = make_twins("cifar_resnet20_sd", device)
    images, _ = next(batches(device))
    with torch.inference_mode():
        torch.testing.assert_close(graphed.eval()(images), eager.eval()(images))


@pytest.mark.parametrize("forced", [False, True])
def test_a_run_with_graphs_equals_one_without(few_images, tmp_path, device, monkeypatch, forced):
    """The last batch has another shape. Without CUDA the flag has no effect unless the test forces it."""
    options = Options("cifar_resnet20_sd", "synthetic", epochs=1, batch_size=32, output=tmp_path / "eager")
    training.train(options)
    init = Learner.__init__

    def graphed(learner, *args):
        init(learner, *args)
        learner.graphed = learner.graphed or forced

    monkeypatch.setattr(Learner, "__init__", graphed)
    training.train(replace(options, cuda_graphs=True, output=tmp_path / "graphs"))
    eager, graphs = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("eager", "graphs"))
    for figure in ("train_loss", "train_error", "active_blocks", "conv1_gradient", "validation_error", "test_error"):
        assert graphs[figure] == pytest.approx(eager[figure], rel=1e-3), figure
