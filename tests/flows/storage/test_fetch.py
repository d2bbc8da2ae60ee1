"""Every way to bring a file here, and what is said when it fails."""

import hashlib

import pytest

from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.fetch import fetch, fetch_first, fetch_prefix
from flows.storage.s3 import public_uri
from servers import free_port, http_server, point_aws_at, s3_server

BODY = bytes(range(256)) * 10_000  # 2.4 MiB: several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()


class Recorder(Monitor):
    def __init__(self):
        self.seen = []

    def progress(self, done, total, unit):
        self.seen.append((done, total, unit))


@pytest.fixture
def s3(monkeypatch):
    with s3_server(monkeypatch, "data") as client:
        yield client


def refused(call, *parts):
    """Assert that `call` raises a UserError of one line that has all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_local_files_are_used_where_they_lie(tmp_path):
    path = tmp_path / "with space.bin"
    path.write_bytes(BODY)
    into = tmp_path / "into"
    assert fetch(str(path), into, sha256=SHA256.upper()) == path
    assert fetch(path.as_uri(), into) == path
    assert not into.exists()


def test_local_files_that_are_not_there(tmp_path):
    refused(lambda: fetch(str(tmp_path / "no.bin"), tmp_path), "no.bin", "no such file")
    refused(lambda: fetch(str(tmp_path), tmp_path), str(tmp_path), "folder")
    refused(lambda: fetch("file://elsewhere/x", tmp_path), "file:///absolute")
    refused(lambda: fetch("ftp://host/x", tmp_path), "unknown scheme", "s3://")


def test_http_download_reports_progress_and_is_reused(tmp_path):
    monitor = Recorder()
    with http_server({"/a/file.bin": (200, {}, BODY)}) as (url, asked):
        path = fetch(f"{url}/a/file.bin?token=1", tmp_path / "new" / "folder", sha256=SHA256, monitor=monitor)
        assert path == tmp_path / "new" / "folder" / "file.bin"
        assert path.read_bytes() == BODY
        fetch(f"{url}/a/file.bin", path.parent, sha256=SHA256)
        assert len(asked) == 1
        fetch(f"{url}/a/file.bin", path.parent)  # without a checksum nobody knows whether the file is the same
        assert len(asked) == 2
    assert monitor.seen[-1] == (len(BODY), len(BODY), "bytes")
    assert len(monitor.seen) > 1


def test_http_failures_leave_nothing_behind(tmp_path):
    answers = {
        "/denied": (403, {}, b""),
        "/cut": (200, {"Content-Length": str(len(BODY) + 5)}, BODY),
        "/file.bin": (200, {}, BODY),
    }
    with http_server(answers) as (url, _):
        refused(lambda: fetch(f"{url}/missing", tmp_path), f"{url}/missing", "404")
        refused(lambda: fetch(f"{url}/denied?token=secret", tmp_path), "403")
        refused(lambda: fetch(f"{url}/cut", tmp_path), f"{len(BODY)} of {len(BODY) + 5} bytes")
        refused(
            lambda: fetch(f"{url}/file.bin", tmp_path, md5="0" * 32), "md5", hashlib.md5(BODY).hexdigest(), "0" * 32
        )
        refused(lambda: fetch(f"{url}/", tmp_path), "names no file")
    refused(lambda: fetch(f"http://127.0.0.1:{free_port()}/x", tmp_path), "cannot be reached")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_checksum_keeps_the_older_file(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"older")
    with http_server({"/file.bin": (200, {}, BODY)}) as (url, _):
        refused(lambda: fetch(f"{url}/file.bin", tmp_path, sha256="0" * 64), SHA256)
    assert (tmp_path / "file.bin").read_bytes() == b"older"


def test_secrets_in_an_address_are_not_repeated():
    assert public_uri("https://me:pw@host:8/a/b.zip?X-Signature=1#f") == "https://host:8/a/b.zip"
    assert public_uri("data/what?.zip") == "data/what?.zip"


def test_fetch_first_tries_in_order(tmp_path):
    with http_server({"/file.bin": (200, {}, BODY)}) as (url, asked):
        uris = [str(tmp_path / "no.bin"), f"{url}/gone", f"{url}/file.bin", f"{url}/unused"]
        assert fetch_first(uris, tmp_path, sha256=SHA256).read_bytes() == BODY
        assert asked == ["/gone", "/file.bin"]
        refused(lambda: fetch_first(uris[:2], tmp_path / "x"), "no.bin: no such file", "gone: HTTP 404")


def test_s3_object(tmp_path, s3):
    s3.put_object(Bucket="data", Key="deep/weights.bin", Body=BODY)
    monitor = Recorder()
    path = fetch("s3://data/deep/weights.bin", tmp_path, sha256=SHA256, monitor=monitor)
    assert path == tmp_path / "weights.bin"
    assert path.read_bytes() == BODY
    assert monitor.seen[-1] == (len(BODY), len(BODY), "bytes")
    refused(lambda: fetch("s3://data/deep/none.bin", tmp_path), "s3://data/deep/none.bin", "no such object")
    refused(lambda: fetch("s3://nowhere/x.bin", tmp_path), "s3://nowhere/x.bin", "no such bucket")
    refused(lambda: fetch("s3:///x.bin", tmp_path), "s3://bucket/key")


def test_s3_prefix(tmp_path, s3):
    for key in ("set/a/1.png", "set/b/2.png", "settle/3.png", "set/", "bad/../../x.png"):
        s3.put_object(Bucket="data", Key=key, Body=key.encode())
    monitor = Recorder()
    fetch_prefix("s3://data/set", tmp_path / "set", monitor=monitor)
    found = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"set/a/1.png": "set/a/1.png", "set/b/2.png": "set/b/2.png"}
    assert monitor.seen == [(1, 2, "objects"), (2, 2, "objects")]
    refused(lambda: fetch_prefix("s3://data/none/", tmp_path), "s3://data/none/", "no object")
    refused(lambda: fetch_prefix("s3://data/bad/", tmp_path / "bad"), "../../x.png", "outside")
    assert not (tmp_path / "bad").exists()


def test_s3_denied_and_unreachable(tmp_path, monkeypatch):
    xml = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    with http_server({"/data/x.bin": (403, {"Content-Type": "application/xml"}, xml)}) as (url, _):
        point_aws_at(monkeypatch, url)
        refused(lambda: fetch("s3://data/x.bin", tmp_path), "s3://data/x.bin", "access denied")
    point_aws_at(monkeypatch, f"http://127.0.0.1:{free_port()}")
    refused(lambda: fetch("s3://data/x.bin", tmp_path), "s3://data/x.bin", "Could not connect")
    assert list(tmp_path.iterdir()) == []


def test_s3_without_credentials_reads_public_buckets(tmp_path, monkeypatch, s3):
    s3.put_object(Bucket="data", Key="open.bin", Body=BODY, ACL="public-read")
    s3.put_object(Bucket="data", Key="closed.bin", Body=BODY)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert fetch("s3://data/open.bin", tmp_path / "into").read_bytes() == BODY
    refused(lambda: fetch("s3://data/closed.bin", tmp_path / "into"), "s3://data/closed.bin", "access denied")
