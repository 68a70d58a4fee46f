"""Fine-tune a ViT on a folder of images, DATA/class/image, of which every fifth is held out."""

import argparse

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

import timm_sd

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", metavar="DATA")
parser.add_argument("--model", default="vit_small_patch16_224")
parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
images = ImageFolder(args.data)
model = timm.create_model(args.model, args.pretrained, drop_path_rate=0.4, num_classes=len(images.classes)).to(device)
timm_sd.skip_drop_path(model)  # what DropPath drops is no longer computed
config = timm.data.resolve_model_data_config(model)
train_set = ImageFolder(args.data, timm.data.create_transform(**config, is_training=True))
test_set = ImageFolder(args.data, timm.data.create_transform(**config))
train_loader = DataLoader(Subset(train_set, [i for i in range(len(images)) if i % 5]), batch_size=64, shuffle=True)
test_loader = DataLoader(Subset(test_set, range(0, len(images), 5)), batch_size=64)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
for epoch in range(args.epochs):
    model.train()
    for x, y in train_loader:
        loss = cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        logits, y = map(torch.cat, zip(*((model(x.to(device)), y.to(device)) for x, y in test_loader), strict=True))
    print(f"epoch {epoch}: loss {cross_entropy(logits, y):.3f}, accuracy {(logits.argmax(1) == y).float().mean():.1%}")
