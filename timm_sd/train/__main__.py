"""Train a network as the paper's authors did: `python -m timm_sd.train --data-dir data`."""

from .. import extras  # noqa: F401

# isort: split
from ..command_line import Parser, one_line_errors
from .options import Options, add_options
from .training import train


def main() -> None:
    parser = Parser(__doc__)
    add_options(parser)
    args = parser.parse_args()
    with one_line_errors():
        train(Options(**vars(args)))


if __name__ == "__main__":
    main()
