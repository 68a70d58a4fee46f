"""A user's code: it runs, and with the package installed `mypy --strict` accepts it."""

import timm
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import timm_sd

network = timm_sd.CifarResNet(depth=8, num_classes=3, drop_path_rate=0.5, drop_path_schedule="uniform")
assert_type(network.forward(torch.randn(2, 3, 8, 8)), Tensor)
assert_type(network.forward_features(torch.randn(2, 3, 8, 8)), Tensor)

gates = timm_sd.gates(network)
assert_type(gates, list[timm_sd.Gate])
survival = [gate.survival for gate in gates]
assert_type(survival, list[float])
assert_type(timm_sd.survival_probabilities(len(survival), final=0.5), list[float])
assert_type(timm_sd.survival_probabilities(2, 0.5, "uniform"), list[float])

values = timm_sd.draw_gates(survival, seed=0, step=1)
assert_type(values, Tensor)
for target in (network, gates):
    with timm_sd.use_gates(target, values):
        network(torch.randn(2, 3, 8, 8)).sum().backward()
assert_type(timm_sd.draw_gates(torch.tensor(survival), seed=0, step=1, batch_size=4, mode="count"), Tensor)

block = timm_sd.StochasticDepth(nn.Sequential(nn.Linear(4, 4)), nn.Identity(), nn.ReLU(), survival=0.8, mode="row")
assert_type(block.survival, Tensor)  # a buffer, so that averages of models average it
assert_type(block.forward(torch.randn(2, 4)), Tensor)
assert_type(timm_sd.Gate(0.5, mode="batch").survival, float)

assert_type(timm_sd.skip_drop_path(network), timm_sd.CifarResNet)  # the model's own type
model: nn.Module = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.1, depth=2)
assert_type(timm_sd.skip_drop_path(model, mode="count", strict=True, allow_batch_norm=False), nn.Module)
assert_type(timm_sd.set_drop_path(model, 0.2, schedule="linear"), nn.Module)
assert_type(timm_sd.summary(model), str)
assert_type(timm_sd.restore_drop_path(model), nn.Module)
