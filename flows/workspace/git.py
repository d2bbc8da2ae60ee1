"""Git for a run: the revision, the uncommitted edits, and a web page of the code."""

import os
import re
import shutil
import subprocess
import tempfile
from itertools import chain
from pathlib import Path

from flows.environment import git_environment
from flows.errors import UserError
from flows.workspace.dvc_files import LOCK_FILE, PARAMS_FILE

# Paths that git must track to run the code again; the active recipe and dvc.lock belong to a run.
SOURCES = ("--", ".", f":(exclude){LOCK_FILE}", f":(exclude){PARAMS_FILE}")
MAX_UNTRACKED = 50 * 2**20  # bytes of untracked files that a run may capture
MAX_SCANNED = 2**20  # bytes of one file's edits that are searched for secrets; larger ones are not logged
PLAIN = (
    *("core.hooksPath=/dev/null", "core.fsmonitor=false", "init.templateDir=", "protocol.file.allow=always"),
    *("color.ui=false", "commit.gpgSign=false", "diff.noprefix=false", "diff.mnemonicPrefix=false"),
    *(
        "apply.whitespace=nowarn",
        "apply.ignoreWhitespace=no",
        "status.showUntrackedFiles=normal",
        "log.showSignature=false",
    ),
)
SECRET_NAME = re.compile(
    r"(^|/)(\.env[^/]*|\.netrc|\.pgpass|\.pypirc|\.npmrc|\.htpasswd|id_(rsa|dsa|ecdsa|ed25519)[^/]*"
    r"|[^/]*\.(pem|key|p12|pfx|jks|keystore|kdbx|ovpn)|[^/]*(credential|secret|passw(or)?d)s?(\.[^/]*)?)$"
    r"|(^|/)(\.aws|\.ssh|\.gnupg|\.kube|\.docker|secrets)/",
    re.I,
)
TOKEN = re.compile(  # of kinds that detect-secrets does not know: of the Hub, in a named value, in a webhook's address
    r"\bhf_[A-Za-z0-9]{30,}|/webhooks/\w+/[\w-]{16,}"
    r"|(?i:token|auth_string|api_?key|signature)[\"']?\s*[:=]\s*[\"']?(?=[^\s\"']*\d)[\w:+/.~%-]{16,}(?![\w(\[])"
)
TOO_EAGER = ("Base64HighEntropyString", "HexHighEntropyString", "IPPublicDetector")  # hashes and addresses of code


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
    found = re.match(
        r"(?:https://(?:[^/@]*@)?|git@|ssh://git@)([^/:@]+)[/:](.+?)(?:\.git)?(?: |$)", remotes.get("origin", "")
    )
    return {"git.url": f"https://{found[1]}/{found[2]}/commit/{revision}"} if found else {}


def git(cwd: Path, *arguments: str, **variables: str) -> bytes:
    """Run git, isolated from the repository of a surrounding git command and from what its user configured for people.

    Raises UserError with git's own words.
    """
    settings = [word for setting in PLAIN for word in ("-c", setting)]
    environment = git_environment(os.environ) | variables
    try:
        done = subprocess.run(
            ["git", *settings, *arguments], cwd=cwd, env=environment, capture_output=True, check=False
        )
    except FileNotFoundError:
        raise UserError("git is not installed, or not on PATH") from None
    if done.returncode:
        command = next((word for word in arguments if not word.startswith("-") and "=" not in word), arguments[0])
        raise UserError(f"{cwd}: git {command} failed: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout


def revision(root: Path) -> str:
    """Return the commit of a workspace. Raises UserError if there is none, or git does not trust the folder."""
    try:
        top, revision = git(root, "rev-parse", "--show-toplevel", "HEAD").decode().split("\n")[:2]
    except UserError as error:
        if "safe.directory" in str(error):  # owned by another user; git's words hold the cure
            raise
        git(root, "config", "--list")  # raises if a configuration file is broken, and names it
        raise UserError(
            f"{error}; a run records the revision of its code: make it a repository with a commit"
        ) from None
    if Path(top).resolve() != root.resolve():
        raise UserError(f"{root}: the workspace must be the top of its git repository, which is {top}")
    return revision


def clone_repository(root: Path, target: Path, commit: str) -> None:
    """Clone a repository of this machine at a commit, without its uncommitted edits."""
    # git asks again whether ROOT/.git is trusted, here and in a process that does not get our options: whoever trusts
    # ROOT, which `revision` has made sure of, trusts that too.
    trusted = "safe.directory=*"
    serve = ("--upload-pack", f"git -c {trusted} upload-pack")
    # The clone's files end their lines as the workspace's do: hashes of code are over bytes.
    ends = {name: git(root, "config", "--default", "", name).decode().strip() for name in ("core.autocrlf", "core.eol")}
    same = [word for name, value in ends.items() if value for word in ("--config", f"{name}={value}")]
    git(root, "-c", trusted, "clone", "--quiet", "--no-checkout", *serve, *same, ".", str(target))
    git(target, "checkout", "--quiet", "--detach", commit)


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


def without_secrets(patch: bytes) -> tuple[bytes, dict[str, str]]:
    """Return what of a patch may be logged, headed by a line for each file left out, and {file: why}.

    Left out are files with the name of a secret, or in whose edits detect-secrets finds one.
    """
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.settings import transient_settings

    kept, left_out = [], {}
    plugins: dict[str, type] = get_mapping_from_secret_type_to_class()
    used = [{"name": plugin.__name__} for plugin in plugins.values() if plugin.__name__ not in TOO_EAGER]
    with transient_settings({"plugins_used": used}):
        for edit in re.split(rb"(?m)^(?=diff --git )", patch):
            name = os.fsdecode(edit.partition(b"\n")[0]).rpartition(" b/")[2].rstrip('"')
            if reason := _secret_in(name, edit):
                left_out[name] = reason
            else:
                kept.append(edit)
    heading = "".join(f"# left out: {name}, {reason}\n" for name, reason in left_out.items())
    return os.fsencode(heading) + b"".join(kept), left_out


def _secret_in(name: str, edit: bytes) -> str | None:
    """Return why the edit of a file may not be logged, or None."""
    from detect_secrets.core.scan import scan_line

    if SECRET_NAME.search(name):
        return "by its name a secret"
    if b"\nGIT binary patch\n" in edit:
        return None
    if len(edit) > MAX_SCANNED:
        return f"larger than the {MAX_SCANNED >> 20} MiB that are searched for secrets"
    lines = edit.decode(errors="replace").splitlines()
    found = chain(
        ("Token" for line in lines if TOKEN.search(line)), (one.type for line in lines for one in scan_line(line))
    )
    return next((f"it holds what looks like a secret ({kind})" for kind in found), None)


def commit_edits(target: Path, patch: Path, run_name: str) -> None:
    git(target, "apply", "--index", str(patch))
    identity = ("-c", "user.name=cm", "-c", "user.email=cm@localhost")
    git(target, *identity, "commit", "--quiet", "-m", f"Uncommitted edits of the run {run_name}")
