"""Loading never changes what a network computes in inference, whatever it is loaded into."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_model, save_file

from timm_sd import stochastic_blocks

TARGETS = {
    "plain": dict(model_name="cifar_resnet20"),
    "same": dict(model_name="cifar_resnet20_sd"),
    "another rate": dict(model_name="cifar_resnet20_sd", drop_path_rate=0.8),
    "no rate": dict(model_name="cifar_resnet20_sd", drop_path_rate=0.0),
    "uniform": dict(model_name="cifar_resnet20_sd", drop_path_schedule="uniform"),
    "row": dict(model_name="cifar_resnet20_sd", drop_path_rate=0.2, drop_path_mode="row"),
    "plain with a rate": dict(model_name="cifar_resnet20", drop_path_rate=0.3),
}


@pytest.fixture(scope="module")
def trained():
    """A network whose parameters and statistics are no longer the initial ones, as after training."""
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet20_sd").train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for _ in range(20):
            network(torch.randn(32, 3, 32, 32))
    return network.eval()


@pytest.fixture
def checkpoint(trained, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(trained.state_dict(), file, metadata={"format": "pt"})
    return file


def images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_same_function(network, trained):
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images()), trained(images()), rtol=1e-4, atol=1e-5)


def by_load_state_dict(trained, checkpoint, **target):
    network = timm.create_model(**target)
    network.load_state_dict(trained.state_dict())
    return network


def by_assignment_to_meta(trained, checkpoint, **target):
    with torch.device("meta"):
        network = timm.create_model(**target)
    network.load_state_dict(trained.state_dict(), assign=True)
    return network


def by_load_model(trained, checkpoint, **target):
    network = timm.create_model(**target)
    load_model(network, checkpoint)
    return network


def by_checkpoint_path(trained, checkpoint, **target):
    return timm.create_model(checkpoint_path=str(checkpoint), **target)


def by_pretrained(trained, checkpoint, **target):
    return timm.create_model(pretrained=True, pretrained_cfg_overlay=dict(file=str(checkpoint)), **target)


def by_local_dir(trained, checkpoint, model_name, **target):
    """The way of hf-hub: without a server."""
    config = dict(architecture=model_name, pretrained_cfg=dict(num_classes=10, input_size=[3, 32, 32]))
    (checkpoint.parent / "config.json").write_text(json.dumps(config))
    return timm.create_model(f"local-dir:{checkpoint.parent}", pretrained=True, **target)


def by_ddp_keys(trained, checkpoint, **target):
    network = timm.create_model(**target)
    wrapper = torch.nn.Module()
    wrapper.module = network
    wrapper.load_state_dict({f"module.{key}": value for key, value in trained.state_dict().items()})
    return network


WAYS = [
    by_load_state_dict,
    by_assignment_to_meta,
    by_load_model,
    by_checkpoint_path,
    by_pretrained,
    by_local_dir,
    by_ddp_keys,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", TARGETS)
def test_function_is_kept(trained, checkpoint, way, target):
    network = way(trained, checkpoint, **TARGETS[target])
    assert_same_function(network, trained)
    expected = torch.tensor([block.survival for block in stochastic_blocks(network)])
    assert torch.equal(network.survival, expected), "the buffer no longer tells the network's own probabilities"


@pytest.mark.parametrize("way", WAYS)
def test_equal_probabilities_load_bit_for_bit(trained, checkpoint, way):
    loaded = way(trained, checkpoint, **TARGETS["same"]).state_dict()
    assert list(loaded) == list(trained.state_dict())
    for key, value in trained.state_dict().items():
        assert torch.equal(loaded[key], value), key


def test_twins_share_every_key():
    plain, stochastic = timm.create_model("cifar_resnet20"), timm.create_model("cifar_resnet20_sd")
    assert list(plain.state_dict()) == list(stochastic.state_dict())
    assert torch.equal(plain.survival, torch.ones(9))
    assert stochastic.survival.tolist() == pytest.approx([1 - b / 18 for b in range(1, 10)])


def test_without_the_buffer_it_is_plain(trained):
    plain = by_load_state_dict(trained, None, **TARGETS["plain"])
    state = plain.state_dict()
    del state["survival"]
    network = timm.create_model("cifar_resnet20_sd")
    network.load_state_dict(state)
    assert_same_function(network, trained)


def test_what_is_loaded_stays_as_it_is(trained):
    state = trained.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    timm.create_model("cifar_resnet20").load_state_dict(state)
    assert list(state) == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_features_only(trained, checkpoint):
    features = by_pretrained(trained, checkpoint, model_name="cifar_resnet20", features_only=True).eval()
    with torch.inference_mode():
        expected = trained.forward_intermediates(images(), intermediates_only=True)
        for output, value in zip(features(images()), expected, strict=True):
            torch.testing.assert_close(output, value, rtol=1e-4, atol=1e-5)


def test_features_only_state_dict_into_another(trained, checkpoint):
    source = by_pretrained(trained, checkpoint, model_name="cifar_resnet20_sd", features_only=True, out_indices=(0, 1))
    target = timm.create_model("cifar_resnet20", features_only=True, out_indices=(0, 1))
    target.load_state_dict(source.state_dict())
    with torch.inference_mode():
        for output, value in zip(target.eval()(images()), source.eval()(images()), strict=True):
            torch.testing.assert_close(output, value, rtol=1e-4, atol=1e-5)


def test_half_precision(trained):
    state = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in trained.state_dict().items()
    }
    same, plain = timm.create_model("cifar_resnet20_sd"), timm.create_model("cifar_resnet20")
    same.load_state_dict(state)
    plain.load_state_dict(state)
    last_bn = "stages.2.2.branch.bn2.weight"
    assert torch.equal(same.state_dict()[last_bn], state[last_bn].float())
    with torch.inference_mode():
        expected = same.eval()(images())
        difference = plain.eval()(images()) - expected
    # bfloat16 keeps 8 bits, of the probabilities too.
    assert difference.norm() < 2**-7 * expected.norm()


def test_other_classes_keep_the_features(trained, checkpoint):
    network = by_pretrained(trained, checkpoint, model_name="cifar_resnet20", num_classes=7).eval()
    with torch.inference_mode():
        assert network(images()).shape == (8, 7)
        expected = trained.forward_features(images())
        torch.testing.assert_close(network.forward_features(images()), expected, rtol=1e-4, atol=1e-5)


def test_another_depth_is_refused(trained):
    with pytest.raises(RuntimeError, match="size mismatch for survival"):
        timm.create_model("cifar_resnet32_sd").load_state_dict(trained.state_dict())
