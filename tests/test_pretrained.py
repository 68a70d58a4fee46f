"""The packaged weights, put through everything that timm does with pretrained weights."""

import hashlib
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_sd.errors import UserError
from timm_sd.paper import pretrained

WEIGHTS = Path(__file__).parents[1] / "timm_sd" / "paper" / "weights"
NAMES = ["cifar_resnet110.e100_cifar10", "cifar_resnet110_sd.e100_cifar10"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def weights_of(name):
    return load_file(WEIGHTS / f"{name}.safetensors")


def expected_logits(name):
    """The logits of a network that loads the file without timm."""
    network = timm.create_model(name.split(".")[0])
    network.load_state_dict(weights_of(name))
    return network.eval()(IMAGES)


@pytest.fixture(autouse=True)
def no_network(hub):
    yield
    assert hub.requests == []


def test_the_recorded_hashes_are_those_of_the_files():
    """In the format of sha256sum."""
    lines = (WEIGHTS / "SHA256SUMS").read_text().splitlines()
    files = [WEIGHTS / f"{name}.safetensors" for name in NAMES]
    assert lines == [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    assert {path.name for path in WEIGHTS.iterdir()} == {f"{name}.safetensors" for name in NAMES} | {"SHA256SUMS"}


@pytest.mark.parametrize(("name", "final"), [(NAMES[0], 1.0), (NAMES[1], 0.5)])
def test_each_block_has_its_probability(name, final):
    weights = weights_of(name)
    keys = [f"stages.{stage}.{block}.survival" for stage in range(3) for block in range(18)]
    expected = [1 - number / 54 * (1 - final) for number in range(1, 55)]
    assert [weights[key].item() for key in keys] == pytest.approx(expected)
    assert {key for key in weights if "survival" in key} == set(keys)


def test_timm_lists_them_and_no_others():
    assert timm.list_pretrained("cifar_resnet*") == NAMES
    for name in timm.list_models("cifar_resnet*", include_tags=True):
        cfg = timm.get_pretrained_cfg(name)
        assert bool(cfg.file) == (name in NAMES)
        assert cfg.hf_hub_id == (f"timm-sd/{name}" if name in NAMES else None)


@pytest.mark.parametrize("name", NAMES)
def test_by_name_and_by_tag(name):
    for asked in (name, name.split(".")[0]):
        assert torch.equal(timm.create_model(asked, pretrained=True).eval()(IMAGES), expected_logits(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kwargs", [{"drop_path_rate": 0.2}, {"drop_path_rate": 0.0}, {"drop_path_schedule": "uniform"}]
)
def test_other_survival_probabilities_do_not_change_the_function(name, kwargs):
    logits = timm.create_model(name, pretrained=True, **kwargs).eval()(IMAGES)
    torch.testing.assert_close(logits, expected_logits(name), rtol=1e-3, atol=1e-3)


def test_other_classes():
    network = timm.create_model("cifar_resnet110_sd", pretrained=True, num_classes=7).eval()
    assert network(IMAGES).shape == (4, 7)
    weights = weights_of("cifar_resnet110_sd.e100_cifar10")
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items() if key[:3] != "fc.")


def test_other_channels():
    network = timm.create_model("cifar_resnet110_sd", pretrained=True, in_chans=1).eval()
    weights = weights_of("cifar_resnet110_sd.e100_cifar10")
    torch.testing.assert_close(network.conv1.weight, weights["conv1.weight"].sum(1, keepdim=True))
    gray = IMAGES[:, :1]
    torch.testing.assert_close(
        network(gray),
        timm.create_model("cifar_resnet110_sd", pretrained=True).eval()(gray.expand(-1, 3, -1, -1)),
        rtol=1e-3,
        atol=1e-3,
    )


def test_features():
    features = timm.create_model("cifar_resnet110_sd", pretrained=True, features_only=True).eval()(IMAGES)
    whole = timm.create_model("cifar_resnet110_sd")
    whole.load_state_dict(weights_of("cifar_resnet110_sd.e100_cifar10"))
    assert torch.equal(features[-1], whole.eval().forward_features(IMAGES))
    assert [feature.shape[1:] for feature in features] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_a_users_file(tmp_path):
    weights = timm.create_model("cifar_resnet20").state_dict()
    file = tmp_path / "mine.safetensors"
    save_file(weights, file)
    for kwargs in ({"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}, {"checkpoint_path": str(file)}):
        state = timm.create_model("cifar_resnet20", **kwargs).state_dict()
        assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_a_checkpoint_over_the_packaged_weights(tmp_path):
    weights = timm.create_model("cifar_resnet110_sd").state_dict()
    save_file(weights, tmp_path / "mine.safetensors")
    network = timm.create_model("cifar_resnet110_sd", pretrained=True, checkpoint_path=tmp_path / "mine.safetensors")
    assert torch.equal(network.fc.weight, weights["fc.weight"])


def test_a_users_state_dict():
    weights = timm.create_model("cifar_resnet20").state_dict()
    network = timm.create_model("cifar_resnet20", pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
    assert torch.equal(network.fc.weight, weights["fc.weight"])


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet110_sd.cifar100", "cifar_resnet1202_sd"])
def test_a_name_without_weights(name):
    tagged = name if "." in name else f"{name}.cifar10"
    with pytest.raises(RuntimeError, match=f"^{tagged} has no pretrained weights; available: {', '.join(NAMES)}$"):
        timm.create_model(name, pretrained=True)


@pytest.fixture
def copied_weights(tmp_path, monkeypatch):
    """Copy the packaged files, to be damaged; return one of them and the arguments that load it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for path in WEIGHTS.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(pretrained, "WEIGHTS", folder)
    file = folder / "cifar_resnet110_sd.e100_cifar10.safetensors"
    return file, dict(pretrained=True, pretrained_cfg_overlay={"file": str(file)})


@pytest.mark.parametrize("place", [3, 5000, 1_000_000, -1])
def test_a_flipped_bit_is_noticed(copied_weights, place):
    """In the header's length, the header, a tensor or the last byte."""
    file, kwargs = copied_weights
    timm.create_model("cifar_resnet110_sd", **kwargs)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match=rf"^{re.escape(str(file))} is damaged \(SHA-256 mismatch\)"):
        timm.create_model("cifar_resnet110_sd", **kwargs)


def test_a_missing_file_is_named(copied_weights):
    file, kwargs = copied_weights
    file.unlink()
    with pytest.raises(RuntimeError, match=f"^{re.escape(str(file))} is missing$"):
        timm.create_model("cifar_resnet110_sd", **kwargs)


def test_pickles_are_not_loaded(tmp_path):
    torch.save(timm.create_model("cifar_resnet20").state_dict(), tmp_path / "model.pth")
    for overlay in (
        {"file": str(tmp_path / "model.pth")},
        {"url": "https://example.com/model.pth"},
        {"hf_hub_id": "ann/model", "hf_hub_filename": "model.bin"},
        {"file": str(tmp_path), "source": "local-dir"},
    ):
        with pytest.raises(RuntimeError, match=r"not loaded|the only file that is loaded"):
            timm.create_model("cifar_resnet20", pretrained=True, pretrained_cfg_overlay=overlay)


def test_validate_reads_them(command, few_images):
    status, out, _ = command("validate", "--model", "cifar_resnet110_sd", "--pretrained", "--dataset", "synthetic")
    assert status == 0
    assert "top-1 error" in out
    status, _, err = command("validate", "--model", "cifar_resnet20", "--pretrained", "--dataset", "synthetic")
    assert (status, err) == (
        1,
        f"validate.py: cifar_resnet20.cifar10 has no pretrained weights; available: {', '.join(NAMES)}\n",
    )


ROUTES = {
    "file": lambda file: timm.create_model(
        "cifar_resnet20_sd", pretrained=True, pretrained_cfg_overlay=dict(file=str(file), hf_hub_id=None)
    ),
    "local-dir": lambda file: timm.create_model(f"local-dir:{file.parent}", pretrained=True),
    "checkpoint_path": lambda file: timm.create_model("cifar_resnet20_sd", checkpoint_path=str(file)),
    "load_state_dict": lambda file: timm.create_model("cifar_resnet20_sd").load_state_dict(load_file(file)),
    "load_weights": lambda file: pretrained.load_weights(timm.create_model("cifar_resnet20_sd"), file, "it"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_damaged_weights_are_refused(tmp_path, route):
    """Probabilities outside (0, 1], weights that are not finite, negative variances, and wrong types or shapes."""
    whole = timm.create_model("cifar_resnet20_sd").state_dict()
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(
        '{"architecture": "cifar_resnet20_sd", "num_classes": 10, "pretrained_cfg": {}}'
    )
    save_file(whole, file)
    ROUTES[route](file)
    survival, others = "stages.1.0.survival", ("fc.weight", "stages.2.1.branch.bn2.running_var")
    damaged = [(survival, torch.tensor(p)) for p in (float("nan"), float("inf"), 0.0, -0.5, 1.5, 1, True)]
    damaged += [(survival, torch.tensor([0.5, 0.5])), (others[1], -whole[others[1]])]
    for name in others:
        damaged += [(name, torch.full_like(whole[name], value)) for value in (float("nan"), float("inf"))]
        damaged += [(name, torch.ones_like(whole[name], dtype=torch.int64))]
    for name, tensor in damaged:
        save_file(whole | {name: tensor}, file)
        with pytest.raises((RuntimeError, UserError), match=f"the weights are damaged: {name} ") as error:
            ROUTES[route](file)
        assert "\n" not in str(error.value)
