#!/usr/bin/env bash
# In transformers, drop_path_rate drops nothing in Swin2SR, and only the attention in Swin.
# Exits with 0 if this is as described, 1 if it has changed, 2 if it could not be tried.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 || exit 2
"$folder/venv/bin/python" - <<'PYTHON'
import sys

try:
    import torch
    import transformers
    from transformers import Swin2SRConfig, Swin2SRModel, SwinConfig, SwinModel, Swinv2Config, Swinv2Model
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

print("torch", torch.__version__, "transformers", transformers.__version__)
print(
    "At a drop path rate of 0.9, Swin2SR computes the same in training as at 0; Swin's drop path is called once a layer,"
    " for the attention, Swin v2's twice."
)

SMALL = dict(image_size=32, patch_size=1, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def make(model, config, rate, **kwargs):
    torch.manual_seed(0)
    return model(config(drop_path_rate=rate, **SMALL, **DROPOUT, **kwargs)).train()


torch.manual_seed(1)
images = torch.randn(4, 3, 32, 32)
with torch.no_grad():
    with_rate, without = (make(Swin2SRModel, Swin2SRConfig, rate)(images).last_hidden_state for rate in (0.9, 0.0))
same = torch.equal(with_rate, without)
drop_paths = sum("DropPath" in type(module).__name__ for module in make(Swin2SRModel, Swin2SRConfig, 0.9).modules())
print(f"Swin2SR: {drop_paths} drop paths at a rate of 0.9; the same output in training as at 0: {same}")

calls = {}
for name, model, config in (("Swin", SwinModel, SwinConfig), ("Swin v2", Swinv2Model, Swinv2Config)):
    network = make(model, config, 0.9)
    calls[name] = []
    for module_name, module in network.named_modules():
        if "DropPath" in type(module).__name__:
            module.register_forward_hook(lambda *_, name=name, place=module_name: calls[name].append(place))
    network(images)
    print(f"{name}: {len(calls[name])} calls of {len(set(calls[name]))} drop paths")
once = len(calls["Swin"]) == len(set(calls["Swin"])) == 3
twice = len(calls["Swin v2"]) == 2 * len(set(calls["Swin v2"])) == 6
sys.exit(0 if same and once and twice else 1)
PYTHON
