"""GPU slots: a stage takes slots of the server's limit, so that flows queue, and locks devices of this machine."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL

from flows.distributed.devices import devices_for, hold_devices, visible_devices
from flows.errors import RunEnding, StageFailed
from flows.workspace.clone import Workspace
from flows.workspace.dvc_files import GPU, Stage

logger = logging.getLogger(__name__)
LEASE_SECONDS = 60.0  # after this a dead worker's slot is free again; Prefect's minimum
RENEW_EVERY = LEASE_SECONDS / 4
SLOT_TAKEN = "cm.gpu-slot.taken"  # an event, for metrics: how long a stage has waited
LOOK_EVERY = 2.0  # seconds between polls for a free slot
BROKEN_AFTER = 120.0  # seconds of nothing but 5xx: no restart of a database, the server cannot write down its leases


def takes_slot(stage: Stage) -> bool:
    """Whether a stage must hold a slot while it runs.

    With Prefect embedded no other flow competes; on a machine without a GPU there is none to wait for.
    """
    return stage.needs == GPU and bool(PREFECT_API_URL.value()) and bool(visible_devices())


@contextmanager
def gpu_slot(stage: Stage, workspace: Workspace) -> Iterator[dict[str, str]]:
    """Hold the slots and devices of a stage while it runs; yield its environment variables.

    Raises RunEnding if the run ends while the stage waits, StageFailed if the server grants no slot.
    """
    folder, devices, count = workspace.shared_root / ".cm" / "devices", visible_devices(), devices_for(stage.name)

    def on_wait() -> None:
        wanted = "one" if count == 1 else count
        logger.info("%s: waits for %s of the GPUs %s", stage.name, wanted, ", ".join(devices))

    asked = time.monotonic()
    with _slots(stage, count, workspace):
        with hold_devices(folder, devices, count, on_wait, lambda: workspace.ending) as variables:
            _refuse_if_ending(stage, workspace)
            waited = {"waited_seconds": time.monotonic() - asked}
            emit_event(SLOT_TAKEN, {"prefect.resource.id": f"cm.stage.{stage.name}"}, payload=waited)
            yield variables


@contextmanager
def _slots(stage: Stage, count: int, workspace: Workspace) -> Iterator[None]:
    """Hold slots of the limit. Without a server they cannot be renewed; that does not stop a training."""
    over = threading.Event()
    with get_client(sync_client=True) as client:
        lease = _take_slots(client, stage, count, workspace)
        renewal = threading.Thread(target=_renew, args=(client, lease, over))
        renewal.start()
        try:
            yield
        finally:
            over.set()
            renewal.join()
            _release(client, lease)


def _take_slots(client: SyncPrefectClient, stage: Stage, count: int, workspace: Workspace) -> UUID:
    """Wait for `count` slots and take them at once; return their lease. Raises StageFailed if the server is broken."""
    wanted = f"{'a slot' if count == 1 else f'{count} slots'} of the limit `{GPU}`"
    waits, failing_since = False, None
    while not isinstance(answer := _ask_for_slots(client, stage, count), UUID):
        if answer is None or not answer.is_server_error:
            failing_since = None
        elif failing_since is None:
            failing_since = time.monotonic()
        elif time.monotonic() - failing_since > BROKEN_AFTER:
            raise StageFailed(
                f"{stage.name}: for {BROKEN_AFTER:.0f} s the Prefect server has answered {answer.status_code} when "
                f"asked for {wanted}; its log says why (can it write to its folder PREFECT_HOME?)"
            )
        if not waits:
            logger.info("%s: waits for %s", stage.name, wanted)
        waits = True
        time.sleep(LOOK_EVERY)
        _refuse_if_ending(stage, workspace)
    return answer


def _ask_for_slots(client: SyncPrefectClient, stage: Stage, count: int) -> UUID | httpx.Response | None:
    """Return the lease of the slots, else the server's answer, or None if there was none: worth asking again."""
    try:
        answer = client.increment_concurrency_slots_with_lease([GPU], count, "concurrency", LEASE_SECONDS).json()
    except httpx.TransportError:
        return None
    except httpx.HTTPStatusError as error:
        if error.response.status_code == HTTPStatus.LOCKED or error.response.is_server_error:
            return error.response
        raise StageFailed(f"{stage.name}: no slot of the limit `{GPU}`: {error}") from error
    if not answer["limits"]:
        raise StageFailed(f"{stage.name}: the Prefect server has no limit `{GPU}`; `cm deploy` makes it")
    return UUID(answer["lease_id"])


def _renew(client: SyncPrefectClient, lease: UUID, over: threading.Event) -> None:
    while not over.wait(RENEW_EVERY):
        try:
            client.renew_concurrency_lease(lease, LEASE_SECONDS)
        except httpx.HTTPError as error:
            logger.warning("gpu slot: not renewed, the stage continues: %s", error)


def _release(client: SyncPrefectClient, lease: UUID) -> None:
    try:
        client.release_concurrency_slots_with_lease(lease)
    except httpx.HTTPError as error:  # the server recovers by itself, and computed results stay valid
        logger.warning("gpu slot: not given back, it is free after %.0f s: %s", LEASE_SECONDS, error)


def _refuse_if_ending(stage: Stage, workspace: Workspace) -> None:
    if workspace.ending:
        raise RunEnding(stage.name)
