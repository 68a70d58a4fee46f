"""What the paper and its authors' code say: how they train on each data set, and the results to compare with."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Protocol:
    """How the authors use a data set: `images` to learn from, of which some are `held_out` for validation."""

    images: int
    held_out: int
    epochs: int
    lr_drops: tuple[float, float]  # as fractions of the epochs
    augmented: bool  # whether training images are shifted and flipped

    @property
    def training_images(self) -> int:
        """The images of a training epoch."""
        return self.images - self.held_out


# Section 4, and the authors' code.
CIFAR = Protocol(50_000, 5_000, epochs=500, lr_drops=(0.5, 0.75), augmented=True)
PROTOCOLS = {
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "svhn": Protocol(604_388, 6_000, epochs=50, lr_drops=(0.6, 0.7), augmented=False),
    "synthetic": replace(CIFAR, images=5_000, held_out=500),
}

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
