"""Small text files rewritten whole, and locks on files, which end with the process that holds them."""

import fcntl
import os
from pathlib import Path
from typing import IO


def replace_text(path: Path, text: str) -> None:
    """Write `text` to a hidden file beside `path`, then put it in its place.

    At any moment the file holds the old text or the new.
    """
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def try_lock(file: IO) -> bool:
    """Lock an open file for this process alone; return whether that went without waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
