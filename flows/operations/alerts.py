"""Alerts: automations of the Prefect server that send a message to an address of apprise."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.errors import UserError
from flows.notification import check_address

if TYPE_CHECKING:
    from prefect.events.schemas.automations import AutomationCore

BLOCK = "cm-alerts"  # of the server: holds the address, which is a secret
RUN, RUN_TEXT = "prefect.flow-run.*", "{{ flow_run.state.message or flow_run.state.name }}\n{{ flow_run|ui_url }}"


@dataclass(frozen=True)
class Alert:
    """An event and the message about it, in Prefect's templates."""

    event: str
    subject: str
    resource: str = "*"
    body: str = "{{ event.resource.name }}"


ALERTS = {
    "failed": Alert("prefect.flow-run.Failed", "{{ flow_run.name }} failed", RUN, RUN_TEXT),
    "lost": Alert("prefect.flow-run.Crashed", "{{ flow_run.name }} crashed, or shows no sign of life", RUN, RUN_TEXT),
    "late": Alert("prefect.flow-run.Late", "{{ flow_run.name }} waits for a worker", RUN, RUN_TEXT),
    "disk": Alert("cm.disk.low", "a disk gets full"),
    "champion": Alert("cm.model.champion", "a student is better than the champion"),
    "finished": Alert("prefect.flow-run.Completed", "{{ flow_run.name }} finished", RUN, RUN_TEXT),
}
DEFAULT = tuple(kind for kind in ALERTS if kind != "finished")


def create_alerts(address: str, kinds: tuple[str, ...]) -> dict[str, bool]:
    """Create the automations of these kinds, which send to `address`; return {name: whether it is new}.

    One of that name stays as it is, whatever the user has made of it. Raises UserError for an unknown address.
    """
    from prefect.blocks.notifications import SlackWebhook
    from prefect.client.orchestration import get_client

    check_address(address)
    block_id = SlackWebhook(url=address).save(BLOCK, overwrite=True)  # the one block that takes any address of apprise
    made = {}
    with get_client(sync_client=True) as client:
        for automation in (_automation(kind, block_id) for kind in kinds):
            made[automation.name] = not client.read_automations_by_name(automation.name)
            if made[automation.name]:
                client.create_automation(automation)
    return made


def _automation(kind: str, block_id: object) -> "AutomationCore":
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    alert = ALERTS[kind]
    trigger = EventTrigger(
        match={"prefect.resource.id": alert.resource}, expect={alert.event}, posture=Posture.Reactive, threshold=1
    )
    action = SendNotification(block_document_id=block_id, subject=alert.subject, body=alert.body)
    return AutomationCore(name=f"Alert: {kind}", trigger=trigger, actions=[action])


def chosen(kinds: list[str] | None) -> tuple[str, ...]:
    """Return the kinds of alerts asked for. Raises UserError for an unknown one."""
    unknown = [kind for kind in kinds or () if kind not in ALERTS]
    if unknown:
        raise UserError(f"--on {unknown[0]}: there are {', '.join(ALERTS)}")
    return tuple(kinds or DEFAULT)
