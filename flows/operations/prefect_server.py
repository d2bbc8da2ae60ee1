"""Prefect's server in a container, with Prefect's settings for the CM_* variables that concern it.

    python -m flows.operations.prefect_server

`cm up` gives its own server the same.
"""

import os
import sys

from flows.errors import USER_ERROR, UserError
from flows.operations.service_environment import retention_variables

COMMAND = [sys.executable, "-m", "prefect", "server", "start"]


def main() -> None:
    """Become Prefect's server, so that signals reach it."""
    try:
        os.execve(COMMAND[0], COMMAND, {**os.environ, **retention_variables()})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
