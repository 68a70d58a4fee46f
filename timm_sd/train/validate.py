"""Evaluate a network on a data set: `python -m timm_sd.train.validate --run output/NAME --data-dir data`."""

from .. import extras  # noqa: F401

# isort: split
import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

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


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", help="one of timm_sd's networks; not needed with --run")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="the weights that come with the package")
    weights.add_argument("--checkpoint", type=path, help="a safetensors file with weights")
    weights.add_argument("--run", type=path, help="a run's folder: its best weights, data set and split")
    parser.add_argument("--dataset", choices=tuple(DATASETS), help="if omitted, the run's or cifar10")
    parser.add_argument("--data-dir", type=path, default=Path("data"), help="folder with torchvision's files")
    parser.add_argument("--split", choices=SPLITS, default="test", help="--seed determines train and validation")
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
        learning_set, test_set = data.load(options.dataset, args.data_dir)
        training_set, validation_set = data.split(learning_set, options.seed, options.dataset)
        images = dict(zip(SPLITS, (training_set, validation_set, test_set), strict=True))[args.split]

        standardize = data.Standardize.of(network, accelerator.device)
        images = images.to(accelerator.device)
        started = time.perf_counter()
        result = evaluate(accelerator, network, images, standardize)
        seconds = time.perf_counter() - started
        if not math.isfinite(result.loss):
            raise UserError(f"the weights are damaged: the loss is {result.loss}")

        names = network.pretrained_cfg["label_names"]
        say(f"{'class':>20} {'images':>7} {'errors':>7} {'error':>7}")
        for name, count, errors in zip(names, result.images, result.errors, strict=True):
            share = f"{100 * errors / count:.2f}%" if count else "-"
            say(f"{name:>20} {count:7} {errors:7} {share:>7}")
        say(
            f"{options.model}, {args.split} images of {options.dataset}: loss {result.loss:.4f}, top-1 error"
            f" {result.error:.2f}%, {len(images) / seconds:.0f} images/s"
        )
        accelerator.end_training()


if __name__ == "__main__":
    main()
