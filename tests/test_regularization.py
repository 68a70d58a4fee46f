"""Each regularizer against its definition; all are functions of (seed, step)."""

import copy

import pytest
import timm
import torch
from by_hand import REGULARIZERS

from timm_sd.train.options import Options
from timm_sd.train.regularization import Regularization

B = 24
CPU = torch.device("cpu")


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(B, 3, 32, 32, generator=generator), torch.randint(10, (B,), generator=generator)


def regularized(step=0, part=slice(None), network=None, seed=0, **strengths):
    """The images, labels and dropout mask of a training step."""
    network = timm.create_model("cifar_resnet20") if network is None else network
    regularize = Regularization(Options("cifar_resnet20", seed=seed, **strengths), network, CPU)
    return *regularize(*batch(), step, part), regularize.mask


def test_nothing_by_default():
    network = timm.create_model("cifar_resnet20")
    state = torch.get_rng_state()
    images, labels, mask = regularized(part=slice(3, 7), network=network)
    assert torch.equal(images, batch()[0][3:7])
    assert torch.equal(labels, batch()[1][3:7])
    assert mask == 1
    assert torch.equal(torch.get_rng_state(), state)


def own_share(labels):
    """Lambda, the weight of each image's own label, after checking that the previous image's label has the rest."""
    own = batch()[1]
    before = own.roll(1)
    assert torch.allclose(labels.sum(1), torch.ones(B))
    share = labels[torch.arange(B), own]
    assert torch.allclose(labels[torch.arange(B), before][own != before], (1 - share)[own != before])
    (share,) = share[own != before].unique()
    return share


def test_mixup_is_a_weighted_mean():
    shares = []
    for step in range(30):
        images, labels, _ = regularized(step, mixup=0.4)
        share = own_share(labels)
        torch.testing.assert_close(images, share * batch()[0] + (1 - share) * batch()[0].roll(1, 0))
        shares.append(share)
    shares = torch.stack(shares)
    # Beta(0.4, 0.4) has mean 1 / 2 and standard deviation 1 / sqrt(4 * 1.8) = 0.37.
    assert shares.mean() == pytest.approx(0.5, abs=0.2)
    assert shares.std() == pytest.approx(0.37, abs=0.1)


def test_cutmix_pastes_a_rectangle():
    shares = []
    for step in range(10):
        images, labels, _ = regularized(step, cutmix=1.0)
        own, pasted = (images == batch()[0]).all(1), (images == batch()[0].roll(1, 0)).all(1)
        assert torch.equal(own, ~pasted)
        assert (pasted == pasted[0]).all(), "one rectangle for the batch"
        if pasted.any():
            rows, columns = pasted[0].any(1), pasted[0].any(0)
            assert torch.equal(pasted[0], rows[:, None] & columns)
            assert all(edge.int().diff().abs().sum() <= 2 for edge in (rows, columns))
        assert own_share(labels) == pytest.approx(own[0].float().mean().item())
        shares.append(own[0].float().mean().item())
    assert len(set(shares)) > 5


def test_mixup_and_cutmix_alternate_at_random():
    pasted = []
    for step in range(20):
        images, _, _ = regularized(step, mixup=1.0, cutmix=1.0)
        pasted.append(bool(((images == batch()[0]) | (images == batch()[0].roll(1, 0))).all()))
    assert 3 <= sum(pasted) <= 17


def test_random_erasing():
    erased = 0
    for step in range(10):
        images, labels, _ = regularized(step, random_erasing=0.25)
        assert torch.equal(labels, batch()[1])
        for image, original in zip(images, batch()[0], strict=True):
            zeros = (image == 0).all(0)  # the mean color, after standardization
            assert torch.equal(image, torch.where(zeros, 0, original))
            if zeros.any():
                rows, columns = zeros.any(1), zeros.any(0)
                assert torch.equal(zeros, rows[:, None] & columns)
                erased += 1
    assert erased / (10 * B) == pytest.approx(0.25, abs=0.1)


def test_dropout_is_before_the_classifier():
    network = timm.create_model("cifar_resnet20").train()
    plain = copy.deepcopy(network)
    images, _, mask = regularized(network=network, dropout=0.25)
    assert mask.shape == (B, 64)
    assert mask.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (mask == 0).float().mean() == pytest.approx(0.25, abs=0.05)
    features = plain.forward_head(plain.forward_features(images), pre_logits=True)
    torch.testing.assert_close(network(images), plain.fc(features * mask))


@pytest.mark.parametrize("strengths", [{name: value} for name, value in REGULARIZERS.items()] + [REGULARIZERS])
def test_functions_of_seed_and_step_for_any_number_of_processes(strengths):
    torch.manual_seed(1)
    whole = regularized(step=3, seed=7, **strengths)
    torch.manual_seed(2)
    parts = [regularized(step=3, seed=7, part=slice(*ends), **strengths) for ends in ((0, 9), (9, 15), (15, B))]
    for index, tensor in enumerate(whole):
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(torch.cat([part[index] for part in parts]), tensor)

    def differ(other):
        return any(not torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(whole, other, strict=True))

    is_random = not strengths.keys() <= {"label_smoothing", "ema_decay"}
    assert differ(regularized(step=4, seed=7, **strengths)) == is_random
    assert differ(regularized(step=3, seed=8, **strengths)) == is_random


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_integer_strengths_are_accepted(name):
    assert regularized(**{name: 1})[1].shape == (B, 10)


def test_dropout_compiles():
    """Even after a network without dropout, whose compiled code PyTorch would otherwise reuse."""
    other = timm.create_model("cifar_resnet20_sd").to(memory_format=torch.channels_last).train()
    compiled = torch.compile(other, backend="eager")
    for size in (64, 52):
        compiled(torch.randn(size, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    network = timm.create_model("cifar_resnet20").eval()
    regularize = Regularization(Options("cifar_resnet20", dropout=0.25), network, CPU)
    compiled = torch.compile(network, backend="eager")
    for step, size in enumerate((B, B, B - 5)):
        images, _ = regularize(*batch(), step, slice(size))
        torch.testing.assert_close(compiled(images), network(images))
        assert not torch.equal(
            compiled(images), network.fc.forward(network.forward_head(network.forward_features(images), True))
        )
