#!/usr/bin/env bash
# PyTorch's PowerSGD hook for DDP turns gradients that are zero on all ranks into NaN.
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
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

print("torch", torch.__version__)
print(
    "With its default of no epsilon, PowerSGD's orthogonalization divides by the norm of a matrix of zeros: a weight"
    " whose gradient is zero, such as that of a layer in a dropped branch, silently gets one of NaN."
)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
found = {}
for epsilon in (0, 1e-8):
    linear = torch.nn.Linear(64, 64)
    model = DistributedDataParallel(linear)
    state = PowerSGDState(None, start_powerSGD_iter=2, orthogonalization_epsilon=epsilon)
    model.register_comm_hook(state, powerSGD_hook)
    found[epsilon] = []
    for _ in range(4):
        model.zero_grad()
        (0 * model(torch.randn(4, 64)).sum()).backward()
        found[epsilon].append(bool(linear.weight.grad.isnan().any()))
    print(f"orthogonalization_epsilon={epsilon:g}, NaN in the gradient at steps 0 to 3: {found[epsilon]}")
sys.exit(0 if any(found[0]) and not any(found[1e-8]) else 1)
PYTHON
