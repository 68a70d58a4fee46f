"""The benchmark compares what it says it compares."""

import copy
import importlib.util
from itertools import count

import pytest
import timm
import torch
from conftest import SCRIPTS
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_sd import draw_gates, gates, skip_drop_path
from timm_sd.errors import UserError


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def peers():
    return importlib.import_module("benchmark_timm")


@pytest.fixture
def _one_thread():
    """Steps this small are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPTS / "benchmark.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "in_own_process", lambda function, *args: function(*args))
    return script


@pytest.mark.parametrize("peer", ["timm DropPath", "torchvision, mode batch"])
def test_peers_compute_what_they_drop(benchmark, peer):
    """Every branch is computed in every training step, and dropped with its block's probability."""
    network = timm.create_model("cifar_resnet20_sd").train()
    survival = [gate.survival for gate in gates(network)]
    branches = [gate.block.branch for gate in gates(network)]
    benchmark.put_in(network, benchmark.PEERS[peer])
    assert not gates(network)
    peers = [module for module in network.modules() if isinstance(module, benchmark.PeerBlock)]
    rates = [getattr(block.drop, "drop_prob", None) or block.drop.p for block in peers]
    assert rates == pytest.approx([1 - p for p in survival])
    computed = []
    for branch in branches:
        branch.register_forward_hook(lambda *_: computed.append(1))
    network(torch.randn(2, 3, 32, 32))
    assert len(computed) == 9


def test_the_clock_of_the_stages(benchmark, monkeypatch):
    """The clock ticks whenever it is read. A forward or backward pass takes one tick, and each neighboring stage adds
    one, since both stages' backward passes read the clock at the tensor between them."""
    ticks = iter(range(1000))
    monkeypatch.setattr(benchmark, "now", lambda: next(ticks))
    network = timm.create_model("cifar_resnet20").train()
    seconds = benchmark.clock_stages(network)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert seconds == [3, 4, 3]
    assert next(ticks) == 12


def test_perfect_skipping(benchmark):
    assert benchmark.perfect_seconds(1.0, [0.4, 0.3, 0.2], [0.1, 0.2, 0.5]) == pytest.approx(1 - 0.04 - 0.06 - 0.1)


@pytest.mark.usefixtures("few_images", "registry")
def test_the_table(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "DEPTHS", (20, 26))
    monkeypatch.setattr(benchmark, "CHECKPOINTED_FROM", 20)
    benchmark.compare_steps("cifar_resnet20", 8, 2)
    benchmark.compare_depths(8, 2)
    out = capsys.readouterr().out
    for kind in ("constant depth", "stochastic depth, plain loop", "timm DropPath", "torchvision, mode batch"):
        assert f"\n{kind} " in out
    survival = [gate.survival for gate in gates(timm.create_model("cifar_resnet20_sd"))]
    opened = sum(draw_gates(survival, 0, t).sum().item() for t in (0, 1))
    rows = {line[:48].strip(): line[48:].split() for line in out.splitlines() if line.startswith("cifar_resnet2")}
    assert float(rows["cifar_resnet20, stochastic depth"][0]) == pytest.approx(opened / 2)
    assert float(rows["cifar_resnet20, constant depth"][0]) == 9
    seconds = float(rows["cifar_resnet20, constant depth"][1])
    assert float(rows["cifar_resnet20, constant depth"][2]) == pytest.approx(1000 * seconds / 9, rel=0.05)
    kinds = ["constant depth", "stochastic depth"]
    checkpointed = [f"{kind}, checkpointing" for kind in kinds]
    deeper = [f"cifar_resnet26, {kind}" for kind in checkpointed]
    assert list(rows) == [*(f"cifar_resnet20, {kind}" for kind in [*kinds, *checkpointed]), *deeper]
    for row in deeper:
        assert float(rows[row][4]) == pytest.approx(float(rows[row][3]) / 12, abs=0.05)


def vit_blocks(drop_path):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(16, 2, drop_path=drop_path, init_values=0.5) for _ in range(2))).train()


def test_dinov2_form_is_mode_count(peers):
    """Where B p is an integer: with the same seed it keeps the same samples, so outputs and gradients are equal."""
    networks = [skip_drop_path(vit_blocks(0.5), "count"), nn.Sequential(*map(peers.DinoV2Block, vit_blocks(0.5)))]
    x = torch.randn(8, 5, 16)
    results = []
    for network in networks:
        torch.manual_seed(1)
        output = network(x)
        output.square().sum().backward()
        # Sorted by norm, since the parameters' names and order differ.
        gradients = sorted((p.grad.flatten() for p in network.parameters()), key=lambda g: g.norm().item())
        results.append([output, *gradients])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rate", "computed"), [(0.4, 4), (0.95, 1), (0.1, 8)])
def test_dinov2_form_computes_only_the_kept_samples(peers, rate, computed):
    """Except at rates of up to 0.1, for which DINOv2 uses DropPath."""
    (block, _) = vit_blocks(rate)
    peer = peers.DinoV2Block(copy.deepcopy(block))
    with FlopCounterMode(display=False) as counted:
        peer(torch.randn(8, 5, 16)).sum().backward()
    with FlopCounterMode(display=False) as expected:
        block(torch.randn(computed, 5, 16)).sum().backward()
    assert counted.get_total_flops() == expected.get_total_flops() > 0


@pytest.mark.parametrize("model", ["test_convnext", "resnet18"])
def test_backward_flops_of_convolutions(peers, model):
    """Twice those of the forward pass, except for the first convolution, whose input needs no gradient."""
    network = timm.create_model(model)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    x = torch.randn(1, *network.pretrained_cfg["input_size"])
    with FlopCounterMode(display=False) as forward:
        network(x)
    with FlopCounterMode(display=False) as without_gradient:
        first(x)
    counted = peers.count_flops("no drop path", model, 0.0, 1, [0])
    assert counted == 3 * forward.get_total_flops() - without_gradient.get_total_flops()


def test_kinds_of_a_model(peers):
    assert peers.kinds("test_vit") == ["no drop path", "DropPath", "DINOv2's form", "row", "count", "batch"]
    assert peers.kinds("test_convnext") == ["no drop path", "DropPath", "row", "count", "batch"]
    assert peers.kinds("resnet18") == ["no drop path", "DropPath", "batch"]
    for model in ("vit_of_nobody", "resnet50.nope", "vgg11", "vit_small_patch14_dinov2"):
        with pytest.raises(UserError, match=f"--timm-models {model}: "):
            peers.kinds(model)


def test_what_is_dropped(peers):
    survival = [0.6, 0.95]
    shares = {kind: peers.dropped(kind, survival, 8, range(50)) for kind in peers.kinds("test_vit")}
    assert shares["no drop path"] == [0, 0]
    assert shares["DropPath"] == pytest.approx([0.4, 0.05])
    assert shares["DINOv2's form"] == pytest.approx([1 - 4 / 8, 0.05])
    assert shares["count"] == pytest.approx([1 - 5 / 8, 0])  # 4.8 and 7.6 of 8
    drawn = [draw_gates(survival, 0, t, 8) for t in range(50)]
    assert shares["row"] == pytest.approx((1 - torch.stack(drawn).double().mean((0, 2))).tolist())
    drawn = torch.stack([draw_gates(survival, 0, t) for t in range(50)])
    assert shares["batch"] == pytest.approx((1 - drawn.double().mean(0)).tolist())
    assert drawn[peers.fullest_step("batch", survival, 8, 50)].all()


def test_the_clock_of_the_branches(peers):
    """The clock ticks whenever it is read, so a branch's forward pass takes one tick and its backward pass another."""
    ticks = count()
    step, seconds = peers.make_clocked_step("test_vit", 0.4, 2, lambda: next(ticks))
    calls = len(peers.survival_of("test_vit", 0.4))
    assert calls == len(seconds) > 2
    step(0)
    assert seconds == [2] * calls
    assert next(ticks) == 4 * calls


def test_savings(peers):
    """Savings are relative to no drop path, ratios to DropPath. The interval is 2.571 * 0.0209 / 2.1 / 6**0.5."""
    measured = {
        "no drop path": peers.Measured([1.9, 2.1] * 3, 2.0, 0.0, 5e9, 100),
        "DropPath": peers.Measured([2.0, 2.2] * 3, 1.6, 0.2, 5e9, 120),
        "row": peers.Measured([1.6, 1.8] * 3, 1.6, 0.2, 4e9, 90),
    }
    rows = [line.split() for line in peers.table(measured, batch_size=8).splitlines()[1:]]
    assert rows[0][3:] == ["2.000", "4.00", "0.952", "±0.003", "1.000", "100", "0.833", "0.000", "2.000", "-"]
    assert rows[1][-3:] == ["0.200", "1.600", "-25.0%"]
    assert rows[2][1:] == ["1.700", "4.71", "0.810", "±0.010", "0.800", "90", "0.750", "0.200", "1.600", "75.0%"]


@pytest.mark.usefixtures("_one_thread")
def test_timm_models_and_their_plot(benchmark, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "in_own_process", lambda *args: 100)  # peak memory
    plot = tmp_path / "timm.svg"
    benchmark.compare_timm(["test_vit"], [0.1, 0.4], 2, 2, plot)
    out = capsys.readouterr().out
    for rate, table in zip((0.1, 0.4), out.split("A training step of ")[1:], strict=True):
        assert table.startswith(f"test_vit at drop path rate {rate}, batch 2, 2 steps")
    rows = {line[:14].strip(): line[14:].split() for line in table.splitlines()[2:8]}
    assert list(rows) == ["no drop path", "DropPath", "DINOv2's form", "row", "count", "batch"]
    flops = {kind: float(row[4]) for kind, row in rows.items()}
    assert flops["no drop path"] == flops["DropPath"] == flops["count"] == 1  # of two samples, it drops none at 0.1
    assert 1 > flops["DINOv2's form"] > 0.5
    assert plot.read_text().startswith("<?xml")


def test_what_the_plot_shows(peers):
    def of_kind(seconds, perfect):
        return peers.Measured([seconds] * 2, perfect, 0.2, 1e9, 100)

    vit = {
        "no drop path": of_kind(1.9, 1.9),
        "DropPath": of_kind(2.0, 1.5),
        "DINOv2's form": of_kind(1.8, 1.5),
        "batch": of_kind(1.6, 1.5),
        "row": of_kind(1.7, 1.5),
        "count": of_kind(1.5, 1.4),
    }
    resnet = {kind: vit[kind] for kind in ("no drop path", "DropPath", "batch")}
    figure = peers.draw_times({"vit_small_patch16_224": vit, "resnet50": resnet}, 0.4)
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1, 0.85, 0.75, 0.8, 1, 0.8])
    perfect = [lines.get_segments()[0][0][1] for lines in axes.collections]
    assert perfect == pytest.approx([0.75, 0.7, 0.75, 0.75])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["vit_small", "resnet50"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["timm's DropPath", 'mode "row"', 'mode "count"', 'mode "batch"', "perfect skipping"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--timm-rates", "0"],
        ["--timm-steps", "1"],
        ["--parts", "step", "--plot", "timm.svg"],
        ["--plot", "timm.xyz"],
        ["--plot", "nowhere/timm.svg"],
    ],
)
def test_flags_are_checked_before_anything_is_measured(command, flags):
    status, _, err = command("benchmark", *flags)
    assert status == 2
    assert err.startswith(f"benchmark.py: {flags[-2]}")
    assert err.count("\n") == 1


def test_timm_models_are_checked_before_anything_is_measured(command, tmp_path):
    flags = ["--data-dir", tmp_path, "--timm-models", "test_vit", "vgg11"]  # without data, the first part would fail
    status, out, err = command("benchmark", *flags)
    assert (status, out) == (1, "")
    assert err.startswith("benchmark.py: --timm-models vgg11: ")
    assert err.count("\n") == 1
