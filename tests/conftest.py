"""What several test files use."""

import copy
import functools
import importlib.util
import os
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
# Runs are compared bit for bit and with computations on the CPU, also where there is a GPU.
os.environ["ACCELERATE_USE_CPU"] = "1"

import timm  # noqa: E402
import torch  # noqa: E402

from timm_sd import data  # noqa: E402

SCRIPTS = Path(__file__).parents[1] / "train_scripts"


load = functools.cache(data.load)  # drawing the synthetic images takes longer than training on a few of them


def take_few_images(monkeypatch):
    """Have training, and all that calls it, use 200 + 50 of the synthetic images."""

    def load_few(*args):
        learning, test = load(*args)
        return learning[:200], test[:50]

    monkeypatch.setattr(data, "load", load_few)


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
