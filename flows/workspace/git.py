"""Git for a run: the revision, the uncommitted edits, and a web page of the code."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from flows.errors import UserError
from flows.workspace.dvc_files import LOCK_FILE, PARAMS_FILE

# Paths that git must track to run the code again; the active recipe and dvc.lock belong to a run.
SOURCES = ("--", ".", f":(exclude){LOCK_FILE}", f":(exclude){PARAMS_FILE}")
MAX_UNTRACKED = 50 * 2**20  # bytes of untracked files that a run may capture


def describe_code(root: Path) -> dict[str, str]:
    """Return tags that identify a workspace's code: revision, whether it was edited, its web page."""
    try:
        commit = revision(root)
    except UserError:
        return {}
    edited = {"git.edits": "uncommitted"} if git(root, "status", "--porcelain", *SOURCES) else {}
    return {"git.revision": commit, **edited, **_code_page(root, commit)}


def _code_page(root: Path, revision: str) -> dict[str, str]:
    """Return the web page of a revision if the remote `origin` has one: https, or git@host:owner/name."""
    remotes = dict(line.split("\t") for line in git(root, "remote", "-v").decode().splitlines())
    found = re.match(r"(?:https://|git@|ssh://git@)([^/:@]+)[/:](.+?)(?:\.git)?(?: |$)", remotes.get("origin", ""))
    return {"git.url": f"https://{found[1]}/{found[2]}/commit/{revision}"} if found else {}


def git(cwd: Path, *arguments: str, **variables: str) -> bytes:
    """Run git, isolated from hooks and from the repository of a surrounding git command."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | variables
    command = ["git", "-c", "core.hooksPath=/dev/null", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"{cwd}: git {arguments[0]} failed: {' '.join(done.stderr.decode().split())}")
    return done.stdout


def revision(root: Path) -> str:
    try:
        top, revision = git(root, "rev-parse", "--show-toplevel", "HEAD").decode().split("\n")[:2]
    except UserError:
        raise UserError(
            f"{root}: a run records the revision of its code; make it a git repository with a commit"
        ) from None
    if Path(top).resolve() != root.resolve():
        raise UserError(f"{root}: the workspace must be the top of its git repository, which is {top}")
    return revision


def uncommitted_patch(root: Path) -> bytes:
    """Return the edits of tracked files and the new files that git does not ignore, as a patch."""
    new = [Path(os.fsdecode(name)) for name in git(root, "ls-files", "-zo", "--exclude-standard").split(b"\0") if name]
    sizes = {path: (root / path).lstat().st_size for path in new}
    if sum(sizes.values()) > MAX_UNTRACKED:
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"{root / largest}: new files of more than {MAX_UNTRACKED // 2**20} MB are neither committed nor ignored; "
            f"put them into .gitignore, or commit them"
        )
    with tempfile.TemporaryDirectory() as scratch:  # leave the user's index unchanged
        own = git(root, "rev-parse", "--path-format=absolute", "--git-path", "index").decode().strip()
        index = shutil.copy(own, scratch)
        git(root, "add", "--intent-to-add", ".", GIT_INDEX_FILE=index)
        prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
        diff = ("diff", "--binary", "--no-ext-diff", "--no-textconv", *prefixes, "HEAD")
        return git(root, *diff, *SOURCES, GIT_INDEX_FILE=index)


def commit_edits(target: Path, patch: Path, run_name: str) -> None:
    git(target, "apply", "--index", "--whitespace=nowarn", str(patch))
    identity = ("-c", "user.name=cm", "-c", "user.email=cm@localhost", "-c", "commit.gpgSign=false")
    git(target, *identity, "commit", "--quiet", "-m", f"Uncommitted edits of the run {run_name}")
