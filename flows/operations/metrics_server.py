"""The address at which Prometheus asks for the metrics, by a password."""

import base64
import hmac
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.exposition import ThreadingWSGIServer

from flows.errors import UserError
from flows.operations.metrics import Metrics, places
from flows.settings import Settings, variable
from flows.tracking.tracker import Tracker

logger = logging.getLogger(__name__)
LOOK_EVERY = 60.0  # seconds between looks at the disks
DISK_LOW, DISK_EVENT = 10, "cm.disk.low"  # GiB
USER, CREDENTIALS = "cm", "PREFECT_API_AUTH_STRING"


class _Quiet(WSGIRequestHandler):
    timeout = 30  # seconds; a client that says nothing would keep its thread for ever

    def log_message(self, *_: object) -> None:
        """Log no requests: one comes every few seconds."""


def application(metrics: Metrics, login: str) -> Callable[..., Iterable[bytes]]:
    """Return the WSGI application: /metrics for those who know `login`, user:password."""
    expected = f"Basic {base64.b64encode(login.encode()).decode()}".encode()

    def answer(environ: dict, start: Callable[..., object]) -> Iterable[bytes]:
        if not hmac.compare_digest(environ.get("HTTP_AUTHORIZATION", "").encode("latin-1"), expected):
            start("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="metrics"'), ("Content-Type", "text/plain")])
            return [b"user and password are needed\n"]
        if (environ["REQUEST_METHOD"], environ["PATH_INFO"]) != ("GET", "/metrics"):
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"GET /metrics\n"]
        text = metrics.text()
        start("200 OK", [("Content-Type", CONTENT_TYPE_LATEST)])
        return [text]

    return answer


@contextmanager
def serving(metrics: Metrics, host: str, port: int) -> Iterator[str]:
    """Serve metrics from a thread; yield their address. Raises UserError without credentials or for a taken port."""
    password = Settings.read().metrics_password
    login = f"{USER}:{password}" if password else os.environ.get(CREDENTIALS)
    if not login:
        raise UserError(f"neither {variable('metrics_password')} nor {CREDENTIALS} is set: metrics ask for a password")
    try:
        server = make_server(host, port, application(metrics, login), ThreadingWSGIServer, _Quiet)
    except OSError as error:
        raise UserError(f"{host}:{port}: {error.strerror}; choose another port, or 0 for a free one") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()


class DiskWatch:
    """Reports a disk that gets full, once until it has room again: an event of Prefect, on which alerts act."""

    def __init__(self, root: Path) -> None:
        self._root, self._looked = root, -LOOK_EVERY
        self._low: set[str] = set()

    def look(self) -> None:
        """Look at the disks, LOOK_EVERY seconds after the last time."""
        if time.monotonic() - self._looked < LOOK_EVERY:
            return
        self._looked = time.monotonic()
        least = (Settings.read().disk_low or DISK_LOW) << 30
        free = {name: (place, shutil.disk_usage(place).free) for name, place in places(self._root).items()}
        low = {name for name, (_, count) in free.items() if count < least}
        for name in sorted(low - self._low):
            self._report(name, *free[name])
        self._low = low

    def _report(self, name: str, place: Path, count: int) -> None:
        from prefect.events import emit_event

        host, said = socket.gethostname(), f"{count / 2**30:.1f} GiB are free in {place}"
        logger.warning("disk: %s", said)
        resource = {"prefect.resource.id": f"cm.disk.{host}.{name}", "prefect.resource.name": f"{host}: {said}"}
        emit_event(DISK_EVENT, resource, payload={"free_bytes": count, "folder": str(place)})


@contextmanager
def observed(root: Path, host: str, port: int) -> Iterator[Callable[[], None]]:
    """Serve the metrics of this machine and of the servers in the environment; yield a look at its disks."""
    tracker = Tracker(root) if os.environ.get("MLFLOW_TRACKING_URI") else None
    with serving(Metrics(root, prefect="PREFECT_API_URL" in os.environ, tracker=tracker), host, port):
        yield DiskWatch(root).look
