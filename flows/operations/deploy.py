"""Registration with a Prefect server: work pool, limit `gpu`, crash automations, deployments.

Every object has a fixed name, so a second call only updates the differences; what a user edited on the server stays.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import UserError
from flows.workspace.dvc_files import CPU, GPU

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events.schemas.automations import AutomationCore

logger = logging.getLogger(__name__)
POOLS_DIR = Path("infra/work-pools")  # TYPE.json: the base job template of a pool of that type
POOL_DESCRIPTION = "Runs of recipes. Their heavy stages wait for a slot of the limit `gpu`, the others do not."
WRITTEN = "consistency_written"  # variable on the server: what the last call wrote, so that edits since are noticed
HEARTBEAT_SECONDS = 30  # between heartbeats of a flow run, Prefect's minimum
DEAD_AFTER = timedelta(seconds=90)  # without a heartbeat: three are missing
Steps = list[dict[str, dict[str, Any]]]


def deploy(
    root: Path,
    *,
    pool_type: str,
    pull_steps: Steps,
    gpus: int | None = None,
    gpus_found: int = 1,
    overwrite: bool = False,
) -> list[str]:
    """Register everything with the server of PREFECT_API_URL; return the names of the deployments.

    `gpus` sets the number of GPU slots over all workers. Without it a new limit has `gpus_found`, as has one that no
    user has changed. `overwrite` replaces what was edited of template and automations. `pull_steps` give
    a worker its workspace. Raises UserError if there is no template of this type, or the server's pool is of another.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import VariableCreate, VariableUpdate

    template = read_template(root, pool_type)
    with get_client(sync_client=True) as client:
        known = client.read_variable_by_name(WRITTEN)
        before: dict[str, Any] = known.value if known else {}  # type: ignore[assignment]  # as written below
        written = {
            **_write_pool(client, pool_type, template, before.get("template"), overwrite),
            **_write_limit(client, gpus, gpus_found, before.get("slots")),
            "automations": _write_automations(client, before.get("automations", {}), overwrite),
        }
        if known:
            client.update_variable(VariableUpdate(name=WRITTEN, value=written))
        else:
            client.create_variable(VariableCreate(name=WRITTEN, value=written))
        return _write_deployments(client, root, pull_steps)


def _write_pool(
    client: "SyncPrefectClient", pool_type: str, template: dict[str, Any], written: str | None, overwrite: bool
) -> dict[str, Any]:
    """Create the pool, or give it this template unless a user has edited the one it has; return what is ours of it."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_work_pool(GPU)
    except ObjectNotFound:
        new = WorkPoolCreate(name=GPU, type=pool_type, base_job_template=template, description=POOL_DESCRIPTION)
        return {"template": _digest(client.create_work_pool(new).base_job_template)}
    if pool.type != pool_type:
        raise UserError(f"work pool {GPU}: the server's is of the type {pool.type}, not {pool_type}; delete it there")
    if not overwrite and _digest(pool.base_job_template) not in (written, _digest(template)):
        file = POOLS_DIR / f"{pool_type}.json"
        logger.warning("work pool %s: edited on the server, it stays so; cm deploy --overwrite takes %s", GPU, file)
        return {"template": written}
    client.update_work_pool(GPU, WorkPoolUpdate(base_job_template=template))
    return {"template": _digest(client.read_work_pool(GPU).base_job_template)}


def _digest(written: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else str(value)  # a set's order differs from process to process

    return hashlib.sha256(json.dumps(written, sort_keys=True, default=plain).encode()).hexdigest()


def _write_limit(client: "SyncPrefectClient", gpus: int | None, found: int, written: int | None) -> dict[str, Any]:
    """Set the slots to `gpus`, or to `found` unless a user has chosen a number; return what is ours of it."""
    from prefect.exceptions import ObjectNotFound

    slots = written
    with suppress(ObjectNotFound):
        slots = client.read_global_concurrency_limit_by_name(GPU).limit
    if gpus is None and slots != written:
        logger.info("limit %s: %s slots, as a user has set it", GPU, slots)
        return {}
    client.upsert_global_concurrency_limit_by_name(GPU, gpus or found)
    return {"slots": found} if gpus is None else {}


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


def _write_automations(client: "SyncPrefectClient", written: Mapping[str, str], overwrite: bool) -> dict[str, str]:
    """Create the automations, or update them unless a user has edited them; return what is ours, {name: digest}.

    One that is as it should be is left alone: an update forgets the runs whose next heartbeat it awaits.
    """
    ours = dict(written)
    for automation in automations():
        name = automation.name
        known = client.read_automations_by_name(name)
        if not known:
            client.create_automation(automation)
        elif (found := _automation_digest(known[0])) != _automation_digest(automation):
            if not overwrite and found != written.get(name):
                logger.warning(
                    "automation %r: edited on the server, it stays so; cm deploy --overwrite replaces it", name
                )
                continue
            # Fields that are not set would stay as they are; the owner cannot be changed.
            whole = type(automation)(**{key: value for key, value in automation if key != "owner_resource"})
            client.update_automation(known[0].id, whole)
        ours[name] = _automation_digest(automation)
    return ours


def _automation_digest(automation: "AutomationCore") -> str:
    """Return the digest of what a user may edit; the server's has an id besides."""
    from prefect.events.schemas.automations import AutomationCore

    return _digest(automation.model_dump(include=set(AutomationCore.model_fields)))


def _write_deployments(client: "SyncPrefectClient", root: Path, pull_steps: Steps) -> list[str]:
    """Create the deployments, or update those that differ; return their names.

    Client and server take a second to check the form of each, so those that are as they should be are left alone.
    """
    from flows.operations.form import form_of
    from flows.pipeline import consistency

    flow_id = client.create_flow(consistency)
    common = {
        "entrypoint": "flows/pipeline.py:consistency",
        "parameter_openapi_schema": form_of(consistency),
        "enforce_parameter_schema": True,
        "pull_steps": pull_steps,
        "work_pool_name": GPU,
    }
    names = []
    for entry in deployment_entries(root):
        names.append(f"{consistency.name}/{entry['name']}")
        known, deployment = _known(client, names[-1]), entry | common
        tags = known.tags if known else []
        deployment["tags"] = [*entry["tags"], *(tag for tag in tags if tag not in entry["tags"])]
        if known is None or any(getattr(known, key) != value for key, value in deployment.items()):
            client.create_deployment(flow_id, **deployment, schedules=_schedules(known))
    return names


def _known(client: "SyncPrefectClient", deployment: str) -> "DeploymentResponse | None":
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(deployment)
    except ObjectNotFound:
        return None


def _schedules(known: "DeploymentResponse | None") -> "list[DeploymentScheduleCreate]":
    """Return a deployment's schedules, which an update would drop."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    kept = set(DeploymentScheduleCreate.model_fields) - {"replaces"}
    return [DeploymentScheduleCreate(**one.model_dump(include=kept)) for one in (known.schedules if known else [])]


def deployment_entries(root: Path) -> list[dict[str, Any]]:
    """Return name, description, tags and parameters of each deployment, one per recipe."""
    from flows.recipes.recipe import recipe_names

    return [_entry(name, root) for name in recipe_names(root)]


def _entry(name: str, root: Path) -> dict[str, Any]:
    from flows.recipes.files import RECIPES_DIR, heading
    from flows.recipes.recipe import load_recipe

    recipe, said = load_recipe(name, root=root), heading(root / RECIPES_DIR / f"{name}.yaml")
    return {
        "name": name,
        "description": said.partition("\n")[0],
        "tags": [recipe.data.source.dataset_name(), recipe.student.method.kind, CPU if "CPU" in said else GPU],
        "parameters": {"recipe": recipe.model_dump(mode="json"), "name": name},
    }
