"""Servers on the loopback that tests talk to over HTTP."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from flows.atomic import reserve_port
from processes import WAIT, wait_until

_reserved: list[socket.socket] = []


def free_port() -> int:
    """Return a port of this machine that nobody listens at; while this process lives no other is given it.

    A server can listen there all the same: all set SO_REUSEADDR.
    """
    _reserved.append(reserve_port("127.0.0.1"))
    return _reserved[-1].getsockname()[1]


class Patient(httpx.HTTPTransport):
    """Asks again while a server is busy: Prefect's on SQLite answers 503 to who loses a race for its one writer."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + WAIT
        while (answer := super().handle_request(request)).status_code == 503 and time.monotonic() < deadline:
            answer.close()
            time.sleep(0.2)
        return answer


def client(**options) -> httpx.Client:
    """Return a client for servers on a loaded machine: httpx's own gives up after 5 s."""
    return httpx.Client(**{"transport": Patient(), "timeout": WAIT, **options})


@contextmanager
def http_server(
    answers: dict[str, tuple[int, dict[str, str], bytes]], certificate: Path | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve path -> (status, headers, body); yield the base URL and the list of paths asked for so far.

    `answers` may change meanwhile. With a file of `make_certificate` it is served by HTTPS.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, headers, body = answers.get(self.path.partition("?")[0], (404, {}, b""))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http{'' if certificate is None else 's'}://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def make_certificate(path: Path) -> Path:
    """Write a key and its own certificate for 127.0.0.1, which a client trusts that names it in SSL_CERT_FILE."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict]]]:
    """Take messages as a chat's webhook does; yield its address for apprise, and the messages so far."""
    told: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"json://127.0.0.1:{server.server_port}/", told
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server(monkeypatch, *buckets: str) -> Iterator:
    """Run moto's S3 over HTTP with empty buckets, point AWS_* of this process at it, yield a client.

    One at a time: all servers of a process share what moto stores, which each begins by emptying.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        httpx.post(f"http://{host}:{port}/moto-api/reset", timeout=WAIT).raise_for_status()
        point_aws_at(monkeypatch, f"http://{host}:{port}")
        client = boto3.client("s3")
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        yield client
    finally:
        server.stop()


def shared_s3(*buckets: str):
    """Return a fixture for a module's attribute: `s3_server` for all of its tests."""

    @pytest.fixture(scope="module")
    def client():
        with pytest.MonkeyPatch.context() as patch, s3_server(patch, *buckets) as client:
            yield client

    return client


def aws_variables() -> dict[str, str]:
    """Return the variables with which another process reaches the same store."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def point_aws_at(monkeypatch, endpoint: str) -> None:
    """Make boto3 clients of this process talk to `endpoint`, with credentials that mean nothing elsewhere."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@contextmanager
def mlflow_server(folder, *arguments: str, store: str | None = None) -> Iterator[str]:
    """Run MLflow's tracking server, its database and files below `folder` unless told otherwise; yield its address."""
    store = store or f"sqlite:///{folder / 'server.db'}"
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store]
    if "--artifacts-destination" not in arguments:
        command += ["--artifacts-destination", str(folder / "artifacts")]
    quiet = {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with process([*command, *arguments], folder, quiet) as log:
        wait_for_page(f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def process(command, folder, variables=None, **options) -> Iterator[Path]:
    """Run a command in a process group of its own, which is killed in the end; yield the file with its output."""
    log = Path(tempfile.mkstemp(prefix="log-", dir=folder)[1])
    with log.open("w") as output:
        popen = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(variables or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
    try:
        yield log
    finally:
        os.killpg(popen.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            popen.wait(20)
        with suppress(ProcessLookupError):  # what is left of the group
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()


def wait_for_page(url: str, log: Path) -> None:
    """Wait until a server answers there; what it said before it did not goes into the error."""

    def answers():
        try:
            urllib.request.urlopen(url, timeout=60).close()
        except (OSError, HTTPException):
            return False
        return True

    _wait_for(answers, url, log)


def _wait_for(answers: Callable[[], bool], place: str, log: Path) -> None:
    try:
        wait_until(answers, every=0.3)
    except AssertionError as error:
        raise TimeoutError(f"{place}: {log.read_text()[-2000:]}") from error


class Postgres:
    """A PostgreSQL server on `place`, host:port, where postgres/postgres may do anything; it can be started again.

    It refuses to run as root, so there it runs as nobody, who gets a folder of his own: pytest closes its folders to
    others whenever another run of it begins.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._data, self._port = folder, folder / "data", free_port()
        self._user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
        self._running, self.place = ExitStack(), f"127.0.0.1:{self._port}"
        self._data.mkdir()
        (folder / "password").write_text("postgres")
        if self._user:
            shutil.chown(self._data, **self._user)
            folder.chmod(0o711)
        init = ["--username", "postgres", "--pwfile", str(folder / "password"), "--auth", "scram-sha-256", "--no-sync"]
        command = [binary("initdb"), "-D", str(self._data), *init]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._user)

    def start(self) -> None:
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        settings = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        command = [binary("postgres"), "-D", str(self._data), "-p", str(self._port), *settings]
        log = self._running.enter_context(process(command, self._folder, **self._user))
        wait_until_it_accepts(self._port, log)

    def stop(self) -> None:
        self._running.close()

    def crash(self) -> None:
        """End it as `pg_ctl stop -m immediate` does: every connection is cut, nothing is written down."""
        number = int((self._data / "postmaster.pid").read_text().split()[0])
        os.kill(number, signal.SIGQUIT)
        os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)
        self.stop()


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run PostgreSQL."""
    with tempfile.TemporaryDirectory() as name:
        server = Postgres(Path(name))
        try:
            server.start()
            yield server
        finally:
            server.stop()


def binary(name: str) -> str:
    """Return the newest of PostgreSQL's programs, which Debian does not put on the path; empty where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}")) or [shutil.which(name)]
    return str(found[-1] or "")


needs_postgres = pytest.mark.skipif(
    not binary("initdb"), reason="PostgreSQL is not installed: apt-get install postgresql"
)


def wait_until_it_accepts(port: int, log: Path) -> None:
    """Wait until PostgreSQL lets a client in: it listens before it is ready."""
    import psycopg2

    def answers():
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user="postgres", password="postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    _wait_for(answers, f"port {port}", log)
