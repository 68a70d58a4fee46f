"""What a user is told: on one line, of characters that can be printed, without secrets."""

import re
from itertools import groupby

LONGEST = 600
TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}")  # the Hub's


def one_line(text: str) -> str:
    """A text from anywhere (a path, a server's answer) as one line: no control characters or tokens, cut if long."""
    runs = groupby(text, str.isprintable)
    text = TOKEN.sub(r"\1_***", "".join("".join(run) if printable else " " for printable, run in runs).strip())
    return text if len(text) <= LONGEST else f"{text[: 2 * LONGEST // 3]} ... {text[-LONGEST // 3 :]}"


class UserError(Exception):
    """What a user can put right. The message names the cause and the way out; a command line prints it and fails."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
