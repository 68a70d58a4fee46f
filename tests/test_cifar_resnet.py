"""The networks: architecture, initialization, arguments, and timm's interface."""

import copy
import math
import pickle

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import timm_sd
from timm_sd import StochasticDepth, gates, survival_probabilities

NAMES = [f"cifar_resnet{depth}{suffix}" for depth in (20, 32, 44, 56, 110, 152, 1202) for suffix in ("", "_sd")]


def create(name="cifar_resnet20_sd", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(batch_size=2, channels=3, size=(32, 32)):
    return torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(1))


# Architecture


def test_registry():
    assert timm.list_models("cifar_resnet*") == NAMES
    assert timm.list_models(module="cifar_resnet") == NAMES
    tagged = timm.list_models("cifar_resnet*", include_tags=True)
    short = [name for name in tagged if "_cifar" in name]  # weights trained for fewer epochs than the paper's
    assert short == timm.list_pretrained("cifar_resnet*")
    assert [name for name in tagged if name not in short] == [
        f"{name}.{tag}" for name in NAMES for tag in ("cifar10", "cifar100", "svhn")
    ]
    assert timm.list_models("*_sd.cifar100", include_tags=True) == [f"{name}.cifar100" for name in NAMES[1::2]]


def test_any_depth_by_name(registry):
    with pytest.raises(RuntimeError, match="Unknown model"):
        create("cifar_resnet26_sd")
    timm_sd.register_depth(26)
    timm_sd.register_depth(26)
    network = create("cifar_resnet26_sd.cifar100", num_classes=7)
    assert [gate.survival for gate in gates(network)] == pytest.approx([1 - b / 24 for b in range(1, 13)])
    assert (network.num_classes, network.pretrained_cfg["architecture"]) == (7, "cifar_resnet26_sd")
    assert [gate.survival for gate in gates(create("cifar_resnet26"))] == [1.0] * 12
    with pytest.raises(ValueError, match="depth=27, but it must be 6n"):
        timm_sd.register_depth(27)


@pytest.mark.parametrize("name", NAMES)
def test_size(name):
    with torch.device("meta"):
        network = timm.create_model(name)
    depth = int(name.removeprefix("cifar_resnet").removesuffix("_sd"))
    n = (depth - 2) // 6
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    # Counted from He et al.'s description: 3x3 convolutions without bias, each followed by a scale and a shift.
    convolutions = [(3, 16)] + [(16, 16)] * 2 * n
    convolutions += [(16, 32)] + [(32, 32)] * (2 * n - 1) + [(32, 64)] + [(64, 64)] * (2 * n - 1)
    expected = sum(9 * inputs * outputs + 2 * outputs for inputs, outputs in convolutions) + 64 * 10 + 10
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert len(gates(network)) == 3 * n
    final = 0.5 if name.endswith("_sd") else 1.0
    expected = [1 - b / (3 * n) * (1 - final) for b in range(1, 3 * n + 1)]
    assert [gate.survival for gate in gates(network)] == pytest.approx(expected)


def test_published_sizes():
    for name, parameters in {"cifar_resnet110": 1_727_962, "cifar_resnet20": 269_722}.items():
        assert sum(parameter.numel() for parameter in create(name).parameters()) == parameters


def test_forward_cost_is_the_published_one():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        timm.create_model("cifar_resnet110").eval()(torch.empty(1, 3, 32, 32))
    assert counter.get_total_flops() / 2 == pytest.approx(253e6, rel=0.01)


def test_output_by_hand():
    """The network rewritten as plain functions, with option A's shortcut made of slices and means."""
    network = create().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = network.state_dict()

    def conv_bn(x, conv, bn, stride=1):
        x = nn.functional.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var, scale, shift = (
            state[f"{bn}.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = conv_bn(images(), "conv1", "bn1").relu()
    block = 0
    for stage in range(3):
        for index in range(3):
            block += 1
            branch = f"stages.{stage}.{index}.branch"
            stride = 2 if stage and not index else 1
            f = conv_bn(x, f"{branch}.conv1", f"{branch}.bn1", stride).relu()
            f = conv_bn(f, f"{branch}.conv2", f"{branch}.bn2")
            if stride == 2:
                pooled = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
                x = torch.cat([pooled, torch.zeros_like(pooled)], dim=1)
            x = ((1 - block / 9 * 0.5) * f + x).relu()
    logits = x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(network(images()), logits)


def test_initialization():
    network = create("cifar_resnet110_sd")
    scales = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (9 * module.in_channels))
            assert module.weight.std().item() == pytest.approx(std, rel=0.15)
            assert module.weight.abs().max() > 2.5 * std, "not normal"
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            scales.append(module.weight.detach())
            assert not module.bias.any()
    scales = torch.cat(scales).sort().values
    assert scales.min() >= 0
    assert scales.max() <= 1
    assert (scales - torch.linspace(0, 1, len(scales))).abs().max() < 0.05, "not uniform"


def test_untrained_1202_layers_do_not_overflow():
    with torch.inference_mode():
        assert create("cifar_resnet1202").eval()(images(1)).isfinite().all()


def test_init_weights_restores_everything():
    network = create(device="meta").to_empty(device="cpu")
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data.fill_(77)
    network.init_weights()
    fresh = create()
    torch.manual_seed(0)
    network.init_weights()
    for key, value in network.state_dict().items():
        if "running" in key or key.endswith(("survival", "tracked", "bn1.bias", "bn2.bias")):
            assert torch.equal(value, fresh.state_dict()[key]), key
        assert not (value == 77).any(), key


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (7, 5)])
def test_other_image_sizes(size):
    features = create().eval().forward_features(images(size=size))
    assert features.shape == (2, 64, math.ceil(size[0] / 4), math.ceil(size[1] / 4))


# Arguments


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("drop_path_rate", 1, r"drop_path_rate=1, but it must lie in \[0, 1\)"),
        ("drop_path_rate", -0.1, r"drop_path_rate=-0\.1, but it must lie in \[0, 1\)"),
        ("drop_path_rate", float("nan"), r"drop_path_rate=nan, but it must lie in \[0, 1\)"),
        ("drop_path_schedule", "cosine", r"schedule='cosine', but it must be one of 'linear', 'uniform'"),
        ("drop_path_mode", "pixel", r"drop_path_mode='pixel', but it must be one of 'row', 'count', 'batch'"),
        ("drop_rate", 1.5, r"drop_rate=1\.5, but it must lie in \[0, 1\]"),
        ("global_pool", "median", r"global_pool='median', but it must be one of 'avg', 'max'"),
        ("global_pool", "", r"global_pool='' requires num_classes=0, but num_classes=10"),
        ("num_classes", -1, r"num_classes=-1, but it must be at least 0"),
        ("in_chans", 0, r"in_chans=0, but it must be at least 1"),
    ],
)
def test_wrong_argument(argument, value, message):
    with pytest.raises(ValueError, match=message):
        create(**{argument: value})


def test_wrong_argument_of_reset_classifier():
    with pytest.raises(ValueError, match="global_pool='median'"):
        create().reset_classifier(10, "median")


def test_arguments_reach_the_blocks():
    uniform = gates(create("cifar_resnet20", drop_path_rate=0.2, drop_path_schedule="uniform"))
    assert [gate.survival for gate in uniform] == [0.8] * 9
    assert {gate.mode for gate in uniform} == {"batch"}
    for mode in ("batch", "row", "count"):
        assert [gate.mode for gate in gates(create(drop_path_mode=mode))] == [mode] * 9


def test_dropout_before_the_classifier():
    network = create("cifar_resnet20", drop_rate=0.5).train()
    features = torch.ones(2, 64, 8, 8)
    dropped = network.forward_head(features, pre_logits=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(network.eval().forward_head(features, pre_logits=True), torch.ones(2, 64))


@pytest.mark.parametrize(("pool", "features"), [("avg", 64), ("max", 64), ("avgmax", 64), ("catavgmax", 128)])
def test_pooling(pool, features):
    network = create(global_pool=pool).eval()
    assert network.head_hidden_size == features
    assert network(images()).shape == (2, 10)


# timm's interface, where timm's own tests do not cover it


def test_data_configuration():
    config = resolve_model_data_config(create())
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.4914, 0.4822, 0.4465)
    assert config["crop_pct"] == 1.0
    labels = create().pretrained_cfg["label_names"]
    assert labels[:2] == ("airplane", "automobile")
    network = create("cifar_resnet20_sd.cifar100")
    assert network(images()).shape == (2, 100)
    labels = network.pretrained_cfg["label_names"]
    assert len(set(labels)) == 100
    assert list(labels) == sorted(labels)
    assert resolve_model_data_config(network)["mean"] == (0.5071, 0.4865, 0.4409)


def test_other_channels_and_classes():
    assert create(in_chans=1, num_classes=7)(images(channels=1)).shape == (2, 7)


def test_classifier():
    network = create().eval()
    assert network.get_classifier() is network.fc
    features = network.forward_features(images())
    pooled = network.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    network.reset_classifier(5)
    assert network(images()).shape == (2, 5)
    network.reset_classifier(0)
    assert torch.equal(network(images()), pooled)
    network.reset_classifier(0, "")
    assert torch.equal(network(images()), features)


def test_parameter_groups_follow_depth():
    network = create()
    groups = timm.models.group_parameters(network, network.group_matcher(), reverse=True)
    assert groups["conv1.weight"] == groups["bn1.weight"] == 0
    order = [groups[f"stages.{stage}.{block}.branch.conv1.weight"] for stage in range(3) for block in range(3)]
    assert order == list(range(1, 10))
    assert groups["fc.weight"] == 10
    coarse = timm.models.group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    assert [coarse[f"stages.{stage}.2.branch.bn2.bias"] for stage in range(3)] == [1, 2, 3]
    optimizer = create_optimizer_v2(network, "sgd", lr=1.0, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales[id(network.fc.weight)] == 1
    assert scales[id(network.conv1.weight)] == 0.5**10


def test_features_only():
    features = create(features_only=True)
    assert features.feature_info.channels() == [16, 32, 64]
    assert features.feature_info.reduction() == [1, 2, 4]
    assert [tuple(output.shape) for output in features(images())] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    last = create(features_only=True, out_indices=(-1,))
    assert [tuple(output.shape) for output in last(images())] == [(2, 64, 8, 8)]
    first = create(features_only=True, out_indices=(0,))
    assert len(gates(first)) == 3, "groups after the last feature are pruned"


@pytest.mark.parametrize("indices", [None, 1, [0, 2], [-2]])
def test_forward_intermediates(indices):
    network = create().eval()
    features, taken = network.forward_intermediates(images(), indices)
    torch.testing.assert_close(features, network.forward_features(images()))
    outputs, x = [], network.act1(network.bn1(network.conv1(images())))
    for stage in network.stages:
        x = stage(x)
        outputs.append(x)
    expected = {None: [0, 1, 2], 1: [2]}.get(indices if not isinstance(indices, list) else "", indices)
    for output, index in zip(taken, expected, strict=True):
        torch.testing.assert_close(output, outputs[index])
    with pytest.raises(ValueError, match="output_fmt=NHWC, but it must be NCHW"):
        network.forward_intermediates(images(), output_fmt="NHWC")


def test_exports():
    network = create().eval()
    x = images()
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="eager")(x), expected)
        torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), expected)
        torch.testing.assert_close(torch.jit.script(network)(x), expected)
        torch.testing.assert_close(torch.jit.trace(network, x)(x), expected)


def test_torchscript_does_not_train_with_stochastic_depth():
    """TorchScript would compute every block. A plain network can be trained as usual."""
    network = create().eval()
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(images()), network(images()))
    message = r"RuntimeError: TorchScript cannot train with stochastic depth: call eval\(\), or use torch.compile"
    for training in (scripted.train(), torch.jit.script(create().train())):
        with pytest.raises(torch.jit.Error, match=message):
            training(images())

    plain = create("cifar_resnet20").train()
    scripted = torch.jit.script(copy.deepcopy(plain))
    outputs = [network(images()) for network in (plain, scripted)]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(*outputs)
    for parameter, other in zip(plain.parameters(), scripted.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_plain_network_trains_in_one_graph():
    torch.manual_seed(0)
    network = create("cifar_resnet20").train()
    expected = copy.deepcopy(network)(images())
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(images()), expected)


def test_copies():
    network = create().eval()
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(images()), network(images()))
        assert repr(other) == repr(network)


@pytest.mark.parametrize(
    ("make", "decay"),
    [
        (lambda network: ModelEmaV3(network, decay=0.9), 0.9),
        (lambda network: ModelEmaV3(network, decay=0.9, foreach=False), 0.9),
        (lambda network: AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True), 0.9),
        (lambda network: AveragedModel(network), 0.0),  # which copies buffers
    ],
)
def test_moving_average(make, decay):
    """It averages the probabilities, too, and evaluates and trains with their average."""
    network = create()
    average = make(network)
    update = average.update_parameters if isinstance(average, AveragedModel) else average.update
    if isinstance(average, ModelEmaV3):  # the other one stays in training
        average.eval()
    before = average.module.conv1.weight.detach().clone()
    update(network)  # AveragedModel's first is a copy
    with torch.no_grad():
        network.conv1.weight += 1
    own = [gate.survival for gate in gates(network)]
    for gate in gates(network):
        gate.survival = 1.0
    update(network)
    torch.testing.assert_close(average.module.conv1.weight, before + (0.5 if decay == 0 else 1 - decay))
    expected = [1 - decay * (1 - p) for p in own]
    state = average.module.state_dict()
    assert [state[key].item() for key in state if key.endswith("survival")] == pytest.approx(expected)

    plain = create(drop_path_rate=0.0).eval()
    for gate, p in zip(gates(plain), expected, strict=True):
        gate.block.branch.bn2.weight.data *= p
        gate.block.branch.bn2.bias.data *= p
    for name, value in state.items():
        if not name.endswith(("survival", "branch.bn2.weight", "branch.bn2.bias")):
            plain.state_dict()[name].copy_(value)
    for moved in (average.module, copy.deepcopy(average.module).double().float()):
        torch.testing.assert_close(moved.eval()(images()), plain(images()))

    assert [gate.survival for gate in gates(average)] == pytest.approx(expected)
    average.module.train()
    assert [gate.survival for gate in gates(average)] == pytest.approx(expected)
    for other in (copy.deepcopy(average.module), average.module.bfloat16().float()):
        assert [gate.block.survival.item() for gate in gates(other)] == pytest.approx(expected)


@pytest.mark.parametrize("to", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_probabilities_are_exact_in_every_precision(to):
    network = to(create()).eval()
    own = survival_probabilities(9, 0.5)
    assert [gate.survival for gate in gates(network)] == own
    assert [gate.block.survival.item() for gate in gates(network)] == pytest.approx(own, rel=1e-7)
    assert [gate.survival for gate in gates(network.float().train())] == own


def test_without_memory():
    network = create(device="meta").eval()
    assert [gate.survival for gate in gates(network)] == survival_probabilities(9, 0.5)
    weights = create(drop_path_rate=0.2).eval()
    for other, assign in ((copy.deepcopy(network).to_empty(device="cpu"), False), (network, True)):
        other.load_state_dict(weights.state_dict(), assign=assign)
        torch.testing.assert_close(other(images()), weights(images()))
        assert [gate.survival for gate in gates(other)] == survival_probabilities(9, 0.5)


def test_weights_that_are_read_in_place():
    """As by PyTorch's distributed checkpoints, before they are passed to load_state_dict."""
    network, trained = create().train(), create(drop_path_rate=0.2).eval()
    state = network.state_dict()
    for key, value in trained.state_dict().items():
        state[key].copy_(value)
    network.load_state_dict(state)
    assert [gate.survival for gate in gates(network)] == survival_probabilities(9, 0.5)
    torch.testing.assert_close(network.eval()(images()), trained(images()))


def test_an_average_loads_its_own_state_dict():
    network = create()
    average = ModelEmaV3(network, decay=0.9)
    for gate in gates(network):
        gate.survival = 1.0
    average.update(network)
    state = copy.deepcopy(average.module.state_dict())
    average.module.load_state_dict(state)
    assert all(map(torch.equal, state.values(), average.module.state_dict().values()))


def test_probabilities_may_change_while_a_gradient_is_computed():
    network = create().eval()
    gradients = []
    for probability in 0.5, 0.9:
        network.zero_grad()
        gates(network)[-1].survival = 0.5
        loss = network(images()).square().sum()
        with torch.inference_mode():
            gates(network)[-1].survival = probability
        loss.backward()
        gradients.append(network.conv1.weight.grad)
    assert torch.equal(*gradients)
    network(images()).sum().backward()


def test_probabilities_stay_in_shared_memory():
    network = create().share_memory()
    gates(network)[0].survival = 0.25
    assert gates(network)[0].block.survival.is_shared()


def test_the_probability_is_not_rounded_beside_a_float32_shortcut():
    branch = nn.Sequential(nn.Linear(8, 8))
    block = StochasticDepth(branch, nn.Identity(), nn.Identity(), 17 / 18).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x = torch.zeros(4, 8)
        torch.testing.assert_close(block(x), 17 / 18 * branch(x).float(), rtol=1e-6, atol=0)


def test_without_data():
    with FakeTensorMode():
        block = StochasticDepth(nn.Sequential(nn.Linear(8, 8)), nn.Identity(), nn.ReLU(), 0.5).eval().train()
        assert "survival=0.5000" in repr(block)


def test_a_network_made_in_inference_mode():
    with torch.inference_mode():
        network = create()
    gates(network)[0].survival = 0.25
    assert gates(network.double())[0].block.survival == 0.25
