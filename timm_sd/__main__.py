"""Run a script with this package's networks registered: `python -m timm_sd [--skip-drop-path MODE] SCRIPT [ARGS ...]`.

With --skip-drop-path, models that the script creates with timm.create_model do not compute, in training, what their
drop paths drop. One line says what is skipped when a model is created, and a few say how much that has saved when the
script ends. The mode is recorded in `timm_sd.json`, next to the `args.yaml` of timm's scripts.

`python -m timm_sd --benchmark MODEL [--drop-path RATE] [--batch-size N] [--img-size PIXELS] [--amp]` times each mode
for a timm model on this machine, and says which to use.
"""

import argparse
import functools
import itertools
import os
import runpy
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import timm
import torch
from timm.models import _factory
from torch import nn

from . import __version__
from .command_line import Parser, one_line_errors, say
from .errors import UserError
from .files import write_json
from .gate import MODES, draw_gates, gates
from .skip.benchmark import benchmark
from .skip.branches import tensors
from .skip.convert import restore_drop_path, skip_drop_path
from .skip.plan import samples_of_call
from .skip.summary import Summary

PROG = "python -m timm_sd"  # also where the script is what runs


@dataclass
class Converted:
    """A model that the script has created: timm's name for it, and its summary, None if it is not converted."""

    name: str
    summary: Summary | None = None


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--skip-drop-path",
        choices=("auto", *MODES),
        help="convert every model with timm_sd.skip_drop_path, in this mode",
    )
    parser.add_argument(
        "--same-gates", action="store_true", help="the same gates in all processes, which then wait less for each other"
    )
    parser.add_argument("--version", action="version", version=f"timm-sd {__version__}")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, such as timm's train.py")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")
    return parser.parse_args()


def skip_in_every_model(mode: str, same_gates: bool) -> list[Converted]:
    """Patch `timm.create_model`, under each of its names, to convert the models it creates with `skip_drop_path`.

    So are the functions by which scripts replace batch normalizations afterwards, to convert the models again. Returns
    the list to which models are added.
    """
    make, converted, entries = timm.create_model, [], WeakKeyDictionary()

    def convert(model: nn.Module) -> None:
        name = entries[model].name
        with one_line_errors(PROG), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                skip_drop_path(model, mode)
            except ValueError as error:
                cause, other_mode, _ = str(error).partition(": use mode=")  # which is for Python code
                way_out = ": use mode auto or batch" if other_mode else ""
                raise UserError(f"--skip-drop-path {mode}, {name}: {cause}{way_out}") from error
        for warning in warned:
            tell(f"{name}: {warning.message}")
        if own := gates(model):
            share = statistics.mean(1 - gate.survival for gate in own)
            modes = " and ".join(sorted({gate.mode for gate in own}))
            tell(f"{name}: {len(own)} drop paths, mode {modes}, {share:.1%} of the samples skipped on average")
        entries[model].summary = Summary(model) if "not_skipped" in vars(model) else None

    @functools.wraps(make)
    def create_model(model_name: str, *args, **kwargs) -> nn.Module:
        model = make(model_name, *args, **kwargs)
        if any(parameter.is_meta for parameter in model.parameters()):
            tell(f"{model_name}: not converted, since it is on the meta device")
            return model
        converted.append(Converted(model_name))
        entries[model] = converted[-1]
        convert(model)
        if same_gates and gates(model):
            share_gates(model)
        return model

    def converted_again(replace: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        @functools.wraps(replace)
        def wrapper(module: nn.Module, *args, **kwargs) -> nn.Module:
            if module not in entries:
                return replace(module, *args, **kwargs)
            try:
                replaced = replace(restore_drop_path(module), *args, **kwargs)
            finally:
                convert(module)
            return replaced

        return wrapper

    for module in (timm, timm.models, _factory):  # the last is where pickle looks it up
        module.create_model = create_model
    for name in ("convert_splitbn_model", "convert_sync_batchnorm"):
        setattr(timm.layers, name, converted_again(getattr(timm.layers, name)))
    return converted


def share_gates(model: nn.Module) -> None:
    """Draw the gates of each training pass as a function of its number and of a seed that all processes have."""
    seed, passes = [], itertools.count()

    def draw(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not module.training:
            return
        if not seed:
            seed.append(int(torch.randint(2**31, ())))
            if torch.distributed.is_initialized():
                torch.distributed.broadcast_object_list(seed)
        own = gates(module)
        survival, modes = [gate.survival for gate in own], [gate.mode for gate in own]
        drawn = draw_gates(survival, seed[0], next(passes), samples_of_call(tensors(args, kwargs)), modes)
        for gate, values in zip(own, drawn, strict=True):
            gate.provide(values)

    model.register_forward_pre_hook(draw, with_kwargs=True)


def record_in_output_folders(mode: str, same_gates: bool) -> None:
    """Patch the function by which timm's scripts make their output folder, to record there what is skipped."""
    make = timm.utils.get_outdir

    @functools.wraps(make)
    def get_outdir(*args, **kwargs) -> str:
        folder = make(*args, **kwargs)
        record = dict(timm_sd=__version__, skip_drop_path=mode, same_gates=same_gates)
        write_json(Path(folder) / "timm_sd.json", record)
        return folder

    timm.utils.get_outdir = get_outdir


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
    if sys.argv[1:2] == ["--benchmark"]:
        with one_line_errors():
            for line in benchmark(sys.argv[2:]):
                say(line)
        return
    args = parse_args()
    with one_line_errors():
        if not os.path.isfile(args.script):
            raise UserError(f"no such file: {args.script}")
        if args.same_gates and not args.skip_drop_path:
            raise UserError("--same-gates: it needs --skip-drop-path")
    converted = []
    if not args.skip_drop_path and "--skip-drop-path" in args.args:
        tell("--skip-drop-path is passed to the script, since it comes after it; before it, it converts the models")
    if args.skip_drop_path:
        converted = skip_in_every_model(args.skip_drop_path, args.same_gates)
        record_in_output_folders(args.skip_drop_path, args.same_gates)
    try:
        run(args.script, args.args)
    finally:
        for model in converted:
            if model.summary is not None:
                tell("; ".join([model.name, *str(model.summary).splitlines()]))


if __name__ == "__main__":
    main()
