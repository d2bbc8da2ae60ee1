"""Waiting for processes and conditions."""

import time

import psutil

WAIT = 300.0  # seconds that no step takes, however many processes share the cores; a condition that holds costs none


def wait_until(condition, seconds=WAIT, every=0.1, sign=lambda: None):
    """Wait until `condition` holds; return what it returned. What changes its `sign` meanwhile gets as long again."""
    deadline, last = time.monotonic() + seconds, sign()
    while not (found := condition()):
        if time.monotonic() >= deadline:
            before, last = last, sign()
            assert last != before, f"waited {seconds} s in vain"
            deadline = time.monotonic() + seconds
        time.sleep(every)
    return found


def runs(pid):
    """Whether a process runs; one that ended but was not reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_line(process):
    """Return a process's command and arguments; none if it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
