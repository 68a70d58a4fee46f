"""Rows of a tensor, one for each sample of the mini-batch: to compute some of them, and to put the results back."""

import torch
from torch import Tensor


class _ZeroGradients(torch.autograd.Function):
    """Identity on the shortcut that gives the parameters of the dropped branch zero gradients.

    Zero, not None: the authors' optimizer still updates a dropped block by momentum and weight decay. PyTorch's
    optimizers skip parameters without a gradient, and DistributedDataParallel would keep waiting for them.
    """

    @staticmethod
    def forward(shortcut: Tensor, *parameters: Tensor) -> Tensor:
        return shortcut.view_as(shortcut)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return gradient, *(torch.zeros_like(parameter) if need else None for parameter, need in needed)


zero_gradients = _ZeroGradients.apply


# `x[rows]` would be slower: its backward pass sorts. `index_select` and `index_add_` do not keep channels_last.


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of images or videos are innermost in memory."""
    return x.ndim > 3 and x.stride(1) == 1


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], in the memory format of x."""
    if is_channels_last(x):
        return x.movedim(1, -1).index_select(0, rows).movedim(-1, 1)
    return x.index_select(0, rows)


def put_rows(x: Tensor, rows: Tensor, size: int, scale: float = 1.0, channels_last: bool = False) -> Tensor:
    """scale * x as these rows of a tensor of zeros of shape (size, ...), in the memory format of x or channels_last."""
    if is_channels_last(x) or (channels_last and x.ndim > 3):
        x = x.movedim(1, -1)
        return x.new_zeros(size, *x.shape[1:]).index_add_(0, rows, x, alpha=scale).movedim(-1, 1)
    return x.new_zeros(size, *x.shape[1:]).index_add_(0, rows, x, alpha=scale)
