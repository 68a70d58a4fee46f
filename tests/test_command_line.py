"""Scripts report any error of the user in one line."""

import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS

from timm_sd import command_line
from timm_sd.command_line import one_line_errors, say
from timm_sd.errors import LONGEST, UserError, one_line


def test_one_line():
    assert one_line("a\x1b[31m\nb\t\u202ec\udcff") == "a [31m b c"
    assert one_line("two  spaces, é and 漢") == "two  spaces, é and 漢"
    token = "hf_" + "aB3" * 10
    assert one_line(f"Bearer {token}, hf_hub") == "Bearer hf_***, hf_hub"
    long = one_line("begin" + 10_000 * "x" + "end")
    assert len(long) < LONGEST + 10
    assert (long[:5], long[-3:]) == ("begin", "end")
    assert str(UserError("a\nb")) == "a b"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is PyTorch's on Linux")
@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_do_not_spin_for_long(own, expected):
    """Set before PyTorch is imported, unless the user has."""
    code = "import os, sys, start; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPTS, env=environment | own, capture_output=True, text=True
    )
    assert done.stdout == f"{expected} False\n"


def test_any_user_input_is_reported_in_one_line(command):
    for name in ("\x1b[31mred", "two\nlines", "x" * 100_000):
        for arguments in (("--model", name), ("--epochs", name), (f"--{name}",)):
            status, out, err = command("train", "--dataset", "synthetic", *arguments)
            assert status in (1, 2)
            assert out == ""
            assert err.count("\n") == 1
            assert len(err) < 800
            assert err[:-1].isprintable()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "the path is empty"),
        ("a\nb", "the path has unprintable characters"),
        ("a\x1b[2J", "the path has unprintable characters"),
        ("a\udcff", "the path has unprintable characters"),  # bytes that are not UTF-8
        ("~nobody-of-that-name/run", "nobody-of-that-name"),
        ("/", "a run needs a folder of its own"),
    ],
)
def test_impossible_paths(command, path, message):
    status, out, err = command("train", "--dataset", "synthetic", "--output", path)
    assert status in (1, 2)
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert err[:-1].isprintable()


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert command_line.path("~/runs") == Path("/home/ann/runs")
    assert command_line.path("runs/~") == Path("runs/~")


def test_missing_packages_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("tqdm", "jinja2") else find(name))
    with pytest.raises(SystemExit, match=r": jinja2, tqdm not installed: pip install 'timm-sd\[train\]'$"):
        runpy.run_module("timm_sd.extras")


def test_the_package_works_without_what_training_needs():
    program = """
import sys
for name in ("accelerate", "jinja2", "matplotlib"):
    sys.modules[name] = None
import timm, timm_sd
assert timm.create_model("cifar_resnet110_sd", pretrained=True)
model = timm.create_model("test_vit", drop_path_rate=0.1)
assert len(timm_sd.gates(timm_sd.skip_drop_path(model))) > 0
assert not {"timm_sd.train", "timm_sd.report"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_publishing_does_without_the_training_loop():
    loop = ("timm_sd.train.training", "timm_sd.train.learner", "timm_sd.train.gpu")
    program = f"import sys, timm_sd.report.publish; print(*(name for name in {loop} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_ctrl_c(capsys):
    with pytest.raises(SystemExit, match=r"^train\.py: interrupted$"), one_line_errors("train.py"):
        signal.raise_signal(signal.SIGINT)


def test_text_that_the_terminal_cannot_show(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with one_line_errors():
            say("r\u00e9seau")
    assert (tmp_path / "out").read_text() == "r\\xe9seau\n"
