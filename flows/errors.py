"""Errors of the user: one clear line, no traceback, exit code 2."""


class UserError(Exception):
    """Bad input. The message is one line that names the cause and what is allowed."""


USER_ERROR = 2  # the exit code of `cm` for bad input


class StageFailed(RuntimeError):
    """A stage failed for a reason other than user input; the message is the end of its output."""


class RunEnding(RuntimeError):
    """A stage was stopped, or not started, because its run is ending."""
