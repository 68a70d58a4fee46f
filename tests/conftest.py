"""Fixtures and helpers shared by several test files."""

import copy
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hub_server import Hub

# huggingface_hub reads these when it is imported. They point it to the Hub on loopback and make it upload through LFS.
HUB = Hub()
HF_HOME = tempfile.TemporaryDirectory()
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HOME=HF_HOME.name,
    NO_PROXY="127.0.0.1",
)
for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
# The suite runs in one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that a shell script runs in the background ignore Ctrl-C, and scripts that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Runs are compared bit for bit, and with computations on the CPU, so they use the CPU even if there is a GPU.
os.environ["ACCELERATE_USE_CPU"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import timm  # noqa: E402
import torch  # noqa: E402
from runs import few  # noqa: E402

from timm_sd.train import data  # noqa: E402

SCRIPTS = Path(__file__).parents[1] / "train_scripts"
# Processes that tests start are forked from a server that has already imported this.
multiprocessing.set_forkserver_preload(["timm_sd.train.training"])


def take_few_images(monkeypatch):
    """Cut every data set to its first 100 images to learn from and its first 50 to test on."""
    monkeypatch.setattr(data, "load", few)


def in_processes(function, *arguments):
    """Call `function` with each tuple of arguments, all at once and each in its own process.

    Returns the exit statuses, None for a process that is still running after two minutes. It is then killed.
    """
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=function, args=args) for args in arguments]
    for process in processes:
        process.start()
    try:
        end = time.monotonic() + 120
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(autouse=True)
def restore_threads():
    """Undo a test's change to the number of threads: two test processes with a thread per core each are very slow."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hub(tmp_path):
    """An empty Hub."""
    HUB.open(tmp_path / "hub")
    return HUB


@pytest.fixture
def registry(monkeypatch):
    """Undo what a test registers with timm."""
    for name, value in vars(timm.models._registry).items():
        if isinstance(value, (dict, set)) and name != "__builtins__":
            monkeypatch.setattr(timm.models._registry, name, copy.deepcopy(value))


@pytest.fixture
def large_tiles(monkeypatch):
    """Few programs for each kernel of the engine, since Triton's interpreter runs one after another."""
    import triton.language as tl  # not on every machine

    from timm_sd.train.gpu import engine

    tiles = {
        16: engine.Tiles(convolution=1024, sum=1024, normalization=1024, gradient_tile=1024, gradient=1024, warps=4),
        32: engine.Tiles(convolution=256, sum=256, normalization=256, gradient_tile=256, gradient=256, warps=4),
        64: engine.Tiles(convolution=64, sum=64, normalization=64, gradient_tile=128, gradient=256, warps=8),
    }
    monkeypatch.setattr(engine, "TILES", tiles)
    monkeypatch.setattr(engine, "CHUNK", 4096)
    # Loops over partial sums go on although there are few of them.
    monkeypatch.setattr(engine.kernels, "ROWS", tl.constexpr(1))
    monkeypatch.setattr(engine.kernels, "GRADIENTS", tl.constexpr(1))


@pytest.fixture
def few_images(monkeypatch):
    take_few_images(monkeypatch)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script in this process; return its exit status, standard output and standard error."""

    def run(name, *args):
        monkeypatch.syspath_prepend(SCRIPTS)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        monkeypatch.setenv("NO_COLOR", "1")  # argparse has colors since Python 3.14
        try:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):  # as Python itself does
                print(status, file=sys.stderr)
                status = 1
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
