"""Training steps of a CIFAR ResNet in a few hundred kernel launches, without autograd.

Every activation has a fixed buffer. The forward pass of each block is captured as a CUDA graph and so is its backward
pass, and the stem, the head with the loss, and the optimizer have one each. The host decides, gate by gate, which
graphs to launch: a dropped block costs a copy of its input, and nothing in the backward pass. On a CPU, the kernels run
in Triton's interpreter, one by one.

There are no atomics and all sums have a fixed order, so that a run can be bit-identical from run to run on one GPU and
one version of everything. (Tests say so in the interpreter.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ...gate import gates
from ...paper.cifar_resnet import CifarResNet
from ...paper.stochastic_depth import StochasticDepth
from . import kernels
from .cuda_graphs import capture, side_stream

SIZE = 32  # pixels on each side of an image
IMAGE_CHANNELS = 4  # a power of two: the last one is zero
CHUNK = 256  # parameters that a program of `kernels.sgd` updates
ALWAYS = 0  # the gate of the stem and the head, never closed; those of the blocks follow
Launch = Callable[[], None]


@dataclass(frozen=True)
class Tiles:
    """How many pixels a program computes. All but `gradient` divide the pixels of any number of images."""

    convolution: int
    sum: int  # in kernels that also add up what they compute: several tiles of `convolution`
    normalization: int
    gradient_tile: int
    gradient: int  # with respect to the weights: several tiles
    warps: int


# By the larger number of channels of a convolution.
TILES = {
    16: Tiles(convolution=128, sum=512, normalization=256, gradient_tile=128, gradient=512, warps=4),
    32: Tiles(convolution=128, sum=128, normalization=128, gradient_tile=128, gradient=512, warps=4),
    64: Tiles(convolution=64, sum=64, normalization=64, gradient_tile=64, gradient=256, warps=8),
}
INFERENCE_TILE = 64
STAGES = 2  # of a pipeline of tiles; with 3, only one program of a convolution fits on a multiprocessor of an H100


def bordered(images: int, size: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of shape (images, size + 2, size + 2, channels), with room behind the last pixel for one more."""
    shape = (images, size + 2, size + 2, channels)
    return torch.zeros(prod(shape) + channels, dtype=dtype, device=device)[: prod(shape)].view(shape)


def inside(x: Tensor) -> Tensor:
    """A bordered tensor without its border."""
    return x[:, 1:-1, 1:-1]


def in_squares(x: Tensor) -> Tensor:
    """A view of (B, 2 H, 2 W, C) as (B, H, 2, W, 2, C)."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))


def on_device(device: torch.device, launches: list[Launch]) -> list[Launch]:
    """On a GPU, the same launches as CUDA graphs; they are run once before. Elsewhere, as they are."""
    if device.type != "cuda":
        return launches
    with side_stream():
        for launch in launches:  # compiles the kernels, which a capture cannot
            launch()
    pool = torch.cuda.graph_pool_handle()
    return [capture(launch, pool) for launch in launches]


class Slot:
    """A tensor that kernels read, of one or two parameters of the network.

    `Parameters` gives it its `value` in float32, its `momentum` and its `copy` in the activations' dtype, all of its
    shape, and its `gradients`, with a row for each partial sum, padded to `padded` numbers.
    """

    value: Tensor
    momentum: Tensor
    copy: Tensor
    gradients: Tensor

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        shape: tuple[int, ...],
        gate: int,
        rows: Callable[[int], int] = lambda images: 1,
    ) -> None:
        """`gate` makes its gradient zero; `rows` is the number of partial gradients for a number of images."""
        self.parameters, self.shape, self.gate, self.rows = parameters, shape, gate, rows
        self.padded = ceil(prod(shape) / CHUNK) * CHUNK

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Views of a tensor of this shape, in the shapes of the parameters."""
        if len(self.parameters) > 1:
            return tensor.unbind()
        (parameter,) = self.parameters
        if parameter.ndim == 4:  # of a convolution: channels are innermost, and those of images padded
            return [tensor[..., : parameter.shape[1]].permute(0, 3, 1, 2)]
        return [tensor]

    @property
    def gradient(self) -> Tensor:
        """The first partial gradient."""
        return self.gradients[0, : prod(self.shape)].view(self.shape)


class Parameters:
    """All slots in one tensor, each padded to whole chunks; the same for momentum, copies and gradients."""

    def __init__(self, slots: list[Slot], batch_sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.device = slots, device
        most = batch_sizes[0]
        sizes = [slot.padded for slot in slots]
        gradient_sizes = [slot.padded * slot.rows(most) for slot in slots]
        self.value, self.momentum = (torch.zeros(sum(sizes), device=device) for _ in range(2))
        self.copy = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self.gradients = torch.zeros(sum(gradient_sizes), device=device)

        flats = (self.value.split(sizes), self.momentum.split(sizes), self.copy.split(sizes))
        for slot, *parts, gradients in zip(slots, *flats, self.gradients.split(gradient_sizes), strict=True):
            slot.value, slot.momentum, slot.copy = (part[: prod(slot.shape)].view(slot.shape) for part in parts)
            slot.gradients = gradients.view(-1, slot.padded)

        # For each chunk: where its first partial gradient is, the distance to the next one, and its gate.
        firsts = [slot.gradients.storage_offset() + chunk for slot in slots for chunk in range(0, slot.padded, CHUNK)]
        self.firsts = torch.tensor(firsts, device=device)
        self.strides = self._by_chunk(sizes)
        self.gates = self._by_chunk([slot.gate for slot in slots])
        # For each batch size: how many partial gradients each chunk has. (Graphs read what they do not keep alive.)
        self.rows = {images: self._by_chunk([slot.rows(images) for slot in slots]) for images in batch_sizes}

    def _by_chunk(self, values: list[int]) -> Tensor:
        chunks = torch.tensor([slot.padded // CHUNK for slot in self.slots])
        return torch.tensor(values).repeat_interleave(chunks).to(self.device)

    def sgd(self, images: int, gates: Tensor, lr: Tensor, weight_decay: float) -> None:
        """Update them after the backward pass of a number of images."""
        rows = self.rows[images]
        kernels.sgd[(len(rows),)](
            self.value, self.momentum, self.copy, self.gradients, self.firsts, self.strides, rows, self.gates,
            gates, lr, weight_decay, CHUNK=CHUNK,
        )  # fmt: skip


class Layer:
    """A convolution and its batch normalization, with the buffers of batches of at most `most` images."""

    def __init__(
        self, conv: nn.Conv2d, bn: nn.BatchNorm2d, size: int, gate: int, most: int, dtype: torch.dtype
    ) -> None:
        """`size` is the number of pixels on each side of the output."""
        self.bn, self.size, self.gate, self.most = bn, size, gate, most
        self.channels_in, self.channels = max(conv.in_channels, IMAGE_CHANNELS), conv.out_channels
        self.stride = conv.stride[0]
        self.tiles = TILES[max(self.channels_in, self.channels)]
        self.weight = Slot([conv.weight], (self.channels, 3, 3, self.channels_in), gate, self.weight_gradients)
        self.affine = Slot([bn.weight, bn.bias], (2, self.channels), gate)

        device = conv.weight.device
        self.y = torch.empty(most * size**2, self.channels, dtype=dtype, device=device)
        self.moments = torch.empty(2, self.channels, device=device)
        self.running = torch.empty(2, self.channels, device=device)

    def pixels(self, images: int) -> int:
        """The number of output pixels."""
        return images * self.size**2

    def sums(self, images: int) -> int:
        """The number of rows of partial sums over the output."""
        return self.pixels(images) // self.tiles.sum

    def weight_gradients(self, images: int) -> int:
        """The number of partial gradients with respect to the weights."""
        return ceil(self.pixels(images) / self.tiles.gradient)

    def forward(self, x: Tensor, out: Tensor, sums: Tensor, images: int, shortcut: Tensor | None = None) -> None:
        """out = ReLU(bn(conv(x)) + shortcut). All three are bordered."""
        tiles, pixels = self.tiles, self.pixels(images)
        kernels.convolve[(self.sums(images),)](
            x, self.weight.copy, self.y, sums,
            SIZE=self.size, IN=self.channels_in, OUT=self.channels, STRIDE=self.stride,
            PIXELS=tiles.convolution, TILES=tiles.sum // tiles.convolution,
            num_warps=tiles.warps, num_stages=STAGES,
        )  # fmt: skip
        kernels.normalize[(pixels // tiles.normalization,)](
            self.y, out, shortcut, sums, self.sums(images), self.affine.value, self.moments, self.running, pixels,
            SIZE=self.size, C=self.channels, **_shortcut(shortcut, out),
            MOST_ROWS=self.sums(self.most), PIXELS=tiles.normalization,
        )  # fmt: skip

    def infer(self, x: Tensor, out: Tensor, survival: float = 1.0, shortcut: Tensor | None = None) -> None:
        """out = ReLU(survival * bn(conv(x)) + shortcut) by the running statistics. All three are bordered."""
        kernels.infer[(self.pixels(len(x)) // INFERENCE_TILE,)](
            x, self.weight.value, self.affine.value, self.running, survival, shortcut, out,
            SIZE=self.size, IN=self.channels_in, OUT=self.channels, STRIDE=self.stride,
            **_shortcut(shortcut, out), PIXELS=INFERENCE_TILE, num_warps=self.tiles.warps, num_stages=1,
        )  # fmt: skip

    def sum_gradient(self, g: Tensor, out: Tensor, sums: Tensor, images: int) -> None:
        """Sums over the gradient g with respect to out."""
        kernels.sum_gradient[(self.sums(images),)](
            g, out, self.y, self.moments, sums, SIZE=self.size, C=self.channels, PIXELS=self.tiles.sum, num_warps=8
        )

    def backward(self, g: Tensor, out: Tensor | None, sums: Tensor, x: Tensor, dy: Tensor, images: int) -> None:
        """Parameter gradients, and the gradient dy with respect to the convolution's output, from their sums and g.

        g is the gradient with respect to out, or without it to the output of batch normalization.
        """
        tiles, pixels = self.tiles, self.pixels(images)
        kernels.normalize_backward[(pixels // tiles.normalization,)](
            g, out, self.y, dy, self.affine.value, self.moments, sums, self.sums(images), self.affine.gradients, pixels,
            SIZE=self.size, C=self.channels, RELU=out is not None, STRIDE=self.stride,
            MOST_ROWS=self.sums(self.most), PIXELS=tiles.normalization,
        )  # fmt: skip
        kernels.weight_gradient[(self.weight_gradients(images), 3)](
            x, dy, self.weight.gradients, self.weight.padded, pixels,
            SIZE=self.size, IN=self.channels_in, OUT=self.channels, STRIDE=self.stride,
            PIXELS=tiles.gradient_tile, TILES=tiles.gradient // tiles.gradient_tile, num_warps=tiles.warps,
        )  # fmt: skip


def _shortcut(shortcut: Tensor | None, out: Tensor) -> dict[str, int]:
    """The kind of shortcut that a kernel adds, and the channels of its input."""
    if shortcut is None:
        return dict(SHORTCUT=0, POOLED=0)
    return dict(SHORTCUT=1 if shortcut.shape == out.shape else 2, POOLED=shortcut.shape[-1])


class Block:
    """A residual block: its two layers, and the buffers that it shares with its neighbors."""

    def __init__(self, block: StochasticDepth, size: int, gate: int, most: int, dtype: torch.dtype) -> None:
        """`size` is the number of pixels on each side of the output."""
        branch = block.branch
        self.survival = block.gate.survival
        self.first = Layer(branch.conv1, branch.bn1, size, gate, most, dtype)
        self.second = Layer(branch.conv2, branch.bn2, size, gate, most, dtype)
        self.stride = self.first.stride
        shape = (most, size, self.second.channels, dtype, branch.conv1.weight.device)
        self.hidden, self.out = bordered(*shape), bordered(*shape)

    def connect(self, x: Tensor, dx: Tensor, group: "Group") -> None:
        """x is the input, bordered; dx takes the gradient with respect to it, flat."""
        self.x, self.dx, self.group = x, dx, group

    def forward(self, sums: Tensor, images: int) -> None:
        self.first.forward(self.x, self.hidden, sums, images)
        self.second.forward(self.hidden, self.out, sums, images, self.x)

    def skip(self, images: int) -> None:
        """Gate closed: the output is the shortcut's."""
        x, out = self.x[:images], self.out[:images]
        if self.stride == 1:
            out.copy_(x)
        else:
            channels = x.shape[-1]
            inside(out)[..., :channels] = in_squares(inside(x)).mean((2, 4))
            inside(out)[..., channels:] = 0

    def backward(self, sums: Tensor, images: int) -> None:
        """From the gradient with respect to the output, in the group's buffer, to that with respect to the input."""
        first, second, g, dy = self.first, self.second, self.group.g, self.group.dy
        second.sum_gradient(g, self.out, sums, images)
        second.backward(g, self.out, sums, self.hidden, dy, images)
        tiles = second.tiles
        kernels.hidden_gradient[(second.sums(images),)](
            dy, second.weight.copy, self.hidden, first.y, first.moments, self.group.dz, sums,
            SIZE=second.size, C=second.channels,
            PIXELS=tiles.convolution, TILES=tiles.sum // tiles.convolution,
            num_warps=tiles.warps, num_stages=STAGES,
        )  # fmt: skip
        dy = dy if self.stride == 1 else self.group.spread
        first.backward(self.group.dz, None, sums, self.x, dy, images)
        size = first.size * self.stride
        kernels.input_gradient[(images * size**2 // first.tiles.convolution,)](
            dy, first.weight.copy, g, self.out, self.dx,
            SIZE=size, IN=first.channels_in, OUT=first.channels, POOLED=self.stride == 2,
            PIXELS=first.tiles.convolution, num_warps=first.tiles.warps,
        )  # fmt: skip

    def skip_backward(self, images: int) -> None:
        """Gate closed: with stride 1, the gradient is where it should be already."""
        if self.stride == 2:
            size, channels = self.first.size, self.first.channels
            g = self.group.g[: images * size**2].view(images, size, 1, size, 1, channels)
            dx = self.dx[: images * 4 * size**2].view(images, 2 * size, 2 * size, -1)
            in_squares(dx).copy_(g[..., : dx.shape[-1]] / 4)


class Group:
    """Buffers that all blocks of one width use in turn in the backward pass."""

    def __init__(self, channels: int, size: int, most: int, dtype: torch.dtype, device: torch.device) -> None:
        flat = (most * size**2, channels)
        self.g, self.dz = (torch.empty(flat, dtype=dtype, device=device) for _ in range(2))
        self.dy = bordered(most, size, channels, dtype, device)
        # The first convolution of a group has stride 2: the gradient with respect to its output, between zeros.
        self.spread = bordered(most, 2 * size, channels, dtype, device) if size < SIZE else None


@dataclass
class Launches:
    """The launches of a training step; a step runs those of forward and backward whose gate is open."""

    stem: Launch
    forward: list[Launch]
    head: Launch
    backward: list[Launch]
    finish: Launch


class Engine:
    """A network's parameters, momentum and running statistics, and what trains them."""

    def __init__(
        self, network: CifarResNet, weight_decay: float, batch_sizes: Sequence[int], dtype: torch.dtype
    ) -> None:
        """
        Args:
            network: The network, on the device to train on. Its values are taken by `load` only.
            weight_decay: Applied to every parameter.
            batch_sizes: All that `step` will meet, the largest first.
            dtype: Of activations and their gradients.
        """
        device = network.conv1.weight.device
        most = batch_sizes[0]
        self.device, self.weight_decay = device, weight_decay
        self.images = bordered(most, SIZE, IMAGE_CHANNELS, dtype, device)
        self.labels = torch.zeros(most, dtype=torch.int64, device=device)
        self.classes = torch.arange(network.num_classes, device=device)

        self.stem = Layer(network.conv1, network.bn1, SIZE, ALWAYS, most, dtype)
        self.stem_weights = network.conv1.weight.numel()
        self.stem_out = x = bordered(most, SIZE, self.stem.channels, dtype, device)
        group = self.first_group = Group(self.stem.channels, SIZE, most, dtype, device)
        self.blocks, size = [], SIZE
        for index, gate in enumerate(gates(network), start=1):
            size //= gate.block.branch.conv1.stride[0]
            block = Block(gate.block, size, index, most, dtype)
            dx = group.g
            if block.stride == 2:
                group = Group(block.first.channels, size, most, dtype, device)
            block.connect(x, dx, group)
            self.blocks.append(block)
            x = block.out
        self.features, self.last_group = x, group
        self.layers = [self.stem, *(layer for block in self.blocks for layer in (block.first, block.second))]

        fc = network.get_classifier()
        self.weight, self.bias = (Slot([p], tuple(p.shape), ALWAYS) for p in (fc.weight, fc.bias))
        slots = [slot for layer in self.layers for slot in (layer.weight, layer.affine)]
        self.parameters = Parameters([*slots, self.weight, self.bias], batch_sizes, dtype, device)

        self.partial_sums = torch.empty(
            max(layer.sums(most) * 2 * layer.channels for layer in self.layers), device=device
        )
        self.schedule = torch.zeros(2 + len(self.blocks), device=device)  # the learning rate and the gates of a step
        self.schedule[1 + ALWAYS] = 1
        self.tracked = torch.zeros(1 + len(self.blocks), dtype=torch.float64, device=device)  # batches, by gate
        self.sums = torch.zeros(3, device=device)  # in the order of metrics.SUMS
        self.launches = {images: self._launches(images) for images in batch_sizes}

    def _launches(self, images: int) -> Launches:
        launches = [
            partial(self._stem, images),
            *(partial(block.forward, self.partial_sums, images) for block in self.blocks),
            partial(self._head, images),
            *(partial(block.backward, self.partial_sums, images) for block in reversed(self.blocks)),
            partial(self._finish, images),
        ]
        launches = on_device(self.device, launches)
        head = len(self.blocks) + 1
        return Launches(launches[0], launches[1:head], launches[head], launches[head + 1 : -1], launches[-1])

    def _stem(self, images: int) -> None:
        self.stem.forward(self.images, self.stem_out, self.partial_sums, images)

    def _head(self, images: int) -> None:
        """Logits, loss and errors, and the gradients of the classifier and with respect to the last block's output."""
        labels, weight = self.labels[:images], self.weight.value
        features = inside(self.features[:images]).float().mean((1, 2))
        logits = torch.addmm(self.bias.value, features, weight.t())
        self.sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        self.sums[1] += 100 * (logits.argmax(1) != labels).sum()
        gradient = (logits.softmax(1) - (labels[:, None] == self.classes).float()) / images
        torch.mm(gradient.t(), features, out=self.weight.gradient)
        torch.sum(gradient, 0, out=self.bias.gradient)
        g = self.last_group.g.view(len(self.labels), -1, features.shape[1])[:images]
        g.copy_(torch.mm(gradient, weight).div_(g.shape[1])[:, None])

    def _finish(self, images: int) -> None:
        """The stem's backward pass, the mean absolute gradient of its convolution (Figure 7), and the optimizer."""
        stem, g, dy = self.stem, self.first_group.g, self.first_group.dy
        stem.sum_gradient(g, self.stem_out, self.partial_sums, images)
        stem.backward(g, self.stem_out, self.partial_sums, self.images, dy, images)
        gradient = stem.weight.gradients[: stem.weight_gradients(images)].sum(0)
        self.sums[2] += gradient.abs().sum() / self.stem_weights
        self.parameters.sgd(images, self.schedule[1:], self.schedule[:1], self.weight_decay)
        self.tracked += self.schedule[1:]

    def step(self, images: Tensor, labels: Tensor, gates: Tensor, lr: float) -> None:
        """One step of SGD.

        Args:
            images: (B, 34, 34, 4), bordered, in the dtype of the activations; the last channel is zero.
            labels: (B,).
            gates: (L,) bools, on the CPU.
            lr: The learning rate.
        """
        launches = self.launches[len(images)]
        self.images[: len(images)].copy_(images)
        self.labels[: len(images)].copy_(labels)
        schedule = torch.cat([torch.tensor([lr, 1.0]), gates.float()])
        if self.device.type == "cuda":
            schedule = schedule.pin_memory()  # so that the host does not wait; its memory is not used again too early
        self.schedule.copy_(schedule, non_blocking=True)

        count, is_open = len(images), gates.tolist()
        launches.stem()
        for block, forward, gate in zip(self.blocks, launches.forward, is_open, strict=True):
            forward() if gate else block.skip(count)
        launches.head()
        for block, backward, gate in zip(self.blocks[::-1], launches.backward, is_open[::-1], strict=True):
            backward() if gate else block.skip_backward(count)
        launches.finish()

    def load(self, optimizer: Optimizer) -> None:
        """Take the values of the network and the momentum of its optimizer."""
        for theirs, ours in self._pairs(optimizer):
            ours.copy_(theirs)
        self.parameters.copy.copy_(self.parameters.value)

    def export(self, optimizer: Optimizer) -> None:
        """Give the network and its optimizer these values."""
        for theirs, ours in self._pairs(optimizer):
            theirs.copy_(ours)

    def _pairs(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
        """Tensors of the network and the optimizer, each with the engine's own for the same."""
        for slot in self.parameters.slots:
            values, momenta = slot.split(slot.value), slot.split(slot.momentum)
            for parameter, value, momentum in zip(slot.parameters, values, momenta, strict=True):
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:  # before the first step
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                yield parameter.data, value
                yield state["momentum_buffer"], momentum
        for layer in self.layers:
            yield layer.bn.running_mean, layer.running[0]
            yield layer.bn.running_var, layer.running[1]
            yield layer.bn.num_batches_tracked, self.tracked[layer.gate]
