"""The model card of a run's weights on the Hub: every number in it comes from the run's own files."""

from datetime import timedelta
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import read_sums
from ..paper import pretrained
from ..paper.cifar_resnet import DEPTHS, CifarResNet
from ..train.options import GROUPS, RUN, Options
from .record import Record

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
PRECISIONS = {"no": "float32", "bf16": "bfloat16 (autocast)"}


def deviations(record: Record) -> list[str]:
    """Where this run deviates from the paper's protocol, apart from what docs/method.md lists for all runs."""
    ours = record.options
    theirs = Options(ours.model, "cifar10" if ours.dataset == "synthetic" else ours.dataset)
    found = []
    for name in ours.changed:
        if GROUPS[name] == RUN and not name.startswith("drop_path"):
            words = name.replace("lr", "learning rate").replace("_", " ")
            found.append(f"{words} {getattr(ours, name)} (paper: {getattr(theirs, name)})")
    found += [f"{regularizer} (paper: none)" for regularizer in record.regularizers]
    if record.stochastic and record.survival[-1] != 0.5:
        found.append(f"p_L {record.survival[-1]:g} (paper: 0.5)")
    if record.stochastic and record.schedule != "linear":
        found.append(f"{record.schedule} survival probabilities (paper: linear)")
    if record.mixed_precision != "no":
        found.append(f"computed in {PRECISIONS[record.mixed_precision]} (paper: float32)")
    if any(where["processes"] > 1 for where in record.environments) and not ours.sync_bn:
        found.append("batch normalization over each process's part of the batch (paper: the whole batch)")
    if ours.grad_checkpointing:
        found.append("blocks computed twice, so running statistics updated twice per step")
    if ours.dataset == "svhn" and ours.depth != 152:
        found.append(f"{ours.depth} layers (paper: 152)")
    if ours.dataset == "synthetic":
        found.append("synthetic shapes (paper: CIFAR)")
    return found


def schedule_in_words(record: Record) -> str:
    """The learning rate over the epochs."""
    lr = record.options.lr
    if record.options.lr_schedule == "one-cycle":
        return f"learning rate rising linearly to {lr:g} in the first fifth of the steps, then falling linearly to 0"
    first, second = (f"{drop:.0%}" for drop in record.dataset.lr_drops)
    return f"learning rate {lr:g}, divided by 10 at {first} of the epochs and again at {second}"


def model_card(record: Record, network: CifarResNet, name: str, address: str | None, sha256: str) -> ModelCard:
    """The model card of a run and its network, called `name`.

    `address` is its future address on the Hub, NAMESPACE/NAME or NAMESPACE/NAME@REVISION, None if it has none. The
    weights' SHA-256 tells whether they also come with the package.
    """
    options, best = record.options, record.best
    where = record.environments[0]
    on_cpu = where["device"] == "cpu"
    dataset, hub_dataset = record.dataset.title, record.dataset.hub
    published, source = record.published or (None, None)
    comparison = f"{source}: {published:.2f}%" if published else "no published result"
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
            f"**{best['test_error']:.2f}% test error on {dataset}** at the best validation error ({comparison}), from"
            f" one run of {options.epochs} epochs with seed {options.seed}."
        ),
        record=record,
        deviations=deviations(record),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        classes=network.num_classes,
        address=address,
        tag=options.weights_tag,
        packaged=read_sums(pretrained.WEIGHTS).get(f"{options.weights_tag}.safetensors") == sha256,
        dataset=dataset,
        hub_dataset=hub_dataset,
        published=f"{published:.2f}%" if published else "",
        source=source,
        schedule=schedule_in_words(record),
        survival=(
            f"{record.schedule} survival probabilities with p_L = {record.survival[-1]:g}"
            if record.stochastic
            else "no block is dropped"
        ),
        registered=options.depth in DEPTHS,
        precision=PRECISIONS[record.mixed_precision],
        cores=where["processes"] * where["threads"] if record.environments == [where] and on_cpu else None,
        duration=str(timedelta(seconds=round(record.summary["seconds"]))),
        plain=options.model.removesuffix("_sd"),
    )
