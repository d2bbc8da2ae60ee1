"""CM_KEEP_RUNS on a real server: ended runs past their time go, with their logs; newer ones and live ones stay."""

import sys
from datetime import UTC, datetime

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import LogCreate
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running
from sqlalchemy import create_engine, text

from flows.operations.service_environment import Services, database_urls, login, server_variables
from live import wait_until
from servers import free_port, needs_postgres, postgres, process, wait_for_page

pytestmark = pytest.mark.slow
DAYS = {"old": 3, "new": 1, "alive": 3}  # since a run has ended, or for "alive" has begun
PAST = {"sqlite": "datetime('now', '-{} days') || '.000000'", "postgresql": "now() - interval '{} days'"}
UP, CONTAINER = ("prefect", "server", "start"), ("flows.operations.prefect_server",)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def database(request, tmp_path):
    if request.param == "sqlite":
        (tmp_path / ".cm" / "prefect").mkdir(parents=True)
        yield None
    else:
        with postgres() as server:
            yield f"postgresql://postgres:postgres@{server.place}/postgres"


@flow
def nothing():
    """A flow of which runs are made, and none is run."""


@pytest.mark.parametrize("command", [UP, CONTAINER], ids=["up", "container"])
def test_ended_runs_go_when_their_time_is_over(database, command, tmp_path, monkeypatch):
    """As the server of `cm up` gets Prefect's settings, and as one in a container makes them of its environment."""
    if command == UP:
        monkeypatch.setenv("CM_KEEP_RUNS", "2")
    at = Services(f"http://127.0.0.1:{free_port()}", "http://127.0.0.1:5000")
    variables = server_variables(tmp_path, at, database) | {
        "PREFECT_HOME": str(tmp_path / ".cm" / "prefect"),
        "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "1",  # by default it looks each hour
        "CM_KEEP_RUNS": "2",
    }
    with process([sys.executable, "-m", *command], tmp_path, variables) as log:
        wait_for_page(f"{at.prefect_api}/health", log)
        with (
            temporary_settings({PREFECT_API_URL: at.prefect_api, PREFECT_API_AUTH_STRING: login(tmp_path)}),
            get_client(sync_client=True) as client,
        ):
            runs = {name: client.create_flow_run(nothing, name=name, state=Running()).id for name in DAYS}
            now = datetime.now(UTC)
            client.create_logs(
                LogCreate(name="x", level=20, message=name, timestamp=now, flow_run_id=run)
                for name, run in runs.items()
            )
            for name in ("old", "new"):
                client.set_flow_run_state(runs[name], Completed(), force=True)
            _date_back(database_urls(tmp_path, database)[0], runs)

            def known():
                return {run.name for run in client.read_flow_runs()}

            wait_until(lambda: "old" not in known(), 120)
            wait_until(lambda: {one.message for one in client.read_logs()} == {"new", "alive"}, 120)
            assert known() == {"new", "alive"}


def _date_back(url, runs):
    engine = create_engine(url.replace("+aiosqlite", "").replace("+asyncpg", "+psycopg2"))
    past = PAST[engine.dialect.name]
    with engine.begin() as connection:
        for name, days in DAYS.items():
            column = "start_time" if name == "alive" else "end_time"
            update = f"update flow_run set {column} = {past.format(days)} where name = '{name}'"
            assert connection.execute(text(update)).rowcount == 1
    engine.dispose()
