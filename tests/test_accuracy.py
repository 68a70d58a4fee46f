"""The study of accuracy: its runs, and its page."""

import importlib
import json
import math
import statistics

import pytest
import torch
from conftest import SCRIPTS
from runs import load_few
from timm.layers import DropPath

from timm_sd.train import data


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    for name in ("accuracy", "benchmark_timm", "start"):
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)
    few = load_few(300, 50)
    monkeypatch.setattr(data, "load", lambda *_: few("synthetic", None))
    module = importlib.import_module("accuracy")
    monkeypatch.setattr(module, "EPOCHS", 2)
    monkeypatch.setattr(module, "EXACT_STEPS", 3)
    return module


def test_arms_differ_only_in_their_drop_path(accuracy):
    networks = [accuracy.make_network("ViT", arm, seed=3) for arm in accuracy.ARMS]
    first, *others = (network.state_dict() for network in networks)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    rates = [[m.drop_prob for m in network.modules() if isinstance(m, DropPath)] for network in networks]
    assert rates[:-1] == [pytest.approx([0.04 * (i // 2 + 1) for i in range(10)])] * 4
    assert rates[-1] == []


def test_the_learning_rate(accuracy):
    optimizer, schedule = accuracy.make_optimizer(accuracy.make_network("ViT", "DropPath", 0), steps=100, warmup=20)
    seen = []
    for step in range(100):
        schedule(step)
        seen.append(optimizer.param_groups[0]["lr"])
    peak = accuracy.LEARNING_RATE
    assert seen[:20] == pytest.approx([peak * (step + 1) / 20 for step in range(20)])
    assert seen[60] == pytest.approx(peak / 2)
    assert seen[-1] == pytest.approx(peak * (1 + math.cos(math.pi * 79 / 80)) / 2)


@pytest.mark.parametrize(("arm", "least", "most"), [("DropPath", 1, 1), ("count", 0.88, 0.95), ("no drop path", 1, 1)])
def test_a_run(accuracy, arm, least, most):
    run = accuracy.run(("ConvNeXt", arm, 1), data_dir=None)
    again = accuracy.run(("ConvNeXt", arm, 1), data_dir=None)
    assert again | {"seconds": run["seconds"]} == run, "it is no function of its seed"
    assert (run["network"], run["arm"], run["seed"]) == ("ConvNeXt", arm, 1)
    assert len(run["errors"]) == len(run["losses"]) == 2
    assert run["losses"][1] < run["losses"][0]
    assert least <= run["flops"] <= most


@pytest.mark.parametrize("mode", ["row", "count", "batch"])
def test_the_same_gates_have_the_same_losses(accuracy, mode, monkeypatch):
    run = accuracy.run(("ViT", mode, None), None)
    assert run["difference"] < 1e-12
    assert run["seed"] is None
    # It would be seen if they differed.
    monkeypatch.setattr(accuracy.GivenDropPath, "forward", lambda self, x: x)
    assert accuracy.run(("ViT", mode, None), None)["difference"] > 1e-6


def test_the_page(accuracy, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    status, _, err = command("accuracy_page")
    assert status == 1
    assert err.startswith("accuracy_page.py: results/accuracy.jsonl has no run of ('ViT', 'DropPath', 0) and 55 others")
    finals = {"DropPath": [40, 42, 41, 43, 44], "row": [40.5, 42.5, 40.5, 43.5, 43.5], "count": [45, 47, 46, 48, 49.1]}
    runs = [
        dict(network=network, arm=arm, seed=seed, errors=[60, final], flops=0.9, torch="2.14.1+cpu", timm="1")
        for network in ("ViT", "ConvNeXt")
        for arm in ("DropPath", "row", "count", "batch", "no drop path")
        for seed, final in enumerate(finals.get(arm, [30, 50, 40, 35, 41]))
    ]
    modes = ("row", "count", "batch")
    runs += [dict(network=n, arm=m, seed=None, difference=3e-16) for n in ("ViT", "ConvNeXt") for m in modes]
    (tmp_path / "results" / "accuracy.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert command("accuracy_page")[0] == 0
    rows = [line.split(" | ") for line in (tmp_path / "docs" / "accuracy.md").read_text().splitlines() if " ± " in line]
    differences = [ours - theirs for ours, theirs in zip(finals["row"], finals["DropPath"], strict=True)]
    half = 2.776 * statistics.stdev(differences) / 5**0.5
    assert rows[1][2:4] == [f"{statistics.mean(differences):+.2f} ± {half:.2f}", "yes"]
    assert [row[3] for row in rows[:5]] == ["", "yes", "no", "not shown", "not shown"]
    assert "| ViT | 3e-16 | 3e-16 | 3e-16 |" in (tmp_path / "docs" / "accuracy.md").read_text()
