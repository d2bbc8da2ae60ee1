"""Small text files rewritten atomically, and file locks that end with the process that holds them.

The locks use the kernel's flock instead of the library filelock, which falls back to lock files that outlive a killed
process, polls, and hides the file, into which `cm up` writes its process id.
"""

import fcntl
import os
from collections.abc import Callable
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
    """Lock an open file for this process alone; return whether that succeeded without waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_lock(file: IO, on_wait: Callable[[], None]) -> None:
    """Lock an open file for this process alone; if another process holds it, call `on_wait` once and wait."""
    if not try_lock(file):
        on_wait()
        fcntl.flock(file, fcntl.LOCK_EX)
