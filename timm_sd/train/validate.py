"""Evaluate a network on a data set: `python -m timm_sd.train.validate --run output/NAME --data-dir data`."""

from .. import extras  # noqa: F401

# isort: split
import argparse
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from .. import register_depth
from ..command_line import Parser, one_line_errors, path, say
from ..errors import UserError
from ..gate import gates
from ..paper import pretrained
from ..paper.datasets import DATASETS
from ..paper.pretrained import load_weights
from . import data, machine
from .evaluation import evaluate
from .options import Options
from .run_folder import RunFolder, read_options

SPLITS = ("train", "validation", "test")
CIFAR_10_C = 50_000  # images in a file: five severities, one after the other
SEVERITIES = 5


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", help="one of timm_sd's networks; not needed with --run")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="the weights that come with the package")
    weights.add_argument("--checkpoint", type=path, help="a safetensors file with weights")
    weights.add_argument("--run", type=path, help="a run's folder: its best weights, data set and split")
    parser.add_argument("--dataset", choices=tuple(DATASETS), help="if omitted, the run's or cifar10")
    parser.add_argument("--data-dir", type=path, default=Path("data"), help="folder with torchvision's files")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--split", choices=SPLITS, default="test", help="--seed determines train and validation")
    images.add_argument(
        "--arrays",
        type=path,
        nargs=2,
        metavar=("IMAGES", "LABELS"),
        help="instead, .npy files, such as those of CIFAR-10.1, or of CIFAR-10-C (50,000 images of five severities)",
    )
    parser.add_argument("--seed", type=int, help="seed of the split; if omitted, the run's or 0")
    parser.add_argument(
        "--drop-blocks",
        type=numbers,
        default=[],
        metavar="B,...",
        help="blocks to drop, counted from 1, such as 3,17",
    )
    args = parser.parse_args()
    if (args.run is None) == (args.model is None):
        parser.error("--model is required with --pretrained or --checkpoint, and not allowed with --run")
    return args


def numbers(text: str) -> list[int]:
    """Argument type for comma-separated numbers."""
    return [int(number) for number in text.split(",")]


def load_network(options: Options, args: argparse.Namespace) -> nn.Module:
    """The network with its weights. Raises UserError if they are missing or not for this network."""
    if args.pretrained:
        register_depth(options.depth)
        try:
            # For a name without a tag, timm takes the first tag with weights, which may be for another data set.
            names = pretrained.names(*options.data_tag.split("."))
            name = next((name for name in names if name in pretrained.packaged()), options.data_tag)
            return timm.create_model(name, pretrained=True)
        except RuntimeError as error:
            raise UserError(str(error)) from error
    network = options.create_model()
    load_weights(network, args.checkpoint or RunFolder(args.run).weights, options.data_tag)
    return network


def drop_blocks(network: nn.Module, dropped: list[int]) -> None:
    """Replace blocks with their shortcuts (eq. 3). Raises UserError if the network has no such block."""
    names = {block: name for name, block in network.named_modules()}
    blocks = [gate.block for gate in gates(network)]
    for number in dropped:
        if not 1 <= number <= len(blocks):
            raise UserError(f"--drop-blocks {number}: no such block, they are numbered from 1 to {len(blocks)}")
        block = blocks[number - 1]
        network.set_submodule(names[block], block.shortcut)


def load_images(options: Options, args: argparse.Namespace, num_classes: int) -> tuple[data.ImageSet, str]:
    """The images to evaluate on, and what the result is of. Raises UserError if they cannot be had."""
    if args.arrays:
        return data.load_arrays(*args.arrays, num_classes), f"{options.model}, {args.arrays[0].name}"
    trainval_set, test_set = data.load(options.dataset, args.data_dir)
    training_set, validation_set = data.split(trainval_set, options.seed, options.dataset)
    images = dict(zip(SPLITS, (training_set, validation_set, test_set), strict=True))[args.split]
    return images, f"{options.model}, {args.split} images of {options.dataset}"


def main() -> None:
    args = parse_args()
    with one_line_errors():
        options = read_options(args.run) if args.run is not None else Options(model=args.model)
        options = replace(
            options,
            dataset=args.dataset or options.dataset,
            seed=options.seed if args.seed is None else args.seed,
        )
        accelerator = machine.start()
        network = load_network(options, args)
        drop_blocks(network, args.drop_blocks)
        network = network.to(accelerator.device, memory_format=torch.channels_last)
        images, title = load_images(options, args, network.num_classes)
        count = SEVERITIES if args.arrays and len(images) == CIFAR_10_C else 1
        size = len(images) // count
        parts = [images[start : start + size] for start in range(0, len(images), size)]

        standardize = data.Standardize.of(network, accelerator.device)
        parts = [part.to(accelerator.device) for part in parts]
        started = time.perf_counter()
        results = [evaluate(accelerator, network, part, standardize) for part in parts]
        seconds = time.perf_counter() - started
        loss = statistics.mean(result.loss for result in results)  # of parts of the same size
        if not math.isfinite(loss):
            raise UserError(f"the weights are damaged: the loss is {loss}")

        names = network.pretrained_cfg["label_names"]
        of_images, of_errors = (np.sum([getattr(r, name) for r in results], axis=0) for name in ("images", "errors"))
        say(f"{'class':>20} {'images':>7} {'errors':>7} {'error':>7}")
        for name, count, errors in zip(names, of_images, of_errors, strict=True):
            share = f"{100 * errors / count:.2f}%" if count else "-"
            say(f"{name:>20} {count:7} {errors:7} {share:>7}")
        for severity, result in enumerate(results, start=1) if len(results) > 1 else ():
            say(f"severity {severity}: loss {result.loss:.4f}, top-1 error {result.error:.2f}%")
        error = statistics.mean(result.error for result in results)
        say(f"{title}: loss {loss:.4f}, top-1 error {error:.2f}%, {len(images) / seconds:.0f} images/s")
        accelerator.end_training()


if __name__ == "__main__":
    main()
