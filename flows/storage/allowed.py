"""Sources that a recipe from a server may name: a person who may start runs must not read this machine or its network.

It may name files of the workspace, public hosts, and what a recipe file of the workspace or the worker's operator
names. A recipe of one's own shell may name anything.
"""

import ipaddress
import os
import socket
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flows.errors import UserError
from flows.storage.s3 import public_uri

RECIPES = "params/recipes/*.yaml"
REMEDY = "a recipe from a server may not read it; the worker's CM_ALLOWED_SOURCES or a recipe file can allow it"
_restricted_to: list[str] | None = None  # None: a recipe of one's own shell


def restrict(root: Path, places: Iterable[str]) -> None:
    """Restrict this process to what a recipe from a server may name: of the workspace `root`, public hosts, `places`.

    Places are folders, s3:// addresses with all below them, and addresses of hosts.
    """
    global _restricted_to
    _restricted_to = [str(root.resolve()), *places, *_named_by_recipes(root)]


def refuse_foreign(address: str | Path) -> None:
    """Raise UserError if the recipe in force may not name this path or s3:// address.

    Hosts of http(s):// are checked when they are connected to, see `opener`.
    """
    text = str(address)
    if _restricted_to is None or text.startswith(("http://", "https://")):
        return
    place = text if "://" in text else os.path.abspath(text)
    below = (place.removeprefix(one) for one in _restricted_to if f"{place}/".startswith(f"{one.rstrip('/')}/"))
    if not any("/." not in rest for rest in below):  # a hidden file is no data: .dvc/config.local, .git
        raise UserError(f"{public_uri(text)}: {REMEDY}")


@cache
def _named_by_recipes(root: Path) -> tuple[str, ...]:
    """Return the paths and addresses in the recipe files of a workspace, read once in a process."""
    import yaml

    def texts(node: Any) -> Iterator[str]:
        if isinstance(node, str) and ("/" in node or "~" in node):
            yield node if "://" in node else os.path.join(root.resolve(), os.path.expanduser(node))
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from texts(child)

    return tuple(text for path in sorted(root.glob(RECIPES)) for text in texts(yaml.safe_load(path.read_text())))


def opener() -> urllib.request.OpenerDirector:
    """Return an opener of http:// and https:// alone, in redirects too, which checks each host that it connects to."""

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(partial(_checked, HTTPConnection), req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(partial(_checked, HTTPSConnection), req)

    handlers: list[type[urllib.request.BaseHandler]] = [Http, Https, urllib.request.ProxyHandler]
    handlers += [urllib.request.HTTPRedirectHandler, urllib.request.UnknownHandler]
    handlers += [urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor]
    found = urllib.request.OpenerDirector()
    for handler in handlers:
        found.add_handler(handler())
    return found


def _checked(kind: type[HTTPConnection], host: str, **options: Any) -> HTTPConnection:
    connection = kind(host, **options)
    connection._create_connection = _connect  # type: ignore[attr-defined]  # the only hook before the first byte
    return connection


def _connect(address: tuple[str, int], *options: Any) -> socket.socket:
    """Connect to the addresses that were checked, not to those of a second look-up, which may answer otherwise."""
    # A proxy is the operator's choice, and then its rules hold.
    trusted = (urlsplit(place).hostname for place in (*(_restricted_to or ()), *urllib.request.getproxies().values()))
    if _restricted_to is None or address[0].lower() in trusted:
        return socket.create_connection(address, *options)
    places = [str(place[4][0]) for place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)]
    for place in places:
        if not _is_public(place):
            raise UserError(f"{address[0]}: leads to {place}, which is not public; {REMEDY}")
    for place in places[:-1]:
        with suppress(OSError):
            return socket.create_connection((place, address[1]), *options)
    return socket.create_connection((places[-1], address[1]), *options)


def _is_public(text: str) -> bool:
    number = ipaddress.ip_address(text)
    number = getattr(number, "ipv4_mapped", None) or number
    return number.is_global and not number.is_multicast
