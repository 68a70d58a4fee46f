#!/usr/bin/env bash
# PyTorch's batch normalization on the CPU computes wrong gradients for one image whose gradient has another memory order.
# Exits with 0 if this is as described, 1 if it has changed, 2 if it could not be tried.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.3.5 || exit 2
"$folder/venv/bin/python" - <<'PYTHON'
import sys

try:
    import torch
    from torch import nn
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

print("torch", torch.__version__)
print(
    "For one contiguous image, a gradient that is laid out in memory as (height, image, width, channel), with the same"
    " values, gives BatchNorm2d's input and weight other gradients."
)


def in_memory_order(x, order):
    """The same values, laid out in memory in this order of dimensions."""
    return x.permute(order).contiguous().permute([order.index(dimension) for dimension in range(x.ndim)])


def gradients(images, upstream):
    norm = nn.BatchNorm2d(images.shape[1]).to(images.dtype)
    images = images.detach().requires_grad_()
    norm(images).backward(upstream)
    return images.grad, norm.weight.grad


torch.manual_seed(0)
errors = {}
for count in (1, 2):
    images, upstream = torch.randn(count, 4, 3, 5), torch.randn(count, 4, 3, 5)
    expected = gradients(images.double(), upstream.double())
    found = gradients(images, in_memory_order(upstream, [2, 0, 3, 1]))
    errors[count] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))
    print(f"images: {count}, largest error relative to the largest gradient: {errors[count]:.1e}")
sys.exit(0 if errors[1] > 0.1 and errors[2] < 1e-5 else 1)
PYTHON
