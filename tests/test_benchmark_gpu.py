"""What `benchmark.py --gpu` does around its measurements: parts that fail, results that add up, tables and the plot."""

import argparse
import importlib
import json
import time
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS
from torch import nn

ABOUT = dict(device="NVIDIA H100", versions=dict(torch="2.11.0", triton="3.6.0"), git_commit=None)
STEPS = dict(
    batch_size=128,
    steps=200,
    constant=dict(eager=48.0, cuda_graphs=12.0, fused=3.0, intervals=dict(eager=0.2, cuda_graphs=0.1, fused=0.05)),
    stochastic_depth=dict(eager=42.0, fused=2.4, intervals=dict(eager=0.3, fused=0.04)),
)
BLOCK = dict(errors=dict(out=2e-3, dx=None), limit=0.02)
STEP = dict(engine=dict(gradient=0.11, loss=1e-4), autograd=dict(gradient=0.12, loss=2e-4), bit_equal=True)
EPOCH = dict(seconds=1.1, train_loss=1.5, train_error=55.0, validation_error=50.0, test_error=49.5)
KERNELS = dict(launches=6.0, microseconds=1234.5, kernels={"convolve": dict(launches=2.0, microseconds=1000.0)})
ROW = dict(ms=90.0, ratio=0.9, interval=0.01, mib=40000.0, saved=0.97)
VIT = {"0.4": dict(batch_size=256, steps=12, kinds={"DropPath": ROW | dict(ratio=1.0, saved=None), "row": ROW})}


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """The module that makes tables, with its files in a folder of their own."""
    module = importlib.import_module("benchmark_gpu_tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(module, "PLOT", tmp_path / "gpu-speed.svg")
    return module


@pytest.fixture
def gpu(monkeypatch, shown):
    """The command, with parts that a test sets, as if on a GPU."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds for Linux only")
    module = importlib.import_module("benchmark_gpu")
    monkeypatch.setattr(module, "RESULTS", shown.RESULTS)
    monkeypatch.setattr(module, "start", lambda: False)
    monkeypatch.setattr(module, "about", lambda: dict(ABOUT))
    return module


def cells(text, first):
    """The rows of tables that begin so."""
    lines = (line for line in text.splitlines() if line.startswith(f"| {first}"))
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]


def test_tables_and_plot(shown, capsys):
    results = ABOUT | dict(
        kernels={"block of 16 to 16 channels, batch 128": BLOCK},
        network=dict(cifar_resnet110_sd=STEP),
        step_ms=STEPS,
        epochs=dict(dataset="cifar10", stochastic_depth=dict(fused=[EPOCH])),
        profile=dict(fused=KERNELS),
        timm_models=dict(vit_base_patch16_224=dict(eager=VIT)),
        failed=dict(kernels="ValueError: no"),
    )
    shown.RESULTS.write_text(json.dumps(results))
    shown.show()
    out = capsys.readouterr().out
    assert out.startswith("NVIDIA H100, torch 2.11.0, triton 3.6.0\n")
    assert cells(out, "block of") == [["out 2.0e-03, dx NaN", "0.02", "**no**"]]
    assert cells(out, "`cifar_resnet110_sd`") == [["1.1e-01 (1.2e-01)", "1.0e-04 (2.0e-04)", "yes"]]
    assert cells(out, "ms per step") == [["constant depth", "stochastic depth", "ratio"]]
    assert cells(out, "eager") == [["48.00 ± 0.20", "42.00 ± 0.30", "0.875"]]
    assert cells(out, "`--cuda-graphs`") == [["12.00 ± 0.10", "", ""]]
    assert cells(out, "stochastic depth") == [["`--fused`", "1", "1.10", "1.5000", "55.00%", "50.00%", "49.50%"]]
    assert cells(out, "`convolve`") == [["2", "1000"]]
    assert cells(out, "row") == [["90.0", "0.900 ± 0.010", "40,000", "97%"]]
    assert "- kernels: ValueError: no\n" in out
    svg = shown.PLOT.read_text()
    for text in ("48.0", "2.4", "constant depth", "NVIDIA H100"):
        assert f"{text} -->" in svg


def test_what_has_not_run_is_not_shown(shown):
    assert shown.tables(ABOUT | dict(step_ms=STEPS)).count("\n\n") == 1  # a heading and a table
    figure = shown.draw_steps({name: STEPS[name] for name in ("batch_size", "stochastic_depth")}, "NVIDIA H100")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [42.0, 2.4]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["eager", "--cuda-graphs", "--fused"]


def test_results_of_the_same_machine_add_up(gpu):
    old = ABOUT | dict(
        step_ms=1, epochs=2, timm_models=dict(one=dict(eager=1)), failed=dict(network="no", epochs="out of time")
    )
    new = ABOUT | dict(epochs=3, timm_models=dict(one=dict(compiled=2), other={}), failed=dict(profile="why"))
    assert gpu.merged(old, new) == ABOUT | dict(
        step_ms=1,
        epochs=3,
        timm_models=dict(one=dict(eager=1, compiled=2), other={}),
        failed=dict(network="no", profile="why"),
    )
    assert gpu.merged(old, ABOUT) == old
    for other in (dict(device="NVIDIA H200"), dict(versions={})):
        assert gpu.merged(old, new | other) == new | other
    assert gpu.merged({}, ABOUT) == ABOUT


def run(gpu, monkeypatch, parts, minutes=4.0, models=None):
    monkeypatch.setattr(gpu, "make_parts", lambda sizes, data_dir, models: parts)
    gpu.run(argparse.Namespace(minutes=minutes, gpu_models=models, data_dir=None))


def test_a_part_that_fails_is_recorded_and_the_rest_go_on(gpu, monkeypatch, capsys):
    def fail(until, found):
        found.update(constant=dict(intervals={}))
        raise RuntimeError("this\nkernel is wrong")

    parts = {name: lambda until, found: None for name in gpu.SHARES}
    parts |= dict(network=fail, step_ms=lambda until, found: found.update(STEPS))
    gpu.RESULTS.write_text(json.dumps(ABOUT | dict(timm_models=dict(vit_base_patch16_224=dict(eager=VIT)))))
    run(gpu, monkeypatch, parts | dict(network=lambda until, found: fail(until, {})))
    results = json.loads(gpu.RESULTS.read_text())
    assert results == ABOUT | dict(
        failed=dict(network="RuntimeError: this kernel is wrong"),
        step_ms=STEPS,
        timm_models=dict(vit_base_patch16_224=dict(eager=VIT)),
    )
    out = capsys.readouterr().out
    assert out.count("RuntimeError: this kernel is wrong\n") == 2  # when it happens, and below the tables
    assert cells(out, "eager")
    assert "vit_base" not in out  # which this run has not measured


def test_parts_share_the_time_and_save_what_they_find(gpu, monkeypatch):
    limits = {}
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 1000.0))

    def part(name, until, found):
        limits[name] = until - 1000
        assert (name == "kernels") == (not gpu.RESULTS.exists())

    parts = {name: lambda until, found, name=name: part(name, until, found) for name in gpu.SHARES}
    run(gpu, monkeypatch, parts, minutes=10)
    assert list(limits) == list(gpu.SHARES)
    assert limits["kernels"] == pytest.approx(600 * gpu.SHARES["kernels"] / sum(gpu.SHARES.values()))
    assert limits["timm_models"] == pytest.approx(600)  # the others have taken none
    gpu.RESULTS.unlink()
    limits.clear()
    run(gpu, monkeypatch, dict(timm_models=parts["kernels"]), models=["test_vit"])  # only these
    assert list(limits) == ["kernels"]


def test_the_rest_runs_in_another_process_if_the_gpu_is_lost(gpu, monkeypatch):
    ran, processes = [], []

    class Executor:
        """Calls functions in this process, where the GPU has come back."""

        def __init__(self, *_):
            processes.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *args):
            future = Future()
            future.set_result(function(*args))
            return future

    def part(name, until, found):
        ran.append((name, len(processes)))
        if name == "step_ms":
            found.update(STEPS)

    monkeypatch.setattr(gpu, "ProcessPoolExecutor", Executor)
    monkeypatch.setattr(gpu, "gpu_is_lost", lambda: len(ran) == 2 and not processes)
    run(gpu, monkeypatch, {name: partial(part, name) for name in gpu.SHARES})
    assert [name for name, _ in ran] == list(gpu.SHARES)
    assert [process for _, process in ran] == [0, 0, 1, 1, 1, 1]
    assert json.loads(gpu.RESULTS.read_text())["step_ms"] == STEPS


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--gpu"], "--gpu: it needs an NVIDIA GPU and no TRITON_INTERPRET"),
        (["--gpu-models", "vit_of_nobody"], "--gpu-models vit_of_nobody: timm has no such model"),
        (["--gpu-tables"], "gpu.json does not exist: run benchmark.py --gpu"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(command, monkeypatch, shown, flags, why):
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds for Linux only")
    monkeypatch.delenv("TRITON_INTERPRET")
    status, out, err = command("benchmark", *flags)
    assert (status, out) == (1, "")
    assert err.startswith("benchmark.py: ")
    assert why in err
    assert err.count("\n") == 1


def test_a_kind_of_step_that_fails_does_not_keep_others_from_being_timed(gpu, monkeypatch):
    module = importlib.import_module("benchmark_gpu_cifar")

    def make_step(model, kind, dataset, batch_size):
        if kind == "fused" or model == "deep":
            raise ValueError(f"not {kind}")
        return lambda t: None

    monkeypatch.setattr(module, "make_step", make_step)
    found = {}
    with pytest.raises(RuntimeError, match=r"^stochastic_depth, fused: ValueError: not fused$"):
        module.time_steps(dict(stochastic_depth="flat"), "synthetic", 4, 5, 2, time.monotonic() + 60, found)
    assert (found["batch_size"], found["steps"]) == (4, 10)
    assert found["stochastic_depth"].keys() == {"eager", "cuda_graphs", "intervals"}
    found.clear()
    with pytest.raises(RuntimeError, match=r"constant, eager: .*constant, cuda_graphs: .*constant, fused: "):
        module.time_steps(dict(constant="deep"), "synthetic", 4, 5, 2, time.monotonic() + 60, found)
    assert not found


def test_a_batch_that_fills_the_gpu(monkeypatch):
    """Throughput grows while a step takes a second, whatever its batch; then a step of 64 is as slow as two of 32."""
    module = importlib.import_module("benchmark_gpu_timm")
    clock = [0.0]
    monkeypatch.setattr(module, "now", lambda: clock[0])

    def make_step(size, fits=1024):
        def step(t):
            if size > fits:
                raise torch.OutOfMemoryError
            clock[0] += max(1.0, size / 32)

        return step

    assert module.full_batch(make_step, 4, 1024) == 32
    assert module.full_batch(make_step, 4, 16) == 16
    assert module.full_batch(lambda size: make_step(size, 8), 4, 1024) == 8
    with pytest.raises(torch.OutOfMemoryError):
        module.full_batch(lambda size: make_step(size, 2), 4, 1024)


def test_a_kind_that_fails_is_left_out():
    module = importlib.import_module("benchmark_gpu_timm")

    def fail(t):
        if t == 1:
            raise ValueError("no")

    steps, errors = {"no drop path": lambda t: None, "row": fail, "count": lambda t: None}, {}
    times, _ = module.take_turns(steps, errors, 3, time.monotonic() + 60)
    assert {kind: len(of_kind) for kind, of_kind in times.items()} == {"no drop path": 3, "count": 3}
    assert errors == {"row": "ValueError: no"}
    with pytest.raises(ValueError, match="no"):
        module.take_turns(steps | {"DropPath": fail}, {}, 3, time.monotonic() + 60)


def test_kinds_share_their_parameters():
    module = importlib.import_module("benchmark_gpu_timm")
    first, second = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    module.share_parameters(first, second)
    assert [*map(id, first.parameters())] == [*map(id, second.parameters())]
    assert first[1].running_mean is not second[1].running_mean


def test_what_a_kind_of_step_has_saved():
    """Without drop path a step takes 2 s, a second of it in a branch, of which half the samples are dropped."""
    module = importlib.import_module("benchmark_gpu_timm")
    times = {"no drop path": [2.0, 2.0], "DropPath": [2.1, 2.1], "clocked": [3.0, 3.0], "count": [1.6, 1.6]}
    found = module.summary(times, dict.fromkeys(times, 100.0), [1.0], [0.5], batch_size=8)
    assert list(found) == ["no drop path", "DropPath", "count"]
    assert found["count"] == pytest.approx(dict(ms=1600, ratio=1.6 / 2.1, interval=0, mib=100, saved=0.8))
    assert found["DropPath"]["saved"] is None
    del times["clocked"]
    assert module.summary(times, dict.fromkeys(times, 100.0), [0.0], [0.5], batch_size=8)["count"]["saved"] is None
