"""What a recipe from a server cannot reach: other files, private networks, by name, by redirect, by a changing DNS."""

import socket

import pytest

from flows.data.sources.array import ArrayFile
from flows.data.sources.image_files import Images
from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage import allowed
from flows.storage.fetch import fetch, fetch_first, fetch_prefix
from servers import http_server, s3_server

REFUSED = "a recipe from a server may not read it"
BODY = b"a secret of this network"


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace, the working directory, with data of its own, a recipe file and a hidden file; beside it others'."""
    root = tmp_path / "workspace"
    (root / "params" / "recipes").mkdir(parents=True)
    (root / "params" / "recipes" / "pets.yaml").write_text(
        f"data: {{source: {{kind: images, path: {tmp_path}/pets}}}}\n"
    )
    for name in ("workspace/data/own.zip", "workspace/.dvc/config.local", "pets/1.png", "granted/a/b.zip", "theirs"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(BODY)
    monkeypatch.chdir(root)
    monkeypatch.setattr(allowed, "_restricted_to", None)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return root


@pytest.fixture
def restricted(workspace):
    allowed.restrict(workspace, (f"{workspace.parent}/granted", "s3://granted/a", "http://localhost"))
    return workspace


def refused(call):
    with pytest.raises(UserError, match=REFUSED) as caught:
        call()
    assert BODY.decode() not in str(caught.value) and "sha256" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "file:///etc/hostname", "~/.netrc", "../theirs", "data/../../theirs"]
    + [".dvc/config.local", "./.dvc/config.local", "../granted/../theirs", "../granted/.ssh/id", "../granted-not"]
)  # fmt: skip
def test_files_outside_the_workspace_are_not_read(restricted, path):
    refused(lambda: fetch(path, restricted / "into", sha256="0" * 64))
    refused(lambda: Images(path=path).read(restricted / "into", Monitor()))
    refused(lambda: ArrayFile(path=path).read(restricted / "into", Monitor()))


def test_what_the_workspace_or_the_operator_names_is_read(restricted):
    for path in ("data/own.zip", f"{restricted.parent}/granted/a/b.zip", f"{restricted.parent}/pets/1.png"):
        assert fetch(path, restricted / "into").read_bytes() == BODY


def test_the_own_shell_may_name_anything(workspace):
    assert fetch("../theirs", workspace / "into").read_bytes() == BODY
    with http_server({"/x": (200, {}, BODY)}) as (url, _):
        assert fetch(f"{url}/x", workspace / "into").read_bytes() == BODY


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "0.0.0.0", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"])
def test_private_hosts_are_not_asked(restricted, host):
    with http_server({"/x": (200, {}, BODY)}) as (url, asked):
        port = url.rpartition(":")[2]
        refused(lambda: fetch(f"http://{host}:{port}/x", restricted / "into", sha256="0" * 64))
        assert not asked


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "[fd00::1]"]
)
def test_private_networks_are_not_connected_to(restricted, host, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("connected"))
    refused(lambda: fetch(f"http://{host}/latest/meta-data", restricted / "into"))
    refused(lambda: fetch_first([f"https://{host}/latest/meta-data"], restricted / "into"))


def test_a_redirect_is_checked_as_its_target(restricted):
    answers = {"/x": (200, {}, BODY)}
    with http_server(answers) as (url, asked):
        port = url.rpartition(":")[2]
        targets = {
            "/private": f"{url}/x",
            "/granted": f"http://localhost:{port}/x",
            "/file": "file:///etc/hostname",
            "/ftp": f"ftp://127.0.0.1:{port}/x",
        }
        answers.update({path: (302, {"Location": target}, b"") for path, target in targets.items()})
        assert fetch(f"http://localhost:{port}/granted", restricted / "into").read_bytes() == BODY
        asked.clear()
        refused(lambda: fetch(f"http://localhost:{port}/private", restricted / "into"))
        for path in ("/file", "/ftp"):
            with pytest.raises(UserError, match=r"HTTP 302|unknown url type"):
                fetch(f"http://localhost:{port}{path}", restricted / "into")
        assert asked == ["/private", "/file", "/ftp"]


def test_a_name_that_answers_differently_the_second_time_gains_nothing(restricted, monkeypatch):
    """The address that was checked is the one that is connected to."""
    looked_up, connected = [], []

    def look_up(host, port, **_):
        looked_up.append(host)
        place = "93.184.215.14" if len(looked_up) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port))]

    def connect(address, *_):
        connected.append(address)
        raise ConnectionRefusedError("nobody")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(UserError, match="cannot be reached"):
        fetch("http://rebinding.example/x", restricted / "into")
    assert connected == [("93.184.215.14", 80)]
    refused(lambda: fetch("http://rebinding.example/x", restricted / "into"))


def test_buckets_of_the_worker_are_not_read(restricted, monkeypatch):
    with s3_server(monkeypatch, "states", "granted") as client:
        for bucket, key in (("states", "head.json"), ("granted", "a/own.bin"), ("granted", "ab/other.bin")):
            client.put_object(Bucket=bucket, Key=key, Body=BODY)
        for uri in ("s3://states/head.json", "s3://granted/ab/other.bin"):
            refused(lambda uri=uri: fetch(uri, restricted / "into"))
        for uri in ("s3://states/", "s3://granted/", "s3://granted/ab"):
            refused(lambda uri=uri: fetch_prefix(uri, restricted / "into"))
        assert fetch("s3://granted/a/own.bin", restricted / "into").read_bytes() == BODY
        assert fetch_prefix("s3://granted/a/", restricted / "all")
