"""torch.hub finds the networks in a checkout, even if timm_sd is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"cifar_resnet{depth}{suffix}" for depth in (20, 32, 44, 56, 110, 152, 1202) for suffix in ("", "_sd")]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_network(hub):
    yield
    assert hub.requests == []


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The checkout, in the folder where torch.hub keeps downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub").mkdir(parents=True)
    (tmp_path / "torch" / "hub" / "OWNER_timm-sd_main").symlink_to(ROOT)
    return "OWNER/timm-sd:main"


def test_every_network_is_listed_and_nothing_else(repository):
    assert sorted(torch.hub.list(repository)) == sorted(NAMES)


def test_help(repository):
    assert torch.hub.help(repository, "cifar_resnet56") == "ResNet-56 with constant depth (He et al.)."
    for name in NAMES:
        assert torch.hub.help(repository, name).startswith(f"ResNet-{name.split('_')[1].removeprefix('resnet')} ")


@pytest.mark.parametrize("name", ["cifar_resnet110", "cifar_resnet110_sd"])
def test_pretrained_networks_are_those_of_timm(name):
    network = torch.hub.load(ROOT, name, source="local", pretrained=True).eval()
    assert torch.equal(network(IMAGES), timm.create_model(name, pretrained=True).eval()(IMAGES))


def test_arguments_reach_the_network(repository):
    network = torch.hub.load(repository, "cifar_resnet20_sd", num_classes=7, drop_path_rate=0.2)
    assert network(IMAGES).shape == (2, 7)
    assert [block.survival for stage in network.stages for block in stage][-1] == pytest.approx(0.8)


SCRIPT = """
import importlib.util, sys, torch

assert importlib.util.find_spec("timm_sd") is None
network = torch.hub.load(sys.argv[1], "cifar_resnet110_sd", source="local", pretrained=True)
assert sys.argv[1] not in sys.path
torch.save(network.eval()(torch.load("images.pt")), "logits.pt")
print(sys.modules["timm_sd"].__file__)
"""


def test_without_an_installation(tmp_path):
    torch.save(IMAGES, tmp_path / "images.pt")
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, str(ROOT)],  # -S hides an editable installation
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if Path(path).resolve() != ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{ROOT / 'timm_sd' / '__init__.py'}\n"
    expected = timm.create_model("cifar_resnet110_sd", pretrained=True).eval()(IMAGES)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
