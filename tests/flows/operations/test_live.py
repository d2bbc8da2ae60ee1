"""The whole topology as processes: PostgreSQL, Prefect and MLflow servers on it, two workers, a browser.

Screenshots are kept in the folder of $CM_SCREENSHOTS, else in pytest's temporary folder.
"""

import os
import re
from pathlib import Path

import pytest

from browsers import chromium
from flows.distributed.devices import visible_devices
from flows.operations.process_trees import still_runs
from live import Up, log_in, make_live_workspace, trainings, worker
from processes import WAIT, wait_until
from servers import client, needs_postgres, postgres

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
def page(up):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(1000 * WAIT)
        log_in(page, up)
        yield page


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

    page.get_by_role("button", name="CT · training", exact=True).click()
    page.locator(".schema-form-property").filter(has_text="Grid intervals at the end").last.locator("input").fill("12")
    page.get_by_text("The training method, with its paper's hyperparameters.").scroll_into_view_if_needed()
    shoot("method")
    page.get_by_role("button", name="Submit").click()
    (run,) = wait_until(lambda: up.post("/flow_runs/filter"))
    return run["id"]


@pytest.fixture(scope="module")
def moved(up, submitted, workers):
    """The same run, completed on another worker after its own was killed in the middle of the student's training."""
    up.wait_in(submitted, lambda: saved_steps(up.root))
    (training,) = trainings(up.root)
    first = next(process for process in workers.values() if process.children())
    for process in (*first.children(), first):  # the flow's engine and the worker, not the training
        process.kill()
    wait_until(lambda: not still_runs(training))  # a training whose flow is gone ends
    up.wait_for(submitted, "Completed")
    return submitted


def saved_steps(root: Path) -> list[int]:
    """Return the steps of the saved states of students in flight."""
    return sorted(int(path.name.split("-")[-1]) for path in root.glob(".cm/states/student-*/step-*[0-9]"))


def test_a_run_has_what_was_chosen_in_its_form(up, submitted):
    recipe = up.flow_run(submitted)["parameters"]["recipe"]
    assert recipe["seed"] == 7
    assert recipe["student"]["method"]["kind"] == "ct" and recipe["student"]["method"]["s1"] == 12


def test_stages_wait_for_each_other_where_there_is_one_gpu_and_for_nothing_where_there_is_none(up, moved):
    """Features and teacher can begin at once."""
    if len(devices := visible_devices()) > 1:
        pytest.skip("more than one GPU: nobody has to wait")
    assert any("waits for a slot" in line for line in up.said(moved)) == bool(devices)


def test_progress_moves(up, submitted):
    def percent():
        return up.artifacts(submitted).get("progress-student", {}).get("data", 0)

    seen = {percent()}
    wait_until(lambda: seen.add(percent()) or len(seen - {0}) > 1 or 100 in seen)


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
    assert "| 1 call |" in (result := found["result"]["data"]) and "![1 call](data:image/png" in result
    assert set(found) == {"result", "data-report"} | {key for key in found if key.startswith("progress-")}

    page.goto(f"{up.note['prefect']}/runs/flow-run/{moved}")
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("result", exact=True).wait_for()
    shoot("run")
    page.goto(f"{up.note['prefect']}/artifacts/artifact/{found['result']['id']}")
    page.get_by_role("img", name="lineage").scroll_into_view_if_needed()
    shoot("result")
    link = page.get_by_role("link", name="This run in MLflow").get_attribute("href")
    assert link.startswith(up.note["mlflow"])
    page.goto(link)
    called = re.compile(r"tiny seed=7 student\.method\.kind=ct .*s1=12.* · ct s0=2 s1=12")
    back = page.get_by_role("link", name=called).first
    back.wait_for()
    shoot("mlflow-run")
    page.goto(back.get_attribute("href"))
    page.get_by_text(called).first.wait_for()
    assert page.url.startswith(up.note["prefect"]) and moved in page.url


@pytest.fixture(scope="module")
def cancelled(up, moved):
    """The id of a run that was cancelled in the middle of its student's training."""
    run_id = up.submit("seed=7", "student.train.num_steps=610")  # whose teacher is known
    (training,) = up.wait_in(run_id, lambda: trainings(up.root))
    up.wait_in(run_id, lambda: up.artifacts(run_id).get("progress-student"))
    up.post(f"/flow_runs/{run_id}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    wait_until(lambda: not still_runs(training))
    return run_id


def test_a_cancelled_training_leaves_its_state(up, cancelled):
    up.wait_for(cancelled, "Cancelled")
    assert 0 < saved_steps(up.root)[-1] < 610


def test_a_cancelled_run_is_nowhere_called_failed_or_running(up, cancelled):
    up.wait_for(cancelled, "Cancelled")
    assert ("student", "Cancelled") in (ended := up.task_ends(cancelled))
    assert not {state for _, state in ended} & {"Failed", "Crashed", "Running"}
    assert "Finished in state Running()" not in (said := up.said(cancelled)) and "Flow run was cancelled." in said


def test_mlflow_compares_the_runs(up, moved, cancelled, page, shoot):
    """Three of them: what the killed process had begun, its continuation, and the cancelled one."""
    experiment = up.artifacts(moved)["result"]["data"].split("/experiments/")[1].split("/")[0]
    search = {"experiment_ids": [experiment], "filter": "tags.stage = 'pipeline'"}
    runs = client().post(f"{up.note['mlflow']}/api/2.0/mlflow/runs/search", json=search).json()["runs"]
    assert sorted(run["info"]["status"] for run in runs) == ["FINISHED", "KILLED", "KILLED"]
    ids = ",".join(f'"{run["info"]["run_id"]}"' for run in runs)
    page.goto(f'{up.note["mlflow"]}/#/compare-runs?runs=[{ids}]&experiments=["{experiment}"]')
    page.get_by_text("nfe_1/fid").first.wait_for()
    shoot("mlflow-compare")
