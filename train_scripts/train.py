"""Train a network as the paper's authors did: `accelerate launch train_scripts/train.py --data-dir data`."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from timm_sd.errors import UserError
from timm_sd.training import DATASETS, Options, train


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def parse_args() -> argparse.Namespace:
    defaults = Options()
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=defaults.model, help="a cifar_resnet network of timm_sd")
    parser.add_argument("--dataset", default=defaults.dataset, help=", ".join(DATASETS))
    parser.add_argument("--data-dir", type=Path, default=defaults.data_dir, help="folder of torchvision's CIFAR files")
    parser.add_argument("--download", action="store_true", help="fetch the CIFAR files into the data folder")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="images a step")
    parser.add_argument("--lr", type=float, default=defaults.lr, help="learning rate of the first half of the epochs")
    parser.add_argument("--weight-decay", type=float, default=defaults.weight_decay, help="on every parameter")
    parser.add_argument("--drop-path", type=float, help="1 - p_L, in [0, 1); the network's own unless given")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of everything random in the run")
    parser.add_argument("--output", type=Path, help="the run's folder; output/MODEL-DATASET-seedSEED unless given")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        train(Options(**vars(args)))
    except UserError as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")


if __name__ == "__main__":
    main()
