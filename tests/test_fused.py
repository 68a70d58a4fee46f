"""Whole runs by the engine, with its kernels in Triton's interpreter, against the same runs by autograd."""

import json
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch
from test_resume import end_of

from timm_sd.errors import UserError
from timm_sd.paper.datasets import DATASETS
from timm_sd.report.record import Record
from timm_sd.train import data, launch, run_folder, training
from timm_sd.train.learner import Learner
from timm_sd.train.options import Options

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds for Linux only")

from timm_sd.train.gpu import fused, inference

pytestmark = pytest.mark.usefixtures("registry")  # depths 8 and 14


@pytest.fixture
def in_the_interpreter(monkeypatch, large_tiles):
    """Runs with `fused=True` on the CPU, on five images in batches of two."""
    monkeypatch.setattr(launch, "check_fused", lambda accelerator: None)
    monkeypatch.setattr(data, "load", runs.load_few(6, 2))


def run(folder, **options):
    """Train a small network, and return the end of its run: see `end_of`."""
    training.train(
        Options(**dict(dataset="synthetic", epochs=2, batch_size=2, weight_decay=0.01, output=folder) | options)
    )
    return end_of(folder)


def assert_same_run(ours, theirs):
    """The same counts exactly, and the same numbers up to rounding, which may turn a ReLU or two."""
    tolerance = 5e-3
    for mine, yours in zip([*ours[0], ours[1]], [*theirs[0], theirs[1]], strict=True):
        assert mine.keys() == yours.keys()
        for name, value in mine.items():
            if name != "sha256":
                assert value == (
                    pytest.approx(yours[name], rel=tolerance) if isinstance(value, float) else yours[name]
                ), name
    for mine, yours in zip(ours[2:], theirs[2:], strict=True):
        assert mine.keys() == yours.keys()
        for name, value in mine.items():
            if "tracked" in str(name):
                assert value == yours[name], name
            else:
                a, b = (np.frombuffer(each, np.float32) for each in (value, yours[name]))
                assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name


def test_a_fused_run_is_the_same_run_and_resumes_in_either(in_the_interpreter, tmp_path, monkeypatch):
    """By the engine and by autograd; stopped within the second epoch, and resumed in the same way or the other."""
    options = dict(model="cifar_resnet8_sd", drop_path=0.9, seed=2)
    eager, whole = (run(tmp_path / name, fused=name == "fused", **options) for name in ("eager", "fused"))
    assert 1 < sum(line["active_blocks"] for line in eager[0]) < 5  # some are closed, and some open
    assert_same_run(whole, eager)
    assert Record.read(tmp_path / "fused").command == f"{Record.read(tmp_path / 'eager').command} --fused"
    for begin, go_on, last in ((True, True, 5), (True, False, 5), (False, True, 6)):
        folder = tmp_path / f"{begin}-{go_on}"
        kind = fused.FusedLearner if begin else Learner
        with monkeypatch.context() as patch:
            step, steps = kind.step, []

            def interrupted(self, *args, step=step, steps=steps, last=last):
                steps.append(1)
                if len(steps) == last:
                    os.kill(os.getpid(), signal.SIGTERM)
                step(self, *args)

            patch.setattr(kind, "step", interrupted)
            with pytest.raises(UserError, match=f"stopped by SIGTERM in epoch 2 after {last - 3} steps"):
                run(folder, fused=begin, **options)
        resumed = run(folder, fused=go_on, resume=True, **options)
        if begin and go_on:
            assert resumed == whole  # to the bit
        else:
            assert_same_run(resumed, eager)
        environments = json.loads((folder / "config.json").read_text())["environments"]
        assert [where["fused"] for where in environments] == [begin] + [go_on] * (begin != go_on)


def test_a_deeper_fused_run_without_augmentation_or_drops(in_the_interpreter, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "synthetic", replace(DATASETS["synthetic"], augmented=False))
    options = dict(model="cifar_resnet14", epochs=1, batch_size=20, lr=0.05)
    assert_same_run(*(run(tmp_path / str(fused), fused=fused, **options) for fused in (True, False)))


def test_a_slow_checkpoint_is_that_of_its_moment(in_the_interpreter, tmp_path, monkeypatch):
    """It is written after the next step, and yet has the progress and the learning rate of before."""
    options = dict(model="cifar_resnet8_sd", lr_schedule="one-cycle", drop_path=0.9)
    run(tmp_path / "eager", **options)
    stepped = threading.Event()
    save, step = run_folder.RunFolder.save, fused.FusedLearner.step

    def slow(folder, accelerator, progress, *args):
        if progress.epoch == 2:
            assert stepped.wait(60)
        save(folder, accelerator, progress, *args)

    steps = []

    def noted(self, *args):
        step(self, *args)
        steps.append(args)
        if len(steps) > self.steps:
            stepped.set()

    monkeypatch.setattr(run_folder.RunFolder, "save", slow)
    monkeypatch.setattr(fused.FusedLearner, "step", noted)
    monkeypatch.setattr(inference.Inference, "error", lambda *_: 50.0)  # takes most of the time
    run(tmp_path / "fused", fused=True, **options)

    def rate(kind: str, name: str) -> float:
        state = torch.load(tmp_path / kind / "checkpoints" / name / "optimizer.bin", weights_only=True)
        return state["param_groups"][0]["lr"]

    for name in ("epoch-00002-step-000000", "epoch-00003-step-000000"):
        assert rate("fused", name) == rate("eager", name)


def test_ctrl_c_while_the_last_checkpoint_is_written(in_the_interpreter, tmp_path, monkeypatch):
    """The folder stays locked until it is written."""
    save = run_folder.RunFolder.save

    def interrupted(folder, accelerator, progress, *args):
        os.kill(os.getpid(), signal.SIGINT)
        save(folder, accelerator, progress, *args)

    monkeypatch.setattr(run_folder.RunFolder, "save", interrupted)
    monkeypatch.setattr(inference.Inference, "error", lambda *_: 50.0)
    run(tmp_path, model="cifar_resnet8_sd", fused=True, epochs=1)
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(in_the_interpreter, tmp_path, monkeypatch, stopped):
    """The next epoch's end says so, or the signal that stops the run."""

    def full(*args):
        raise OSError(28, "No space left on device")

    step, steps = fused.FusedLearner.step, []

    def interrupted(self, *args):
        steps.append(args)
        if stopped and len(steps) > self.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, *args)

    monkeypatch.setattr(fused.FusedLearner, "step", interrupted)
    monkeypatch.setattr(run_folder, "save_file", full)
    monkeypatch.setattr(inference.Inference, "error", lambda *_: 50.0)
    with pytest.raises(UserError, match="No space left on device"):
        run(tmp_path, model="cifar_resnet8_sd", fused=True, epochs=3, batch_size=5)


@pytest.mark.parametrize(
    "options",
    [dict(mixup=0.2), dict(ema_decay=0.9), dict(dropout=0.1), dict(grad_checkpointing=True), dict(cuda_graphs=True)],
)
def test_options_that_it_does_without(options):
    (name,) = options
    with pytest.raises(UserError, match=f"--fused does without --{name.replace('_', '-')}: omit one or the other"):
        Options(fused=True, **options)


def test_it_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="--fused: it needs an NVIDIA GPU; omit it"):
        training.train(Options("cifar_resnet8_sd", "synthetic", fused=True, output=tmp_path))
