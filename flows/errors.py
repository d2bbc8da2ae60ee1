"""Errors of the user: one clear line, no traceback, exit code 2."""

from collections.abc import Iterable
from difflib import get_close_matches


def printable(text: str) -> str:
    """Return `text` as one line, without control characters but tabs; names of files may hold some."""
    return "".join(one if one.isprintable() or one == "\t" else one.encode("unicode_escape").decode() for one in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known words that are most like `word`, else nothing."""
    alike = get_close_matches(word, known, n=2)
    return f" (did you mean {' or '.join(alike)}?)" if alike else ""


class UserError(Exception):
    """Bad input. The message is one line that names the cause and what is allowed."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


USER_ERROR = 2  # the exit code of `cm` for bad input


DISK_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "database or disk is full",  # SQLite
    " requested and ",  # NumPy: "1000 requested and 12 written"
)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that a disk is full; each library has words of its own."""
    while error is not None:
        if any(words in str(error) for words in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


class StageFailed(RuntimeError):
    """A stage failed for a reason other than user input; the message is the end of its output."""


class RunEnding(RuntimeError):
    """A stage was stopped, or not started, because its run is ending."""
