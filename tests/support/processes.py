"""Waiting for processes and conditions."""

import time

import psutil

WAIT = (
    300.0  # seconds that nothing here takes, however many processes share the cores; a condition that holds costs none
)


def wait_until(condition, seconds=WAIT, every=0.1):
    """Wait until `condition` holds; return what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
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
