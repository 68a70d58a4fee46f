"""Evaluation and `validate.py` against counts by hand."""

import json
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file

from timm_sd.errors import UserError
from timm_sd.paper.labels import SYNTHETIC_LABELS
from timm_sd.train import data, evaluation, training, validate
from timm_sd.train.evaluation import evaluate
from timm_sd.train.options import Options


@pytest.fixture
def network():
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20_sd").eval()


def test_evaluate_against_counts_by_hand(network, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 16)
    images, _ = data.load("synthetic", None)
    images = images[:53]
    standardize = data.Standardize.of(network, torch.device("cpu"))
    with torch.inference_mode():
        logits = torch.cat([network(standardize(image[None])) for image in images.images])
    result = evaluate(Accelerator(), network.train(), images, standardize)
    assert result.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    wrong = [label for label, row in zip(images.labels.tolist(), logits, strict=True) if row.argmax() != label]
    assert result.error == pytest.approx(100 * len(wrong) / 53)
    assert result.errors == [wrong.count(label) for label in range(10)]
    assert result.images == [images.labels.tolist().count(label) for label in range(10)]
    assert not network.training


@pytest.fixture
def run(few_images, tmp_path, capsys):
    """A finished run of one epoch."""
    folder = tmp_path / "run"
    training.train(Options("cifar_resnet20_sd", "synthetic", epochs=1, batch_size=32, seed=3, output=folder))
    capsys.readouterr()
    return folder


def test_a_runs_weights_have_its_errors(command, run):
    """`--run` alone determines the model, the data set and the seed of the split."""
    metrics = json.loads((run / "metrics.jsonl").read_text())
    learning, test = data.load("synthetic", None)
    for split, part in (("validation", data.split(learning, 3, "synthetic")[1]), ("test", test)):
        status, out, err = command("validate", "--run", run, "--split", split)
        assert (status, err) == (0, "")
        *table, last = out.splitlines()
        assert f"{split} images of synthetic" in last
        assert f"top-1 error {metrics[f'{split}_error']:.2f}%" in last
        rows = [row.rsplit(maxsplit=3) for row in table[1:]]
        assert [row[0].strip() for row in rows] == list(SYNTHETIC_LABELS)
        assert [int(row[1]) for row in rows] == part.labels.bincount(minlength=10).tolist()
        assert sum(int(row[2]) for row in rows) == pytest.approx(metrics[f"{split}_error"] * len(part) / 100)


def test_weights_alone(command, run):
    """They are evaluated in the network that was trained and in its plain twin. `--seed` determines the split."""
    metrics = json.loads((run / "metrics.jsonl").read_text())
    for model in ("cifar_resnet20_sd", "cifar_resnet20"):
        arguments = ["--model", model, "--checkpoint", run / "model.safetensors", "--dataset", "synthetic"]
        _, out, _ = command("validate", *arguments, "--split", "validation", "--seed", 3)
        assert f"top-1 error {metrics['validation_error']:.2f}%" in out


def test_dropped_blocks(command, run, network):
    """Block 4 is the first of the second group, so its shortcut pools and pads."""
    _, out, _ = command("validate", "--run", run, "--drop-blocks", "3,4")
    network.load_state_dict(load_file(run / "model.safetensors"))
    _, test_set = data.load("synthetic", None)
    x = data.Standardize.of(network, torch.device("cpu"))(test_set.images)
    with torch.inference_mode():
        x = network.act1(network.bn1(network.conv1(x)))
        for number, block in enumerate((block for stage in network.stages for block in stage), start=1):
            branch = (1 - number / 18) * block.branch(x)
            if number == 4:
                x = torch.cat([F.avg_pool2d(x, 2), torch.zeros(50, 16, 16, 16)], dim=1)
            elif number != 3:
                x = (branch + block.shortcut(x)).relu()
        loss = F.cross_entropy(network.fc(x.mean((2, 3))), test_set.labels)
    assert f"loss {loss:.4f}" in out


def test_images_in_the_form_of_cifar_10_1(command, run, tmp_path):
    """The test images of the run, in an array with the channels last and labels of 32 bits."""
    _, test_set = data.load("synthetic", None)
    np.save(tmp_path / "data.npy", test_set.images.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "labels.npy", test_set.labels.numpy().astype(np.int32))
    _, expected, _ = command("validate", "--run", run)
    status, out, err = command("validate", "--run", run, "--arrays", tmp_path / "data.npy", tmp_path / "labels.npy")
    assert (status, err) == (0, "")
    assert out.splitlines()[:-1] == expected.splitlines()[:-1]
    speed = r", \d+ images/s\n$"
    assert re.sub(speed, "", out.splitlines(keepends=True)[-1]) == re.sub(
        speed, "", expected.splitlines(keepends=True)[-1]
    ).replace("test images of synthetic", "data.npy")


def test_images_in_the_form_of_cifar_10_c(command, run, tmp_path, monkeypatch):
    """The same images at several severities, one after the other, with labels of 8 bits."""
    _, test_set = data.load("synthetic", None)
    images = test_set.images.permute(0, 2, 3, 1).numpy()
    severities = [images, 255 - images, images // 4, images // 2, images[::-1]]
    np.save(tmp_path / "fog.npy", np.concatenate(severities))
    np.save(tmp_path / "labels.npy", np.tile(test_set.labels.numpy().astype(np.uint8), 5))
    monkeypatch.setattr(validate, "CIFAR_10_C", 5 * len(images))
    _, out, _ = command("validate", "--run", run, "--arrays", tmp_path / "fog.npy", tmp_path / "labels.npy")
    table, of_severities, last = out.splitlines()[:11], out.splitlines()[11:-1], out.splitlines()[-1]
    network = timm.create_model("cifar_resnet20_sd").eval()
    network.load_state_dict(load_file(run / "model.safetensors"))
    standardize, errors = data.Standardize.of(network, torch.device("cpu")), []
    for number, (severity, line) in enumerate(zip(severities, of_severities, strict=True), start=1):
        with torch.inference_mode():
            likeliest = network(standardize(torch.from_numpy(severity.copy()).permute(0, 3, 1, 2))).argmax(1)
        errors.append(100 * (likeliest != test_set.labels).double().mean().item())
        assert line.startswith(f"severity {number}: ")
        assert line.endswith(f"top-1 error {errors[-1]:.2f}%")
    assert len(set(errors)) > 1
    assert "fog.npy: loss" in last
    assert f"top-1 error {sum(errors) / 5:.2f}%" in last
    assert sum(int(row.split()[1]) for row in table[1:]) == 5 * len(images)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            np.zeros((4, 3, 32, 32), np.uint8),
            np.zeros(4, int),
            "images.npy has no images: it must be an array of uint8",
        ),
        (np.zeros((4, 32, 32, 3)), np.zeros(4, int), "images.npy has no images: it must be an array of uint8"),
        (
            np.zeros((4, 32, 32, 3), np.uint8),
            np.zeros(3, int),
            "labels.npy does not have one integer for each of the",
        ),
        (np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4), "labels.npy does not have one integer for each of the"),
        (np.zeros((4, 32, 32, 3), np.uint8), np.arange(4) + 7, "labels.npy has labels from 7 to 10 for 10 classes"),
        (
            np.zeros((4, 32, 32, 3), np.uint8),
            np.array([None] * 4),
            "labels.npy cannot be read as a NumPy array",
        ),
    ],
)
def test_arrays_that_are_no_images_or_labels(tmp_path, images, labels, message):
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(UserError, match=re.escape(message)):
        data.load_arrays(tmp_path / "images.npy", tmp_path / "labels.npy", num_classes=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --pretrained --checkpoint --run is required"),
        (["--pretrained"], "--model is required with --pretrained or --checkpoint, and not allowed with --run"),
        (["--pretrained", "--model", "resnet11"], "--model resnet11: it must be cifar_resnetN or "),
        (
            ["--run", "{run}", "--model", "cifar_resnet20"],
            "--model is required with --pretrained or --checkpoint, and not allowed with",
        ),
        (["--pretrained", "--model", "cifar_resnet26"], "cifar_resnet26.cifar10 has no pretrained weights"),
        (["--run", "nowhere"], "nowhere has no run: its config.json is missing, damaged"),
        (["--run", "{run}", "--split", "all"], "invalid choice: 'all'"),
        (["--run", "{run}", "--dataset", "mnist"], "argument --dataset: invalid choice: 'mnist'"),
        (["--run", "{run}", "--drop-blocks", "0"], "--drop-blocks 0: no such block, they are numbered from 1 to 9"),
        (
            ["--run", "{run}", "--drop-blocks", "3,10"],
            "--drop-blocks 10: no such block, they are numbered from 1 to 9",
        ),
        (["--run", "{run}", "--drop-blocks", "x"], "--drop-blocks: invalid numbers value: 'x'"),
        (
            ["--model", "cifar_resnet20", "--checkpoint", "nothing"],
            "nothing is missing: pass a run or a file with weights",
        ),
        (
            ["--model", "cifar_resnet20", "--checkpoint", "{run}/config.json"],
            "config.json is not a valid safetensors file",
        ),
        (
            ["--model", "cifar_resnet32", "--checkpoint", "{run}/model.safetensors"],
            "the weights are those of a cifar_resnet20, not of a cifar_resnet32",
        ),
    ],
)
def test_wrong_input_is_reported_in_one_line(command, run, registry, arguments, message):
    status, out, err = command("validate", *(argument.format(run=run) for argument in arguments))
    assert status in (1, 2)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("validate.py: ")
    assert message in err


def test_a_truncated_file_is_refused(command, run):
    file = run / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    status, _, err = command("validate", "--run", run)
    assert status == 1
    assert f"validate.py: {file} is not a valid safetensors file" in err


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00\x10\x00{'descr': '(unclosed", b"no array at all"]
)
def test_files_that_are_no_arrays(tmp_path, content):
    (tmp_path / "images.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"images\.npy cannot be read as a NumPy array"):
        data.load_arrays(tmp_path / "images.npy", tmp_path / "images.npy", num_classes=10)
