"""Registration with a Prefect server: work pool, limit `gpu`, crash automations, deployments.

Every object has a fixed name, so a second call only updates the differences.
"""

import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import UserError
from flows.workspace.dvc_files import GPU

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.events.schemas.automations import AutomationCore

POOLS_DIR = Path("infra/work-pools")  # TYPE.json: the base job template of a pool of that type
POOL_DESCRIPTION = "Runs of recipes. Their heavy stages wait for a slot of the limit `gpu`, the others do not."
NIGHTLY = "0 2 * * *"  # UTC; the schedule of a new deployment, inactive until a user switches it on
HEARTBEAT_SECONDS = 30  # between heartbeats of a flow run, Prefect's minimum
DEAD_AFTER = timedelta(seconds=90)  # without a heartbeat: three are missing
Steps = list[dict[str, dict[str, Any]]]


def deploy(root: Path, *, gpus: int, pool_type: str, pull_steps: Steps) -> list[str]:
    """Register everything with the server of PREFECT_API_URL; return the names of the deployments.

    `gpus` is the number of GPU slots over all workers. `pull_steps` give a worker its workspace.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    template = read_template(root, pool_type)
    pool = WorkPoolCreate(name=GPU, type=pool_type, base_job_template=template, description=POOL_DESCRIPTION)
    with get_client(sync_client=True) as client:
        client.create_work_pool(pool, overwrite=True)
        client.upsert_global_concurrency_limit_by_name(GPU, gpus)
        for automation in automations():
            _write_automation(client, automation)
        return _write_deployments(client, root, pull_steps)


def read_template(root: Path, pool_type: str) -> dict[str, Any]:
    """Return the base job template of a type of work pool. Raises UserError if there is none."""
    file = root / POOLS_DIR / f"{pool_type}.json"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in (root / POOLS_DIR).glob("*.json")))
        raise UserError(f"{file}: no such file; there are templates for {known or 'no type of pool'}")
    return json.loads(file.read_text())


def in_folder(workspace: Path) -> Steps:
    """Return the pull steps of a worker that already has the workspace in this folder of its machine or image."""
    return [{"prefect.deployments.steps.set_working_directory": {"directory": str(workspace)}}]


def from_repository(url: str, branch: str) -> Steps:
    """Return the pull steps of a worker that first clones a git repository.

    Cloning over https uses the server's Secret block `git-token`; over ssh, the worker's own key.
    """
    token = {"access_token": "{{ prefect.blocks.secret.git-token }}"} if url.startswith("https://") else {}
    return [{"prefect.deployments.steps.git_clone": {"repository": url, "branch": branch, **token}}]


def automations() -> "list[AutomationCore]":
    """Return the automations by which the server detects dead runs and restarts crashed ones."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    of_deployments = {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}
    silent = EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", "prefect.flow-run.Completed", "prefect.flow-run.Failed"}
        | {"prefect.flow-run.Cancelled", "prefect.flow-run.Crashed", "prefect.flow-run.AwaitingRetry"},
        threshold=1,
        within=DEAD_AFTER,
    )
    crashed = EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=of_deployments,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        expect={"prefect.flow-run.Crashed"},
        threshold=1,
    )
    no_sign = f"No sign of life for {DEAD_AFTER.seconds} s: its process or its machine is gone."
    return [
        AutomationCore(
            name="A run without a sign of life has crashed",
            trigger=silent,
            actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=no_sign)],
        ),
        AutomationCore(
            name="A crashed run is started again",
            description="On whichever worker is free; trainings resume from their last state.",
            trigger=crashed,
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED, name="AwaitingRetry", message="Crashed; resumes from its last state."
                )
            ],
        ),
    ]


def _write_automation(client: "SyncPrefectClient", automation: "AutomationCore") -> None:
    """Write the automation only if it differs: an update forgets the runs whose next heartbeat it awaits."""
    known = client.read_automations_by_name(automation.name)
    if not known:
        client.create_automation(automation)
    elif (known[0].trigger, known[0].actions) != (automation.trigger, automation.actions):
        client.update_automation(known[0].id, automation)


def _write_deployments(client: "SyncPrefectClient", root: Path, pull_steps: Steps) -> list[str]:
    from flows.pipeline import consistency

    flow_id = client.create_flow(consistency)
    form = form_of(consistency)
    names = []
    for entry in deployment_entries(root):
        names.append(f"{consistency.name}/{entry['name']}")
        client.create_deployment(
            flow_id,
            **entry,
            entrypoint="flows/pipeline.py:consistency",
            parameter_openapi_schema=form,
            enforce_parameter_schema=True,
            pull_steps=pull_steps,
            work_pool_name=GPU,
            schedules=_schedules(client, names[-1]),
        )
    return names


def form_of(flow: "Flow") -> dict[str, Any]:
    """Return the schema of the parameters that a person chooses; a worker's own folder is the workspace."""
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(flow).model_dump(exclude_unset=True)
    del schema["properties"]["root"]
    return schema


def _schedules(client: "SyncPrefectClient", deployment: str) -> "list[DeploymentScheduleCreate]":
    """Return a deployment's schedules, which the server drops on an update; for a new one NIGHTLY."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.exceptions import ObjectNotFound

    try:
        known = client.read_deployment_by_name(deployment).schedules
    except ObjectNotFound:
        return [DeploymentScheduleCreate(schedule=CronSchedule(cron=NIGHTLY, timezone="UTC"), active=False)]
    kept = set(DeploymentScheduleCreate.model_fields) - {"replaces"}
    return [DeploymentScheduleCreate(**one.model_dump(include=kept)) for one in known]


def deployment_entries(root: Path) -> list[dict[str, Any]]:
    """Return name, description and parameters of each deployment, one per recipe."""
    from flows.recipes.files import first_comment
    from flows.recipes.recipe import load_recipe, recipe_names

    return [
        {
            "name": name,
            "description": first_comment(root / "params" / "recipes" / f"{name}.yaml"),
            "parameters": {"recipe": load_recipe(name, root=root).model_dump(mode="json"), "name": name},
        }
        for name in recipe_names(root)
    ]
