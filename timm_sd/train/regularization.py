"""Regularizers other than stochastic depth, from timm and PyTorch. The paper has none of them.

Everything random is drawn on the CPU for the whole batch, as a function of (seed, step), and each process takes its
part. So a run sees the same images, labels and dropout on any device, with any number of processes, and after resuming.
"""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms import v2

from .options import Options


class Regularization:
    """Random erasing, mixup, CutMix, and dropout before the classifier."""

    def __init__(self, options: Options, network: nn.Module, device: torch.device) -> None:
        """
        Args:
            options: The strength of each, and the seed.
            network: The network to train. Dropout adds a hook to its classifier.
            device: The device of the batches.
        """
        self.seed = options.seed
        self.erasing = RandomErasing(options.random_erasing, device=device) if options.random_erasing else None
        alphas = {v2.MixUp: options.mixup, v2.CutMix: options.cutmix}
        mixes = [mix(alpha=float(alpha), num_classes=network.num_classes) for mix, alpha in alphas.items() if alpha]
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.dropout = options.dropout
        self.features = network.head_hidden_size
        self.mask: Tensor | float = 1.0
        if self.dropout:
            torch.compiler.reset()  # code compiled for another network would be used again, without the hook
            network.get_classifier().register_forward_pre_hook(lambda _, args: (args[0] * self.mask,))

    def __call__(self, images: Tensor, labels: Tensor, step: int, part: slice) -> tuple[Tensor, Tensor]:
        """Regularize the batch of a training step, and take one part of it.

        Args:
            images: (B, C, H, W), standardized. They are modified in place.
            labels: (B,).
            step: The training step, counted from the beginning of the run.
            part: The samples that this process trains on.

        Returns:
            Images of shape (b, C, H, W) and labels of shape (b,), or with mixup or CutMix class probabilities of shape
            (b, classes). Dropout applies to the next forward pass.
        """
        if self.erasing or self.mix or self.dropout:
            # timm and torchvision draw from the global generators, torchvision's of the CPU.
            set_seed(int(np.random.SeedSequence([self.seed, step, 1]).generate_state(1)[0]))
        if self.erasing:
            images = self.erasing(images)
        if self.mix:
            images, labels = self.mix(images, labels)
        if self.dropout:
            self.mask = F.dropout(torch.ones(len(images), self.features), self.dropout)[part]
            self.mask = self.mask.to(images.device, non_blocking=True)
        return images[part].contiguous(memory_format=torch.channels_last), labels[part]
