"""What the benchmark compares is what it says it compares."""

import importlib.util

import pytest
import timm
import torch
from conftest import SCRIPTS

from timm_sd import draw_gates, stochastic_blocks


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPTS / "benchmark.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "in_own_process", lambda function, *args: function(*args))
    return script


@pytest.mark.parametrize("peer", ["timm DropPath", "torchvision, mode batch"])
def test_peers_compute_what_they_drop(benchmark, peer):
    """Each branch runs in every training step, with its block's probability of being dropped."""
    network = timm.create_model("cifar_resnet20_sd").train()
    survival = network.survival_probabilities
    branches = [block.branch for block in stochastic_blocks(network)]
    benchmark.put_in(network, benchmark.PEERS[peer])
    assert not stochastic_blocks(network)
    peers = [module for module in network.modules() if isinstance(module, benchmark.PeerBlock)]
    rates = [getattr(block.drop, "drop_prob", None) or block.drop.p for block in peers]
    assert rates == pytest.approx([1 - p for p in survival])
    computed = []
    for branch in branches:
        branch.register_forward_hook(lambda *_: computed.append(1))
    network(torch.randn(2, 3, 32, 32))
    assert len(computed) == 9


def test_the_clock_of_the_stages(benchmark, monkeypatch):
    """With a clock that ticks whenever it is read: a tick for each forward and backward, and one more for each
    neighbour whose backward begins or ends at the same tensor."""
    ticks = iter(range(1000))
    monkeypatch.setattr(benchmark, "now", lambda: next(ticks))
    network = timm.create_model("cifar_resnet20").train()
    seconds = benchmark.clock_stages(network)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert seconds == [3, 4, 3]
    assert next(ticks) == 12


def test_perfect_skipping(benchmark):
    assert benchmark.perfect_seconds(1.0, [0.4, 0.3, 0.2], [0.1, 0.2, 0.5]) == pytest.approx(1 - 0.04 - 0.06 - 0.1)


def test_the_table(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "DEPTHS", (20,))
    benchmark.compare_steps("cifar_resnet20", 8, 2)
    benchmark.compare_depths(8, 2)
    out = capsys.readouterr().out
    for kind in ("constant depth", "stochastic depth, plain loop", "timm DropPath", "torchvision, mode batch"):
        assert f"\n{kind} " in out
    gates = torch.stack(
        [draw_gates(timm.create_model("cifar_resnet20_sd").survival_probabilities, 0, t) for t in (0, 1)]
    )
    rows = {line[:48].strip(): line[48:].split() for line in out.splitlines() if line.startswith("cifar_resnet20,")}
    assert float(rows["cifar_resnet20, stochastic depth"][0]) == pytest.approx(gates.sum().item() / 2)
    assert float(rows["cifar_resnet20, constant depth"][0]) == 9
    seconds = float(rows["cifar_resnet20, constant depth"][1])
    assert float(rows["cifar_resnet20, constant depth"][2]) == pytest.approx(1000 * seconds / 9, rel=0.05)
