"""The environment that a process inherits from its user's shell: what is settled for our processes, what is refused.

`adopt` settles it once for this process and everything that it starts. `CHECKS` refuse, in one line that names the
variable, what no process here could work with; `cm doctor` shows each. CM_* variables: flows/settings.py.
"""

import locale
import os
import pwd
import re
import ssl
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from flows.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # as getpass.getuser looks them up
CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # for all hosts, each for some clients
ONE_SERVER = ("AWS_CA_BUNDLE", "MLFLOW_TRACKING_SERVER_CERT_PATH", "PREFECT_API_SSL_CERT_FILE", "GIT_SSL_CAINFO")
# What git and its users say about networks, identity and configuration; other GIT_* name the repository of a
# surrounding git command.
OURS_OF_GIT = re.compile(
    r"GIT_(CONFIG_(GLOBAL|SYSTEM|NOSYSTEM|COUNT|KEY_\d+|VALUE_\d+)|(AUTHOR|COMMITTER)_\w+|SSL_\w+|SSH\w*|HTTP_\w+"
    r"|PROXY_\w+|ASKPASS|TERMINAL_PROMPT|EXEC_PATH|TRACE\w*)"
)
THREADS = "OMP_NUM_THREADS"
SCRATCH = 2**20  # bytes that must fit into a folder that is to be written


def adopt() -> None:
    """Settle the environment of this process and its children; a second call changes nothing."""
    _settle_proxies()
    _share_certificates()
    for name in set(os.environ) - set(git_environment(os.environ)):
        del os.environ[name]
    if not _has_account() and not any(map(os.environ.get, USER_VARIABLES)):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"  # DVC and MLflow ask for a name
    if not _has_account() and "HOME" not in os.environ:
        os.environ["HOME"] = os.sep  # as container engines do
    if os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION") == "when_required":  # a store that refuses the new headers
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    os.environ["PYTHONUTF8"] = "1"  # the children's


def git_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without those that point git at another repository, index or set of objects."""
    return {
        name: value for name, value in variables.items() if not name.startswith("GIT_") or OURS_OF_GIT.fullmatch(name)
    }


def _settle_proxies() -> None:
    """Keep the loopback off all proxies, and let every client know the proxy for all schemes."""
    proxies = getproxies_environment()
    excluded = list(filter(None, (one.strip() for one in proxies.pop("no", "").split(","))))
    if not proxies:
        return
    both = proxies.get("all")
    if both and not _is_socks(both):  # S3 clients and urllib do not read ALL_PROXY
        for name in {"http", "https"} - set(proxies):
            os.environ[f"{name}_proxy"] = both
    elif {"http", "https"} <= set(proxies):  # with ALL_PROXY=socks://..., which desktops set, httpx refuses to start
        for name in ("all_proxy", "ALL_PROXY"):
            os.environ.pop(name, None)
    if "*" not in excluded:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*excluded, *LOOPBACK]))


def _is_socks(proxy: str) -> bool:
    return urlsplit(proxy).scheme.startswith("socks")


def _share_certificates() -> None:
    """Let a file of certificates for all hosts serve every client: each reads another variable."""
    given = next(filter(None, map(os.environ.get, CERTIFICATES)), None)
    if given and Path(given).is_file():
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):
            os.environ.setdefault(name, given)


def _has_account() -> bool:
    try:
        return bool(pwd.getpwuid(os.getuid()))
    except KeyError:
        return False


def _check_proxies() -> str:
    proxies = getproxies_environment()
    excluded = proxies.pop("no", "")
    for scheme, proxy in proxies.items():
        name = next(name for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()) if os.environ.get(name))
        if _is_socks(proxy):
            remedy = "set HTTP_PROXY and HTTPS_PROXY to a proxy that speaks HTTP"
            raise UserError(f"{name}={_shown(proxy)}: downloads and S3 clients know no SOCKS; {remedy}")
        if urlsplit(proxy if "://" in proxy else f"http://{proxy}").scheme not in ("http", "https"):
            raise UserError(f"{name}={_shown(proxy)}: expected http://host:port")
    if not proxies:
        return "none"
    return ", ".join(f"{scheme}: {_shown(proxy)}" for scheme, proxy in proxies.items()) + f"; none for {excluded}"


def _shown(proxy: str) -> str:
    return re.sub(r"//[^/@]*@", "//", proxy)  # without a password


def _check_certificates() -> str:
    given = {name: os.environ[name] for name in (*CERTIFICATES, *ONE_SERVER) if os.environ.get(name)}
    for name, path in given.items():
        if Path(path).is_dir():
            continue
        try:
            ssl.create_default_context(cafile=path)
        except OSError as error:  # an SSLError is one
            raise UserError(f"{name}={path}: {error.strerror or 'holds no certificates'}") from None
    return ", ".join(f"{path} ({name})" for name, path in given.items()) or "those of each package"


def _check_locale() -> str:
    name = next((name for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), None)
    shown = f"{name}={os.environ[name]}" if name else "no locale"
    if not is_utf8():
        raise UserError(f"{shown}: paths and texts of a workspace are UTF-8; set PYTHONUTF8=1 or LC_ALL=C.UTF-8")
    return f"{shown}, read as UTF-8"


def is_utf8() -> bool:
    """Whether this process reads and writes texts and paths as UTF-8."""
    return sys.getfilesystemencoding() == "utf-8" and locale.getpreferredencoding(False).lower() in ("utf-8", "utf8")


def take_space(folder: Path | None = None) -> None:
    """Write SCRATCH bytes into a folder, by default that of temporary files, and remove them. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(SCRATCH))
        file.flush()


def _check_temporary_files() -> str:
    try:
        take_space()
    except OSError as error:
        place = f"TMPDIR={os.environ['TMPDIR']}" if os.environ.get("TMPDIR") else tempfile.tempdir or "temporary files"
        raise UserError(f"{place}: {error.strerror}; set TMPDIR to a folder with room") from None
    if (given := os.environ.get("TMPDIR")) and not Path(given).is_dir():
        raise UserError(f"TMPDIR={given}: no such folder")
    return tempfile.gettempdir()


def _check_threads() -> str:
    given = os.environ.get(THREADS, "")
    if given and not re.fullmatch(r"[1-9]\d*(\s*,\s*[1-9]\d*)*", given.strip()):
        raise UserError(f"{THREADS}={given}: expected a number of threads, 1 or more")
    return given or "one a core"


CHECKS: dict[str, Callable[[], str]] = {
    "proxies": _check_proxies,
    "certificates": _check_certificates,
    "locale": _check_locale,
    "temporary files": _check_temporary_files,
    "threads": _check_threads,
}


def check_environment() -> None:
    """Raise UserError for the first variable that no process here could work with."""
    for check in CHECKS.values():
        check()
