#!/usr/bin/env bash
# Inductor cannot compile, for images of any size, a layer norm over channels between two convolutions.
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
    "With dynamic=True, convolution, layer norm over the channels and convolution, as in ConvNeXt, cannot be compiled"
    " for training on a CPU: Inductor sorts symbolic strides without knowing their sizes. With dynamic=False they can."
)


class ChannelNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


model = nn.Sequential(nn.Conv2d(8, 8, 1), ChannelNorm(8), nn.Conv2d(8, 8, 1))
images, found = torch.randn(4, 8, 12, 20), {}
for dynamic in (False, True):
    torch._dynamo.reset()
    try:
        torch.compile(model, dynamic=dynamic)(images).sum().backward()
        found[dynamic] = "works"
    except Exception as error:
        found[dynamic] = next((line for line in str(error).splitlines() if "Relational" in line), str(error)[:200])
    print(f"dynamic={dynamic}: {found[dynamic]}")
if found[False] != "works":
    print("could not be tried: nothing can be compiled here")
    sys.exit(2)
sys.exit(0 if "Relational" in found[True] else 1)
PYTHON
