"""The machine that a script runs on: setting up Accelerate, using its cores, and what to record about it."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path

import accelerate
import numpy
import timm
import torch
import torchvision
from accelerate import Accelerator

from .. import __version__
from ..errors import UserError

CGROUP = Path("/sys/fs/cgroup")
CPU_QUOTAS = (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"])  # of cgroup v2 and v1


def start(**kwargs) -> Accelerator:
    """The Accelerator that its launcher or variables ask for, on all cores. Raises UserError if it cannot start."""
    try:
        accelerator = Accelerator(**kwargs)
        use_all_cores()
    except Exception as error:  # of any type: environment variables are read all over Accelerate and PyTorch
        raise UserError(
            f"Accelerate cannot start ({type(error).__name__}: {error}): check its environment variables and launcher"
            " flags"
        ) from error
    if accelerator.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"ACCELERATE_TORCH_DEVICE={accelerator.device}: CUDA is not available")
    if accelerator.device.type == "cuda":
        torch.cuda.set_device(accelerator.device)  # Accelerate does so with several processes only
    return accelerator


def use_all_cores() -> None:
    """Divide the cores among the run's processes on this machine, unless OMP_NUM_THREADS says otherwise.

    Launchers set it to 1 if the user has not set it, so under a launcher 1 does not count.
    """
    asked = os.environ.get("OMP_NUM_THREADS")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
    if asked and not (asked == "1" and launched):
        return
    torch.set_num_threads(max(1, cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))


def cores() -> int:
    """The number of cores that this process may use, by its affinity and its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in CPU_QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # no such files, or "max"
            quota, period = (int(word) for file in files for word in (CGROUP / file).read_text("utf-8").split())
            if quota > 0:  # -1 is v1's "max"
                count = min(count, max(1, quota // period))
    return count


def environment(accelerator: Accelerator) -> dict[str, str | int | None]:
    """Where a run takes place: what its exact results may depend on besides its options."""
    cuda = accelerator.device.type == "cuda"
    return dict(
        processes=accelerator.num_processes,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(accelerator.device) if cuda else accelerator.device.type,
        processor=processor(),
        dynamo_backend=accelerator.state.dynamo_plugin.backend.value,
        git_commit=git_commit(),
        timm_sd=__version__,
        python=platform.python_version(),
        **{library.__name__: str(library.__version__) for library in (torch, torchvision, timm, accelerate, numpy)},
    )


def processor() -> str:
    """The CPU's name if the system tells it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `-dirty` if files have changed; None outside one."""
    folder = Path(__file__).parent
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        # A package installed inside another project's checkout is not part of it.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=True)
        return subprocess.run(describe, cwd=folder, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
