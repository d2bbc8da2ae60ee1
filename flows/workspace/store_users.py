"""Who uses a DVC remote: each workspace with a run says there where the references to its objects are kept.

Without it `cm gc --remote` would take what another team's MLflow or repository needs for unused.
"""

import hashlib
import json
import os
import socket
from pathlib import Path

from flows.storage.folder import Store, open_store
from flows.storage.s3 import public_uri
from flows.workspace.git import git

USERS = ".cm/users/"


def register_user(address: str, root: Path) -> None:
    """Record in a remote that the workspace `root` uses it. Raises UserError if the store fails."""
    store, text = open_store(address), json.dumps(_references(root))
    if store:
        store.put(f"{USERS}{hashlib.sha256(text.encode()).hexdigest()[:16]}.json", text.encode())


def unseen_users(store: Store, root: Path) -> list[str]:
    """Describe the users of a remote whose references cannot be seen from the workspace `root`."""
    here = _references(root)
    users = [(entry, json.loads(store.contents(entry.key) or b"{}")) for entry in store.entries(USERS)]
    return [
        f"{user.get('mlflow')} with {user.get('git')}, last on {entry.modified:%Y-%m-%d} ({entry.key})"
        for entry, user in users
        if user != here
    ]


def _references(root: Path) -> dict[str, str]:
    """Return MLflow's address and the repository's, without credentials; what is local is named with its machine."""
    here, mlflow = f"{socket.gethostname()}:{root}", os.environ.get("MLFLOW_TRACKING_URI")
    remotes = git(root, "remote").decode().split()
    origin = git(root, "remote", "get-url", "origin").decode().strip() if "origin" in remotes else here
    return {"mlflow": public_uri(mlflow) if mlflow else f"{here}/mlflow.db", "git": public_uri(origin)}
