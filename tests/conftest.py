"""What several test files use."""

import copy
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hub_server import Hub

# huggingface_hub reads these when it is imported: its Hub is on loopback, where uploads go the LFS way.
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
# The suite runs in a process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell has what it runs in the background ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Runs are compared bit for bit and with computations on the CPU, also where there is a GPU.
os.environ["ACCELERATE_USE_CPU"] = "1"

import timm  # noqa: E402
import torch  # noqa: E402
from runs import load_few  # noqa: E402

from timm_sd import data  # noqa: E402

SCRIPTS = Path(__file__).parents[1] / "train_scripts"
# The processes that tests start begin as copies of one that has imported this.
multiprocessing.set_forkserver_preload(["timm_sd.training"])


def take_few_images(monkeypatch):
    """Have training, and all that calls it, use 100 + 50 of the synthetic images."""
    monkeypatch.setattr(data, "load", load_few(100, 50))


def in_processes(function, *arguments):
    """Call `function` at the same time in as many processes as there are tuples of arguments; their exit statuses."""
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=function, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(autouse=True)
def restore_threads():
    """A test may train on all cores, the next one not: two processes with as many threads as cores are very slow."""
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
    """What a test registers is forgotten after it."""
    for name, value in vars(timm.models._registry).items():
        if isinstance(value, (dict, set)) and name != "__builtins__":
            monkeypatch.setattr(timm.models._registry, name, copy.deepcopy(value))


@pytest.fixture
def few_images(monkeypatch):
    take_few_images(monkeypatch)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script in this process; its exit status, its standard output and its error output."""

    def run(name, *args):
        monkeypatch.syspath_prepend(SCRIPTS)
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        try:
            script.main()
            status = 0
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):  # as Python's own handling of it does
                print(status, file=sys.stderr)
                status = 1
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
