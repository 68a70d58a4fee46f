"""The data sets, the authors' protocol on each, and the published results."""

from dataclasses import dataclass, replace

from .labels import CIFAR10_LABELS, CIFAR100_LABELS, SVHN_LABELS, SYNTHETIC_LABELS


@dataclass(frozen=True)
class DataSet:
    """A data set, and how the authors train on it (section 4, and their code).

    Of the trainval `images`, some are `held_out` for validation.
    """

    title: str
    labels: tuple[str, ...]  # the names of the classes
    mean: tuple[float, float, float]  # of each channel, over all trainval images, in [0, 1]
    std: tuple[float, float, float]
    images: int
    held_out: int
    hub: str | None = None  # its name on the Hugging Face Hub
    epochs: int = 500
    lr_drops: tuple[float, float] = (0.5, 0.75)  # as fractions of the epochs
    augmented: bool = True  # whether training images are shifted and flipped

    @property
    def training_images(self) -> int:
        """The images of a training epoch."""
        return self.images - self.held_out


CIFAR10 = DataSet(
    "CIFAR-10",
    CIFAR10_LABELS,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    images=50_000,
    held_out=5_000,
    hub="uoft-cs/cifar10",
)
CIFAR100 = replace(
    CIFAR10,
    title="CIFAR-100",
    labels=CIFAR100_LABELS,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    hub="uoft-cs/cifar100",
)
SVHN = DataSet(
    "SVHN",
    SVHN_LABELS,
    mean=(0.4309, 0.4302, 0.4463),
    std=(0.1965, 0.1983, 0.1994),
    images=604_388,
    held_out=6_000,
    hub="ufldl-stanford/svhn",
    epochs=50,
    lr_drops=(0.6, 0.7),
    augmented=False,
)
SYNTHETIC = replace(
    CIFAR10, title="timm-sd's synthetic shapes", labels=SYNTHETIC_LABELS, images=5_000, held_out=500, hub=None
)
DATASETS = dict(cifar10=CIFAR10, cifar100=CIFAR100, svhn=SVHN, synthetic=SYNTHETIC)

# Test error in percent, and who reports it: by depth, constant or stochastic (linear decay to p_L = 0.5), and data set.
HUANG, HE, ZOO = "Huang et al.", "He et al.", "pytorch-cifar-models"
PUBLISHED = {
    # At the best validation error: Figure 3, Table 1 and section 4; SVHN from the README of their code.
    (110, "constant", "cifar10"): (6.41, HUANG),
    (110, "stochastic", "cifar10"): (5.25, HUANG),
    (1202, "stochastic", "cifar10"): (4.91, HUANG),
    (110, "constant", "cifar100"): (27.22, HUANG),
    (110, "stochastic", "cifar100"): (24.58, HUANG),
    (152, "stochastic", "svhn"): (1.75, HUANG),
    # arXiv:1512.03385, Table 6.
    (20, "constant", "cifar10"): (8.75, HE),
    (32, "constant", "cifar10"): (7.51, HE),
    (44, "constant", "cifar10"): (7.17, HE),
    (56, "constant", "cifar10"): (6.97, HE),
    (1202, "constant", "cifar10"): (7.93, HE),
    # https://github.com/chenyaofo/pytorch-cifar-models, trained on all 50,000 images.
    (20, "constant", "cifar100"): (31.17, ZOO),
    (32, "constant", "cifar100"): (29.84, ZOO),
    (44, "constant", "cifar100"): (28.37, ZOO),
    (56, "constant", "cifar100"): (27.37, ZOO),
}

# Seconds per epoch on CIFAR-10 with 110 layers, constant and stochastic.
SECONDS = {
    "the authors, TITAN X": (75.0, 60.0),
    "a later reproduction": (69.4, 52.1),  # 57m48s and 43m26s for 50 epochs
}
