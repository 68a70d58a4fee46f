"""Errors of the network that an engine trains, by the engine's kernels: all of its layers as one CUDA graph."""

import torch
from torch import Tensor

from .engine import IMAGE_CHANNELS, SIZE, Engine, bordered, inside, on_device

NO_LABEL = -1  # of what fills up the last batch


class Inference:
    """Inference on batches of a fixed size by the running statistics (eq. 5), in float32 or TF32."""

    def __init__(self, engine: Engine, batch_size: int) -> None:
        self.engine = engine
        device = engine.device
        self.images = bordered(batch_size, SIZE, IMAGE_CHANNELS, torch.float32, device)
        self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.errors = torch.zeros((), dtype=torch.int64, device=device)
        # For each width: the input of a block, which its output replaces, and what lies between its convolutions.
        self.buffers = {
            layer.channels: [bordered(batch_size, layer.size, layer.channels, torch.float32, device) for _ in range(2)]
            for layer in engine.layers
        }
        (self.launch,) = on_device(device, [self._infer])

    def _infer(self) -> None:
        engine = self.engine
        x, _ = self.buffers[engine.stem.channels]
        engine.stem.infer(self.images, x)
        for block in engine.blocks:
            out, hidden = self.buffers[block.first.channels]
            block.first.infer(x, hidden)
            block.second.infer(hidden, out, block.survival, x)
            x = out
        logits = torch.addmm(engine.bias.value, inside(x).mean((1, 2)), engine.weight.value.t())
        self.errors += ((logits.argmax(1) != self.labels) & (self.labels != NO_LABEL)).sum()

    def error(self, images: Tensor, labels: Tensor) -> float:
        """The error in percent on images of shape (N, 34, 34, 4), bordered, in float32."""
        self.errors.zero_()
        for some, own in zip(images.split(len(self.images)), labels.split(len(self.images)), strict=True):
            self.images[: len(some)].copy_(some)
            self.labels.fill_(NO_LABEL)
            self.labels[: len(some)].copy_(own)
            self.launch()
        return 100 * self.errors.item() / len(labels)
