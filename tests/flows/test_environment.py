"""What a process inherits: settled for every client, or refused in one line that names the variable."""

import os
import shutil
import ssl
import subprocess
import sys
from unittest.mock import patch

import pytest

from fault_proxy import error, fault_proxy
from flows import environment
from flows.errors import UserError
from flows.storage.fetch import fetch
from servers import http_server

DEAD = "http://127.0.0.1:9"
CLIENTS = {
    "httpx": "import httpx; print(httpx.get(URL).text)",  # Prefect
    "requests": "import requests; print(requests.get(URL).text)",  # MLflow
    "urllib": "import urllib.request as r; print(r.urlopen(URL).read().decode())",  # downloads
}


@pytest.fixture
def settled():
    """Return a function that adopts an environment with these variables for this test."""
    with patch.dict(os.environ):
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name in (*environment.CERTIFICATES, *environment.ONE_SERVER):
                del os.environ[name]

        def settle(**variables):
            os.environ.update(variables)
            environment.adopt()

        yield settle


def ask(client, url):
    """Return what a client of this kind gets from an address, in a process of its own: clients remember proxies."""
    code = CLIENTS[client].replace("URL", repr(url))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_loopback_goes_through_no_proxy_and_all_else_does(settled, name):
    with http_server({"/": (200, {}, b"direct")}) as (url, _), fault_proxy(DEAD) as proxy:
        proxy.strike(error(200, "proxied"))
        settled(**{name: proxy.url, "NO_PROXY": "internal.example"})
        for client in CLIENTS:
            assert ask(client, f"{url}/") == "direct", client
            assert "proxied" in ask(client, "http://store.example/file"), client
        assert {path for _, path in proxy.seen} == {"http://store.example/file"}
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "internal.example,localhost,127.0.0.1,::1"


def test_a_download_goes_through_the_proxy(settled, tmp_path):
    with fault_proxy(DEAD) as proxy:
        proxy.strike(error(200, "proxied"))
        settled(ALL_PROXY=proxy.url)
        assert b"proxied" in fetch("http://data.example/images.zip", tmp_path).read_bytes()


def test_without_a_proxy_nothing_is_set(settled):
    settled()
    assert not [name for name in os.environ if name.lower().endswith("_proxy")]


def test_all_loopback_names_are_excluded_once_and_a_star_stays(settled):
    settled(HTTPS_PROXY=DEAD, no_proxy="localhost, .corp")
    environment.adopt()
    assert os.environ["NO_PROXY"] == "localhost,.corp,127.0.0.1,::1"
    settled(no_proxy="*", NO_PROXY="*")
    assert os.environ["NO_PROXY"] == "*"


def test_socks_beside_http_proxies_is_not_needed_and_alone_is_refused(settled):
    settled(all_proxy="socks://127.0.0.1:1080/", HTTP_PROXY=DEAD, HTTPS_PROXY=DEAD)  # as a desktop sets them
    assert "all_proxy" not in os.environ and environment.CHECKS["proxies"]().startswith("http")
    settled(ALL_PROXY="socks5://127.0.0.1:1080")
    environment.CHECKS["proxies"]()
    del os.environ["HTTP_PROXY"], os.environ["HTTPS_PROXY"]
    os.environ["ALL_PROXY"] = "socks5://user:secret@127.0.0.1:1080"
    with pytest.raises(
        UserError, match=r"^ALL_PROXY=socks5://127\.0\.0\.1:1080: downloads .* no SOCKS; set HTTP_PROXY"
    ):
        environment.CHECKS["proxies"]()


def test_one_file_of_certificates_serves_every_client(settled):
    file = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
    settled(REQUESTS_CA_BUNDLE=file, AWS_CA_BUNDLE="/of/the/store.pem")
    assert os.environ["SSL_CERT_FILE"] == file and os.environ["AWS_CA_BUNDLE"] == "/of/the/store.pem"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("https_proxy", "foo://x", "https_proxy=foo://x: expected http://host:port"),
        *((name, "/nowhere.pem", f"{name}=/nowhere.pem: No such file") for name in environment.CERTIFICATES),
        *((name, "/nowhere.pem", f"{name}=/nowhere.pem: No such file") for name in environment.ONE_SERVER),
        ("SSL_CERT_FILE", __file__, "certificate"),
        ("OMP_NUM_THREADS", "many", "OMP_NUM_THREADS=many: expected a number of threads"),
        ("OMP_NUM_THREADS", "0", "OMP_NUM_THREADS=0: expected a number of threads"),
        ("TMPDIR", "/nowhere", "TMPDIR=/nowhere: no such folder"),
    ],
)
def test_what_nobody_can_work_with_is_refused(settled, name, value, said):
    settled(**{name: value})
    with pytest.raises(UserError, match=said):
        environment.check_environment()


def test_a_full_folder_of_temporary_files_is_named(settled, monkeypatch):
    settled(TMPDIR="/tmp")
    monkeypatch.setattr(environment.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
    with pytest.raises(UserError, match=r"^TMPDIR=/tmp: No space left on device; set TMPDIR"):
        environment.check_environment()


def test_threads_may_be_given_for_each_level(settled):
    settled(OMP_NUM_THREADS="4,2")
    environment.check_environment()


def test_the_repository_of_a_surrounding_command_is_forgotten_and_gits_settings_are_kept(settled):
    kept = {"GIT_CONFIG_GLOBAL": "/c", "GIT_CONFIG_COUNT": "0", "GIT_SSH_COMMAND": "ssh", "GIT_SSL_CAINFO": "/ca"}
    settled(**kept, GIT_DIR="/a", GIT_WORK_TREE="/b", GIT_INDEX_FILE="/i", GIT_CEILING_DIRECTORIES="/", GIT_PREFIX="x")
    assert {name: value for name, value in os.environ.items() if name.startswith("GIT_")} == kept


def foreign_user():
    """Return the start of a command that runs as a user without an account, as OpenShift and `docker run --user` do."""
    command = ["unshare", "--user", "--map-user=12345"]
    works = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return [*command, "env", "-u", "USER", "-u", "LOGNAME", "-u", "HOME"] if works else None


@pytest.mark.skipif(not foreign_user(), reason="no user namespaces here")
def test_a_user_without_an_account_has_a_name_and_a_home():
    code = (
        "import getpass; from pathlib import Path; from flows.environment import adopt\n"
        "try: print(getpass.getuser())\nexcept KeyError: print('nobody knows')\n"
        "adopt(); print(getpass.getuser(), Path.home())"
    )
    done = subprocess.run([*foreign_user(), sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["nobody knows", "uid-12345 /"]


@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}])
def test_texts_are_utf8_whatever_the_locale(variables):
    """`cm` starts again with PYTHONUTF8 where Python would read files as ASCII."""
    strict = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = (
        "import sys; from flows import cli; from flows.environment import is_utf8\n"
        "cli.build_parser = lambda: print(is_utf8()) or sys.exit()\n"
        "cli.main()"
    )
    env = {**os.environ, **strict, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    refused = "from flows.environment import CHECKS; CHECKS['locale']()"
    done = subprocess.run([sys.executable, "-c", refused], env=env, capture_output=True, text=True, check=False)
    assert "LC_ALL=C: paths and texts of a workspace are UTF-8; set PYTHONUTF8=1 or LC_ALL=C.UTF-8" in done.stderr
