#!/usr/bin/env bash
# In timm, drop_path_rate is the last block's rate in most models, and every block's in some.
# Exits with 0 if this is as described, 1 if it has changed, 2 if it could not be tried.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 || exit 2
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import sys

try:
    import timm
    import torch
    from timm.layers import DropPath
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

print("torch", torch.__version__, "timm", timm.__version__)
print("With the same drop_path_rate, some models drop every block at that rate; most spread it linearly, from 0 (no drop path).")

RATE = 0.3
LINEAR = ("vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "resnet50")
ALL_ALIKE = ("xcit_nano_12_p16_224", "cait_xxs24_224", "levit_128", "mixer_s32_224", "sequencer2d_s", "coat_lite_tiny")
means = {}
for name in LINEAR + ALL_ALIKE:
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=RATE)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    means[name] = statistics.mean(rates)
    print(f"{name}: {len(rates)} drop paths, rates from {min(rates):.3f} to {max(rates):.3f}, {means[name]:.3f} on average")
linear = all(means[name] < 0.6 * RATE for name in LINEAR)
sys.exit(0 if linear and all(abs(means[name] - RATE) < 1e-6 for name in ALL_ALIKE) else 1)
PYTHON
