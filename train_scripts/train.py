"""Train a network as the paper's authors did: `accelerate launch train_scripts/train.py --data-dir data`."""

import ctrl_c  # noqa: F401

# isort: split
import argparse

from timm_sd.command_line import Parser, one_line_errors, path
from timm_sd.options import DATASETS, Options
from timm_sd.training import train


def parse_args() -> argparse.Namespace:
    defaults = Options()
    parser = Parser(__doc__)
    run = parser.add_argument_group("the run")
    run.add_argument("--model", default=defaults.model, help="a cifar_resnet network of timm_sd")
    run.add_argument("--dataset", default=defaults.dataset, help=", ".join(DATASETS))
    run.add_argument("--data-dir", type=path, default=defaults.data_dir, help="folder of torchvision's CIFAR files")
    run.add_argument("--download", action="store_true", help="fetch the CIFAR files into the data folder")
    run.add_argument("--epochs", type=int, default=defaults.epochs, help="passes over the training images")
    run.add_argument("--batch-size", type=int, default=defaults.batch_size, help="images a step, of all processes")
    run.add_argument("--lr", type=float, default=defaults.lr, help="the highest learning rate")
    run.add_argument(
        "--lr-schedule", default=defaults.lr_schedule, help="steps, the authors', or one-cycle for few epochs"
    )
    run.add_argument("--weight-decay", type=float, default=defaults.weight_decay, help="on every parameter")
    run.add_argument("--drop-path", type=float, help="1 - p_L, in [0, 1); the network's own unless given")
    run.add_argument(
        "--drop-path-schedule", default=defaults.drop_path_schedule, help="linear, the paper's, or uniform"
    )
    run.add_argument("--seed", type=int, default=defaults.seed, help="of everything random in the run")
    how = parser.add_argument_group("how it is computed")
    how.add_argument("--sync-bn", action="store_true", help="normalise over the batch, not each GPU's part of it")
    how.add_argument("--grad-checkpointing", action="store_true", help="compute blocks twice to save memory")
    how.add_argument("--cuda-graphs", action="store_true", help="replay blocks as CUDA graphs; without CUDA, no effect")
    leaves = parser.add_argument_group("what it leaves")
    leaves.add_argument("--output", type=path, help="the run's folder; unless given, output/ and a name of its options")
    leaves.add_argument("--resume", action="store_true", help="go on from the folder's newest checkpoint")
    leaves.add_argument("--checkpoint-steps", type=int, help="a checkpoint every so many steps, not only every epoch")
    leaves.add_argument("--keep-checkpoints", type=int, default=defaults.keep_checkpoints, help="how many stay")
    leaves.add_argument("--log-with", help="one of Accelerate's trackers: tensorboard, wandb, ...")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors("train.py"):
        train(Options(**vars(args)))


if __name__ == "__main__":
    main()
