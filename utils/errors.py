"""The one exception that means: something the user gave is missing, damaged or contradictory."""

from typing import Any

QUOTED = 80  # characters of a file's content that a message shows at most


class InputError(ValueError):
    """Bad input. The message is one line that says what, where and what to do next; control characters are escaped."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Escape what would steer a terminal, line ends included: file names and keys come from strangers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quote(value: Any) -> str:
    """Return a value from a file as a message shows it: its ``repr``, at most 80 characters of it."""
    if isinstance(value, str):
        value = value[: QUOTED + 1]  # before repr, which may make it four times as long
    return shorten(repr(value))


def shorten(text: str) -> str:
    """Cut a text from a file to 80 characters."""
    return text if len(text) <= QUOTED else text[: QUOTED - 3] + "..."
