"""Who uses a DVC remote or a shared cache: each workspace with a run says there where references to its objects are.

Without it `cm gc` would take what another MLflow or repository needs for unused.
"""

import hashlib
import json
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from flows.environment import LOOPBACK
from flows.errors import UserError
from flows.settings import Settings
from flows.storage.folder import Folder, Store
from flows.storage.s3 import public_uri
from flows.workspace.git import git
from flows.workspace.locations import cache_of

USERS = ".cm/users/"


def own_records(root: Path) -> str:
    """Return the name of a workspace's own MLflow database, which its `cm gc` always reads."""
    return f"{socket.gethostname()}:{root}/mlflow.db"


def records(root: Path) -> str:
    """Return where MLflow keeps what this process logs, without credentials; what is local is named with its machine.

    An address of the loopback is another server on each machine. `cm up`, whose address it is, says what is behind it.
    """
    place = Settings.read().records or os.environ.get("MLFLOW_TRACKING_URI", "").removeprefix("sqlite:///")
    if not place:
        return own_records(root)
    host = urlsplit(place).hostname
    local = host is None or host in LOOPBACK
    return f"{socket.gethostname()}:{public_uri(place)}" if local else public_uri(place)


def register_user(store: Store, root: Path) -> None:
    """Record in a store that the workspace `root` uses it. Raises UserError if the store fails."""
    _write(store, {"mlflow": records(root), "git": _repository(root)})


def _write(store: Store, references: dict[str, str]) -> None:
    text = json.dumps(references)
    try:
        store.put(f"{USERS}{hashlib.sha256(text.encode()).hexdigest()[:16]}.json", text.encode())
    except OSError as error:
        raise UserError(error) from error


def register_at_cache(root: Path) -> None:
    """Record the same in a workspace's cache, unless only the workspace's own records can refer to its objects.

    To a cache within the workspace no other repository refers. Raises UserError if the cache cannot be written.
    """
    folder = cache_of(root).folder
    if not folder.is_relative_to(root):
        register_user(Folder(folder), root)
    elif (mlflow := records(root)) != own_records(root):
        _write(Folder(folder), {"mlflow": mlflow})


def unseen_users(store: Store, root: Path) -> list[str]:
    """Describe the users of a store whose references cannot be seen from the workspace `root`."""
    users = [(entry, json.loads(store.contents(entry.key) or b"{}")) for entry in store.entries(USERS)]
    if not users:
        return []
    seen, repository = {own_records(root), records(root)}, _repository(root)
    return [
        f"{' with '.join(user.values())}, last on {entry.modified:%Y-%m-%d} ({entry.key})"
        for entry, user in users
        if user.get("mlflow") not in seen or user.get("git", repository) != repository
    ]


def _repository(root: Path) -> str:
    """Return the address of the repository, without credentials; one without a remote is named with its machine."""
    if "origin" in git(root, "remote").decode().split():
        return public_uri(git(root, "remote", "get-url", "origin").decode().strip())
    return f"{socket.gethostname()}:{root}"
