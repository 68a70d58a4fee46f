#!/usr/bin/env bash
# Triton 3.6's interpreter cannot run a loop to a bound that is an argument, with NumPy 2.4.
# Exits with 0 if this is as described, 1 if it has changed, 2 if it could not be tried.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet torch==2.11.0 triton==3.6.0 numpy==2.4.6 || exit 2
cat >"$folder/sum.py" <<'PYTHON'
import importlib.metadata
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
try:
    import torch
    import triton
    import triton.language as tl
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

for name in ("torch", "triton", "numpy"):
    print(name, importlib.metadata.version(name))
print("A range to a number that the kernel is called with raises a TypeError; to a constant, and a while loop, it runs.")


@triton.jit
def by_range(x_ptr, sum_ptr, count):
    total = 0.0
    for i in range(0, count):
        total += tl.load(x_ptr + i)
    tl.store(sum_ptr, total)


@triton.jit
def by_constant(x_ptr, sum_ptr, COUNT: tl.constexpr):
    total = 0.0
    for i in range(0, COUNT):
        total += tl.load(x_ptr + i)
    tl.store(sum_ptr, total)


@triton.jit
def by_while(x_ptr, sum_ptr, count):
    total = 0.0
    i = 0
    while i < count:
        total += tl.load(x_ptr + i)
        i += 1
    tl.store(sum_ptr, total)


outcomes = {}
for kernel in (by_range, by_constant, by_while):
    x, result = torch.arange(5, dtype=torch.float32), torch.zeros(1)
    try:
        kernel[(1,)](x, result, 5)
        outcomes[kernel] = str(result.item())
    except Exception as error:
        outcomes[kernel] = str(error).splitlines()[0]
for kernel, outcome in outcomes.items():
    print(f"{kernel.__name__}: {outcome}")
as_described = "0-dimensional" in outcomes[by_range] and outcomes[by_constant] == outcomes[by_while] == "10.0"
sys.exit(0 if as_described else 1)
PYTHON
"$folder/venv/bin/python" "$folder/sum.py" # a file, since Triton reads the source of kernels
