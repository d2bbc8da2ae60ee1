"""Who starts a run, as far as this machine knows."""

import getpass
import os
import socket
from pathlib import Path

from flows.errors import UserError
from flows.settings import Settings, variable
from flows.workspace.git import git

USER, KNOWN_BY = "mlflow.user", "user.known_by"  # tags; MLflow's pages show the first as the user of a run
UNKNOWN = "not known"


def person(root: Path) -> dict[str, str]:
    """Return tags of the person at this machine: name, how it is known, and git's identity if there is one."""
    if name := Settings.read().user:
        known_by = variable("user")
    elif name := os.environ.get("MLFLOW_TRACKING_USERNAME", ""):
        known_by = "login at MLflow"
    else:
        name, known_by = _account(), f"account on {socket.gethostname()}"
    return {USER: name, KNOWN_BY: known_by, **_git_identity(root)}


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _git_identity(root: Path) -> dict[str, str]:
    try:
        return {"git.user": git(root, "config", "user.email").decode().strip()}
    except UserError:  # none configured, or no repository
        return {}
