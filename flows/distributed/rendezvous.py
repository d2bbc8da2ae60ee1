"""Several machines at one stage: how they meet, make sure that they compute the same, and notice who is gone.

The main node runs `cm stage` (or a flow that does) with CM_NODES=n and CM_MEET=host:port, and listens at that address.
The others run `cm join`. Between it and each of them a connection stays open, for JSON, an object a line: first who
asks and what it would compute, then signs of life, and in the end how it went. Tensors go other ways.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flows.distributed.devices import NODES_VARIABLE
from flows.errors import UserError
from flows.monitor import Monitor
from flows.settings import Settings

MEET_VARIABLE = "CM_MEET"
WAIT = 600.0  # seconds for all nodes to come
BEAT = 1.0  # seconds between two signs of life, and between two looks
SILENCE = 30.0  # seconds without one after which a node is taken for lost
HELLO = 5.0  # seconds for whoever comes to say who it is
LONGEST = 2**20  # bytes of a line; nobody here says more
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # the network through which tensors go

Facts = Mapping[str, Any]  # what decides the results of a stage, by name


class NodeMissing(Exception):
    """A node did not come, or went; the message says which."""


@dataclass(frozen=True)
class Welcome:
    """What the main node tells another when all are there."""

    node: int
    nodes: int
    port: int
    """Where the processes meet, at the host of CM_MEET."""


class Link:
    """The connection to another node."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self.peer, self.over = peer, threading.Event()
        self.lost: str | None = None  # what went wrong over there, once something did
        self._socket, self._lines, self._sending = connection, connection.makefile("rb"), threading.Lock()

    def send(self, **message: Any) -> None:
        """Say something; raises OSError where the other side is gone."""
        with self._sending:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, patience: float) -> dict[str, Any]:
        """Return what comes next; raises OSError where nothing comes, ValueError where it is none of ours."""
        self._socket.settimeout(patience)
        line = self._lines.readline(LONGEST)
        if not line:
            raise ConnectionResetError(f"{self.peer} is gone")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"{self.peer} says {message!r}")
        return message

    def local_address(self) -> str:
        """Return the address of this machine that the other side sees."""
        return self._socket.getsockname()[0]

    def keep(self) -> None:
        """From now on give signs of life, and note what comes: `lost`, `over`."""
        for work in (self._beat, self._listen):
            threading.Thread(target=work, daemon=True).start()

    def ended(self) -> bool:
        """Whether nothing more is to be expected from the other side."""
        return self.over.is_set() or self.lost is not None

    def part(self, lost: str | None = None) -> None:
        """Tell the other side that all is over here, or what went wrong; it may be gone itself."""
        with suppress(OSError):
            self.send(lost=lost) if lost else self.send(over=True)

    def close(self) -> None:
        """End the connection."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _beat(self) -> None:
        with suppress(OSError):  # `_listen` notices it, too
            while not self.over.wait(BEAT):
                self.send()

    def _listen(self) -> None:
        try:
            while not self.over.is_set() and self.lost is None:
                message = self.receive(SILENCE)
                self.lost = message.get("lost")
                if "over" in message:
                    self.over.set()
        except TimeoutError:
            self.lost = f"{self.peer} gave no sign of life for {SILENCE:.0f} s"
        except (OSError, ValueError):
            self.lost = f"{self.peer} is gone"


def meeting_place() -> tuple[str, int]:
    """Return host and port of CM_MEET. Raises UserError where it is none."""
    host, _, port = (Settings.read().meet or "").rpartition(":")
    if not host:
        raise UserError(f"{MEET_VARIABLE}=: must be host:port, an address of the main node that all nodes reach")
    return host.strip("[]"), int(port)


def meet(stage: str, count: int, facts: Facts, monitor: Monitor) -> list[Link]:
    """Wait, on the main node, for the others and return the connections to them, those of nodes 1 .. count - 1.

    Raises:
        UserError: nobody can listen at CM_MEET, or a node would compute something else; that node says so, too.
        NodeMissing: not all came in time, or the stage is asked to end.
    """
    host, port = meeting_place()
    links: list[Link] = []
    with _listener(host, port) as server:
        monitor.remark(f"waits at {host}:{port} for {_others(count)}, at most {WAIT:.0f} s")
        deadline = time.monotonic() + WAIT
        try:
            while len(links) < count - 1:
                _check_patience(deadline, stage, len(links) + 1, count, monitor)
                for link, theirs in _admit(server, stage, len(links) + 1):
                    links.append(link)
                    _compare(stage, facts, theirs, link.peer)
        except (UserError, NodeMissing) as error:
            for link in links:
                link.part(str(error))
            raise
    _choose_interface(links[0])
    return links


def welcome(links: Sequence[Link], port: int) -> None:
    """Send the other nodes to where the processes meet, and watch over them from now on."""
    for node, link in enumerate(links, start=1):
        with suppress(OSError):  # it is noticed as any later loss
            link.send(node=node, nodes=len(links) + 1, port=port)
        link.keep()


def _others(count: int) -> str:
    return "the other node" if count == 2 else f"the {count - 1} other nodes"


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        server = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"{MEET_VARIABLE}={host}:{port}: this machine cannot listen there ({error.strerror})"
        ) from error
    server.settimeout(BEAT)
    return server


def _check_patience(deadline: float, stage: str, here: int, count: int, monitor: Monitor) -> None:
    if monitor.stop_requested():
        raise NodeMissing(f"{stage}: stopped before all nodes had come")
    if time.monotonic() > deadline:
        came = f"{here} of {NODES_VARIABLE}={count} nodes were there after {WAIT:.0f} s"
        raise NodeMissing(f"{stage}: {came}; start the others")


def _admit(server: socket.socket, stage: str, node: int) -> Iterator[tuple[Link, Facts]]:
    """Yield who comes for this stage, and its facts; nobody, or who comes for another stage, which is to ask again."""
    try:
        connection, (address, *_) = server.accept()
    except TimeoutError:
        return
    link = Link(connection, f"node {node} ({address})")
    try:
        hello = link.receive(HELLO)
        link.peer = f"node {node} ({hello['host']})"
        if hello["stage"] == stage:
            yield link, hello["facts"]
            return
        link.send(later=stage)
    except (OSError, ValueError, KeyError):  # no node of ours
        pass
    link.close()


def _compare(stage: str, ours: Facts, theirs: Facts, peer: str) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(name, "missing"), theirs.get(name, "missing")
        if here != there:
            raise UserError(
                f"{stage}: {name} is {there} on {peer} and {here} on the main node; all must compute the same"
            )


def enter(stage: str, facts: Facts, say: Callable[[str], None]) -> tuple[Link, Welcome]:
    """Go to the main node, wait until it runs this stage and all nodes are there; return the connection and our place.

    Raises:
        UserError: the main node refuses, because this node or another would compute something else.
        NodeMissing: no main node was found that waits for this stage, or it went away.
    """
    host, port = meeting_place()
    say(f"{stage}: looks for the main node at {host}:{port}, at most {WAIT:.0f} s")
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        with suppress(ConnectionError, TimeoutError):
            link = Link(socket.create_connection((host, port), timeout=SILENCE), f"the main node ({host}:{port})")
            link.send(stage=stage, host=socket.gethostname(), facts=facts)
            answer = link.receive(WAIT + SILENCE)
            if "later" not in answer:
                return link, _read_welcome(answer, link)
            link.close()
        time.sleep(BEAT)
    raise NodeMissing(f"{stage}: no main node waited for one at {host}:{port} within {WAIT:.0f} s")


def _read_welcome(answer: Mapping[str, Any], link: Link) -> Welcome:
    if "lost" in answer:
        raise UserError(answer["lost"])
    _choose_interface(link)
    return Welcome(**answer)


def _choose_interface(link: Link) -> None:
    """Let tensors go through the network that connects the nodes; a machine's first may be one that only it can see."""
    import psutil

    own = link.local_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            for variable in INTERFACES:
                os.environ.setdefault(variable, name)
