#!/usr/bin/env bash
# On a CPU, compiled convolutions fail in the backward pass of a batch of no images.
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
    "Inductor asserts that the gradient of a convolution's weight is contiguous. For no images, PyTorch's own kernel"
    " returns it in channels_last, so a step that works uncompiled and in backend aot_eager raises AssertionError."
)
model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
found = {}
for backend in ("aot_eager", "inductor"):
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, backend=backend)
    for images in (8, 0):
        try:
            compiled(torch.randn(images, 8, 6, 6)).sum().backward()
            found[backend, images] = "works"
        except AssertionError as error:
            found[backend, images] = f"AssertionError: {str(error).splitlines()[0]}"
        except Exception as error:  # for instance no C++ compiler
            print(f"could not be tried: {type(error).__name__}: {error}")
            sys.exit(2)
        print(f"{backend}, {images} images: {found[backend, images]}")
failed = [case for case, result in found.items() if result != "works"]
sys.exit(0 if failed == [("inductor", 0)] else 1)
PYTHON
