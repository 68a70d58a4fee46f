"""Publish a finished run on the Hugging Face Hub:
`python -m timm_sd.report.publish --run output/NAME --repo-id NAMESPACE/NAME`.

The repository's folder is kept in the run's folder as `hub`. Without --repo-id, that is all.
"""

from .. import extras  # noqa: F401

# isort: split
import argparse
from contextlib import closing

from ..command_line import Parser, one_line_errors, path, say
from ..train.run_folder import RunFolder
from .hub import check_address, make_folder, upload
from .record import Record


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--run", type=path, required=True, help="the run's folder")
    parser.add_argument("--repo-id", help="NAMESPACE/NAME on the Hub; without it, nothing is uploaded")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="the branch to commit to; if omitted, main")
    args = parser.parse_args()
    if args.repo_id is None and (args.private or args.revision is not None):
        parser.error("--private and --revision require --repo-id")
    return args


def main() -> None:
    args = parse_args()
    with one_line_errors():
        if args.repo_id is not None:
            check_address(args.repo_id, args.revision)
        record = Record.read(args.run)
        name = args.repo_id.split("/")[1] if args.repo_id else record.options.weights_tag
        address = f"{args.repo_id}@{args.revision}" if args.revision is not None else args.repo_id
        with closing(RunFolder(args.run)) as run:
            run.acquire()
            folder = make_folder(args.run, name, address)
            for file in sorted(folder.iterdir()):
                say(f"{file.stat().st_size:>12,} bytes  {file}")
            if args.repo_id is not None:
                message = f"{name}: {record.best['test_error']:.2f}% test error after {record.options.epochs} epochs"
                say(upload(folder, args.repo_id, args.private, args.revision, message))


if __name__ == "__main__":
    main()
