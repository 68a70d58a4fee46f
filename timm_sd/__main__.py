"""Run a script with this package's networks registered: `python -m timm_sd [--skip-drop-path MODE] SCRIPT [ARGS ...]`.

With --skip-drop-path, models that the script creates with timm.create_model do not compute, in training, what their
drop paths drop. When it ends, a few lines say how much that has saved.
"""

import argparse
import functools
import os
import runpy
import sys
import warnings

import timm
from timm.models import _factory
from torch import nn

from .command_line import Parser, one_line_errors
from .errors import UserError
from .gate import MODES
from .skip.convert import skip_drop_path
from .skip.summary import Summary

PROG = "python -m timm_sd"


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = PROG
    parser.add_argument(
        "--skip-drop-path",
        choices=("auto", *MODES),
        help="convert every model with timm_sd.skip_drop_path, in this mode",
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, such as timm's train.py")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")
    return parser.parse_args()


def skip_in_every_model(mode: str) -> list[tuple[str, Summary]]:
    """Patch `timm.create_model`, under each of its names, to convert the models it creates with `skip_drop_path`.

    Returns the list to which it adds their names and summaries.
    """
    make, summaries = timm.create_model, []

    @functools.wraps(make)
    def create_model(model_name: str, *args, **kwargs) -> nn.Module:
        model = make(model_name, *args, **kwargs)
        with one_line_errors(PROG), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                skip_drop_path(model, mode)
            except ValueError as error:
                cause = str(error).partition(": use")[0]  # what follows is for Python code
                raise UserError(f"--skip-drop-path {mode}, {model_name}: {cause}: use mode auto or batch") from error
        for warning in warned:
            tell(f"{model_name}: {warning.message}")
        if "not_skipped" in vars(model):
            summaries.append((model_name, Summary(model)))
        return model

    for module in (timm, timm.models, _factory):  # the last is where pickle looks it up
        module.create_model = create_model
    return summaries


def tell(text: str) -> None:
    """Print a line to standard error, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{PROG}: {text}", file=sys.stderr)


def run(script: str, args: list[str]) -> None:
    """Run a script as `python SCRIPT ARGS ...` would."""
    sys.argv = [script, *args]
    if not getattr(sys.flags, "safe_path", False):  # `python -P`, since Python 3.11
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    args = parse_args()
    with one_line_errors(PROG):
        if not os.path.isfile(args.script):
            raise UserError(f"no such file: {args.script}")
    summaries = skip_in_every_model(args.skip_drop_path) if args.skip_drop_path else []
    try:
        run(args.script, args.args)
    finally:
        for name, summary in summaries:
            tell("; ".join([name, *str(summary).splitlines()]))


if __name__ == "__main__":
    main()
