"""Shared by the scripts: one-line messages for errors the user can fix, and output that may fail."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from .errors import UserError, one_line


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line instead of printing the whole usage."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
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
def one_line_errors(prog: str) -> Iterator[None]:
    """Exit with status 1 and one line on a UserError (printed once per machine), Ctrl-C or lost output."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by train_scripts/start.py during the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    lost.clear()
    try:
        yield
    except UserError as error:
        sys.exit(f"{prog}: {error}" if os.environ.get("RANK") is None or os.environ.get("LOCAL_RANK") == "0" else 1)
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted")
    if lost:
        sys.exit(f"{prog}: cannot write to standard output ({lost[0]}); everything else is done")


lost: list[str] = []  # why writing to standard output failed


def say(text: object) -> None:
    """Print and flush a line, in the first process only. If that fails (full disk, closed pipe), continue without."""
    if lost or os.environ.get("RANK", "0") != "0":
        return
    try:
        print(text, flush=True)
    except OSError as error:
        lost.append(error.strerror)
        # Flushing what is left in the buffer at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
