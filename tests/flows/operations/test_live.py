"""The whole topology as processes: PostgreSQL, Prefect and MLflow servers on it, two workers, a browser.

Screenshots are kept in the folder of $CM_SCREENSHOTS, else in pytest's temporary folder.
"""

import os
from pathlib import Path

import httpx
import pytest

from flows.distributed.devices import visible_devices
from flows.operations.process_trees import still_runs
from live import CHROMIUM, Up, make_live_workspace, trainings, wait_until, worker
from servers import needs_postgres, postgres

pytestmark = [pytest.mark.soak, needs_postgres]
EARLY = ("prepare", "teacher")  # features may still wait for their turn when the student begins


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    """`cm up` on PostgreSQL, the servers alone."""
    root = make_live_workspace(tmp_path_factory.mktemp("live") / "workspace")
    with postgres() as database:
        services = Up(root, "--database", f"postgresql://postgres:postgres@{database.place}/postgres", "--no-workers")
        yield services
        assert services.stop() == 0
        assert not [child for child in services.children if still_runs(child)]


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
    page.get_by_text("-1 is less than the minimum of 0").first.wait_for(state="hidden")
    seed.fill("7")

    page.get_by_role("button", name="ct", exact=True).click()
    page.locator(".schema-form-property").filter(has_text="Grid intervals at the end").last.locator("input").fill("12")
    page.get_by_text("The training method, with its paper's hyperparameters.").scroll_into_view_if_needed()
    shoot("method")
    page.get_by_role("button", name="Submit").click()
    (run,) = wait_until(lambda: up.post("/flow_runs/filter"), 30)
    return run["id"]


@pytest.fixture(scope="module")
def moved(up, submitted, workers):
    """The same run, completed on another worker after its own was killed in the middle of the student's training."""
    wait_until(lambda: saved_steps(up.root), 600)
    (training,) = trainings(up.root)
    first = next(process for process in workers.values() if process.children())
    for process in (*first.children(), first):  # the flow's engine and the worker, not the training
        process.kill()
    wait_until(lambda: not still_runs(training), 20)  # a training whose flow is gone ends
    up.wait_for(submitted, "Completed", 900)
    return submitted


def saved_steps(root: Path) -> list[int]:
    """Return the steps of the saved states of students in flight."""
    return sorted(int(path.name.split("-")[-1]) for path in root.glob(".cm/states/student-*/step-*[0-9]"))


def test_a_run_has_what_was_chosen_in_its_form(up, submitted):
    recipe = up.flow_run(submitted)["parameters"]["recipe"]
    assert recipe["seed"] == 7
    assert recipe["student"]["method"]["kind"] == "ct" and recipe["student"]["method"]["s1"] == 12


def test_stages_that_need_a_gpu_wait_for_each_other(up, submitted):
    """Features and teacher could begin at once; this machine's limit lets one of them."""
    if len(visible_devices()) > 1:
        pytest.skip("more than one GPU: nobody has to wait")
    wait_until(lambda: any("waits for a slot of the limit `gpu`" in line for line in up.said(submitted)), 600)


def test_progress_moves(up, submitted):
    def percent():
        return up.artifacts(submitted).get("progress-student", {}).get("data", 0)

    first = wait_until(percent, 600)
    assert wait_until(lambda: percent() > first, 300)


def test_a_run_whose_worker_died_goes_on_elsewhere_from_its_last_state(up, moved):
    assert up.flow_run(moved)["run_count"] == 2
    states, said = up.states(moved), up.said(moved)
    assert states.index("Crashed") < states.index("AwaitingRetry") < states.index("Completed")
    assert len({line for line in said if "submitting flow run" in line}) == 2, "by both workers"
    (resumed,) = [line for line in said if "resuming from step" in line]
    assert int(resumed.rpartition(" ")[2]) >= 50


def test_what_was_known_by_then_is_shown_as_cached(up, moved, page, shoot):
    ended = up.task_ends(moved)
    assert {(stage, "Cached") for stage in EARLY} | {("evaluate", "Completed"), ("student", "Crashed")} <= ended
    assert not {state for _, state in ended} & {"Running", "Pending"}, "not even of the start that was killed"
    page.goto(f"{up.note['prefect']}/runs/flow-run/{moved}")
    page.get_by_text("Task Runs", exact=True).click()
    page.get_by_text("Cached", exact=True).first.wait_for()
    shoot("cached")


def test_its_page_shows_progress_metrics_pictures_and_the_way_to_mlflow_and_back(up, moved, page, shoot):
    found = up.artifacts(moved)
    assert found["progress-student"]["data"] == 100
    assert "nfe_1" in found["metrics"]["data"]
    assert any(artifact["type"] == "image" for key, artifact in found.items() if key.startswith("sample"))

    page.goto(f"{up.note['prefect']}/runs/flow-run/{moved}")
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("metrics", exact=True).wait_for()
    page.get_by_text("sample-strips", exact=True).scroll_into_view_if_needed()
    shoot("run")
    page.goto(f"{up.note['prefect']}/artifacts/artifact/{found['mlflow']['id']}")
    link = page.get_by_role("link", name="This run in MLflow").get_attribute("href")
    assert link.startswith(up.note["mlflow"])
    page.goto(link)
    back = page.get_by_role("link", name="tiny · ct s0=2 s1=12").first
    back.wait_for()
    shoot("mlflow-run")
    page.goto(back.get_attribute("href"))
    page.get_by_text("tiny · ct s0=2 s1=12").first.wait_for()
    assert page.url.startswith(up.note["prefect"]) and moved in page.url


@pytest.fixture(scope="module")
def cancelled(up, moved):
    """The id of a run that was cancelled in the middle of its student's training."""
    run_id = up.submit("seed=7", "student.train.num_steps=610")  # whose teacher is known
    (training,) = wait_until(lambda: trainings(up.root), 600)
    wait_until(lambda: up.artifacts(run_id).get("progress-student"), 300)
    up.post(f"/flow_runs/{run_id}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    wait_until(lambda: not still_runs(training), 10)
    return run_id


def test_a_cancelled_training_leaves_its_state(up, cancelled):
    up.wait_for(cancelled, "Cancelled", 300)
    assert 0 < saved_steps(up.root)[-1] < 610


def test_mlflow_compares_the_runs(up, moved, cancelled, page, shoot):
    """Three of them: what the killed process had begun, its continuation, and the cancelled one."""
    experiment = up.artifacts(moved)["mlflow"]["data"].split("/experiments/")[1].split("/")[0]
    search = {"experiment_ids": [experiment], "filter": "tags.stage = 'pipeline'"}
    runs = httpx.post(f"{up.note['mlflow']}/api/2.0/mlflow/runs/search", json=search).json()["runs"]
    assert sorted(run["info"]["status"] for run in runs) == ["FINISHED", "KILLED", "KILLED"]
    ids = ",".join(f'"{run["info"]["run_id"]}"' for run in runs)
    page.goto(f'{up.note["mlflow"]}/#/compare-runs?runs=[{ids}]&experiments=["{experiment}"]')
    page.get_by_text("fid_classifier/nfe_1").first.wait_for()
    shoot("mlflow-compare")
