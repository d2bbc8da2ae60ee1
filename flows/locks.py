"""Locks on files, which end with the process that holds them, however it ends."""

import fcntl
from typing import IO


def try_lock(file: IO) -> bool:
    """Lock an open file for this process alone; return whether that went without waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
