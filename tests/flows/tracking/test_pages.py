"""MLflow's pages in a browser: what the printed link opens, a pipeline's run, a model version.

Screenshots are kept in the folder of $CM_SCREENSHOTS, else in pytest's temporary folder.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from browsers import CHROMIUM, chromium
from flows.commands.output import CHARTS
from flows.recipes.recipe import Recipe, load_recipe
from flows.reports.figures import save_grid
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.results import publish
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import COLOUR, Tracker
from miniature import REPOSITORY, make_bare_workspace, save_untrained
from servers import mlflow_server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
RECIPES = {"digits-cd": 12.66, "digits-cd student.method.num_scales=9": 15.21}  # with the student's FID in one call


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server on which two pipelines are logged, and the ids of their runs."""
    root = make_bare_workspace(tmp_path_factory.mktemp("workspace"))
    with pytest.MonkeyPatch.context() as patch, mlflow_server(root) as uri:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        runs = [log_pipeline(root / str(number), *one) for number, one in enumerate(RECIPES.items())]
        yield uri, Tracker(root), runs


def log_pipeline(root: Path, name: str, fid: float) -> str:
    """Log a pipeline as a flow does that has computed its student; return the run's id."""
    metrics = {
        "fid_classifier": {"real": 1.2345, "untrained": 456.78, "nfe_1": fid, "nfe_2": fid / 2, "teacher_nfe_35": 2.07},
        "kid_classifier": {"real": 0.001, "untrained": 0.5, "nfe_1": 0.012, "nfe_2": 0.006, "teacher_nfe_35": 0.002},
    }
    row = {"model": "student", "num_images": 5000, "sigmas": [80.0]}
    bounds = {"num_images": 5000, "nfe": None, "model": "real"}
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    contents = {
        "prepare/dataset.json": {"name": "digits", "counts": {"train": 1500}, "licence": "CC BY 4.0"},
        "evaluate/metrics.json": metrics,
        "evaluate/protocol.json": {
            "network": {"name": "classifier", "sha256": "b" * 64},
            "reference": {"images": "1500 training images"},
            "torch_fidelity": "0.4.0",
            "weights": "of the last training step",
            "settings": {},
            "samples": {},
            "rows": {"real": bounds, "untrained": bounds, "nfe_1": row | {"nfe": 1}, "nfe_2": row | {"nfe": 2}},
        },
        "sample/samples.json": {
            "rows": [{"name": f"nfe_{nfe}", "model": "student"} for nfe in (1, 2)],
            "grids": {f"nfe_{nfe}": f"nfe_{nfe}_grid.png" for nfe in (1, 2)},
        },
    }
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content))
    save_untrained(root / "student", form="skip", image_shape=(1, 8, 8))
    steps = range(50, 3001, 50)
    entries = [{"step": step, "loss": fid / step**0.5} for step in steps]
    (root / "student/metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for nfe in (1, 2):
        save_grid(images, root / f"sample/nfe_{nfe}_grid.png")
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    recipe: Recipe = load_recipe(name.split()[0], name.split()[1:], root=REPOSITORY)
    student = f"{int(fid):032x}"
    with PipelineRun(Tracker(root), f"{name} · cd", {"recipe": name, "git.revision": "1" * 40}, {"seed": 0}) as parent:
        with StageRun(root, "student", parent.run_id, lambda: {"recipe": name, "git.revision": "1" * 40}) as run:
            for entry in entries:
                run.metrics({"loss": entry["loss"]}, entry["step"])
            run.image("samples", files["sample/nfe_1_grid.png"], 3000)
            run.submit(lambda tracker, run_id: tracker.set_tags(run_id, {"dvc.out": student}))
        publish(parent, recipe, {"prepare": {"out/prepare": "a" * 32}, "student": {"out/student": student}}, files)
    return parent.run_id


@pytest.fixture(scope="module")
def page(server):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1600, "height": 1200})
        page.set_default_timeout(120_000)
        # MLflow's assistant covers a third of the page at the first visit
        page.add_init_script("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")
        yield page


@pytest.fixture(scope="module")
def shoot(page, tmp_path_factory):
    folder = Path(os.environ.get("CM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    return lambda name: page.screenshot(path=folder / f"{name}.png")


def shown(found):
    """Return the first of the found elements that a person sees."""
    return found.locator("visible=true").first


def loaded(picture) -> None:
    """Wait until an image has been drawn."""
    picture.scroll_into_view_if_needed()
    picture.evaluate("image => image.decode()")
    assert picture.evaluate("image => image.naturalWidth") > 0


def test_the_link_opens_charts_of_pipelines_alone(server, page, shoot):
    """In different colours, the curves first; the pictures of the students' own runs are not among them."""
    uri, tracker, runs = server
    page.goto(f"{uri}/#/experiments/{tracker.experiment_id}/runs{CHARTS}")
    page.get_by_text("2 matching runs").wait_for()
    for chart in ("fid_against_nfe", "student_loss"):
        shown(page.get_by_text(f"curves/{chart}", exact=True)).wait_for()
    page.locator(".js-plotly-plot .scatterlayer .trace").nth(3).wait_for(state="attached")
    lines = page.locator(".js-plotly-plot .scatterlayer .trace path.js-line")
    drawn = {line.evaluate("line => line.style.stroke") for line in lines.all()}
    tags = [tracker.client.get_run(run_id).data.tags for run_id in runs]
    hues = {f"rgb({', '.join(str(int(one[COLOUR][at : at + 2], 16)) for at in (1, 3, 5))})" for one in tags}
    assert len(hues) == 2 and drawn == hues
    sections = page.get_by_text(re.compile(r"^(curves|nfe_1|teacher_nfe_35) \(\d+\)$|^(curves|nfe_1|teacher_nfe_35)$"))
    assert sections.first.inner_text().startswith("curves")
    assert page.get_by_text("samples", exact=True).count() == 0 and page.get_by_text("· student").count() == 0
    shoot("mlflow-charts")


def test_a_pipeline_shows_its_curves_its_table_and_its_images(server, page, shoot):
    uri, tracker, runs = server
    page.goto(f"{uri}/#/experiments/{tracker.experiment_id}/runs/{runs[0]}")
    page.get_by_text("FID 12.7 at 1 call, 6.33 at 2").first.wait_for()
    page.get_by_role("cell", name="456.8", exact=True).wait_for()
    loaded(page.locator("img[src^='get-artifact']").first)
    shoot("mlflow-run")
    page.goto(f"{uri}/#/experiments/{tracker.experiment_id}/runs/{runs[0]}/model-metrics")
    for chart in ("fid_against_nfe", "student_loss"):  # here MLflow shows the group apart
        shown(page.get_by_text(chart, exact=True)).wait_for()
    page.locator(".js-plotly-plot .scatterlayer .trace").nth(1).wait_for(state="attached")
    shoot("mlflow-run-charts")


def test_a_model_version_says_what_it_is_and_how_to_call_it(server, page, shoot):
    uri, tracker, _ = server
    page.goto(f"{uri}/#/models/cm-digits/versions/1")
    page.get_by_text(re.compile("cm sample --model models:/m-")).first.wait_for()
    page.get_by_text(re.compile("mlflow models serve --model-uri models:/m-")).first.wait_for()
    page.get_by_role("cell", name="12.66", exact=True).first.wait_for()
    loaded(page.locator("img[src*='logged-models']").first)
    shoot("mlflow-version")


def test_models_and_stages_are_named_by_recipe_and_difference(server, page, shoot):
    uri, tracker, _ = server
    page.goto(f"{uri}/#/experiments/{tracker.experiment_id}/models")
    page.get_by_text("digits-cd student·method·num_scales=9 · student").first.wait_for()
    shoot("mlflow-models")
    students = tracker.client.search_runs([tracker.experiment_id], "tags.stage = 'student'")
    assert {run.info.run_name for run in students} == {f"{name} · student" for name in RECIPES}
