#!/usr/bin/env bash
# vit-pytorch's MaxViT does not drop samples: its mask has one entry for each of four columns of the image.
# Exits with 0 if this is as described, 1 if it has changed, 2 if it could not be tried.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet torch==2.14.1 vit-pytorch==1.26.11 || exit 2
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

try:
    import torch
    from vit_pytorch.max_vit import Dropsample
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

for name in ("torch", "vit-pytorch"):
    print(name, importlib.metadata.version(name))
print("Dropsample zeroes columns of images that are 4 pixels wide, the same in all samples, and raises for other widths.")

torch.manual_seed(0)
drop = Dropsample(prob=0.5).train()
whole_samples = same_columns = 0
for _ in range(200):
    zero = drop(torch.ones(6, 3, 5, 4)) == 0
    by_column = zero.all(dim=2).all(dim=1).all(dim=0)
    same_columns += torch.equal(zero, by_column.expand_as(zero))
    by_sample = zero.flatten(1).all(dim=1)
    whole_samples += torch.equal(zero, by_sample.view(-1, 1, 1, 1).expand_as(zero))
print(f"6 images of 4 columns, 200 calls: only whole columns are zero in {same_columns}, only whole samples in {whole_samples}")
try:
    drop(torch.ones(6, 3, 5, 7))
    raised = None
except RuntimeError as error:
    raised = str(error).splitlines()[0]
print(f"6 images of 7 columns: {raised or 'no error'}")
sys.exit(0 if same_columns == 200 and whole_samples < 100 and raised else 1)
PYTHON
