"""The report of a pipeline run, kept in the workspace: the stage's page, how it was made, and earlier students."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.recipes.naming import command, title
from flows.reports.metrics_table import of_student
from flows.reports.model_card import Training
from flows.reports.run_facts import Measured, write_run_report
from flows.storage.s3 import public_text
from flows.tracking.gpu_usage import in_words
from flows.tracking.model_card import trainings_of
from flows.tracking.person import UNKNOWN, USER
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.registry import RUN_TAG, Registry, Version, model_name, protocol_digest
from flows.tracking.tracker import MODEL_NAME, Tracker
from flows.workspace.clone import file_name
from flows.workspace.dvc_files import version

if TYPE_CHECKING:
    from flows.recipes.recipe import Recipe

REPORT = "evaluate/report.html"
SHORT = 8  # characters of a run's id, as `cm runs` shows it


def keep_report(
    parent: PipelineRun,
    recipe: "Recipe",
    root: Path,
    workspace: Path,
    files: Mapping[str, Path],
    stages: Mapping[str, Mapping[str, Any]],
    run_ids: Mapping[str, str],
    others: Sequence[Measured],
    lineage: str,
) -> Path | None:
    """Write the report into .cm/reports of a workspace, named after the run and its id; return its path.

    `root` has the recipe files from which the run was started; with CM_HOME it is not the workspace.
    `stages` say what was cached, `run_ids` which run computed each; `lineage` is an SVG; without a report of
    the stage there is none.
    """
    if REPORT not in files:
        return None
    name, revision = parent.tags["recipe"], parent.tags.get("git.revision")
    edits = " with uncommitted edits, edits.patch in MLflow" if "git.edits" in parent.tags else ""
    trainings = trainings_of(parent.tracker, recipe, run_ids)
    hardware = dict.fromkeys(one.hardware for one in trainings.values() if one.hardware)
    facts = {
        "Recipe": public_text(name),
        "Method": title(recipe, ""),
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Commit": f"{revision[:12]}{edits}" if revision else "not recorded",
        "Hardware": ", ".join(hardware) or "not recorded",
        "Minutes": _minutes(parent, trainings),
        "Computed": ", ".join(stage for stage, result in stages.items() if not result["cached"]) or "all was cached",
        "Started by": parent.tags.get(USER, UNKNOWN),
        **in_words(parent.tracker.book_usage(parent.run_id)),
        "Run": parent.run_id[:SHORT],
    }
    again = command(recipe, name, root) or "cm run recipe.yaml    # among the artifacts of the registered student"
    commands = ([f"git checkout {revision[:12]}"] if revision else []) + [public_text(again)]
    path = workspace / ".cm" / "reports" / f"{file_name(parent.name)}-{parent.run_id[:SHORT]}.html"
    own = of_student(json.loads(files["evaluate/metrics.json"].read_text()))
    measured = {"own": own, "deviations": _deviations(own, json.loads(files["evaluate/protocol.json"].read_text()))}
    write_run_report(files[REPORT], path, facts, commands=commands, others=others, lineage=lineage, **measured)
    return path


def _deviations(own: Mapping[str, float], protocol: Mapping[str, Any]) -> dict[str, float]:
    """Return the standard deviations that the protocol has of these metrics, {nfe_1/fid: value}."""
    places = {key: key.split("/") for key in own}
    rows = protocol["rows"]
    return {key: rows[row][f"{name}_std"] for key, (row, name) in places.items() if f"{name}_std" in rows.get(row, {})}


def _minutes(parent: PipelineRun, trainings: Mapping[str, Training]) -> str:
    """Return how long the run took, and the trainings, whichever run did them."""
    started = parent.tracker.client.get_run(parent.run_id).info.start_time
    said = f"{(datetime.now(UTC).timestamp() - started / 1000) / 60:.3g} in all"
    known = [f"{role} {one.minutes:.3g}" for role, one in trainings.items() if one.minutes is not None]
    return said + (f"; training: {', '.join(known)}" if known else "")


def earlier_students(
    tracker: Tracker, outs: Mapping[str, Mapping[str, str]], files: Mapping[str, Path]
) -> list[Measured]:
    """Return the champion and the newest other student, of those measured alike.

    A run asks before it publishes its own. `outs` are {stage: {path: hash}}, `files` {stage/path: file}.
    """
    if MODEL_NAME not in outs:
        return []
    registry, name = Registry(tracker), model_name(json.loads(files["prepare/dataset.json"].read_text())["name"])
    if name not in registry.names():
        return []
    registered, own_model = registry.read(name), tracker.find_student(version(outs[MODEL_NAME]))
    protocol = json.loads(files["evaluate/protocol.json"].read_text())
    own = Version(0, version(outs["prepare"]), protocol_digest(protocol), {}, own_model)
    alike = [other for other in registered.versions.values() if other.is_comparable_with(own)]
    others = [other for other in alike if own_model is None or other.model_id != own_model]
    champion = registered.champion
    found = {"champion": champion} if champion in alike and champion is not None else {}
    if others and (previous := max(others, key=lambda other: other.number)) is not champion:
        found["previous"] = previous
    return [_measured(title, one, own_model) for title, one in found.items()]


def _measured(title: str, found: Version, own_model: str | None) -> Measured:
    same = "this very student, " if own_model and found.model_id == own_model else ""
    run = f", run {found.tags[RUN_TAG][:SHORT]}" if RUN_TAG in found.tags else ""
    note = f"{same}version {found.number}, recipe {found.tags.get('recipe', 'unknown')}{run}"
    return Measured(title, note, found.numbers)
