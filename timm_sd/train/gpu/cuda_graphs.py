"""Residual blocks as CUDA graphs, for GPUs that wait for the host to launch these networks' many small kernels.

Each block's forward and backward passes are captured once and then replayed with one launch each. The host still
decides whether to replay a block, so a dropped block still costs nothing. The blocks read and write a chain of fixed
buffers: one block's output is the next one's input, and only tensors that skip a block are copied.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ...gate import gates, use_gates
from ...paper.stochastic_depth import StochasticDepth

WARM_UP_PASSES = 3


class _Replay(torch.autograd.Function):
    """A block's graphs as one autograd node, without parameters: the graph itself accumulates their `.grad`."""

    @staticmethod
    def forward(ctx, x: Tensor, graphs: "_BlockGraphs") -> Tensor:
        ctx.graphs = graphs
        _copy(x, graphs.input)
        graphs.replay_forward()
        return graphs.output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        graphs = ctx.graphs
        _copy(gradient, graphs.output_gradient)
        graphs.replay_backward()
        return graphs.input_gradient.detach(), None


class _BlockGraphs:
    """The forward and backward graphs of one block, gate open, and the buffers they read and write."""

    def __init__(self, block: StochasticDepth, autocast: AbstractContextManager) -> None:
        self.block = block
        self.autocast = autocast
        self.parameters = list(block.parameters())

    def capture_forward(self, x: Tensor, pool: tuple[int, int]) -> Tensor:
        self.input = x.detach().requires_grad_()
        self.replay_forward = capture(self._forward, pool)
        return self.output

    def capture_backward(self, gradient: Tensor, pool: tuple[int, int]) -> Tensor:
        self.output_gradient = gradient
        self.replay_backward = capture(self._backward, pool)
        # The parameters' autograd nodes are bound to the capture stream and must not stay behind.
        self.output = self.output.detach()
        return self.input_gradient

    def _forward(self) -> None:
        with self.autocast:
            self.output = self.block.activation(self.block.shortcut(self.input) + self.block.branch(self.input))

    def _backward(self) -> None:
        inputs = (self.input, *self.parameters)
        self.input_gradient, *gradients = torch.autograd.grad(self.output, inputs, self.output_gradient)
        torch._foreach_add_([parameter.grad for parameter in self.parameters], gradients)

    def forward(self, x: Tensor) -> Tensor:
        """The block's forward pass; batches of another shape (the last of an epoch) do without the graphs."""
        if not self.block.training or x.shape != self.input.shape:
            return StochasticDepth.forward(self.block, x)
        if self.block.gate.can_close() and not self.block.gate.draw(len(x)):
            return self.block.shortcut(x)  # the gradients of the branch's parameters are zero already
        return _Replay.apply(x, self)


def graph_blocks(network: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> None:
    """Make `network` replay its blocks in training, for batches of the shape of `images` and gates in mode "batch".

    From then on every parameter has a gradient, zero until a backward pass adds to it: call
    `optimizer.zero_grad(set_to_none=False)`. A dropped block leaves its gradients at zero. The network can be trained
    in one process only, and its parameters must not move in memory.

    Args:
        network: The network to train, on a CUDA device.
        images: (B, C, H, W), on the same device and in the memory format of the training batches.
        dtype: Autocast's dtype, None without autocast.
    """
    network.train()
    blocks = [gate.block for gate in gates(network)]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    x = _warm_up(network, blocks, images)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    # A cast that autocast cached outside a graph would not be repeated when the graph is replayed.
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype is not None, cache_enabled=False)
    pool = torch.cuda.graph_pool_handle()
    graphs = [_BlockGraphs(block, autocast) for block in blocks]
    # All graphs share one memory pool, so they are captured in the order in which they are replayed.
    for block_graphs in graphs:
        x = block_graphs.capture_forward(x, pool)
    gradient = torch.zeros_like(x)
    for block_graphs in reversed(graphs):
        gradient = block_graphs.capture_backward(gradient, pool)

    for buffer, before in buffers:  # the warm-up has updated the running statistics
        buffer.copy_(before)
    for block_graphs in graphs:
        block_graphs.block.forward = block_graphs.forward


def _warm_up(network: nn.Module, blocks: list[StochasticDepth], images: Tensor) -> Tensor:
    """Let the libraries choose and load their kernels; return the first block's input, for its dtype and layout."""
    inputs = []
    hook = blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    with hook, side_stream(), use_gates(network, torch.ones(len(blocks), dtype=torch.bool)):
        for _ in range(WARM_UP_PASSES):
            network(images).sum().backward()
    return inputs[-1]


def _copy(source: Tensor, buffer: Tensor) -> None:
    if source.data_ptr() != buffer.data_ptr():
        buffer.detach().copy_(source)


@contextmanager
def side_stream() -> Iterator[None]:
    """A side stream, which CUDA requires for the passes before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(function: Callable[[], None], pool: tuple[int, int]) -> Callable[[], None]:
    """Capture the kernels that `function` launches; return a function that replays them in one launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph.replay
