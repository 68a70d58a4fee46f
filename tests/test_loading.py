"""Loading never changes what a network computes in inference, whatever it is loaded into."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_model, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from timm_sd import CifarResNet, gates

TARGETS = {
    "plain": dict(model_name="cifar_resnet20"),
    "same": dict(model_name="cifar_resnet20_sd"),
    "another rate": dict(model_name="cifar_resnet20_sd", drop_path_rate=0.8),
    "no rate": dict(model_name="cifar_resnet20_sd", drop_path_rate=0.0),
    "uniform": dict(model_name="cifar_resnet20_sd", drop_path_schedule="uniform"),
    "row": dict(model_name="cifar_resnet20_sd", drop_path_rate=0.2, drop_path_mode="row"),
    "count": dict(model_name="cifar_resnet20_sd", drop_path_rate=0.6, drop_path_mode="count"),
    "plain with a rate": dict(model_name="cifar_resnet20", drop_path_rate=0.3),
}


@pytest.fixture(scope="module")
def trained():
    """A network whose parameters and statistics have changed, as in training."""
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


def assert_same_features(features, trained, groups=3):
    """Assert that an extractor's outputs are those of the first `groups` groups of `trained`, a whole network."""
    with torch.inference_mode():
        outputs = features.eval()(images())
        outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
        expected = trained.forward_intermediates(images(), intermediates_only=True)
        for output, value in zip(outputs, expected[:groups], strict=True):
            torch.testing.assert_close(output, value, rtol=1e-4, atol=1e-5)


def survival_of(state):
    """The blocks' survival probabilities in a state dict, by key."""
    return {key: value.item() for key, value in state.items() if key.endswith(".survival")}


BLOCKS = [f"stages.{stage}.{block}" for stage in range(3) for block in range(3)]


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
    """timm loads it as it would from `hf-hub:`, but without a server."""
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
def test_the_function_is_unchanged(trained, checkpoint, way, target):
    network = way(trained, checkpoint, **TARGETS[target])
    assert_same_function(network, trained)
    own = [gate.survival for gate in gates(timm.create_model(**TARGETS[target]))]
    assert [gate.survival for gate in gates(network)] == own, "loading changed the network's own probabilities"
    assert list(survival_of(network.state_dict()).values()) == pytest.approx(own)


@pytest.mark.parametrize("way", WAYS)
def test_equal_probabilities_load_bit_for_bit(trained, checkpoint, way):
    loaded = way(trained, checkpoint, **TARGETS["same"]).state_dict()
    assert list(loaded) == list(trained.state_dict())
    for key, value in trained.state_dict().items():
        assert torch.equal(loaded[key], value), key


def test_twins_share_every_key():
    plain, stochastic = (timm.create_model(name).state_dict() for name in ("cifar_resnet20", "cifar_resnet20_sd"))
    assert list(plain) == list(stochastic)
    keys = [f"{block}.survival" for block in BLOCKS]
    assert survival_of(plain) == dict.fromkeys(keys, 1.0)
    assert survival_of(stochastic) == pytest.approx({key: 1 - b / 18 for b, key in enumerate(keys, start=1)})
    for value in (stochastic[key] for key in keys):
        assert (value.dtype, value.shape, value.device.type) == (torch.float32, (), "cpu")


def test_changed_probabilities_are_saved(trained):
    """The gates' current probabilities count, not those that the network was created with."""
    changed, plain = timm.create_model("cifar_resnet20_sd"), timm.create_model("cifar_resnet20")
    changed.load_state_dict(trained.state_dict())
    for index, gate in enumerate(gates(changed), start=1):
        gate.survival = 0.05 * index
    assert list(survival_of(changed.state_dict()).values()) == pytest.approx([0.05 * index for index in range(1, 10)])
    with torch.inference_mode():
        difference = changed.eval()(images()) - trained(images())
    assert difference.abs().max() > 0.1, "other probabilities are another function"
    plain.load_state_dict(changed.state_dict())
    assert_same_function(plain, changed)
    trained_again = timm.create_model("cifar_resnet20_sd")
    trained_again.load_state_dict(changed.state_dict())
    assert_same_function(trained_again, changed)


@pytest.mark.parametrize("missing", [BLOCKS, BLOCKS[4:5]])
def test_a_block_without_an_entry_loads_as_is(trained, missing):
    state = {key: value for key, value in trained.state_dict().items() if key.removesuffix(".survival") not in missing}
    network = timm.create_model("cifar_resnet20", drop_path_rate=0.2)
    own = [gate.survival for gate in gates(network)]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "stages') as error:
        network.load_state_dict(state)
    assert all(f'"{block}.survival"' in str(error.value) for block in missing)
    network = timm.create_model("cifar_resnet20", drop_path_rate=0.2)
    incompatible = network.load_state_dict(state, strict=False)
    assert incompatible.missing_keys == [f"{block}.survival" for block in missing]
    assert incompatible.unexpected_keys == []
    loaded = network.state_dict()
    for block, p, trained_p in zip(BLOCKS, own, [1 - b / 18 for b in range(1, 10)], strict=True):
        for name in ("weight", "bias"):
            key = f"{block}.branch.bn2.{name}"
            if block in missing:
                assert torch.equal(loaded[key], state[key])
            else:
                torch.testing.assert_close(loaded[key], state[key] * trained_p / p)


def test_plain_weights_from_other_code(trained):
    """They have no survival probabilities, so ones are added."""
    plain = by_load_state_dict(trained, None, **TARGETS["plain"])
    weights = {key: value for key, value in plain.state_dict().items() if not key.endswith("survival")}
    model = timm.create_model("cifar_resnet20_sd")
    ones = {key: torch.ones(()) for key in model.state_dict() if key.endswith("survival")}
    assert len(ones) == 9
    model.load_state_dict({**weights, **ones})
    assert_same_function(model, trained)


def test_state_dicts_of_distributed_checkpoints(trained):
    """PyTorch looks up each of their entries as an attribute."""
    state = get_model_state_dict(trained)
    assert list(state) == list(trained.state_dict())
    network = timm.create_model("cifar_resnet20")
    set_model_state_dict(network, state)
    assert_same_function(network, trained)


def test_the_loaded_state_dict_is_unchanged(trained):
    state = trained.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    timm.create_model("cifar_resnet20").load_state_dict(state)
    assert list(state) == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)


EXTRACTORS = ["list", "dict", "hook", "getter", "fx"]


@pytest.mark.parametrize("feature_cls", EXTRACTORS)
@pytest.mark.parametrize("out_indices", [(0, 1, 2), (0, 1)])
def test_features_only(trained, checkpoint, feature_cls, out_indices):
    """Load a network's weights into extractors with the same and other probabilities, then theirs into others."""
    kwargs = dict(features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    plain = by_pretrained(trained, checkpoint, model_name="cifar_resnet20", **kwargs)
    same = by_pretrained(trained, checkpoint, model_name="cifar_resnet20_sd", **kwargs)
    for extractor in (plain, same):
        assert_same_features(extractor, trained, len(out_indices))
    for source, target in ((plain, dict(drop_path_rate=0.7)), (same, {})):
        extractor = timm.create_model("cifar_resnet20", **kwargs, **target)
        extractor.load_state_dict(source.state_dict())
        assert_same_features(extractor, trained, len(out_indices))


def test_features_only_by_default(trained, checkpoint):
    features = by_pretrained(trained, checkpoint, model_name="cifar_resnet20", features_only=True)
    assert_same_features(features, trained)
    assert type(features) is timm.models.FeatureListNet


@pytest.mark.parametrize(
    ("feature_cls", "renamed"),
    [
        *[(name, lambda key: key.replace("stages.", "stages_")) for name in ("list", "dict", "hook")],
        ("getter", lambda key: f"model.{key}"),
        ("fx", lambda key: f"graph_module.{key}"),
    ],
)
def test_a_networks_weights_into_an_extractor(trained, feature_cls, renamed):
    """Under the names that the extractor gives them."""
    features = timm.create_model("cifar_resnet20", features_only=True, feature_cls=feature_cls)
    features.load_state_dict(
        {renamed(key): value for key, value in trained.state_dict().items() if not key.startswith("fc.")}
    )
    assert_same_features(features, trained)


def test_half_precision(trained):
    state = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in trained.state_dict().items()
    }
    same, plain = timm.create_model("cifar_resnet20_sd"), timm.create_model("cifar_resnet20")
    same.load_state_dict(state)
    plain.load_state_dict(state)
    for block in BLOCKS:  # also those whose probability bfloat16 rounds
        for name in ("weight", "bias"):
            key = f"{block}.branch.bn2.{name}"
            assert torch.equal(same.state_dict()[key], state[key].float())
    with torch.inference_mode():
        expected = same.eval()(images())
        difference = plain.eval()(images()) - expected
    # bfloat16 has 8 bits of precision, for the probabilities too.
    assert difference.norm() < 2**-7 * expected.norm()


def test_a_network_in_half_precision_saves_its_probabilities_in_full(trained):
    network = timm.create_model("cifar_resnet20_sd").bfloat16()
    network.load_state_dict(trained.state_dict())
    assert survival_of(network.state_dict()) == survival_of(trained.state_dict())
    assert network.state_dict()["conv1.weight"].dtype == torch.bfloat16


def test_other_classes_keep_the_features(trained, checkpoint):
    network = by_pretrained(trained, checkpoint, model_name="cifar_resnet20", num_classes=7).eval()
    with torch.inference_mode():
        assert network(images()).shape == (8, 7)
        expected = trained.forward_features(images())
        torch.testing.assert_close(network.forward_features(images()), expected, rtol=1e-4, atol=1e-5)


def test_another_depth_is_refused(trained):
    with pytest.raises(RuntimeError, match=r'Missing key.*"stages\.0\.3\.survival"'):
        timm.create_model("cifar_resnet32_sd").load_state_dict(trained.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"stages\.0\.2\.survival"'):
        CifarResNet(14).load_state_dict(trained.state_dict())
