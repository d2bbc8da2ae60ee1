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
from prefect.settings import PREFECT_API_URL

from flows.distributed.devices import devices_for, hold_devices, visible_devices
from flows.errors import RunEnding, StageFailed
from flows.workspace.clone import Workspace
from flows.workspace.dvc_files import GPU, Stage

logger = logging.getLogger(__name__)
LEASE_SECONDS = 60.0  # after this a dead worker's slot is free again; Prefect's minimum
RENEW_EVERY = LEASE_SECONDS / 4
LOOK_EVERY = 2.0  # seconds between polls for a free slot


@contextmanager
def gpu_slot(stage: Stage, workspace: Workspace) -> Iterator[dict[str, str]]:
    """Hold the slots and devices of a stage that needs GPUs while it runs; yield its environment variables.

    With Prefect embedded no other flow competes, and nothing is held. Raises RunEnding if the run ends while the
    stage waits, StageFailed if the server grants no slot.
    """
    if stage.needs != GPU or not PREFECT_API_URL.value():
        yield {}
        return
    folder, devices, count = workspace.shared_root / ".cm" / "devices", visible_devices(), devices_for(stage.name)

    def on_wait() -> None:
        wanted = "one" if count == 1 else count
        logger.info("%s: waits for %s of the GPUs %s", stage.name, wanted, ", ".join(devices))

    with _slots(stage, count, workspace):
        with hold_devices(folder, devices, count, on_wait, lambda: workspace.ending) as variables:
            _refuse_if_ending(stage, workspace)
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
    """Wait for `count` slots and take them at once; return their lease."""
    lease = _ask_for_slots(client, stage, count)
    if lease is None:
        wanted = "a slot" if count == 1 else f"{count} slots"
        logger.info("%s: waits for %s of the limit `%s`", stage.name, wanted, GPU)
    while lease is None:
        time.sleep(LOOK_EVERY)
        _refuse_if_ending(stage, workspace)
        lease = _ask_for_slots(client, stage, count)
    return lease


def _ask_for_slots(client: SyncPrefectClient, stage: Stage, count: int) -> UUID | None:
    """Return the lease of the slots; None while too few are free or the server or its database is unreachable."""
    try:
        answer = client.increment_concurrency_slots_with_lease([GPU], count, "concurrency", LEASE_SECONDS).json()
    except httpx.TransportError:
        return None
    except httpx.HTTPStatusError as error:
        if error.response.status_code == HTTPStatus.LOCKED or error.response.is_server_error:
            return None
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
