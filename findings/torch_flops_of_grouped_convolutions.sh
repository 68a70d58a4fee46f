#!/usr/bin/env bash
# PyTorch's FLOP counter takes the backward pass of a depthwise convolution for that of an ordinary one.
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
    from torch.utils.flop_counter import FlopCounterMode
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

print("torch", torch.__version__)
print("A convolution's backward pass has twice the FLOPs of its forward pass, but one of its two parts is counted without groups.")


def ratio(groups):
    """FLOPs of the backward pass relative to the forward pass."""
    convolution = nn.Conv2d(64, 64, 7, padding=3, groups=groups)
    images = torch.randn(2, 64, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        output = convolution(images)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return backward.get_total_flops() / forward.get_total_flops()


ratios = {groups: ratio(groups) for groups in (1, 8, 64)}
for groups, found in ratios.items():
    print(f"64 channels in groups: {groups}, backward / forward: {found:g}")
sys.exit(0 if ratios[1] == 2 and ratios[64] > 32 else 1)
PYTHON
