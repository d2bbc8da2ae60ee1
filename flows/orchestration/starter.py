"""Who started the flow run: in MLflow's tags, and as a tag of the flow run by which Prefect's pages can be filtered."""

from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from flows.settings import Settings
from flows.tracking.person import KNOWN_BY, UNKNOWN, USER, person

TAG = "user:"  # of a flow run, before the name


def starter(root: Path) -> dict[str, str]:
    """Return the tags of the person who started this flow run, and tag it in Prefect with the name."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None:
        return person(root)
    who = _of_deployment(run) if run.deployment_id and not Settings.read().user else person(root)
    who |= _said(run)
    with get_client(sync_client=True) as client:
        client.update_flow_run(run.id, tags={*run.tags, f"{TAG}{who[USER]}"})
    return who


def _of_deployment(run: FlowRun) -> dict[str, str]:
    """Return what Prefect knows: a worker's account starts nothing, and all people share the server's password."""
    if run.auto_scheduled:
        return {USER: "schedule", KNOWN_BY: "Prefect"}
    if run.created_by and run.created_by.display_value:
        return {USER: run.created_by.display_value, KNOWN_BY: f"Prefect, {(run.created_by.type or '').lower()}"}
    return {USER: UNKNOWN, KNOWN_BY: "the server's password, which people share"}


def _said(run: FlowRun) -> dict[str, str]:
    """Return the name that a tag `user:NAME` of the flow run gives, as the form of Prefect's page can."""
    named = [tag.removeprefix(TAG) for tag in run.tags if tag.startswith(TAG)]
    return {USER: named[0], KNOWN_BY: "tag of the flow run"} if named else {}
