"""Errors that are the user's to mend: one clear line, no traceback, exit code 2."""


class UserError(Exception):
    """Bad input. The message is one line that names the cause and what is allowed."""


USER_ERROR = 2  # the exit code of `cm` for bad input


class StageFailed(RuntimeError):
    """A stage ended with an error that is not the user's; the message is the end of its output."""


class RunEnding(RuntimeError):
    """A stage was ended, or not begun, because its run ends."""
