"""The card of a run's weights on the Hub: every figure in it comes from the run's own files."""

from datetime import timedelta
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import pretrained
from .cifar_resnet import CifarResNet
from .data import LEARNING_IMAGES, split_sizes
from .files import read_sums
from .options import Options
from .record import Record

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
DATASET_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "synthetic": "timm-sd's drawn shapes"}
HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
PRECISIONS = {"no": "float32", "bf16": "bfloat16 (autocast)"}
LR_SCHEDULES_IN_WORDS = {
    "steps": "learning rate {lr:g}, a tenth of it from half of the epochs on and a hundredth from three quarters",
    "one-cycle": "learning rate in a line up to {lr:g} within the first fifth of the steps, then in a line down to 0",
}


def deviations(record: Record) -> list[str]:
    """What this run has not of the paper's protocol, beside what the README says of all runs."""
    theirs, ours = Options(), record.options
    names = {
        "epochs": "epochs",
        "batch_size": "batch size",
        "lr": "learning rate",
        "lr_schedule": "learning rate schedule",
        "weight_decay": "weight decay",
    }
    found = [
        f"{words} {getattr(ours, name)} (the paper's: {getattr(theirs, name)})"
        for name, words in names.items()
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if record.stochastic and record.survival[-1] != 0.5:
        found.append(f"p_L {record.survival[-1]:g} (the paper's: 0.5)")
    if record.stochastic and ours.drop_path_schedule != "linear":
        found.append("uniform survival probabilities (the paper's: linear)")
    if record.mixed_precision != "no":
        found.append(f"computed in {PRECISIONS[record.mixed_precision]} (the paper's: float32)")
    if any(where["processes"] > 1 for where in record.environments) and not ours.sync_bn:
        found.append("batches normalised in the parts that each process has (the paper's: whole)")
    if ours.grad_checkpointing:
        found.append("blocks computed twice, so running statistics moved twice a step")
    if ours.dataset == "synthetic":
        found.append("drawn shapes (the paper's: CIFAR)")
    return found


def model_card(record: Record, network: CifarResNet, name: str, address: str | None, sha256: str) -> ModelCard:
    """The card of what `record` tells and its network, called `name`.

    `address` is where it will be on the Hub, NAMESPACE/NAME or NAMESPACE/NAME@REVISION, None if it will not. The
    weights' SHA-256 tells whether they are also those of the package.
    """
    options, best = record.options, record.best
    where = record.environments[0]
    on_cpu = where["device"] == "cpu"
    dataset, hub_dataset = DATASET_NAMES[options.dataset], HUB_DATASETS.get(options.dataset)
    published = record.published
    beside = f"beside the paper's {published}%" if published else "which the paper has no figure for"
    result = dict(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=hub_dataset or options.dataset,
        dataset_name=dataset,
        dataset_split="test",
    )
    error = round(best["test_error"], 2)
    return ModelCard.from_template(
        ModelCardData(
            library_name="timm",
            license="apache-2.0",
            pipeline_tag="image-classification",
            tags=[
                "image-classification",
                "timm",
                "timm-sd",
                "resnet",
                *(["stochastic-depth"] if record.stochastic else []),
            ],
            datasets=[hub_dataset] if hub_dataset else None,
            metrics=["accuracy"],
            model_name=name,
            eval_results=[
                EvalResult(metric_type="error", metric_name="Top-1 test error (%)", metric_value=error, **result),
                EvalResult(
                    metric_type="accuracy",
                    metric_name="Top-1 accuracy (%)",
                    metric_value=round(100 - error, 2),
                    **result,
                ),
            ],
        ),
        template_path=str(TEMPLATE),
        name=name,
        summary=(
            f"**{best['test_error']:.2f}% test error on {dataset}** at the best validation error, {beside}: one run of"
            f" {options.epochs} epochs, seed {options.seed}."
        ),
        deviations=deviations(record),
        options=options,
        stochastic=record.stochastic,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        classes=network.num_classes,
        address=address,
        tag=options.weights_tag,
        packaged=read_sums(pretrained.WEIGHTS).get(f"{options.weights_tag}.safetensors") == sha256,
        dataset=dataset,
        hub_dataset=hub_dataset,
        best=best,
        last=record.last,
        paper=f"{published}%" if published else "",
        sizes=split_sizes(LEARNING_IMAGES[options.dataset]),
        schedule=LR_SCHEDULES_IN_WORDS[options.lr_schedule].format(lr=options.lr),
        survival=(
            f"survival probabilities {options.drop_path_schedule}, p_L = {record.survival[-1]:g}"
            if record.stochastic
            else "no block is dropped"
        ),
        precision=PRECISIONS[record.mixed_precision],
        environments=record.environments,
        command=record.command,
        cores=where["processes"] * where["threads"] if record.environments == [where] and on_cpu else None,
        duration=str(timedelta(seconds=round(record.seconds))),
        plain=options.model.removesuffix("_sd"),
    )
