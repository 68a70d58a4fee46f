#!/usr/bin/env bash
# A column-parallel linear layer of PyTorch refuses a batch of no samples, depending on the number of tokens.
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
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from torch.testing._internal.distributed.fake_pg import FakeStore
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

print("torch", torch.__version__)
print(
    "After parallelize_module with ColwiseParallel on 2 ranks, a linear layer takes an empty batch of 4 tokens but not"
    " one of 5, which DTensor's rule for views takes for an uneven shard, though the tokens are not sharded."
)
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
linear = parallelize_module(torch.nn.Linear(64, 192), init_device_mesh("cpu", (2,)), ColwiseParallel())
found = []
for shape in ((1, 4, 64), (1, 5, 64), (0, 4, 64), (0, 5, 64)):
    try:
        found.append(tuple(linear(torch.zeros(shape)).shape))
    except RuntimeError as error:
        found.append(str(error).splitlines()[0])
    print(f"input {shape}: {found[-1]}")
failed = [isinstance(each, str) for each in found]
sys.exit(0 if failed == [False, False, False, True] and "unevenly sharded" in found[-1] else 1)
PYTHON
