"""The card of a registered student: collected from its run, kept beside its logged weights, found again for the Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cm_core.model import load_spec
from flows.recipes.recipe import Recipe, dump_recipe
from flows.reports.model_card import PICTURE, RECIPE_FILE, Card, Training, render
from flows.stages.models import ORIGIN_FILE
from flows.storage.s3 import public_text, public_uri
from flows.tracking.description import address_in_model

if TYPE_CHECKING:
    from flows.tracking.tracker import Tracker

FOLDER, CARD_FILE, FACTS_FILE = "model_card", "model_card.md", "card.json"
ROLES = ("teacher", "base", "student")
LONGEST = 5000  # characters of a version's description in MLflow's databases
HARDWARE, SPEED = "hardware", "images_per_s"  # tag and metric of a training's run


def collect_card(
    tracker: "Tracker",
    name: str,
    recipe: Recipe,
    recipe_name: str,
    files: Mapping[str, Path],
    metrics: Mapping[str, Any],
    run_ids: Mapping[str, str],
) -> Card:
    """Return the card of a measured student: `files` {stage/path: file}, `run_ids` of the stages that MLflow has."""
    origins = {}
    for role in ROLES:
        section = getattr(recipe, role)
        if section is not None and section.is_imported:
            origin = json.loads(files[f"{role}/{ORIGIN_FILE}"].read_text())
            origins[role] = {"weights": public_uri(section.weights), **origin}
    return Card(
        name=name,
        spec=json.loads(files["student/model.json"].read_text()),
        method="" if "student" in origins else recipe.student.method.kind,
        recipe=public_text(recipe_name),
        data=json.loads(files["prepare/dataset.json"].read_text()),
        metrics=dict(metrics),
        protocol=json.loads(files["evaluate/protocol.json"].read_text()),
        trainings=trainings_of(tracker, recipe, run_ids),
        origins=origins,
    )


def trainings_of(tracker: "Tracker", recipe: Recipe, run_ids: Mapping[str, str]) -> dict[str, Training]:
    """Return the trainings of a recipe by role, imported models left out; `run_ids` of the stages that MLflow has."""
    sections = {role: getattr(recipe, role) for role in ROLES}
    return {
        role: _training(tracker, section.train, run_ids.get(role))
        for role, section in sections.items()
        if section is not None and not section.is_imported
    }


def _training(tracker: "Tracker", train: Any, run_id: str | None) -> Training:
    known = {"steps": train.num_steps, "batch_size": train.batch_size}
    if run_id is None:
        return Training(**known)
    run = tracker.client.get_run(run_id).data
    speed = run.metrics.get(SPEED)
    minutes = train.num_steps * train.batch_size / speed / 60 if speed else None
    return Training(**known, minutes=minutes, hardware=run.tags.get(HARDWARE, ""))


def log_card(tracker: "Tracker", model_id: str, card: Card, recipe: Recipe, files: Mapping[str, Path]) -> str:
    """Write the card beside a logged model's weights, with the grid of the student's first row of samples.

    Return it as the description of a registered version, with an address of the grid that MLflow's pages can load.
    """
    samples = json.loads(files["sample/samples.json"].read_text())
    first = next(row["name"] for row in samples["rows"] if row["model"] == "student")
    text = render(card, model=f"models:/{model_id}")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / FOLDER
        folder.mkdir()
        (folder / CARD_FILE).write_text(text)
        (folder / FACTS_FILE).write_text(card.model_dump_json(indent=2) + "\n")
        (folder / RECIPE_FILE).write_text(public_text(dump_recipe(recipe)))
        (folder / PICTURE).write_bytes(files[f"sample/{samples['grids'][first]}"].read_bytes())
        tracker.client.log_model_artifacts(model_id, scratch)
    text = text.replace(f"]({PICTURE})", f"]({address_in_model(model_id, f'{FOLDER}/{PICTURE}')})")
    rest = f"\n\n... `{FOLDER}/{CARD_FILE}` among the model's artifacts goes on"
    return text if len(text) <= LONGEST else text[: LONGEST - len(rest)] + rest


def read_card(weights: Path) -> tuple[Card, Path] | None:
    """Return the card that was logged with downloaded weights, and the folder it lies in; None if none was."""
    folder = weights.parents[1] / FOLDER  # below artifacts/, where MLflow puts them
    if not (folder / FACTS_FILE).is_file():
        return None
    return Card.model_validate_json((folder / FACTS_FILE).read_text()), folder


def imported_card(folder: Path) -> Card:
    """Return what a folder says by itself of a model that was never measured."""
    path = folder / ORIGIN_FILE
    origin = json.loads(path.read_text()) if path.is_file() else {}
    return Card(
        name=folder.resolve().name,
        spec=load_spec(folder),
        method=origin.get("method", ""),
        origins={"model": origin} if "format" in origin else {},
    )
