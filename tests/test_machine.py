"""How a run uses its machine, and what it says about an impossible environment."""

import os
import subprocess

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from timm_sd.errors import UserError
from timm_sd.train import machine, training
from timm_sd.train.options import Options


@pytest.fixture
def environment(monkeypatch):
    """An environment without a launcher's variables or OMP_NUM_THREADS, in which Accelerate has not started."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in ("OMP_NUM_THREADS", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 6),
        ({"OMP_NUM_THREADS": "1"}, 4),  # the user's, so it is respected
        ({"OMP_NUM_THREADS": "3"}, 4),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 6),  # the launcher's
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, 4),
        ({"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, 3),
        ({"LOCAL_WORLD_SIZE": "0"}, 6),
    ],
)
def test_threads(environment, variables, threads):
    """There are six cores, and PyTorch starts with four threads."""
    environment.setattr(machine, "cores", lambda: 6)
    torch.set_num_threads(4)
    for name, value in variables.items():
        environment.setenv(name, value)
    machine.use_all_cores()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "250000\n"}, 8),
    ],
)
def test_cores_of_a_container(monkeypatch, tmp_path, files, count):
    (tmp_path / "cpu").mkdir()
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine.cores() == count


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "Accelerate cannot start .*"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Accelerate cannot start .*"),
        ("ACCELERATE_DYNAMO_BACKEND", "bogus", "Accelerate cannot start .*BOGUS.*"),
        ("ACCELERATE_DYNAMO_BACKEND", "", "Accelerate cannot start .*"),
        ("ACCELERATE_USE_CPU", "maybe", "Accelerate cannot start .*maybe.*"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "Accelerate cannot start .*fp8.*"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "--mixed_precision fp16: launch with no or bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp32", "--mixed_precision fp32: launch with no or bf16"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "2",
            "gradient accumulation is not supported: .* --gradient_accumulation_steps 1",
        ),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "0",
            "gradient accumulation is not supported: .* --gradient_accumulation_steps 1",
        ),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "-1",
            "gradient accumulation is not supported: .* --gradient_accumulation_steps 1",
        ),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x", "Accelerate cannot start .*"),
        ("LOCAL_WORLD_SIZE", "x", "Accelerate cannot start .*"),
    ],
)
def test_an_impossible_environment(environment, tmp_path, name, value, message):
    environment.setenv(name, value)
    with pytest.raises(UserError, match=message):
        training.train(Options("cifar_resnet20_sd", "synthetic", epochs=1, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_missing_gpu(environment):
    environment.delenv("ACCELERATE_USE_CPU")
    environment.setenv("ACCELERATE_TORCH_DEVICE", "cuda")
    environment.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA"):
        machine.start()


def test_the_commit_of_the_checkout(tmp_path, monkeypatch):
    """It is None if the package lies in another project's checkout, which does not track it."""

    def git(*args):
        return subprocess.run(["git", "-C", tmp_path, *args], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("config", "user.name", "test")
    git("config", "user.email", "test@example.com")
    git("commit", "--allow-empty", "-m", "first")
    module = tmp_path / "training.py"
    module.write_text("")
    monkeypatch.setattr(machine, "__file__", str(module))
    assert machine.git_commit() is None
    git("add", "training.py")
    git("commit", "-m", "second")
    assert machine.git_commit() == git("rev-parse", "HEAD")
    module.write_text("# changed")
    assert machine.git_commit() == git("rev-parse", "HEAD") + "-dirty"
