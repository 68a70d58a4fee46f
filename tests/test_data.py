"""Split, standardization and augmentation against torchvision and per-image loops."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import timm.data
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from scipy.io import savemat
from torchvision.datasets import SVHN
from torchvision.transforms.functional import to_pil_image

from timm_sd.errors import UserError
from timm_sd.paper.datasets import DATASETS
from timm_sd.train import data
from timm_sd.train.learner import Learner
from timm_sd.train.learning_rate import learning_rate
from timm_sd.train.options import Options


def make_set(num_images=50):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return data.ImageSet(images, torch.arange(num_images))


def make_standardize():
    return data.Standardize.of(timm.create_model("cifar_resnet20.cifar10"), torch.device("cpu"))


def test_standardize_equals_timms_transform():
    images = make_set(5).images
    network = timm.create_model("cifar_resnet20.cifar10")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    expected = torch.stack([transform(to_pil_image(image)) for image in images])
    torch.testing.assert_close(make_standardize()(images), expected)
    by_hand = (images[0, 1, 2, 3] / 255 - 0.4822) / 0.2435
    torch.testing.assert_close(expected[0, 1, 2, 3], by_hand)


def test_shift_and_flip_image_by_image():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(81, 3, 32, 32, generator=generator)
    shifts = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    flips = torch.rand(81, generator=generator) < 0.5
    outputs = data.shift_and_flip(images, shifts, flips)
    for image, (down, right), flip, output in zip(images, shifts.tolist(), flips, outputs, strict=True):
        expected = torch.zeros(3, 32, 32)
        for row in range(32):
            for column in range(32):
                source = row + down - 4, column + right - 4
                if 0 <= source[0] < 32 and 0 <= source[1] < 32:
                    expected[:, row, column] = image[:, source[0], source[1]]
        assert torch.equal(output, expected.flip(2) if flip else expected)


def epoch_of(images, seed=0, epoch=1, batch_size=16):
    return list(data.training_batches(images, batch_size, make_standardize(), seed, epoch))


def test_an_epoch_has_every_image_once_and_a_partial_last_batch():
    batches = epoch_of(make_set())
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    order = torch.cat([labels for _, labels in batches])
    assert order.tolist() != list(range(50))
    assert order.sort().values.tolist() == list(range(50))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)


def test_each_training_image_has_its_own_shift():
    images = make_set()
    standardized = torch.nn.functional.pad(make_standardize()(images.images), (4, 4, 4, 4))
    seen = set()
    for batch, labels in epoch_of(images):
        for image, label in zip(batch, labels, strict=True):
            found = [
                (down, right, flip)
                for down in range(9)
                for right in range(9)
                for flip in (False, True)
                if torch.equal(
                    image.flip(2) if flip else image, standardized[label, :, down : down + 32, right : right + 32]
                )
            ]
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) > 30, "images share their shifts"
    assert {flip for _, _, flip in seen} == {False, True}
    assert {down for down, _, _ in seen} == set(range(9))


def test_batches_are_a_function_of_seed_and_epoch():
    def flat(**kwargs):
        return torch.cat([images.flatten() for images, _ in epoch_of(make_set(), **kwargs)])

    torch.manual_seed(1)
    first = flat(seed=3, epoch=2)
    torch.manual_seed(2)
    assert torch.equal(first, flat(seed=3, epoch=2))
    assert not torch.equal(first, flat(seed=3, epoch=3))
    assert not torch.equal(first, flat(seed=4, epoch=2))


def test_evaluation_batches_are_the_images_in_order():
    images = make_set()
    batches = list(data.evaluation_batches(images, 20, make_standardize()))
    assert [len(labels) for _, labels in batches] == [20, 20, 10]
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
    torch.testing.assert_close(torch.cat([batch for batch, _ in batches]), make_standardize()(images.images))


def test_split_is_a_random_partition():
    images = make_set(500)
    training, validation = data.split(images, 0, "cifar10")
    assert (len(training), len(validation)) == (450, 50)
    assert sorted(training.labels.tolist() + validation.labels.tolist()) == list(range(500))
    assert validation.labels.float().mean() == pytest.approx(250, abs=75)
    assert torch.equal(images.images[validation.labels], validation.images)
    assert torch.equal(data.split(images, 0, "cifar10")[1].labels, validation.labels)
    assert not torch.equal(data.split(images, 1, "cifar10")[1].labels, validation.labels)


def test_synthetic_images():
    training, test = data.load("synthetic", "nowhere")
    assert (training.images.shape, training.images.dtype) == ((5000, 3, 32, 32), torch.uint8)
    assert (test.images.shape, test.labels.dtype) == ((1000, 3, 32, 32), torch.int64)
    assert training.labels.bincount().tolist() == [500] * 10
    assert torch.equal(data.draw_shapes(100, seed=4).images, data.draw_shapes(100, seed=4).images)
    assert not torch.equal(training.images[:1000], test.images)
    # The stripes of class 8 are horizontal and those of class 9 vertical, so they vary along different axes.
    gradients = [
        np.abs(np.diff(training.images[training.labels == label].float().mean(1).numpy(), axis=axis)).mean()
        for label in (8, 9)
        for axis in (1, 2)
    ]
    assert gradients[0] > gradients[1] + 1
    assert gradients[3] > gradients[2] + 1


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("download", [False, True])
def test_cifar_equals_torchvisions(monkeypatch, dataset, download):
    class Cifar:
        """Like torchvision's: `data` uint8 of shape (N, 32, 32, 3), `targets` a list."""

        def __init__(self, root, train, download):
            self.asked = (root, download)
            size = 7 if train else 5
            self.data = np.random.default_rng(size).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
            self.targets = list(range(10, 10 + size))
            made.append(self)

    made = []
    monkeypatch.setattr(data, dataset.upper(), Cifar)
    parts = data.load(dataset, "folder", download)
    assert [cifar.asked for cifar in made] == [("folder", download)] * 2
    assert [len(part) for part in parts] == [7, 5]
    for part, cifar in zip(parts, made, strict=True):
        assert part.labels.tolist() == cifar.targets
        for image, pixels in zip(part.images.numpy(), cifar.data, strict=True):
            for channel in range(3):
                assert (image[channel] == pixels[:, :, channel]).all()


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn"])
def test_missing_data(tmp_path, dataset):
    with pytest.raises(UserError, match=f"{dataset} is missing or corrupt in .*--download") as error:
        data.load(dataset, tmp_path / "nothing")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "nothing").exists()


def test_corrupt_data(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ["batches.meta", "test_batch", *(f"data_batch_{index}" for index in range(1, 6))]:
        (folder / name).write_bytes(b"not what was published")
    with pytest.raises(UserError, match="cifar10 is missing or corrupt"):
        data.load("cifar10", tmp_path)


def test_an_epoch_continues_from_a_step():
    whole = epoch_of(make_set())
    rest = list(data.training_batches(make_set(), 16, make_standardize(), 0, 1, first_step=2))
    assert len(rest) == 2
    for (images, labels), (expected_images, expected_labels) in zip(rest, whole[2:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
    assert not list(data.training_batches(make_set(), 16, make_standardize(), 0, 1, first_step=4))


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """A folder with files in SVHN's format: X of shape (32, 32, 3, N), y of shape (N, 1), with 10 for the digit 0."""
    written = {}
    files = dict(SVHN.split_list)
    for seed, (part, size) in enumerate((("train", 130), ("extra", 250), ("test", 20))):
        random = np.random.default_rng(seed)
        pixels = random.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        digits = random.permutation(np.arange(size) % 10)
        file = tmp_path / f"{part}_32x32.mat"
        labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        savemat(file, {"X": pixels.transpose(1, 2, 3, 0), "y": labels})
        url, name, _ = files[part]
        files[part] = [url, name, hashlib.md5(file.read_bytes()).hexdigest()]
        written[part] = pixels, digits
    monkeypatch.setattr(SVHN, "split_list", files)
    monkeypatch.setattr(data, "SVHN_TRAIN", 130)
    monkeypatch.setattr(data, "SVHN_HELD_OUT", (4, 2))
    return tmp_path, written


def test_svhn_is_train_and_extra_together(svhn):
    folder, written = svhn
    learning, test = data.load("svhn", folder)
    for images, parts in ((learning, ("train", "extra")), (test, ("test",))):
        assert images.labels.tolist() == [digit for part in parts for digit in written[part][1]]
        pixels = np.concatenate([written[part][0] for part in parts])
        assert np.array_equal(images.images.permute(0, 2, 3, 1).numpy(), pixels)
        assert images.images.is_contiguous()


def test_the_authors_split_of_svhn(svhn):
    """A fixed number of images of each digit, from train and from extra, is held out at random."""
    learning, _ = data.load("svhn", svhn[0])
    index = {image.numpy().tobytes(): number for number, image in enumerate(learning.images)}
    training, validation = data.split(learning, 0, "svhn")
    held_out = [index[image.numpy().tobytes()] for image in validation.images]
    trained = [index[image.numpy().tobytes()] for image in training.images]
    assert sorted(held_out + trained) == list(range(380))
    for part, count in ((range(130), 4), (range(130, 380), 2)):
        digits = [learning.labels[number].item() for number in held_out if number in part]
        assert Counter(digits) == dict.fromkeys(range(10), count)
    others = data.split(learning, 1, "svhn")[1]
    assert {index[image.numpy().tobytes()] for image in others.images} != set(held_out)


def test_the_papers_protocol_for_svhn(svhn, monkeypatch, tmp_path):
    """No augmentation, 598,388 training images, digits as class names, and learning rate drops at 60% and 70%."""
    protocol = DATASETS["svhn"]
    assert (protocol.training_images, protocol.held_out, protocol.epochs) == (598_388, 10 * (400 + 200), 50)
    network = timm.create_model("cifar_resnet152_sd.svhn")
    assert network.pretrained_cfg["label_names"] == tuple("0123456789")
    options = Options("cifar_resnet20_sd", "svhn", svhn[0], epochs=1, output=tmp_path / "run")
    learner = Learner(Accelerator(), options)
    batches = list(learner.batches(epoch=1))
    seen = torch.cat([images for images, _, _ in batches])
    standardized = {image.numpy().tobytes() for image in learner.standardize(learner.training_set.images)}
    assert {image.contiguous().numpy().tobytes() for image in seen} == standardized
    assert len(seen) == 380 - 60
    options = replace(options, epochs=50)
    rates = [learning_rate(options, epoch, 1, learner.steps) for epoch in (29, 30, 34, 35)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_validation_images_of_svhn(svhn, command, tmp_path):
    """They are those of the authors' split, not a tenth of the images."""
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("cifar_resnet20").state_dict(), file)
    arguments = ["--model", "cifar_resnet20", "--checkpoint", file, "--dataset", "svhn", "--data-dir", svhn[0]]
    status, out, _ = command("validate", *arguments, "--split", "validation")
    assert status == 0
    rows = [line.split()[:2] for line in out.splitlines()[1:-1]]
    assert rows == [[str(digit), "6"] for digit in range(10)]


def test_svhn_without_scipy(monkeypatch, tmp_path):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"svhn is read by SciPy, which is not installed: pip install .timm-sd\[svhn\]"):
        data.load("svhn", tmp_path)
