"""The examples run as they are on small data."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import timm_sd

EXAMPLES = Path(__file__).parents[1] / "examples"
COLORS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}


@pytest.fixture
def images(tmp_path):
    """A folder of images: ten of each color, in a folder of that name."""
    folder = tmp_path / "images"
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for number in range(10):
            noise = Image.effect_noise((64, 64), 80).convert("RGB")
            Image.blend(noise, Image.new("RGB", (64, 64), color), 0.5).save(folder / name / f"{number}.png")
    return folder


def test_finetune_vit(images, monkeypatch, capsys, hub):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = [str(images), "--model", "test_vit", "--no-pretrained", "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", ["finetune_vit.py", *args])
    model = runpy.run_path(str(EXAMPLES / "finetune_vit.py"), run_name="__main__")["model"]
    printed = re.findall(r"epoch (\d): loss (\d\.\d{3}), accuracy (\d+\.\d)%\n", capsys.readouterr().out)
    assert [epoch for epoch, _, _ in printed] == ["0", "1"]
    assert float(printed[1][1]) < float(printed[0][1])

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    held_out = sorted(images.glob("*/*.png"))[::5]
    x = torch.stack([transform(Image.open(file)) for file in held_out])
    y = torch.tensor([list(COLORS).index(file.parent.name) for file in held_out])
    logits = model(x)
    assert not model.training
    assert float(printed[1][1]) == pytest.approx(cross_entropy(logits, y).item(), abs=1e-3)
    assert float(printed[1][2]) == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item(), abs=0.1)

    gates = timm_sd.gates(model)
    assert {gate.mode for gate in gates} == {"row"}
    assert gates[-1].survival == pytest.approx(0.6)
    assert hub.requests == []
