"""Several processes for one stage, a device each. This process is the first: it alone tracks, saves and writes.

`CM_DEVICES=2` asks for them, `CM_NODES=2` for as many on each of two machines (rendezvous.py), `CM_SHARD=1` for weights
that they divide. All three are facts of the machines and no part of a recipe: results differ by rounding alone, and a
training goes on with other values.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cm_core.parallel import ranks, sharding
from cm_core.training.config import why_not_sharded
from flows.distributed import rendezvous
from flows.distributed.devices import COUNT_VARIABLE, devices_for, nodes_for
from flows.errors import StageFailed, UserError
from flows.monitor import Monitor
from flows.settings import Settings

GRACE = 30.0  # seconds for an exchange with a lost process to fail by itself, and for the others to end
NOTICE = 2.0  # seconds after which it is known who was lost, when an exchange has failed
EXIT_PEER_LOST = 75  # exit code of a process whose exchange failed: another was lost
LOOK = 0.1  # seconds between two looks for an end that is near


@dataclass(frozen=True)
class Place:
    """Which of a stage's processes one is, and where they meet."""

    host: str
    port: int
    rank: int
    count: int
    device: int
    """The GPU of its machine."""


@dataclass
class WorkerGroup:
    """The processes that this one started, from rank `first` on, and the nodes that it knows."""

    first: int
    processes: list[subprocess.Popen]
    links: list[rendezvous.Link]

    def lost(self) -> str | None:
        """Return which process or node was lost, and how; None where all are well."""
        for rank, process in enumerate(self.processes, start=self.first):
            code = process.poll()
            if code and code != EXIT_PEER_LOST:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                return f"process {rank} {how}"
        return next((link.lost for link in self.links if link.lost), None)

    def lost_soon(self) -> str | None:
        """Return what `lost` does, as soon as it is known."""
        deadline = time.monotonic() + NOTICE
        while (lost := self.lost()) is None and time.monotonic() < deadline:
            time.sleep(LOOK)
        return lost

    def tell(self, lost: str) -> None:
        """Let the other nodes know what went wrong."""
        for link in self.links:
            link.part(lost)

    def end(self) -> None:
        """Let the processes end, which they do as soon as this one's pipe closes, and wait for them and the nodes."""
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for link in self.links:
            link.part()
        deadline = time.monotonic() + GRACE
        while any(not link.ended() for link in self.links) and time.monotonic() < deadline:
            time.sleep(LOOK)
        for link in self.links:
            link.close()


@contextmanager
def several_processes(
    stage: str,
    section: Any,
    root: Path,
    state_dir: Path | None = None,
    *,
    facts: Callable[[], rendezvous.Facts] = dict,
    monitor: Monitor | None = None,
) -> Iterator[None]:
    """Run a stage in as many processes as CM_DEVICES and CM_NODES say; alone where the recipe's `section` is empty.

    `facts` decide what the stage makes, and must be the same on every node.

    Raises:
        UserError: CM_DEVICES or CM_NODES is no number that fits the batch and the machine; nodes differ; CM_SHARD
            is not 0 or 1, or the training cannot be divided so.
        StageFailed: one of the processes or nodes was lost, or did not come; the last saved state is whole.
    """
    node_count, devices = processes_for(stage, section)
    count = node_count * devices
    if count == 1:
        yield
        return
    host, links = ranks.LOCAL, []
    if node_count > 1:
        host, _ = rendezvous.meeting_place()
        links = _meet(stage, node_count, facts(), monitor or Monitor())
    store = ranks.listen(host)
    rendezvous.welcome(links, store.port)
    places = [Place(host, store.port, rank, count, rank) for rank in range(1, devices)]
    crew = WorkerGroup(1, [_start(stage, root, state_dir, place) for place in places], links)
    over = threading.Event()
    threading.Thread(target=_watch, args=(stage, crew, over), daemon=True).start()
    try:
        with ranks.member(store, 0, count, device=0):
            yield
    except Exception as error:
        # On GPUs an exchange with a lost process can fail later, where its result is asked for.
        failed = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        lost = crew.lost_soon() if failed else None
        crew.tell(lost or f"the main node ended: {error}")
        if lost is None:
            raise
        raise StageFailed(_explain(stage, lost)) from error
    finally:
        over.set()
        crew.end()


def processes_for(stage: str, section: Any) -> tuple[int, int]:
    """Return of how many nodes a stage takes how many devices; alone where the recipe's `section` is empty.

    Raises UserError for what several_processes would refuse of CM_DEVICES, CM_NODES and CM_SHARD.
    """
    if section is None:
        return 1, 1
    train, node_count = getattr(section, "train", None), nodes_for(stage)
    devices = devices_for(stage, train and train.batch_size, node_count)
    if train is not None:
        _check_sharding(stage, section, node_count * devices)
    return node_count, devices


def _check_sharding(stage: str, section: Any, count: int) -> None:
    obstacle = why_not_sharded(section.method, section.train)
    if Settings.read().shard and count > 1 and obstacle:
        raise UserError(f"{sharding.VARIABLE}=1: {stage}.{obstacle}; allowed there: {sharding.VARIABLE}=0")


def _meet(stage: str, node_count: int, facts: rendezvous.Facts, monitor: Monitor) -> list[rendezvous.Link]:
    try:
        return rendezvous.meet(stage, node_count, {**facts, **_arithmetic()}, monitor)
    except rendezvous.NodeMissing as error:
        raise StageFailed(str(error)) from error


def _arithmetic() -> dict[str, str]:
    """Return what decides how a node rounds, and how many of its devices there are."""
    gpu, settings = torch.cuda.is_available(), Settings.read()
    processor = torch.cuda.get_device_name() if gpu else torch.backends.cpu.get_cpu_capability()
    return {
        "PyTorch": torch.__version__,
        "the processor": processor,
        COUNT_VARIABLE: str(settings.devices),
        sharding.VARIABLE: str(int(settings.shard)),
    }


def join_stage(stage: str, section: Any, root: Path, facts: rendezvous.Facts, say: Callable[[str], None]) -> None:
    """Be one more node of a stage that the main node runs; return when it has ended there.

    Raises:
        UserError: nothing to join, a bad number or address, or the main node refuses.
        StageFailed: no main node was found, or a process or node was lost.
    """
    _, devices = processes_for(stage, section)
    if section is None:
        raise UserError(f"{stage}: null in the recipe; there is nothing to join")
    host, _ = rendezvous.meeting_place()
    try:
        link, welcome = rendezvous.enter(stage, {**facts, **_arithmetic()}, say)
    except rendezvous.NodeMissing as error:
        raise StageFailed(str(error)) from error
    link.keep()
    first, count = welcome.node * devices, welcome.nodes * devices
    say(f"{stage}: node {welcome.node} of {welcome.nodes}, processes {first}..{first + devices - 1} of {count}")
    places = [Place(host, welcome.port, first + device, count, device) for device in range(devices)]
    state_dir = root / ".cm" / "joined" / stage  # holds no states: they come from the main node
    state_dir.mkdir(parents=True, exist_ok=True)
    crew = WorkerGroup(first, [_start(stage, root, state_dir, place) for place in places], [link])
    try:
        lost = _wait(crew)
        if lost is not None:
            crew.tell(lost)
            raise StageFailed(f"{stage}: {lost}")
        say(f"{stage}: {link.lost or 'done'}")
    except KeyboardInterrupt:
        crew.tell(f"node {welcome.node} ({socket.gethostname()}) was stopped")
        raise
    finally:
        crew.end()


def _wait(crew: WorkerGroup) -> str | None:
    """Wait for the end of all processes of this node; return what went wrong, if something did."""
    lost, deadline = None, None
    while any(process.poll() is None for process in crew.processes):
        lost = lost or crew.lost()
        if lost is not None and deadline is None:  # the main node may have ended well, and these are about to
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            return lost
        time.sleep(LOOK)
    if not any(process.returncode for process in crew.processes):
        return None
    return lost or crew.lost_soon() or "an exchange failed"


def _start(stage: str, root: Path, state_dir: Path | None, place: Place) -> subprocess.Popen:
    arguments = (stage, str(state_dir or root), json.dumps(asdict(place)))
    command = [sys.executable, "-m", "flows.stage_runner.worker", *arguments]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE)  # the pipe ends when this process does


def _watch(stage: str, crew: WorkerGroup, over: threading.Event) -> None:
    """End this process when another was lost and the exchange with it does not fail: a GPU may wait for it in vain."""
    while not over.wait(1.0):
        lost = crew.lost()
        if lost is not None and not over.wait(GRACE):
            crew.tell(lost)
            print(f"cm: {_explain(stage, lost)}", file=sys.stderr, flush=True)
            os._exit(1)


def _explain(stage: str, lost: str) -> str:
    return f"{stage}: {lost}; started again, a training goes on from its last saved state"
