"""Trainers of others, with models converted by skip_drop_path: python tests/trainers.py [NAME ...]

Not a part of the test suite, since it downloads some of these packages, each into a temporary folder of its own, as
`packages.py` does. Every trainer trains a small model twice, as it is and converted, and evaluates it. Forward hooks
count the rows that branches compute: fewer in training if the model is converted, and all of them in evaluation. The
trainer's own checkpoint of the converted model must load into an unconverted one. A line is printed for each trainer;
the exit status is 1 if one fails.
"""

import contextlib
import copy
import importlib.metadata
import io
import math
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from in_folder import main
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import timm_sd

IN_BRANCH = re.compile(r"\.fc2$")  # the last layer of an MLP
RATE, SIZE, CLASSES, BATCH, STEPS = 0.5, 32, 4, 8, 4
VIT = dict(img_size=SIZE, num_classes=CLASSES, drop_path_rate=RATE)

State = dict[str, Tensor]
Convert = Callable[..., None]  # has the arguments of skip_drop_path
Train = Callable[[Convert, Path], tuple[float, State]]
"""Trains a model that it converts where a user would. Returns the last loss, and the state in the checkpoint."""


class Trainer(NamedTuple):
    requirements: str  # the package itself first, then what the environment may lack
    train: Train


class Observer:
    """Converts a model, or does not, and counts what its branches compute from then on."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.rows: Counter[bool] = Counter()  # by whether the model is in training

    def convert(self, model: nn.Module, **options: Any) -> None:
        rows = self.rows

        def count(module: nn.Module, args: tuple, output: Tensor) -> None:  # of a method, copies would copy `self`
            rows[module.training] += len(output)

        self.model, self.unconverted = model, copy.deepcopy(model)
        if self.skip:
            timm_sd.skip_drop_path(model, strict=True, **options)
        for name, module in model.named_modules():
            if IN_BRANCH.search(name):
                module.register_forward_hook(count)


def samples() -> TensorDataset:
    return TensorDataset(torch.randn(STEPS * BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (STEPS * BATCH,)))


@torch.inference_mode()
def evaluate(model: Callable[[Tensor], object]) -> None:
    for x, _ in DataLoader(samples(), BATCH):
        model(x)


def by_timm(convert: Convert, folder: Path) -> tuple[float, State]:
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = timm.create_model("test_vit", **VIT)
    convert(model)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    scheduler = CosineLRScheduler(optimizer, t_initial=STEPS)
    ema = ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=folder)
    model.train()
    for step, (x, y) in enumerate(DataLoader(samples(), BATCH)):
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)
        scheduler.step(step + 1)
    model.eval()
    evaluate(model)
    saver.save_checkpoint(epoch=0)
    timm.models.load_checkpoint(timm.create_model("test_vit", **VIT), folder / "last.pth.tar", use_ema=True)
    return loss.item(), torch.load(folder / "last.pth.tar", weights_only=False)["state_dict"]


def by_accelerate(convert: Convert, folder: Path) -> tuple[float, State]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = timm.create_model("test_vit", **VIT)
    convert(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loaders = DataLoader(samples(), BATCH), DataLoader(samples(), BATCH)
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, *loaders)
    model.train()
    for x, y in train_loader:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        for x, _ in val_loader:
            model(x)
    accelerator.save_state(folder)
    return loss.item(), load_file(folder / "model.safetensors")


def by_lightning(convert: Convert, folder: Path) -> tuple[float, State]:
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Classifier(lightning.LightningModule):
        def __init__(self, name: str, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = timm.create_model(name, **options)
            convert(self.model)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x, y = batch
            loss = cross_entropy(self.model(x), y)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            x, y = batch
            self.log("val_loss", cross_entropy(self.model(x), y))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=folder, callbacks=EMAWeightAveraging(decay=0.9), **quiet
    )
    trainer.fit(Classifier("test_vit", **VIT), DataLoader(samples(), BATCH), DataLoader(samples(), BATCH))
    loss = trainer.callback_metrics["loss"].item()
    trainer.save_checkpoint(folder / "last.ckpt")
    state = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
    return loss, {key.removeprefix("model."): value for key, value in state.items()}


def by_transformers(convert: Convert, folder: Path) -> tuple[float, State]:
    from transformers import Dinov2Config, Dinov2ForImageClassification, Trainer, TrainingArguments

    config = Dinov2Config(
        image_size=SIZE, patch_size=16, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_labels=CLASSES,
        drop_path_rate=RATE,
    )  # fmt: skip
    model = Dinov2ForImageClassification(config)
    args = TrainingArguments(
        output_dir=folder, num_train_epochs=1, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        eval_strategy="epoch", save_strategy="epoch", use_cpu=True, report_to="none",
    )  # fmt: skip
    data = [dict(pixel_values=x, labels=y) for x, y in samples()]
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
    # What Trainer passes and this model hands on to its blocks; and after Trainer, which sets config.use_cache.
    convert(model, example=dict(pixel_values=torch.randn(5, 3, SIZE, SIZE), num_items_in_batch=torch.tensor(5)))
    loss = trainer.train().training_loss
    again = Dinov2ForImageClassification.from_pretrained(folder / f"checkpoint-{STEPS}")
    return loss, again.state_dict()


def by_fastai(convert: Convert, folder: Path) -> tuple[float, State]:
    from fastai.vision.all import ImageDataLoaders, vision_learner
    from torchvision.transforms.functional import to_pil_image

    for part in ("train", "valid"):
        for index, (x, y) in enumerate(samples()):
            (folder / part / str(y.item())).mkdir(parents=True, exist_ok=True)
            to_pil_image(x.sigmoid()).save(folder / part / str(y.item()) / f"{index}.png")
    data = ImageDataLoaders.from_folder(folder, bs=BATCH, num_workers=0, device=torch.device("cpu"))
    learner = vision_learner(data, "test_vit", pretrained=False, drop_path_rate=RATE, img_size=SIZE)
    convert(learner.model)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1)
    learner.save("last")
    return learner.recorder.losses[-1].item(), torch.load(folder / "models" / "last.pth", weights_only=False)["model"]


def by_open_clip(convert: Convert, folder: Path) -> tuple[float, State]:
    import open_clip

    vision = open_clip.get_model_config("convnext_tiny")["vision_cfg"]
    vision |= dict(timm_model_name="test_convnext", timm_drop_path=RATE, image_size=SIZE)
    text = dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
    model = open_clip.create_model("convnext_tiny", vision_cfg=vision, text_cfg=text, output_dict=True)
    convert(model.visual)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    criterion = open_clip.ClipLoss()
    model.train()
    for x, _ in DataLoader(samples(), BATCH):
        loss = criterion(**model(x, torch.randint(32, (len(x), 8))))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    evaluate(model.encode_image)
    torch.save(dict(state_dict=model.state_dict()), folder / "last.pt")
    again = open_clip.create_model("convnext_tiny", vision_cfg=vision, text_cfg=text)
    open_clip.load_checkpoint(again, folder / "last.pt", strict=True, weights_only=True)
    return loss.item(), again.visual.state_dict()


def by_segmentation_models(convert: Convert, folder: Path) -> tuple[float, State]:
    import segmentation_models_pytorch as smp

    model = smp.Unet("tu-test_convnext", encoder_weights=None, classes=CLASSES, drop_path_rate=RATE)
    convert(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    criterion = smp.losses.DiceLoss("multiclass")
    model.train()
    for x, y in DataLoader(samples(), BATCH):
        loss = criterion(model(x), y.view(-1, 1, 1).expand(-1, SIZE, SIZE))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    evaluate(model)
    model.save_pretrained(folder)
    return loss.item(), smp.from_pretrained(folder).state_dict()


FASTAI = (
    "fastai==2.8.12 fastcore==2.2.41 fastdownload==0.0.8 fastprogress==1.0.3 fasttransform==0.0.5 plum-dispatch==2.9.0"
    " beartype==0.23.1 cloudpickle==3.1.3 rich==15.0.0 pandas==3.1.1 python-dateutil==4.0.0 scikit-learn==1.9.1"
    " joblib==1.6.0 threadpoolctl==3.8.0 narwhals==2.29.0 requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3"
    " certifi idna"
)
TRAINERS = {
    "timm": Trainer("", by_timm),
    "accelerate": Trainer("", by_accelerate),
    "lightning": Trainer("lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0", by_lightning),
    "transformers": Trainer("", by_transformers),
    "fastai": Trainer(FASTAI, by_fastai),
    "open-clip-torch": Trainer("open-clip-torch==3.3.0 ftfy==6.3.1 wcwidth==0.9.4 regex==2026.11.19", by_open_clip),
    "segmentation-models-pytorch": Trainer("segmentation-models-pytorch==0.6.0", by_segmentation_models),
}


def try_here(name: str) -> bool:
    """Try a trainer that is installed; print a line and return whether it works."""
    plain, converted = Observer(skip=False), Observer(skip=True)
    warnings.filterwarnings("error", ".*drop path")
    for observer in (plain, converted):
        torch.manual_seed(0)
        logs = contextlib.redirect_stdout(io.StringIO())
        with tempfile.TemporaryDirectory(prefix="timm-sd-") as folder, logs:
            loss, state = TRAINERS[name].train(observer.convert, Path(folder))
    trained = converted.model.state_dict()
    changed = any(not torch.equal(p, trained[key]) for key, p in converted.unconverted.named_parameters())
    converted.unconverted.load_state_dict(state, strict=True)
    failed = [
        what
        for what, ok in {
            "training computes all rows": 0 < converted.rows[True] < plain.rows[True],
            "evaluation does not compute all rows": 0 < converted.rows[False] == plain.rows[False],
            f"the loss is {loss}": math.isfinite(loss),
            "no parameter has changed": changed,
            "the checkpoint differs from the model": all(torch.equal(state[key], trained[key]) for key in trained),
        }.items()
        if not ok
    ]
    rows = [f"{converted.rows[mode]} of {plain.rows[mode]} rows in" for mode in (True, False)]
    outcome = "; ".join(failed) or "ok"
    version = importlib.metadata.version(name)
    print(f"{name} {version}: branches compute {rows[0]} training, {rows[1]} evaluation: {outcome}")
    return not failed


if __name__ == "__main__":
    requirements = {name: each.requirements for name, each in TRAINERS.items()}
    sys.exit(main(__file__, __doc__.splitlines()[0], requirements, try_here))
