"""Errors that are the user's to mend: one clear line, no traceback, exit code 2."""


class UserError(Exception):
    """Bad input. The message is one line that names the cause and what is allowed."""
