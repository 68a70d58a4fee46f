"""The method against its equations, written out."""

import copy
import itertools
import math
import pickle
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import start_processes
from torch.utils.flop_counter import FlopCounterMode

from timm_sd import StochasticDepth, draw_gates, gates, survival_probabilities, use_gates

MODES = ["batch", "row", "count"]


def make_block(survival=0.5, mode="batch"):
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    return StochasticDepth(branch, nn.Identity(), nn.ReLU(), survival, mode)


def branch_by_hand(block, x, batch_statistics):
    conv1, bn, _, conv2 = block.branch
    x = F.conv2d(x, conv1.weight, conv1.bias, padding=1)
    mean, var = (
        (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
        if batch_statistics
        else (
            bn.running_mean,
            bn.running_var,
        )
    )
    x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + bn.eps).sqrt()
    return F.conv2d((x * bn.weight.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)).relu(), conv2.weight, conv2.bias)


def inputs(batch_size=6):
    return torch.randn(batch_size, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def inputs_after_relu(batch_size=6):
    """Inputs that a ReLU leaves unchanged: with gates per sample, a block applies it to the dropped samples too."""
    return inputs(batch_size).abs()


def small_network(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20_sd", **kwargs)


def images(batch_size=4):
    return torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def gradients(network):
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def drawn(network, step=0, batch_size=4, seed=0):
    """The gates of a step in the network's mode."""
    own = gates(network)
    (mode,) = {gate.mode for gate in own}
    return draw_gates([gate.survival for gate in own], seed, step, None if mode == "batch" else batch_size, mode)


# Schedules


def test_linear_decay_is_the_papers():
    p = survival_probabilities(54, 0.5)
    assert p[0] == pytest.approx(1 - 0.5 / 54)
    assert p[26] == pytest.approx(0.75)
    assert p[53] == 0.5
    assert sum(p) == pytest.approx(40.25)


def test_linear_decay_is_not_timms():
    timms = [1 - rate for rate in torch.linspace(0, 0.5, 54).tolist()]
    assert timms[0] == 1
    assert survival_probabilities(54, 0.5)[0] < 1


def test_uniform_survival():
    assert survival_probabilities(3, 0.2, "uniform") == [0.2, 0.2, 0.2]


@pytest.mark.parametrize("final", [0, -0.1, 1.1, float("nan")])
def test_survival_out_of_range(final):
    with pytest.raises(ValueError, match=r"final=.*must lie in \(0, 1\]"):
        survival_probabilities(3, final)
    with pytest.raises(ValueError, match=r"survival=.*must lie in \(0, 1\]"):
        make_block(survival=final)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.84, 0.68, 0.52, 0.36]),
        ("uniform", [0.36, 0.36, 0.36, 0.36]),
        ("quadratic", [1 - 0.64 / 16, 1 - 0.64 / 4, 1 - 9 * 0.64 / 16, 0.36]),
        ("exponential", [0.6**0.5, 0.6, 0.6**1.5, 0.36]),
        ([1.0, 0.2, 0.9, 0.5], [1.0, 0.2, 0.9, 0.5]),
    ],
)
def test_schedules(schedule, expected):
    assert survival_probabilities(4, 0.36, schedule) == pytest.approx(expected)
    network = timm.create_model("cifar_resnet20", drop_path_schedule=[*expected, *[1] * 5])
    assert [gate.survival for gate in gates(network)] == [*expected, *[1] * 5]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([0.5, 0.5], "2 survival probabilities, but there are 3 residual blocks"),
        ([0.5, 0.0, 0.5], r"p_2=0.0, but it must lie in \(0, 1\]"),
        ([0.5, 0.5, float("nan")], r"p_3=nan, but it must lie in \(0, 1\]"),
    ],
)
def test_probabilities_that_are_not_valid(schedule, message):
    with pytest.raises(ValueError, match=message):
        survival_probabilities(3, 0.5, schedule)


def test_probabilities_that_change_over_time():
    """As in docs/networks.md, every drop rate rises linearly over the first steps."""
    network = timm.create_model("cifar_resnet20_sd").train()
    final = [gate.survival for gate in gates(network)]
    images, opened = torch.randn(2, 3, 32, 32), []
    for step in range(60):
        for gate, p in zip(gates(network), final, strict=True):
            gate.survival = 1 - min(1, step / 30) * (1 - p)
        survival = [gate.survival for gate in gates(network)]
        with use_gates(network, draw_gates(survival, seed=0, step=step)):
            with FlopCounterMode(display=False) as flops:
                network(images)
            opened.append(flops.get_total_flops())
        if step == 20:
            saved = copy.deepcopy(network.state_dict()), copy.deepcopy(network).eval(), survival
    assert opened[0] == max(opened)
    assert sum(opened[30:]) < sum(opened[:30])
    assert survival == final
    state = network.state_dict()
    assert [state[key].item() for key in state if key.endswith("survival")] == pytest.approx(final)
    # To resume, set the probabilities of that step before loading the weights.
    weights, expected, survival = saved
    resumed = timm.create_model("cifar_resnet20_sd").eval()
    for gate, p in zip(gates(resumed), survival, strict=True):
        gate.survival = p
    resumed.load_state_dict(weights)
    torch.testing.assert_close(resumed(images), expected(images))


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"schedule='cosine'.*'linear', 'uniform', 'quadratic', 'exponential'"):
        survival_probabilities(3, 0.5, "cosine")


# Gates


def test_gates_are_a_function_of_seed_and_step():
    p = survival_probabilities(54, 0.5)
    torch.manual_seed(0)
    first = draw_gates(p, seed=3, step=7)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, draw_gates(torch.tensor(p), seed=3, step=7))
    assert first.shape == (54,)
    assert first.dtype == torch.bool
    assert not torch.equal(first, draw_gates(p, seed=3, step=8))
    assert not torch.equal(first, draw_gates(p, seed=4, step=7))


def test_gates_open_as_often_as_they_should():
    p = torch.tensor(survival_probabilities(54, 0.5))
    steps = 4000
    frequency = torch.stack([draw_gates(p, 0, step) for step in range(steps)]).double().mean(0)
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / steps).sqrt()).all()
    rows = draw_gates(p, 0, 0, batch_size=steps)
    assert rows.shape == (54, steps)
    assert draw_gates(p.bfloat16(), 0, 0, batch_size=0).shape == (54, 0)
    assert ((rows.double().mean(1) - p).abs() < 5 * (p * (1 - p) / steps).sqrt()).all()


def test_gates_of_different_blocks_and_steps_are_independent():
    values = torch.stack([draw_gates([0.5] * 20, 0, step) for step in range(4000)]).double() - 0.5
    between_blocks = values.T @ values / len(values) * 4
    assert (between_blocks - torch.eye(20)).abs().max() < 0.1
    between_steps = (values[1:] * values[:-1]).mean() * 4
    assert between_steps.abs() < 0.02


@pytest.mark.parametrize("batch_size", [1, 2, 7, 128])
def test_counted_gates_open_for_k_samples(batch_size):
    p = survival_probabilities(54, 0.3)
    values = draw_gates(p, 0, 0, batch_size, mode="count")
    assert values.shape == (54, batch_size)
    assert values.dtype == torch.bool
    assert values.sum(1).tolist() == [max(1, math.floor(batch_size * probability + 0.5)) for probability in p]
    assert torch.equal(values, draw_gates(p, 0, 0, batch_size, mode="count"))
    if batch_size > 2:
        assert not torch.equal(values, draw_gates(p, 0, 1, batch_size, mode="count"))


def test_counted_gates_open_for_k_samples_whatever_the_rounding():
    """10 * (1 - 0.8) is less than 2."""
    assert draw_gates([1 - 0.8], 0, 0, 10, mode="count").sum() == 2


def test_counted_gates_take_every_choice_of_samples_equally_often():
    """All six choices of two samples out of four, independently for each gate."""
    choices = {choice: index for index, choice in enumerate(itertools.combinations(range(4), 2))}
    counts = torch.zeros(6, 6)
    for step in range(4):
        values = draw_gates([0.5] * 4000, 0, step, 4, mode="count")
        taken = [choices[tuple(row.nonzero().flatten().tolist())] for row in values]
        for first, second in zip(taken[::2], taken[1::2], strict=True):
            counts[first, second] += 1
    p = 1 / 36
    assert (counts / 8000 - p).abs().max() < 5 * (p * (1 - p) / 8000) ** 0.5


@pytest.mark.parametrize(
    ("batch_size", "mode", "message"),
    [(4, "cuont", "mode='cuont', but it must be one of"), (None, "row", "batch_size"), (None, "count", "batch_size")],
)
def test_gates_of_a_mode_that_cannot_be_drawn(batch_size, mode, message):
    with pytest.raises(ValueError, match=message):
        draw_gates([0.5], 0, 0, batch_size, mode)


# The residual rule


def test_open_gate():
    block = make_block().train()
    x = inputs()
    expected = (branch_by_hand(block, x, batch_statistics=True) + x).relu()
    with use_gates(block, torch.tensor([True])):
        torch.testing.assert_close(block(x), expected)


def test_closed_gate():
    block = make_block().train()
    x = inputs()
    before = copy.deepcopy(block.state_dict())
    with use_gates(block, torch.tensor([False])):
        assert torch.equal(block(x), x)
    for key, value in block.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of a dropped block changed"


@pytest.mark.parametrize("mode", MODES)
def test_inference_scales_the_branch(mode):
    block = make_block(survival=0.3, mode=mode).eval()
    block.branch[1].running_mean.uniform_()
    x = inputs()
    expected = (0.3 * branch_by_hand(block, x, batch_statistics=False) + x).relu()
    torch.testing.assert_close(block(x), expected)


def test_dropped_branch_costs_nothing():
    network = small_network().train()
    blocks = [gate.block for gate in gates(network)]

    def flops(values):
        with use_gates(network, values), FlopCounterMode(display=False) as counter:
            network(images()).sum().backward()
        return counter.get_total_flops()

    everything, nothing = torch.ones(9, dtype=torch.bool), torch.zeros(9, dtype=torch.bool)
    # Two 3x3 convolutions, 16 to 16 channels, 32x32 pixels, 4 images; a backward pass costs two forward passes.
    one_block = 2 * 3 * 2 * 9 * 16 * 16 * 32 * 32 * 4
    without_second = everything.clone()
    without_second[1] = False
    assert flops(everything) - flops(without_second) == one_block
    # What remains is the stem, whose input needs no gradient, and the classifier.
    stem, classifier = 2 * 2 * 9 * 3 * 16 * 32 * 32 * 4, 3 * 2 * 64 * 10 * 4
    assert flops(nothing) == stem + classifier

    calls = []
    for block in blocks:
        block.branch.register_forward_hook(lambda *_: calls.append(1))
    with use_gates(network, nothing):
        network(images())
    assert not calls


def test_dropped_parameters_get_zero_gradients():
    network = small_network().train()
    values = torch.tensor([True, False] * 4 + [True])
    with use_gates(network, values):
        network(images()).square().sum().backward()
    for gate, value in zip(gates(network), values, strict=True):
        for parameter in gate.block.parameters():
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.any() == value


def test_dropped_block_is_moved_by_momentum_and_weight_decay():
    block = make_block().train()
    lr, momentum, decay = 0.1, 0.9, 0.01
    optimizer = torch.optim.SGD(block.parameters(), lr=lr, momentum=momentum, nesterov=True, weight_decay=decay)
    weight = block.branch[0].weight
    x = inputs()

    with use_gates(block, torch.tensor([True])):
        block(x).square().sum().backward()
    gradient = weight.grad + decay * weight.detach()
    velocity = gradient
    expected = weight.detach() - lr * (gradient + momentum * velocity)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)

    optimizer.zero_grad()
    with use_gates(block, torch.tensor([False])):
        block(x.requires_grad_()).square().sum().backward()
    gradient = decay * expected
    velocity = momentum * velocity + gradient
    expected = expected - lr * (gradient + momentum * velocity)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_frozen_parameters_stay_without_gradient():
    block = make_block().train()
    block.branch[0].requires_grad_(False)
    with use_gates(block, torch.tensor([False])):
        block(inputs()).sum().backward()
    assert block.branch[0].weight.grad is None
    assert not block.branch[3].weight.grad.any()


@pytest.mark.parametrize(("mode", "kept"), [("row", [0, 2, 3]), ("row", [5]), ("row", []), ("count", [1, 2, 5])])
def test_rows(mode, kept):
    """Outputs and gradients against the block computed by hand on the kept rows alone."""
    block = make_block(mode=mode).train()
    x, weights = inputs_after_relu().requires_grad_(), inputs()
    expected = x.clone()
    if kept:
        expected[kept] = (branch_by_hand(block, x[kept], batch_statistics=True) + x[kept]).relu()
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *block.parameters()], materialize_grads=True)
    values = torch.zeros(1, len(x), dtype=torch.bool)
    values[0, kept] = True
    with use_gates(block, values):
        output = block(x)
        (output * weights).sum().backward()
    torch.testing.assert_close(output, expected)
    for tensor, gradient in zip([x, *block.parameters()], wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
    assert block.branch[1].num_batches_tracked == bool(kept)


@pytest.mark.parametrize(
    ("batch_size", "survival", "k"), [(6, 0.5, 3), (7, 0.5, 4), (6, 0.9, 5), (6, 0.01, 1), (1, 0.5, 1)]
)
def test_mode_count_keeps_k_rows(batch_size, survival, k):
    """With gates that the block draws, k rows differ from the shortcut and the others equal it to the bit."""
    block = make_block(survival, mode="count").train()
    x = inputs_after_relu(batch_size)
    seen = []
    block.branch.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    kept = set()
    for _ in range(40):
        rows = (block(x) != x).flatten(1).any(1).nonzero().flatten().tolist()
        assert len(rows) == k
        (branch_input,) = seen
        seen.clear()
        assert {row.numpy().tobytes() for row in branch_input} == {x[row].numpy().tobytes() for row in rows}
        kept |= set(rows)
    assert kept == set(range(batch_size)), "some sample is never kept"


def test_rows_promote_types_as_addition_does():
    block = make_block(mode="row").double().train()
    block.branch.append(ToFloat32())
    x = inputs_after_relu().bfloat16()
    block.branch.insert(0, ToDouble())
    with use_gates(block, torch.tensor([[True, False] * 3])):
        output = block(x)
    assert output.dtype == torch.float32
    assert torch.equal(output[1::2], x[1::2].float())


@pytest.mark.parametrize("mode", ["row", "count"])
def test_rows_keep_the_memory_format(mode):
    network = small_network(drop_path_mode=mode).to(memory_format=torch.channels_last).train()
    formats = []
    for gate in gates(network):
        for module in (gate.block, gate.block.branch):
            module.register_forward_hook(
                lambda _, __, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    values = torch.tensor([[True, False, True, False]] * 9)
    for gate in gates(network):
        gate.survival = 0.5
    with use_gates(network, values):
        network(images().contiguous(memory_format=torch.channels_last))
    assert formats == [True] * 18


class ToDouble(nn.Module):
    def forward(self, x):
        return x.double()


class ToFloat32(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("mode", ["row", "count"])
def test_rows_under_autocast(mode):
    network = small_network(drop_path_mode=mode).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = network(images()).float().sum()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_default_gates_come_from_torchs_cpu_generator(mode):
    block = make_block(mode=mode).train()
    x = inputs(1)
    outputs = []
    torch.manual_seed(5)
    for _ in range(20):
        outputs.append(bool((block(x) != x).any()))
    torch.manual_seed(5)
    expected = [bool(torch.rand(1 if mode == "row" else ()) < 0.5) for _ in range(20)]
    assert outputs == expected


def test_default_rows_come_from_torchs_cpu_generator():
    block = make_block(mode="count").train()
    x = inputs_after_relu()
    torch.manual_seed(5)
    rows = [(block(x) != x).flatten(1).any(1).nonzero().flatten().tolist() for _ in range(20)]
    torch.manual_seed(5)
    assert rows == [torch.randperm(6)[:3].sort().values.tolist() for _ in range(20)]


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_gates_are_not_rounded_to_the_default_type(bfloat16_by_default):
    """In bfloat16, 0.999 is 1, and only 256 numbers can be drawn."""
    gate = make_block(survival=0.999, mode="row").gate.train()
    torch.manual_seed(6)
    drawn = gate.draw(20_000)
    torch.manual_seed(6)
    assert torch.equal(drawn, torch.rand(20_000, dtype=torch.float32) < 0.999)
    assert 0 < (~drawn).sum() < 60
    p = survival_probabilities(54, 0.999)
    assert torch.equal(
        draw_gates(p, 0, 0, 1000),
        torch.from_numpy(np.random.default_rng([0, 0]).random((54, 1000)) < np.array(p)[:, None]),
    )
    state = make_block(survival=0.999).state_dict()
    assert state["survival"].dtype == torch.float32
    assert state["survival"].item() == pytest.approx(0.999, abs=1e-7)


def test_plain_network_draws_nothing():
    network = timm.create_model("cifar_resnet20").train()
    before = torch.get_rng_state()
    network(images())
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"mode='pixel'.*'row', 'count', 'batch'"):
        make_block(mode="pixel")


def test_repr_shows_probability_and_mode():
    assert "survival=0.5000, mode='batch'" in repr(make_block())


# Provided gates


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("batch", torch.ones(8, dtype=torch.bool)),
        ("batch", torch.ones(9)),
        ("batch", torch.ones(9, 4, 1, dtype=torch.bool)),
        ("row", torch.ones(9, dtype=torch.bool)),
        ("count", torch.ones(9, dtype=torch.bool)),
    ],
)
def test_gates_that_do_not_fit(mode, values):
    network = small_network(drop_path_mode=mode)
    with pytest.raises(ValueError, match=f"this network's 9 gates in mode '{mode}'"), use_gates(network, values):
        pass


def test_modes_may_be_mixed():
    """A gate for the whole mini-batch has equal entries in its row."""
    network = small_network().train()
    own = gates(network)
    for gate, mode in zip(own, ["batch", "row", "count"] * 3, strict=True):
        gate.mode, gate.survival = mode, 0.5
    modes, p = [gate.mode for gate in own], [0.5] * 9
    values = draw_gates(p, 3, 1, 4, modes)
    assert torch.equal(values[1::3], draw_gates(p, 3, 1, 4, "row")[1::3])
    assert torch.equal(values[2::3], draw_gates(p, 3, 1, 4, "count")[2::3])
    assert (values[::3] == values[::3, :1]).all()
    with use_gates(network, values):
        assert [gate.provided.tolist() for gate in own] == [
            row[0].item() if mode == "batch" else row.tolist() for mode, row in zip(modes, values, strict=True)
        ]
        network(images(4)).sum().backward()
    values[0] = torch.tensor([True, False, True, True])
    with pytest.raises(ValueError, match="in mode 'batch', which takes one for all"), use_gates(network, values):
        pass
    with pytest.raises(ValueError, match="8 modes, but there are 9 gates"):
        draw_gates(p, 3, 1, 4, modes[1:])
    assert {draw_gates([0.5], 3, step, 4, ["batch"]).any().item() for step in range(20)} == {False, True}


@pytest.mark.parametrize("mode", ["row", "count"])
def test_gates_for_another_batch(mode):
    network = small_network(drop_path_mode=mode).train()
    message = r"gates of shape \(3,\), but this pass needs \(4,\)"
    with use_gates(network, drawn(network, batch_size=3)), pytest.raises(ValueError, match=message):
        network(images())


@pytest.mark.parametrize("mode", ["row", "count"])
def test_a_gate_for_the_whole_batch_where_each_sample_has_its_own(mode):
    block = make_block(mode=mode).train()
    block.gate.provided = torch.tensor(True)
    with pytest.raises(ValueError, match=r"gates of shape \(\), but this pass needs \(6,\)"):
        block(inputs_after_relu())


@pytest.mark.parametrize("opened", [0, 2, 4, 6])
def test_another_number_of_open_gates_is_refused(opened):
    block = make_block(mode="count").train()
    values = torch.arange(6).unsqueeze(0) < opened
    message = rf"{opened} of 6 gates are open, but mode 'count' with p = 0\.5 opens 3: draw them with mode='count'"
    with pytest.raises(ValueError, match=message), use_gates(block, values):
        pass
    assert block.gate.provided is None


def test_the_list_of_gates_is_enough():
    network = small_network().train()
    outputs = []
    for which in (network, gates(network)):
        with use_gates(which, GATES):
            outputs.append(network(images()))
    assert torch.equal(*outputs)
    assert [gate.survival for gate in gates(network)] == survival_probabilities(9, 0.5)
    assert [gate.block.gate for gate in gates(network)] == gates(network)


def test_copies_do_not_keep_provided_gates():
    """Copies made within a context draw their own gates, there and later."""
    network = small_network().train()
    with use_gates(network, torch.zeros(9, dtype=torch.bool)):
        copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
        assert all(gate.provided is not None for gate in gates(network))
        for other in copies:
            assert all(gate.provided is None for gate in gates(other))
            assert [gate.survival for gate in gates(other)] == [gate.survival for gate in gates(network)]
        torch.manual_seed(0)
        outputs = [other(images()) for other in copies for _ in range(5)]
        assert any(not torch.equal(output, network(images())) for output in outputs)
        with use_gates(copies[0], GATES):
            expected = copies[0](images())
    with use_gates(network, GATES):
        torch.testing.assert_close(network(images()), expected)


def test_contexts_nest():
    block = make_block().train()
    with use_gates(block, torch.tensor([False])):
        with use_gates(block, torch.tensor([True])):
            assert not torch.equal(block(inputs()), inputs())
        for _ in range(10):
            assert torch.equal(block(inputs()), inputs())


def test_gates_end_with_their_context():
    network = small_network().train()
    with pytest.raises(RuntimeError, match="stop"), use_gates(network, torch.ones(9, dtype=torch.bool)):
        raise RuntimeError("stop")
    torch.manual_seed(0)
    first = network(images())
    assert any(not torch.equal(first, network(images())) for _ in range(5)), "the gates are still the provided ones"


GATES = torch.tensor([True, False, True, True, False, False, True, False, True])


def expected_features(network):
    """The features of the three groups, computed without the dropped blocks."""
    shortened = copy.deepcopy(network).train()
    values = iter(GATES)
    features, x = [], shortened.act1(shortened.bn1(shortened.conv1(images())))
    for stage in shortened.stages:
        for block in stage:
            x = block.activation(block.shortcut(x) + block.branch(x)) if next(values) else block.shortcut(x)
        features.append(x)
    return features


@pytest.mark.parametrize("feature_cls", ["getter", "list", "dict", "hook", "fx"])
def test_gates_reach_feature_extractors(feature_cls):
    features = small_network(features_only=True, feature_cls=feature_cls).train()
    expected = expected_features(small_network())
    with use_gates(features, GATES):
        outputs = features(images())
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value)


def test_gates_reach_a_compiled_network():
    network = small_network().train()
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager")
    for model in (network, compiled):
        with use_gates(model, GATES):
            model(images()).square().sum().backward()
    torch.testing.assert_close(gradients(compiled._orig_mod), gradients(network))


def compiled_steps(network, graphs, steps):
    """Train a compiled network, and append each compiled graph to `graphs`."""

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network.train(), backend=backend)
    for step in range(steps):
        with use_gates(compiled, drawn(network, step)):
            compiled(images()).sum().backward()


@pytest.mark.parametrize("name", ["cifar_resnet20_sd", "cifar_resnet56_sd"])
def test_training_compiles_to_a_handful_of_graphs(name):
    graphs = []
    # The limit would hide recompilations by falling back to eager.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled_steps(timm.create_model(name), graphs, steps=30)
    assert len(graphs) <= 14
    assert sum("conv2d" in graph.code for graph in graphs) >= 5, "the branches are not compiled"


def test_training_with_rows_compiles_to_a_bounded_number_of_graphs():
    graphs = []
    compiled_steps(small_network(drop_path_mode="row"), graphs, steps=30)
    assert len(graphs) <= 24


def test_training_with_counts_compiles_to_one_graph():
    graphs = []
    compiled_steps(small_network(drop_path_mode="count"), graphs, steps=10)
    assert len(graphs) == 1


@pytest.mark.parametrize("provided", [True, False])
def test_compiled_training_with_counts_equals_eager_training(provided):
    network = small_network(drop_path_mode="count").train()
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager", fullgraph=True)
    for model in (network, compiled):
        torch.manual_seed(3)
        with use_gates(model, drawn(network)) if provided else nullcontext():
            model(images()).square().sum().backward()
    torch.testing.assert_close(gradients(compiled._orig_mod), gradients(network))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provided", [True, False])
def test_gradient_checkpointing_computes_the_same_blocks_again(mode, provided):
    network = small_network(drop_path_mode=mode).train()
    checkpointed = copy.deepcopy(network)
    checkpointed.set_grad_checkpointing()
    for model in (network, checkpointed):
        torch.manual_seed(3)
        with use_gates(model, drawn(network)) if provided else nullcontext():
            model(images()).square().sum().backward()
    torch.testing.assert_close(gradients(checkpointed), gradients(network))


def train_under_ddp(rank, init_file, mode):
    """Three steps with different gates on each rank: every parameter must still be ready for reduction."""
    warnings.simplefilter("error", UserWarning)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    network = small_network(drop_path_mode=mode).to(memory_format=torch.channels_last).train()
    network = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(3):
        with use_gates(network, drawn(network, step, seed=rank)):
            network(images() + rank).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    flat = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    others = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(others, flat)
    assert torch.equal(others[0], others[1])
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", MODES)
def test_ddp_does_not_need_find_unused_parameters(tmp_path, mode):
    start_processes(train_under_ddp, (tmp_path / "init", mode), nprocs=2, start_method="forkserver")


@pytest.mark.parametrize("survival", [[0.5, float("nan")], [1.5], [-0.1], [float("inf")], [[0.5], [0.5]], 0.5])
def test_probabilities_that_cannot_be_drawn_from(survival):
    with pytest.raises(ValueError, match="must be a list of probabilities"):
        draw_gates(survival, 0, 0)


def test_gates_that_are_not_a_tensor():
    network = timm.create_model("cifar_resnet20_sd")
    with pytest.raises(ValueError, match="gates of type list"), use_gates(network, [True] * 9):
        pass
