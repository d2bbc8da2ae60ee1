"""A proxy in front of a server that does to requests and answers what networks and stores do on bad days."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP = {"connection", "transfer-encoding", "keep-alive", "expect", "content-length", "server", "date"}


@dataclass
class Exchange:
    """One request on its way through: what a fault may look at and change."""

    method: str
    path: str
    body: bytes
    sent: Mapping[str, str] = field(default_factory=dict)  # the request's headers
    forward: Callable[[], None] = lambda: None  # ask the server; fills the answer
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    answer: bytes = b""
    cut_after: int | None = None  # bytes of the answer before the connection is cut; 0: no answer at all
    unheard: set[str] = field(default_factory=set)  # headers that the server does not get to see


Fault = Callable[[Exchange], None]


def error(status: int, code: str) -> Fault:
    """Answer with an error of S3 instead of asking the server."""

    def fault(exchange: Exchange) -> None:
        exchange.status, exchange.headers = status, {"Content-Type": "application/xml"}
        exchange.answer = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        exchange.answer = b"" if exchange.method == "HEAD" else exchange.answer

    return fault


def slow(seconds: float) -> Fault:
    def fault(exchange: Exchange) -> None:
        time.sleep(seconds)
        exchange.forward()

    return fault


def cut_request(exchange: Exchange) -> None:
    """Close the connection before the server has heard of the request."""
    exchange.cut_after = 0


def cut_answer(exchange: Exchange) -> None:
    """Let the server do what it was asked, and lose the answer."""
    exchange.forward()
    exchange.cut_after = 0


def cut_body(exchange: Exchange) -> None:
    """Close the connection in the middle of the answer."""
    exchange.forward()
    exchange.cut_after = len(exchange.answer) // 2


def alter_request(exchange: Exchange) -> None:
    """Change a byte of what is sent."""
    exchange.body = altered(exchange.body)
    exchange.forward()


def alter_answer(exchange: Exchange) -> None:
    """Change a byte of what is received."""
    exchange.forward()
    exchange.answer = altered(exchange.answer)


def ignore(header: str) -> Fault:
    """Be a store that does not know a header."""

    def fault(exchange: Exchange) -> None:
        exchange.unheard = {header.lower()}
        exchange.forward()

    return fault


def shift_clock(seconds: float) -> Fault:
    """Let the server's clock differ from everybody else's."""

    def shifted(text: str) -> str:
        return format_datetime(parsedate_to_datetime(text) + timedelta(seconds=seconds), usegmt=True)

    def fault(exchange: Exchange) -> None:
        exchange.forward()
        for name in exchange.headers:
            if name.lower() in ("date", "last-modified"):
                exchange.headers[name] = shifted(exchange.headers[name])

    return fault


def altered(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


class FaultProxy:
    """Where to reach the server through the proxy, and which faults strike."""

    def __init__(self, url: str) -> None:
        self.url, self.seen = url, []  # (method, path) of every request
        self._rules, self._changing = [], threading.Lock()

    def strike(self, fault: Fault, *, method: str = "", path: str = "", times: float = float("inf")) -> None:
        """Have the next `times` requests of a method (any), whose path has this part, meet the fault."""
        with self._changing:
            self._rules.append([fault, method, path, times])

    def heal(self) -> None:
        """Let everything through from now on."""
        with self._changing:
            self._rules.clear()

    def fault_for(self, exchange: Exchange) -> Fault | None:
        with self._changing:
            self.seen.append((exchange.method, exchange.path))
            for rule in self._rules:
                fault, method, path, times = rule
                if times > 0 and method in ("", exchange.method) and path in exchange.path:
                    rule[3] -= 1
                    return fault
        return None


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy in front of the server at this URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.upstream = urlsplit(upstream).netloc
    server.proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        exchange = Exchange(self.command, self.path, self._read_body(), self.headers)
        exchange.forward = lambda: self._ask(exchange)
        fault = self.server.proxy.fault_for(exchange)
        if fault:
            fault(exchange)
        else:
            exchange.forward()
        self._answer(exchange)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _ask(self, exchange: Exchange) -> None:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP | exchange.unheard}
        connection.request(exchange.method, exchange.path, exchange.body or None, headers)
        response = connection.getresponse()
        exchange.status, exchange.answer = response.status, response.read()
        exchange.headers = {n: v for n, v in response.getheaders() if n.lower() not in HOP - {"date"}}
        if exchange.method == "HEAD":
            exchange.headers["Content-Length"] = response.headers.get("Content-Length", "0")
        connection.close()

    def _answer(self, exchange: Exchange) -> None:
        if exchange.cut_after == 0:
            self.close_connection = True
            return
        self.send_response_only(exchange.status)
        for name, value in {"Content-Length": str(len(exchange.answer)), **exchange.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(exchange.answer[: exchange.cut_after])
        self.close_connection = self.close_connection or exchange.cut_after is not None

    def log_message(self, *_: object) -> None:
        pass
