"""Small text files rewritten atomically; locks of files and ports that end with the process that holds them.

The locks of files use the kernel's flock instead of the library filelock, which falls back to lock files that outlive
a killed process, polls, and hides the file, into which `cm up` writes its process id.
"""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def replace_text(path: Path, text: str) -> None:
    """Write `text` to a hidden file beside `path`, then put it in its place.

    At any moment the file holds the old text or the new. Raises OSError, and leaves nothing else behind.
    """
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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


@contextmanager
def named_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a name, whose file exists as long as somebody holds or wants it.

    While another process holds it, `on_wait` is called every half second, and may raise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            while not try_lock(file):
                on_wait()
                time.sleep(0.5)
            if not _is_at(path, file):
                continue  # its holder has removed the file that this one waited for
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def reserve_port(host: str, port: int = 0) -> socket.socket:
    """Return a socket that keeps a port, any free one for 0, for a server that is still to start.

    Until it is closed the kernel gives the port to nobody who asks for any. A server can listen there that sets
    SO_REUSEADDR, as all do here. Raises OSError if the port is taken.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        kept.bind((host, port))
    except OSError:
        kept.close()
        raise
    return kept
