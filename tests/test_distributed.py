"""A run in two processes against the same run computed by hand in one."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from by_hand import REGULARIZERS, assert_metrics_are_close, protocol_by_hand
from conftest import SCRIPTS, in_processes
from safetensors.torch import load_file

from timm_sd.errors import UserError
from timm_sd.train import data, machine, processes, training
from timm_sd.train.learner import Learner
from timm_sd.train.options import Options
from timm_sd.train.run_folder import RunFolder

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def torchrun(program, *arguments):
    """Run a program in two processes; return the exit status and standard error."""
    done = subprocess.run(
        [*TORCHRUN, program, *arguments],
        env=os.environ | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


def launch(output, *arguments):
    """Run `runs.noted` in two forked processes; return their exit statuses and what each wrote to standard error."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    errors = [output.with_name(f"errors{rank}") for rank in (0, 1)]
    for file in errors:
        file.write_text("")
    every = [(rank, store.port, errors[rank], output, *arguments) for rank in (0, 1)]
    return in_processes(runs.noted_without_torchrun, *every), [file.read_text() for file in errors]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run in two processes, what each process noted, and what they wrote to standard error."""
    folder = tmp_path_factory.mktemp("distributed") / "run"
    status, errors = torchrun(runs.__file__, folder)
    assert status == 0, errors
    notes = [json.loads(Path(f"{folder}-rank{rank}.json").read_text()) for rank in (0, 1)]
    return folder, notes, errors


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in lines
    ]


def test_two_processes_agree(run):
    _, (first, second), errors = run
    assert [notes["processes"] for notes in (first, second)] == [2, 2]
    assert first["wrapper"] == "DistributedDataParallel"
    assert not first["unused"]
    assert first["parameters"] == second["parameters"]
    assert first["buffers"] == second["buffers"]
    assert [step["gates"] for step in first["steps"]] == [step["gates"] for step in second["steps"]]
    assert "arning" not in errors


def test_every_training_image_once_per_epoch(run):
    _, notes, _ = run
    learning, _ = runs.uneven("synthetic", None)
    training_set, _ = data.split(learning, seed=0, dataset="synthetic")
    for epoch in (0, 1):
        steps = [note["steps"][3 * epoch : 3 * epoch + 3] for note in notes]
        assert [[len(step["labels"]) for step in steps[rank]] for rank in (0, 1)] == [[32, 32, 30], [32, 32, 31]]
        assert [step["of"] for step in steps[0]] == [64, 64, 61]
        labels = [label for rank in (0, 1) for step in steps[rank] for label in step["labels"]]
        assert sorted(labels) == sorted(training_set.labels.tolist())
        means = {mean for rank in (0, 1) for step in steps[rank] for mean in step["images"]}
        assert len(means) == len(training_set)


def test_the_run_follows_the_protocol(run):
    """Mean gradients over unevenly divided batches, statistics of each process (the first's are kept), and metrics."""
    folder, _, _ = run
    options = Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=64)
    states, history = protocol_by_hand(options, *runs.uneven("synthetic", None), processes=2)
    for line, expected in zip(metrics(folder), history, strict=True):
        assert_metrics_are_close(line, expected)
    best = min(range(2), key=lambda index: history[index]["validation_error"])
    saved = load_file(folder / "model.safetensors")
    torch.testing.assert_close(saved, states[best], rtol=1e-3, atol=1e-4)
    last = load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")
    torch.testing.assert_close(last, states[1], rtol=1e-3, atol=1e-4)


def test_regularizers(tmp_path):
    """They are drawn for the whole batch as in one process, also after a signal to one process and resuming."""
    folder, arguments = tmp_path / "run", json.dumps(REGULARIZERS)
    statuses, errors = launch(folder, "SIGTERM", "1", "1", arguments)
    assert statuses == [1, 1], errors
    assert "UserError: stopped by SIGTERM in epoch 1 after 2 steps" in errors[0]
    statuses, errors = launch(folder, "", "", "", arguments)
    assert statuses == [0, 0], errors
    notes = [json.loads(Path(f"{folder}-rank{rank}.json").read_text()) for rank in (0, 1)]
    assert notes[0]["buffers"] == notes[1]["buffers"]
    options = Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=64, **REGULARIZERS)
    states, history = protocol_by_hand(options, *runs.uneven("synthetic", None), processes=2)
    for line, expected in zip(metrics(folder), history, strict=True):
        assert_metrics_are_close(line, expected)
    best = min(range(2), key=lambda index: history[index]["validation_error"])
    torch.testing.assert_close(load_file(folder / "model.safetensors"), states[best], rtol=1e-3, atol=1e-4)


def test_interrupted_and_resumed(run, tmp_path, monkeypatch):
    """A signal to one process stops both within an epoch, and later one is killed; the final result is the same."""
    folder, notes, _ = run
    interrupted = tmp_path / "run"
    statuses, errors = launch(interrupted, "SIGTERM", "1", "1")
    assert statuses == [1, 1], errors
    for text in errors:
        assert "UserError: stopped by SIGTERM in epoch 1 after 2 steps" in text
    (checkpoint,) = (interrupted / "checkpoints").iterdir()
    assert checkpoint.name == "epoch-00001-step-000002"
    sums = json.loads((checkpoint / "progress.json").read_text())["sums"]
    assert len(sums) == 2
    assert sums[0] != sums[1]

    # A single process continues from the sums of two.
    shutil.copytree(interrupted, tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", runs.uneven)
        options = Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=64, resume=True)
        copy = RunFolder(tmp_path / "alone")
        options, accelerator = replace(options, output=copy.path), Accelerator()
        alone = Learner(accelerator, options)
        training.Run(accelerator, options, copy, alone).begin()
    copy.close()
    assert alone.sums.tolist() == pytest.approx([first + second for first, second in zip(*sums, strict=True)])

    status, errors = torchrun(runs.__file__, interrupted, "SIGKILL", "1", "2")
    assert status != 0
    assert "Signal 9 (SIGKILL)" in errors
    assert max((interrupted / "checkpoints").iterdir()).name == "epoch-00002-step-000000"
    statuses, errors = launch(interrupted)
    assert statuses == [0, 0], errors
    assert (interrupted / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(interrupted) == metrics(folder)
    for rank, expected in enumerate(notes):
        resumed = json.loads((tmp_path / f"run-rank{rank}.json").read_text())
        assert len(resumed["steps"]) == 3
        assert resumed["parameters"] == expected["parameters"]


def test_missing_data_is_reported_once(tmp_path):
    status, errors = torchrun(SCRIPTS / "train.py", "--data-dir", tmp_path, "--output", tmp_path / "run")
    assert status != 0
    assert errors.count("train.py: cifar10 is missing or corrupt") == 1
    assert "barrier" not in errors
    assert not (tmp_path / "run").exists()


def test_gradients_are_summed_in_order_of_rank(monkeypatch):
    """In float32, 1e8 + 1 - 1e8 is 0, but 1 if the large terms are added first."""
    parts = [torch.tensor([value]) for value in (1e8, 1.0, -1e8)]

    future = torch.futures.Future()
    future.set_result(None)

    def all_gather(outputs, mine, async_op):
        for output, part in zip(outputs, parts, strict=True):
            output.copy_(part)
        return SimpleNamespace(get_future=lambda: future)

    class Bucket:
        def buffer(self):
            return parts[0].clone()

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    assert processes.mean_in_order(None, Bucket()).wait().tolist() == [0.0]
    parts.reverse()
    parts.append(parts.pop(1))
    assert processes.mean_in_order(None, Bucket()).wait().tolist() == pytest.approx([1 / 3])
    future = torch.futures.Future()
    future.set_exception(RuntimeError("a process is gone"))
    with pytest.raises(RuntimeError, match="a process is gone"):
        processes.mean_in_order(None, Bucket()).wait()


class Processes:
    """Stands in for an Accelerator with several processes."""

    mixed_precision, gradient_accumulation_steps, device = "no", 1, torch.device("cpu")

    def __init__(self, num_processes, distributed_type=DistributedType.MULTI_CPU):
        self.num_processes = num_processes
        self.distributed_type = distributed_type


@pytest.mark.parametrize(
    ("processes", "kwargs", "message"),
    [
        (3, dict(batch_size=128), "--batch-size 128: .* all 3 processes together.* divisible"),
        (2, dict(sync_bn=True), "--sync-bn: PyTorch supports it on GPUs only"),
        (2, dict(cuda_graphs=True), "--cuda-graphs: it works only in one process"),
    ],
)
def test_options_for_one_process_are_refused(monkeypatch, processes, kwargs, message):
    monkeypatch.setattr(machine, "Accelerator", lambda **_: Processes(processes))
    with pytest.raises(UserError, match=message):
        training.train(Options("cifar_resnet20_sd", "synthetic", **kwargs))


def test_fsdp_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "Accelerator", lambda **_: Processes(2, DistributedType.FSDP))
    with pytest.raises(UserError, match="FSDP is not supported: launch with --multi_gpu"):
        training.train(Options("cifar_resnet20_sd", "synthetic"))
