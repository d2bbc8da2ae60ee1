"""The results of a pipeline in MLflow: numbers, figures, and the student as a registered model."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.tracking.model_card import collect_card, log_card
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.registry import champion_of, model_name, register_student
from flows.tracking.tracker import MODEL_NAME, shown_files
from flows.workspace.dvc_files import version

if TYPE_CHECKING:
    from flows.recipes.recipe import Recipe

logger = logging.getLogger(__name__)
CHAMPION_EVENT = "cm.model.champion"
FIGURES_OF = ("prepare/", "sample/", "edit/", "evaluate/")  # stages whose figures go to the parent run


def publish(
    parent: PipelineRun, recipe: "Recipe", outs: Mapping[str, Mapping[str, str]], files: Mapping[str, Path]
) -> tuple[dict[str, Any], dict[str, Path], dict[str, str]]:
    """Log what the stages have made, and register the student.

    `outs` are {stage: {path: hash}}, `files` {stage/path: file} and further {name: file} to be logged as they are.
    Return the metrics, the figures and the runs that computed the stages.
    """
    metrics = json.loads(files["evaluate/metrics.json"].read_text())
    figures = {path: file for path, file in shown_files(files).items() if path.startswith(FIGURES_OF)}
    protocol = json.loads(files["evaluate/protocol.json"].read_text()) if "evaluate/protocol.json" in files else {}
    shown = {**figures, **{name: file for name, file in files.items() if "/" not in name}}
    parent.log_evaluation(metrics, protocol, files, shown)
    run_ids = parent.log_stages(outs)
    if "prepare/dataset.json" in files:
        facts = files["prepare/dataset.json"]
        parent.tracker.log_dataset(parent.run_id, facts, version(outs["prepare"]), "training")
    if MODEL_NAME in outs:
        _publish_student(parent, recipe, outs, files, metrics, run_ids)
    return metrics, figures, run_ids


def _publish_student(
    parent: PipelineRun,
    recipe: "Recipe",
    outs: Mapping[str, Mapping[str, str]],
    files: Mapping[str, Path],
    metrics: Mapping[str, Any],
    run_ids: Mapping[str, str],
) -> None:
    """Log the student and register it with its metrics and its card; log its registered name."""
    model_id = parent.log_student(recipe, files, outs[MODEL_NAME], metrics, run_ids.get(MODEL_NAME))
    dataset = json.loads(files["prepare/dataset.json"].read_text())["name"]
    before = champion_of(parent.tracker, dataset)
    card = collect_card(parent.tracker, model_name(dataset), recipe, parent.tags["recipe"], files, metrics, run_ids)
    name, registered = register_student(
        parent.tracker,
        model_id,
        dataset=dataset,
        data_version=version(outs["prepare"]),
        protocol=json.loads(files["evaluate/protocol.json"].read_text()),
        metrics=metrics,
        tags={"recipe": parent.tags["recipe"], "method": recipe.student.method.kind, "run_id": parent.run_id},
        description=log_card(parent.tracker, model_id, card, recipe, files),
    )
    logger.info("student: %s version %s in MLflow's registry", name, registered.number)
    if before and registered.number == champion_of(parent.tracker, dataset) != before:
        _report_champion(name, f"version {registered.number}, of {parent.name}, is better than version {before}")


def _report_champion(name: str, said: str) -> None:
    """Log a new champion, and report it to the Prefect server, if there is one, as an event for alerts."""
    logger.info("student: %s %s", name, said)
    if os.environ.get("PREFECT_API_URL"):
        from prefect.events import emit_event

        emit_event(
            CHAMPION_EVENT, {"prefect.resource.id": f"cm.model.{name}", "prefect.resource.name": f"{name} {said}"}
        )
