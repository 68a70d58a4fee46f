"""Train a network as the paper's authors did: `python train_scripts/train.py --data-dir data`."""

import start  # noqa: F401

# isort: split
from timm_sd.command_line import Parser, one_line_errors
from timm_sd.train.options import Options, add_options
from timm_sd.train.training import train


def main() -> None:
    parser = Parser(__doc__)
    add_options(parser)
    args = parser.parse_args()
    with one_line_errors("train.py"):
        train(Options(**vars(args)))


if __name__ == "__main__":
    main()
