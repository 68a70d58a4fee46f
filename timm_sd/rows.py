"""Rows of a tensor, one for each sample of the mini-batch: to compute with some of them, and to put the results back.

The autograd functions behind `timm_sd.gate`. Their backward passes are differentiable again.
"""

import math

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


class _TakeRows(torch.autograd.Function):
    """x[rows] for distinct rows. PyTorch's own backward pass must allow for repeated rows and is much slower.

    (`index_select` would not keep channels_last.)
    """

    @staticmethod
    def forward(x: Tensor, rows: Tensor) -> Tensor:
        return x[rows]

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, rows = inputs
        ctx.size = len(x)
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return put_rows(gradient, rows, ctx.size, 1.0), None


class _PutRows(torch.autograd.Function):
    """x, scaled, as these rows of a tensor of zeros with `size` rows, in the memory format of x."""

    @staticmethod
    def forward(x: Tensor, rows: Tensor, size: int, scale: float) -> Tensor:
        strides = torch.empty_like(x, device="meta").stride()  # those of x itself may overlap
        if strides[0] == math.prod(x.shape[1:]):
            whole = x.new_empty_strided((size, *x.shape[1:]), strides).zero_()
        else:
            whole = x.new_zeros((size, *x.shape[1:]))
        return whole.index_copy_(0, rows, x if scale == 1 else x * scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, int, float], output: Tensor) -> None:
        _, rows, ctx.size, ctx.scale = inputs
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        gradient = take_rows(gradient, rows)
        return gradient if ctx.scale == 1 else gradient * ctx.scale, None, None, None


zero_gradients, take_rows, put_rows = _ZeroGradients.apply, _TakeRows.apply, _PutRows.apply
