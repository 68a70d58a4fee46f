"""The examples run as they are on small data."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_sd

EXAMPLES = Path(__file__).parents[1] / "examples"
COLORS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}


@pytest.fixture
def data(tmp_path):
    """Ten images of each color to train on and five to validate with."""
    for split, count in dict(train=10, val=5).items():
        for name, color in COLORS.items():
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = Image.effect_noise((64, 64), 80).convert("RGB")
                Image.blend(noise, Image.new("RGB", (64, 64), color), 0.5).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the example with these arguments; returns its global names and what it has printed."""

    def run(*args):
        torch.manual_seed(0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["train_on_folder.py", *map(str, args)])
        names = runpy.run_path(str(EXAMPLES / "train_on_folder.py"), run_name="__main__")
        return names, capsys.readouterr().out

    return run


def test_train_on_folder(data, run, hub):
    flags = ("--model", "test_vit", "--epochs", 2, "--batch-size", 8, "--img-size", 64)
    names, out = run(data, *flags, "--drop-path", 0.4, "--mode", "count", "--compare")
    printed = re.findall(r"epoch (\d), (\w+): \d+\.\d s, accuracy (\d+\.\d)%\n", out)
    assert [line[:2] for line in printed] == [("0", "DropPath"), ("0", "count"), ("1", "DropPath"), ("1", "count")]
    model = names["model"]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model) | {"input_size": (3, 64, 64)})
    files = sorted(data.glob("val/*/*.png"))
    x = torch.stack([transform(Image.open(file)) for file in files])
    y = torch.tensor([list(COLORS).index(file.parent.name) for file in files])
    assert not model.training
    assert float(printed[-1][-1]) == pytest.approx(100 * (model(x).argmax(1) == y).float().mean().item(), abs=0.1)
    gates = timm_sd.gates(model)
    assert {gate.mode for gate in gates} == {"count"}
    assert gates[-1].survival == pytest.approx(0.6)
    assert not timm_sd.gates(names["models"]["DropPath"])
    assert re.search(r"skipped so far: \d+\.\d% of the samples", out)
    assert hub.requests == []


def test_it_learns(data, run):
    torch.manual_seed(0)
    _, out = run(data, "--model", "test_vit", "--epochs", 8, "--batch-size", 30, "--img-size", 64)
    accuracies = [float(accuracy) for accuracy in re.findall(r"accuracy (\d+\.\d)%", out)]
    assert accuracies[-1] > 60


def test_other_classes_to_validate_with(data, run):
    (data / "val" / "red").rename(data / "val" / "yellow")
    with pytest.raises(SystemExit, match="must have the same classes"):
        run(data, "--model", "test_vit")


def test_another_layout(data, run):
    with pytest.raises(SystemExit, match=f"{data / 'train'} needs the folders train and val"):
        run(data / "train")
