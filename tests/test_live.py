"""The whole topology as processes: PostgreSQL, Prefect and MLflow servers on it, two workers, a browser.

Screenshots are kept in the folder of $CM_SCREENSHOTS, else in pytest's temporary folder.
"""

import os
from pathlib import Path

import psutil
import pytest

from live import CHROMIUM, POSTGRES, Up, make_live_workspace, postgres, wait_until, worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(POSTGRES is None, reason="no PostgreSQL server on this machine (initdb is not in PATH)"),
]
LONG = {"num_steps": 1500, "batch_size": 8, "log_every": 10, "save_every": 100, "grid_every": 500}
EARLY = ("prepare", "features", "teacher")


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    """`cm up` on PostgreSQL, the servers alone."""
    root = make_live_workspace(tmp_path_factory.mktemp("live") / "workspace")
    with postgres(tmp_path_factory.mktemp("postgres")) as database:
        services = Up(root, "--database", database, "--no-workers")
        yield services
        assert services.stop() == 0
        assert not [child for child in services.children if child.is_running()]


@pytest.fixture(scope="module")
def workers(up):
    with worker(up, "a") as first, worker(up, "b") as second:
        yield {"a": first, "b": second}


@pytest.fixture(scope="module")
def page():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(30_000)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def shoot(page, tmp_path_factory):
    folder = Path(os.environ.get("CM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))

    def shoot(name):
        page.wait_for_timeout(1500)  # drawings move into place
        page.screenshot(path=folder / f"{name}.png")

    return shoot


def field(page, section, label):
    """Return the input of a form field, inside the last section of that title."""
    boxes = page.locator(".schema-form-property").filter(
        has=page.locator(".schema-form-property__label", has_text=section)
    )
    return boxes.last.locator(".schema-form-property").filter(has_text=label).last.locator("input")


@pytest.fixture(scope="module")
def submitted(up, workers, page, shoot):
    """The id of a run that was started from the form, its method changed to ct and a number with it."""
    page.goto(f"{up.note['prefect']}/deployments")
    page.get_by_role("link", name="tiny").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    page.get_by_text("Every choice of the run.").wait_for()
    shoot("form")

    seed = page.locator(".schema-form-property").filter(has_text="Seed of weights, order").last.locator("input")
    seed.fill("-1")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("-1 is less than the minimum of 0").first.wait_for()
    shoot("refused")
    assert up.post("/flow_runs/count") == 0
    seed.fill("7")

    page.get_by_role("button", name="ct", exact=True).click()
    page.locator(".schema-form-property").filter(has_text="Grid intervals at the end").last.locator("input").fill("12")
    page.get_by_text("The training method, with its paper's hyperparameters.").scroll_into_view_if_needed()
    shoot("method")
    page.get_by_role("button", name="Submit").click()
    (run,) = wait_until(lambda: up.post("/flow_runs/filter"), 30)
    return run["id"]


def test_a_run_from_the_form_has_what_was_chosen_there(up, submitted):
    recipe = up.flow_run(submitted)["parameters"]["recipe"]
    assert recipe["seed"] == 7
    assert recipe["student"]["method"]["kind"] == "ct" and recipe["student"]["method"]["s1"] == 12
    assert up.wait_for(submitted, "Completed") == "Completed"
    assert up.flow_run(submitted)["name"] == "tiny · ct s0=2 s1=12"


def test_its_page_shows_tasks_progress_metrics_pictures_and_the_way_to_mlflow(up, submitted, page, shoot):
    assert set(up.task_states(submitted)) == {*EARLY, "student", "sample", "evaluate"}
    found = up.artifacts(submitted)
    assert found["progress-student"]["data"] == 100
    assert "nfe_1" in found["metrics"]["data"]
    assert any(artifact["type"] == "image" for key, artifact in found.items() if key.startswith("sample"))

    page.goto(f"{up.note['prefect']}/runs/flow-run/{submitted}")
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("progress-student").first.wait_for()
    shoot("run")
    page.goto(f"{up.note['prefect']}/artifacts/artifact/{found['mlflow']['id']}")
    link = page.get_by_role("link", name="This run in MLflow")
    assert link.get_attribute("href").startswith(up.note["mlflow"])
    page.goto(link.get_attribute("href"))
    page.get_by_text("tiny · ct s0=2 s1=12").first.wait_for()
    back = page.get_by_role("link", name="tiny · ct s0=2 s1=12").first
    assert back.get_attribute("href") == f"{up.note['prefect']}/runs/flow-run/{submitted}"
    shoot("mlflow-run")


@pytest.fixture(scope="module")
def cancelled(up, workers):
    """The id of a run that was cancelled in the middle of its student's training, and the seconds until its end."""
    run_id = up.submit({"student": {"train": {**LONG, "optimizer": {"kind": "adam"}, "emas": [{"kind": "constant"}]}}})
    wait_until(lambda: trainings(up.root), 120)
    processes = trainings(up.root)
    wait_until(lambda: saved_steps(up.root), 60)
    up.post(f"/flow_runs/{run_id}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, "the training's processes are gone within 10 seconds"
    return run_id


def trainings(root: Path) -> list[psutil.Process]:
    """Return the processes that train students of this workspace."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "student" in (process.info["cmdline"] or ()) and "stage" in process.info["cmdline"]
        if process.environ().get("CM_HOME") == str(root)
    ]


def saved_steps(root: Path) -> list[int]:
    """Return the steps of the saved states of students."""
    return sorted(int(path.name.split("-")[-1]) for path in root.glob(".cm/states/student-*/step-*"))


def test_a_cancelled_training_leaves_its_state(up, cancelled):
    assert up.wait_for(cancelled, "Cancelled", seconds=60) == "Cancelled"
    assert saved_steps(up.root)[-1] < LONG["num_steps"]


@pytest.fixture(scope="module")
def moved(up, cancelled, workers):
    """The id of a run whose worker and process were killed in mid-training, so that another worker took it over."""
    before = saved_steps(up.root)[-1]
    run_id = up.submit({"student": {"train": {**LONG, "optimizer": {"kind": "adam"}, "emas": [{"kind": "constant"}]}}})
    wait_until(lambda: saved_steps(up.root)[-1] > before, 120)
    first = next(name for name, process in workers.items() if process.children())
    killed = [workers[first], *workers[first].children()]  # the worker and the flow's engine, not the training
    orphans = trainings(up.root)
    for process in killed:
        process.kill()
    assert not psutil.wait_procs(orphans, timeout=15)[1], "a training whose flow is gone ends"
    up.wait_for(run_id, "AwaitingRetry", "Crashed", seconds=150)
    up.wait_for(run_id, "Completed", "Crashed", "AwaitingRetry", "Running", "Pending", "Scheduled", seconds=5)
    wait_until(lambda: up.flow_run(run_id)["state_name"] in ("Completed", "Failed"), 180)
    return run_id


def test_a_run_whose_worker_died_goes_on_elsewhere_from_its_last_state(up, cancelled, moved):
    run = up.flow_run(moved)
    assert (run["state_name"], run["run_count"]) == ("Completed", 2), up.said(moved)[-20:]
    said = up.said(moved)
    assert sum("resuming from step" in line for line in said) == 2, "after the cancelled run's, and after its own"
    assert len({line for line in said if "submitting flow run" in line}) == 2, "by both workers"
    states = [state["name"] for state in up.get(f"/flow_run_states/?flow_run_id={moved}")]
    assert "Crashed" in states and "AwaitingRetry" in states


def test_what_is_known_is_shown_as_cached(up, moved, page, shoot):
    states = up.task_states(moved)
    assert {stage: states[stage] for stage in EARLY} == dict.fromkeys(EARLY, "Cached")
    page.goto(f"{up.note['prefect']}/runs/flow-run/{moved}")
    page.get_by_text("Task Runs", exact=True).click()
    page.get_by_text("Cached", exact=True).first.wait_for()
    shoot("cached")


def test_mlflow_compares_the_two_runs(up, submitted, moved, page, shoot):
    ids = [up.artifacts(run_id)["mlflow"]["data"].rpartition("/")[2].rstrip(")") for run_id in (submitted, moved)]
    experiment = up.artifacts(moved)["mlflow"]["data"].split("/experiments/")[1].split("/")[0]
    runs = ",".join(f'"{run_id}"' for run_id in ids)
    page.goto(f'{up.note["mlflow"]}/#/compare-runs?runs=[{runs}]&experiments=["{experiment}"]')
    page.get_by_text("fid_classifier/nfe_1").first.wait_for()
    shoot("mlflow-compare")
