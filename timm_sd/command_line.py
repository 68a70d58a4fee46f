"""What the scripts share: whatever a user can put right is answered in one line, and output may fail."""

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
    """Answers a wrong flag with one line instead of the whole usage."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists the flags)\n")


def path(text: str) -> Path:
    """The type of a flag that takes a path, with ~ as the home folder where the shell has left it."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}: a path with characters that cannot be printed")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """End the program with status 1 and one line for a UserError, said once a machine, for Ctrl-C, for lost output."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as it is while a script imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    lost.clear()
    try:
        yield
    except UserError as error:
        sys.exit(f"{prog}: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted")
    if lost:
        sys.exit(f"{prog}: standard output could not be written ({lost[0]}); all else is done")


lost: list[str] = []  # why standard output could no longer be written


def say(text: object) -> None:
    """Print a line at once, of all processes' once. Where that fails (a full disk, a closed pipe), go on without."""
    if lost or os.environ.get("RANK", "0") != "0":
        return
    try:
        print(text, flush=True)
    except OSError as error:
        lost.append(error.strerror)
        # What is still in the buffer would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
