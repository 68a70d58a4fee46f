"""Shared by the scripts: one-line messages for errors the user can fix."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from .errors import UserError, one_line


def program() -> str:
    """The name of the running program: a script's, or `python -m MODULE`."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else os.path.basename(sys.argv[0])


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line instead of printing the whole usage."""

    def __init__(self, description: str) -> None:
        super().__init__(
            prog=program(),
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists the flags)\n")


def path(text: str) -> Path:
    """Argument type for paths; expands a ~ that the shell has left alone."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}: the path has unprintable characters")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


@contextmanager
def one_line_errors(prog: str | None = None) -> Iterator[None]:
    """Exit with status 1 and one line on a UserError (printed once per machine) or Ctrl-C.

    The line begins with `prog`, by default `program()`.
    """
    prog = prog or program()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        first = os.environ.get("RANK") is None or os.environ.get("LOCAL_RANK") == "0"
        sys.exit(f"{prog}: {error}" if first else 1)
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted")


def say(text: object) -> None:
    """Print and flush a line, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
