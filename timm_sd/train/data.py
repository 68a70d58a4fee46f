"""Data sets as tensors on the training device, with the authors' split, standardization and augmentation.

Everything random is drawn on the CPU as a function of (seed, epoch), so a run sees the same batches on any device.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from ..errors import UserError
from ..paper.datasets import DATASETS

MAX_SHIFT = 4
SVHN_TRAIN = 73_257  # images of the part "train"; "extra" comes after it
SVHN_HELD_OUT = (400, 200)  # images of each digit for validation, from "train" and from "extra"


@dataclass(frozen=True)
class ImageSet:
    """N labeled images: `images` uint8 of shape (N, C, H, W), `labels` int64 of shape (N,)."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, images: np.ndarray, labels: Sequence[int]) -> "ImageSet":
        """From arrays in any memory layout."""
        return cls(torch.from_numpy(np.ascontiguousarray(images)), torch.as_tensor(labels, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "ImageSet":
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device) -> "ImageSet":
        """The same images and labels on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def load(dataset: str, data_dir: Path, download: bool = False) -> tuple[ImageSet, ImageSet]:
    """The trainval and test splits of a data set.

    They are 50,000 and 10,000 for "cifar10" and "cifar100", 604,388 ("train", then "extra") and 26,032 for "svhn", and
    5,000 and 1,000 for "synthetic". The files in `data_dir` are torchvision's, checked by MD5, and downloaded only with
    `download`.

    Raises UserError if files are missing or corrupt, or cannot be downloaded, or SciPy is missing for SVHN.
    """
    if dataset == "synthetic":
        return draw_shapes(5000, seed=0), draw_shapes(1000, seed=1)
    if dataset == "svhn" and not importlib.util.find_spec("scipy"):
        raise UserError("svhn is read by SciPy, which is not installed: pip install 'timm-sd[svhn]'")
    try:
        if dataset == "svhn":
            parts = [SVHN(data_dir, part, download=download) for part in ("train", "extra", "test")]
            train, extra, test = (ImageSet.of(part.data, part.labels) for part in parts)
            return ImageSet(torch.cat([train.images, extra.images]), torch.cat([train.labels, extra.labels])), test
        cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
        parts = [cifar(data_dir, train=train, download=download) for train in (True, False)]
        train, test = (ImageSet.of(part.data.transpose(0, 3, 1, 2), part.targets) for part in parts)
        return train, test
    except (OSError, RuntimeError) as error:
        way_out = (
            f"the download failed ({error}): try again, or pass the folder of a copy as --data-dir"
            if download
            else "pass its folder as --data-dir, download it by training with --download, or try --dataset synthetic"
        )
        raise UserError(f"{dataset} is missing or corrupt in {str(data_dir)!r}: {way_out}") from error


def load_arrays(images: Path, labels: Path, num_classes: int) -> ImageSet:
    """Images and labels in NumPy files, such as those of CIFAR-10.1 (Recht et al.) and CIFAR-10-C (Hendrycks et al.).

    Images are uint8 of shape (N, 32, 32, 3), labels integers of shape (N,), below `num_classes`.

    Raises UserError if the files are missing, or not such arrays. Nothing pickled is loaded.
    """
    arrays = []
    for file in (images, labels):
        try:
            arrays.append(np.lib.format.open_memmap(file, mode="r"))
        except Exception as error:  # of any type: NumPy trusts headers
            raise UserError(f"{file} cannot be read as a NumPy array ({error})") from error
    of_images, of_labels = arrays
    if getattr(of_images, "dtype", None) != np.uint8 or of_images.shape[1:] != (32, 32, 3):
        raise UserError(f"{images} has no images: it must be an array of uint8 of shape (N, 32, 32, 3)")
    integers = isinstance(of_labels, np.ndarray) and np.issubdtype(of_labels.dtype, np.integer)
    if not integers or of_labels.shape != of_images.shape[:1] or not len(of_labels):
        raise UserError(f"{labels} does not have one integer for each of the {len(of_images)} images")
    if not 0 <= of_labels.min() <= of_labels.max() < num_classes:
        raise UserError(f"{labels} has labels from {of_labels.min()} to {of_labels.max()} for {num_classes} classes")
    return ImageSet.of(of_images.transpose(0, 3, 1, 2), of_labels.astype(np.int64))


def draw_shapes(num_images: int, seed: int) -> ImageSet:
    """A learnable stand-in for CIFAR-10: 32x32 images of ten shapes, with random position, size, colors and noise.

    The classes are `SYNTHETIC_LABELS`. All are symmetric, so flips keep the class.
    """
    random = np.random.default_rng(seed)
    labels = np.arange(num_images) % 10
    center = random.uniform(12, 20, (2, num_images, 1, 1))
    radius = random.uniform(6, 11, (num_images, 1, 1))
    y = (np.arange(32).reshape(1, 32, 1) - center[0]) / radius
    x = np.abs(np.arange(32).reshape(1, 1, 32) - center[1]) / radius
    distance = np.hypot(x, y)
    box = np.maximum(x, np.abs(y))
    shapes = [
        distance < 1,
        (distance < 1) & (distance > 0.55),
        box < 0.85,
        (box < 0.85) & (box > 0.45),
        (x < (y + 0.9) / 2) & (y < 0.8),
        (x < (0.9 - y) / 2) & (y > -0.8),
        (np.minimum(x, np.abs(y)) < 0.3) & (box < 1),
        (np.abs(x - np.abs(y)) < 0.35) & (box < 1),
        (y * 1.5 % 1 < 0.5) & (box < 1),
        (x * 1.5 % 1 < 0.5) & (box < 1),
    ]
    inside = np.choose(labels.reshape(-1, 1, 1), shapes)[:, None]
    background = random.uniform(0, 255, (num_images, 3, 1, 1))
    shape_color = (background + random.uniform(80, 175, background.shape)) % 255
    images = np.where(inside, shape_color, background) + random.normal(0, 25, (num_images, 3, 32, 32))
    return ImageSet(torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels))


def split(data: ImageSet, seed: int, dataset: str) -> tuple[ImageSet, ImageSet]:
    """A random split into images for training and for validation.

    A tenth is for validation (for CIFAR, 5,000 images), but of SVHN 400 images of each digit in "train" and 200 of each
    in "extra", as in the authors' code.
    """
    order = torch.randperm(len(data), generator=_generator(seed, epoch=0))
    if dataset == "svhn":
        digits = data.labels[order]
        parts = zip((order < SVHN_TRAIN, order >= SVHN_TRAIN), SVHN_HELD_OUT, strict=True)
        held_out = torch.cat([order[part & (digits == digit)][:count] for part, count in parts for digit in range(10)])
    else:
        known = DATASETS[dataset]
        held_out = order[: round(len(data) * known.held_out / known.images)]
    return data[order[~torch.isin(order, held_out)]], data[held_out]


@dataclass(frozen=True)
class Standardize:
    """uint8 images of shape (B, C, H, W) to float32 (image / 255 - mean) / std; `mean`, `std` of shape (C, 1, 1)."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, network: nn.Module, device: torch.device) -> "Standardize":
        """From a timm network's data configuration."""
        config = timm.data.resolve_model_data_config(network)
        return cls(*(torch.tensor(config[key], device=device).view(-1, 1, 1) for key in ("mean", "std")))

    def __call__(self, images: Tensor) -> Tensor:
        return (images / 255 - self.mean) / self.std


def shift_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Shift each image by its own offset, padding with zeros, then flip it left to right or not.

    Args:
        images: Standardized images of shape (B, C, H, W): zero is the mean color, as in the authors' code.
        shifts: (B, 2) integers in 0..2 * MAX_SHIFT, down and right: the image moves by MAX_SHIFT - shift.
        flips: (B,) bools.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (MAX_SHIFT,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, shift, shift, H, W), a view
    shifted = windows[torch.arange(len(images), device=images.device), :, shifts[:, 0], shifts[:, 1]]
    return torch.where(flips.view(-1, 1, 1, 1), shifted.flip(3), shifted)


def training_batches(
    data: ImageSet,
    batch_size: int,
    standardize: Standardize,
    seed: int,
    epoch: int,
    first_step: int = 0,
    augmented: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images, labels): every image once, in random order, the last batch smaller.

    If `augmented`, each image is shifted and flipped. An epoch resumed at `first_step` continues with the same batches.
    """
    generator = _generator(seed, epoch)
    device = data.labels.device
    order = torch.randperm(len(data), generator=generator).to(device)
    if augmented:
        shifts = torch.randint(2 * MAX_SHIFT + 1, (len(data), 2), generator=generator).to(device)
        flips = (torch.rand(len(data), generator=generator) < 0.5).to(device)
    for start in range(first_step * batch_size, len(data), batch_size):
        drawn = slice(start, start + batch_size)
        batch = data[order[drawn]]
        images = standardize(batch.images)
        if augmented:
            images = shift_and_flip(images, shifts[drawn], flips[drawn])
        yield images.contiguous(memory_format=torch.channels_last), batch.labels


def evaluation_batches(data: ImageSet, batch_size: int, standardize: Standardize) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (images, labels): every image once, in order, without augmentation."""
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        yield standardize(batch.images).contiguous(memory_format=torch.channels_last), batch.labels


def _generator(seed: int, epoch: int) -> torch.Generator:
    """A separate CPU generator for each (seed, epoch); torch uses only the low 32 bits of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
