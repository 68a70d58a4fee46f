"""Train a timm model on your images without computing what its drop path drops.

Images are where timm's own scripts look for them: DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import timm_sd

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", metavar="DATA", type=Path)
parser.add_argument("--model", default="vit_small_patch16_224")
parser.add_argument("--pretrained", action="store_true", help="download weights from the Hugging Face Hub")
parser.add_argument("--img-size", type=int, help="height and width; the model's own by default")
parser.add_argument("--drop-path", type=float, default=0.2)
parser.add_argument("--mode", choices=("auto", "row", "count", "batch"), default="auto")
parser.add_argument("--compare", action="store_true", help="also train a copy that computes everything")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=64)
args = parser.parse_args()
if not all((args.data / split).is_dir() for split in ("train", "val")):
    sys.exit(f"{args.data} needs the folders train and val, with images in train/CLASS/ and val/CLASS/")

device = "cuda" if torch.cuda.is_available() else "cpu"
classes = ImageFolder(args.data / "train").classes
options = dict(drop_path_rate=args.drop_path, num_classes=len(classes))
try:
    model = timm.create_model(args.model, args.pretrained, img_size=args.img_size, **options).to(device)
except TypeError:  # most convolutional networks take any size, and no such argument
    model = timm.create_model(args.model, args.pretrained, **options).to(device)
models = {"DropPath": copy.deepcopy(model)} if args.compare else {}
models[args.mode] = timm_sd.skip_drop_path(model, args.mode)

config = timm.data.resolve_model_data_config(model)
if args.img_size:
    config["input_size"] = (3, args.img_size, args.img_size)
train_set = ImageFolder(args.data / "train", timm.data.create_transform(**config, is_training=True))
val_set = ImageFolder(args.data / "val", timm.data.create_transform(**config))
if val_set.classes != classes:
    sys.exit(f"{args.data}/train and {args.data}/val must have the same classes")
train_loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=len(train_set) > args.batch_size)
val_loader = DataLoader(val_set, args.batch_size)
optimizers = {name: torch.optim.AdamW(each.parameters(), lr=1e-4, weight_decay=0.05) for name, each in models.items()}

for epoch in range(args.epochs):
    for name, each in models.items():
        started = time.perf_counter()
        each.train()
        for x, y in tqdm(train_loader, f"epoch {epoch}, {name}", leave=False):
            cross_entropy(each(x.to(device)), y.to(device)).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
        seconds = time.perf_counter() - started
        each.eval()
        with torch.inference_mode():
            right = sum((each(x.to(device)).argmax(1) == y.to(device)).sum().item() for x, y in val_loader)
        print(f"epoch {epoch}, {name}: {seconds:.1f} s, accuracy {right / len(val_set):.1%}")
print(timm_sd.summary(model))
