"""Attacks on the servers of a workspace, over real connections: other websites, no password, another host's name."""

import json
import stat
import subprocess
import sys

import httpx
import psutil
import pytest
import yaml

from browsers import chromium
from flows.errors import UserError
from flows.operations import service_environment
from live import Up, end_tree, environment, log_in, worker
from miniature import REPOSITORY
from processes import WAIT, wait_until
from servers import client, free_port, http_server

EVIL = "https://evil.example"
COMMAND = [{"prefect.deployments.steps.run_shell_script": {"script": "id"}}]


def test_the_password_is_the_owners_alone_and_stays_the_same(tmp_path):
    login, file = service_environment.login(tmp_path), service_environment.login_file(tmp_path)
    assert len(login) > 40 and service_environment.login(tmp_path) == login
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    with pytest.raises(UserError, match="other users may read this password"):
        service_environment.login(tmp_path)


def test_a_password_that_two_processes_make_at_once_is_one(tmp_path):
    code = "import sys; from flows.operations.service_environment import login; from pathlib import Path;"
    command = [sys.executable, "-c", f"{code} print(login(Path(sys.argv[1])))", str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate()[0] for process in both)
    assert first == second and first.startswith("cm:")


@pytest.fixture(scope="module")
def stranger(up):
    """A client of Prefect's API without a password."""
    with client(base_url=f"{up.note['prefect']}/api") as stranger:
        yield stranger


def attack(up: Up) -> dict:
    """Return a deployment whose next run has the worker run a command."""
    deployed = up.get("/deployments/name/consistency/tiny")
    return {"name": "owned", "flow_id": deployed["flow_id"], "work_pool_name": "gpu", "pull_steps": COMMAND}


@pytest.mark.slow
def test_another_website_gets_nothing_from_prefect(up, stranger):
    asked = {"Origin": EVIL, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert "access-control-allow-origin" not in stranger.options("/deployments/", headers=asked).headers
    answer = stranger.post("/deployments/", json=attack(up), headers={"Origin": EVIL})
    assert answer.status_code in (401, 403) and "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in up.api.get("/deployments/name/consistency/tiny", headers=asked).headers
    assert [one["name"] for one in up.post("/deployments/filter")] == ["tiny"]


@pytest.mark.slow
def test_without_the_password_prefect_says_only_that_it_lives(up, stranger):
    assert stranger.get("/health").json() is True
    for path in ("/admin/settings", "/deployments/name/consistency/tiny", "/csrf-token?client=me"):
        assert stranger.get(path).status_code == 401, path
    wrong = {"auth": ("cm", "guess"), "headers": {"Prefect-Csrf-Token": "x", "Prefect-Csrf-Client": "x"}}
    assert stranger.post("/deployments/", json=attack(up), **wrong).status_code in (401, 403)


@pytest.mark.slow
def test_a_change_needs_the_token_as_well(up):
    with client(base_url=up.api.base_url, auth=tuple(up.login.split(":"))) as forged:
        answer = forged.post("/deployments/", json=attack(up))
    assert answer.status_code == 403 and "CSRF" in answer.text


@pytest.mark.slow
def test_events_are_not_heard_or_told_without_the_password(up):
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import connect

    for path in ("events/in", "events/out", "logs/out"):
        url = f"{up.note['prefect'].replace('http', 'ws')}/api/{path}"
        for subprotocols in (None, ["prefect"]):
            with (
                pytest.raises((ConnectionClosed, InvalidStatus)),
                connect(url, subprotocols=subprotocols, open_timeout=WAIT) as socket,
            ):
                socket.send('{"type": "auth", "token": "guess"}')
                socket.recv(timeout=WAIT)
                raise AssertionError(f"{path} took a guess")


def test_make_ui_takes_its_own_names_alone():
    """MLflow's default allows 10.* and 192.168.*, which are names as well."""
    told = subprocess.run(
        ["make", "--dry-run", "ui"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert "MLFLOW_SERVER_ALLOWED_HOSTS=127.0.0.1:5000,localhost:5000" in told.partition("mlflow ui")[0]


@pytest.mark.slow
@pytest.mark.parametrize("host", ["evil.example", "10.evil.example", "192.168.evil.example"])
def test_mlflow_answers_under_its_own_name_alone(up, host):
    url = f"{up.note['mlflow']}/api/2.0/mlflow/experiments/search"
    with client() as asked:
        assert asked.post(url, json={"max_results": 1}).status_code == 200
        assert asked.post(url, json={"max_results": 1}, headers={"Host": host}).status_code == 403
        assert asked.post(url, json={"max_results": 1}, headers={"Origin": f"https://{host}"}).status_code == 403


@pytest.mark.slow
def test_mlflow_of_infra_takes_nobody_without_the_password(tmp_path):
    """The command of compose.yaml, its store and its port replaced."""
    service = yaml.safe_load((REPOSITORY / "infra" / "compose.yaml").read_text())["services"]["mlflow"]
    users = (REPOSITORY / "infra" / "mlflow-auth.ini").read_text().replace("/home/cm/mlflow", str(tmp_path))
    (tmp_path / "auth.ini").write_text(users)
    variables = {
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": "correct horse battery",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "staple",
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/runs.db",
    }
    port = free_port()
    own = ["--host=127.0.0.1", f"--port={port}", "--workers=1", f"--artifacts-destination={tmp_path}/artifacts"]
    command = [sys.executable, "-m", *service["command"], *own]
    with (tmp_path / "log").open("wb") as log:
        server = psutil.Popen(command, env=environment(REPOSITORY, **variables), stdout=log, stderr=log)
    asked = client()
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
        for path, body in (("experiments/search", {"max_results": 1}), ("runs/create", {"experiment_id": "0"})):
            url = f"http://127.0.0.1:{port}/api/2.0/mlflow/{path}"
            assert asked.post(url, json=body).status_code == 401
            assert asked.post(url, json=body, auth=("cm", "guess")).status_code == 401
            assert asked.post(url, json=body, auth=("cm", "correct horse battery")).status_code == 200
        artifact = f"http://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts/x"
        assert asked.put(artifact, content=b"x").status_code == 401
    finally:
        asked.close()
        end_tree(server)
        server.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("path", ["file:///etc/hostname", "http://127.0.0.1:{port}/api/admin/version", "s3://states/x"])
def test_a_run_from_the_server_does_not_read_its_workers_machine(up, path):
    """Its recipe is the sender's, its address as well."""
    source = json.dumps({"kind": "images", "path": path.format(port=up.note["prefect"].rpartition(":")[2])})
    with worker(up, "a"):
        run_id = up.submit(f"data.source={source}")
        wait_until(lambda: up.flow_run(run_id)["state_name"] in ("Failed", "Completed"), every=1)
    state = up.flow_run(run_id)["state"]
    assert state["name"] == "Failed" and "a recipe from a server may not read it" in state["message"]


@pytest.mark.slow
def test_a_browser_is_asked_for_the_password_once(up):
    theirs = b"<title>another website</title>"
    with chromium() as browser, http_server({"/": (200, {"Content-Type": "text/html"}, theirs)}) as (url, _):
        page = browser.new_page()
        page.set_default_timeout(60_000)
        log_in(page, up)
        page.get_by_role("link", name="tiny").first.wait_for()
        page.reload()
        page.get_by_role("link", name="tiny").first.wait_for()
        page.goto(url)
        said = page.evaluate(f"fetch('{up.note['prefect']}/api/admin/version').then(() => 'read', () => 'refused')")
    assert said == "refused"


@pytest.mark.slow
def test_the_server_of_a_run_without_services_asks_for_a_password_too(tmp_path):
    from prefect.client.orchestration import get_client

    from flows.orchestration.embedded import embedded_prefect

    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        with embedded_prefect(tmp_path), get_client(sync_client=True) as owner, client() as stranger:
            url = f"{str(owner.api_url).rstrip('/')}/flows/filter"
            answer = stranger.post(url, json={}, headers={"Origin": EVIL})
            assert answer.status_code == 401 and "access-control-allow-origin" not in answer.headers
            assert owner.read_flows() == []
