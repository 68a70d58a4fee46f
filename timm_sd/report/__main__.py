"""Draw the paper's CIFAR figures and write a results page from the logs of runs:
`python -m timm_sd.report --runs output/ONE output/OTHER --out results`.
"""

from .. import extras  # noqa: F401

# isort: split
import argparse
import shlex
import sys

from ..command_line import Parser, one_line_errors, path, program, say
from ..files import write, writing
from . import figures, results
from .figures import CONSTANT, STOCHASTIC
from .record import Record


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=path, nargs="+", required=True, help="folders of runs to compare")
    parser.add_argument("--sweep", type=path, nargs="+", default=[], help="runs that vary p_L, schedule or depth")
    parser.add_argument("--out", type=path, required=True, help="folder for the figures and results.md")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        groups = results.compare([Record.read(path) for path in args.runs])
        drawn = {"figure3": figures.learning_curves(groups), "figure7": figures.gradients(groups)}
        if STOCHASTIC in groups:
            drawn["figure2"] = figures.survival(groups[STOCHASTIC])
        if results.same_machine(groups):
            drawn["time"] = figures.times(groups)
        else:
            say(f"no figure of times: it needs whole epochs of {CONSTANT} and {STOCHASTIC} on the same machine")
        sweep = [Record.read(path) for path in args.sweep]
        if sweep:
            results.check_alike(sweep, but=("depth", "seed", "p_L", "drop_path_schedule"))
            drawn["figure8"] = figures.sweep(sweep)
        called = program() if " " in program() else f"python train_scripts/{program()}"
        command = f"{called} {shlex.join(sys.argv[1:])}"
        page = results.page(groups, sweep, list(drawn), command)
        with writing(args.out, "choose another --out"):
            args.out.mkdir(parents=True, exist_ok=True)
            for name, figure in drawn.items():
                for file in (args.out / f"{name}.png", args.out / f"{name}.svg"):
                    figures.save(figure, file)
                    say(file)
            write(args.out / "results.md", page.encode())
            say(args.out / "results.md")


if __name__ == "__main__":
    main()
