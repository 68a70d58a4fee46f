"""Messages for the user: one line of printable characters, without secrets."""

import re
from itertools import groupby

LONGEST = 600
TOKEN = re.compile(r"(hf|api_org)_[A-Za-z0-9]{20,}")  # a Hub token


def one_line(text: str) -> str:
    """Any text (a path, a server's response) as one line: no control characters or tokens, shortened if long."""
    runs = groupby(text, str.isprintable)
    text = TOKEN.sub(r"\1_***", "".join("".join(run) if printable else " " for printable, run in runs).strip())
    return text if len(text) <= LONGEST else f"{text[: 2 * LONGEST // 3]} ... {text[-LONGEST // 3 :]}"


class UserError(Exception):
    """An error the user can fix. The message names the cause and the way out; scripts print it and fail."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
