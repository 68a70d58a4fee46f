"""A run in two processes, compared with its computation by hand in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from by_hand import assert_figures_are_close, protocol_by_hand
from safetensors.torch import load_file

from timm_sd import data, training
from timm_sd.errors import UserError
from timm_sd.options import Options

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PROGRAM = Path(__file__).with_name("two_processes.py")


def launch(output, kill_rank="none", kill_step="none"):
    """Run the program in two processes; its exit status and error output."""
    done = subprocess.run(
        [*TORCHRUN, PROGRAM, output, kill_rank, kill_step],
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run in two processes, what each process noted, and what they printed as errors and warnings."""
    folder = tmp_path_factory.mktemp("distributed") / "run"
    status, errors = launch(folder)
    assert status == 0, errors
    notes = [json.loads(Path(f"{folder}-rank{rank}.json").read_text()) for rank in (0, 1)]
    return folder, notes, errors


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in lines
    ]


def test_there_are_two_processes_that_agree(run):
    _, (first, second), errors = run
    assert [notes["processes"] for notes in (first, second)] == [2, 2]
    assert first["wrapper"] == "DistributedDataParallel"
    assert not first["unused"]
    assert first["parameters"] == second["parameters"]
    assert first["buffers"] == second["buffers"]
    assert [step["gates"] for step in first["steps"]] == [step["gates"] for step in second["steps"]]
    assert "arning" not in errors


def test_every_training_image_once_an_epoch(run):
    _, notes, _ = run
    training_set, _ = data.split(data.load("synthetic", None)[0][:210], seed=0)
    for epoch in (0, 1):
        steps = [note["steps"][3 * epoch : 3 * epoch + 3] for note in notes]
        assert [[len(step["labels"]) for step in steps[rank]] for rank in (0, 1)] == [[32, 32, 30], [32, 32, 31]]
        assert [step["of"] for step in steps[0]] == [64, 64, 61]
        labels = [label for rank in (0, 1) for step in steps[rank] for label in step["labels"]]
        assert sorted(labels) == sorted(training_set.labels.tolist())
        means = {mean for rank in (0, 1) for step in steps[rank] for mean in step["images"]}
        assert len(means) == len(training_set)


def test_it_is_the_protocol(run):
    """The mean gradient over an unevenly divided batch, statistics a process, those of the first kept, and figures."""
    folder, _, _ = run
    options = Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=64)
    learning, test = data.load("synthetic", None)
    states, history = protocol_by_hand(options, learning[:210], test[:51], processes=2)
    for line, figures in zip(metrics(folder), history, strict=True):
        assert_figures_are_close(line, figures)
    best = min(range(2), key=lambda index: history[index]["validation_error"])
    saved = load_file(folder / "model.safetensors")
    torch.testing.assert_close(saved, states[best], rtol=1e-3, atol=1e-4)
    last = load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")
    torch.testing.assert_close(last, states[1], rtol=1e-3, atol=1e-4)


def test_killed_and_resumed(run, tmp_path):
    """One process dies in the fifth step, the other is ended by the launcher, and both go on to the same end."""
    folder, notes, _ = run
    status, _ = launch(tmp_path / "run", "1", "4")
    assert status != 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-00002-step-000000"]
    status, errors = launch(tmp_path / "run")
    assert status == 0, errors
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(tmp_path / "run") == metrics(folder)
    resumed = [json.loads((tmp_path / f"run-rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(note["steps"]) for note in resumed] == [3, 3]
    for note, expected in zip(resumed, notes, strict=True):
        assert note["parameters"] == expected["parameters"]


class Processes:
    """An Accelerator of more processes than there are."""

    mixed_precision, gradient_accumulation_steps, device = "no", 1, torch.device("cpu")

    def __init__(self, num_processes):
        self.num_processes = num_processes


@pytest.mark.parametrize(
    ("processes", "kwargs", "message"),
    [
        (3, dict(batch_size=128), "--batch-size 128: .* all 3 processes together.* divide"),
        (2, dict(sync_bn=True), "--sync-bn: PyTorch has it for GPUs only"),
        (2, dict(cuda_graphs=True), "--cuda-graphs: it works in one process only"),
    ],
)
def test_what_cannot_be_divided_is_refused(monkeypatch, processes, kwargs, message):
    monkeypatch.setattr(training, "Accelerator", lambda **_: Processes(processes))
    with pytest.raises(UserError, match=message):
        training.train(Options("cifar_resnet20_sd", "synthetic", **kwargs))
