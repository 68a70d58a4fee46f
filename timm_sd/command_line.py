"""What the scripts share: whatever a user can put right is answered in one line."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag with one line instead of the whole usage."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """End the program with status 1 and one line for a UserError, said once a machine, or for Ctrl-C."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{prog}: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted")
