"""A database that another version of MLflow wrote: one line, and not a byte of it changes."""

import sqlite3

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
from sqlalchemy import create_engine

from flows.errors import UserError
from flows.tracking.database import check_database
from flows.tracking.tracker import Tracker


@pytest.fixture
def older(tmp_path):
    """A database as MLflow wrote it some releases ago, made by MLflow's own migrations."""
    path = tmp_path / "mlflow.db"
    uri = f"sqlite:///{path}"
    engine = create_engine(uri)
    InitialBase.metadata.create_all(engine)
    engine.dispose()
    config = utils._get_alembic_config(uri)
    revisions = [one.revision for one in ScriptDirectory.from_config(config).walk_revisions()]
    command.upgrade(config, revisions[5])
    return path


@pytest.fixture
def newer(tmp_path):
    Tracker(tmp_path)
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    database.close()
    return path


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("older", "an older MLflow than .* wrote this database .*; back it up, then `mlflow db upgrade`"),
        ("newer", "a newer MLflow than .* wrote this database .*; install the MLflow that wrote it"),
    ],
)
def test_a_database_of_another_version_is_refused_unchanged(which, said, request, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = request.getfixturevalue(which)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"^sqlite:///{path}: {said}"):
        Tracker(path.parent)
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == ["mlflow.db"]


def test_servers_new_files_and_todays_databases_are_accepted(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for uri in ("http://127.0.0.1:9", "postgresql://a:b@127.0.0.1:9/c", f"sqlite:///{tmp_path}/new.db", "foo://x", "x"):
        check_database(uri)
    assert not list(tmp_path.iterdir())
    Tracker(tmp_path)
    check_database(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_new_database_is_whole_or_absent_and_of_two_that_are_made_at_once_one_wins(tmp_path, monkeypatch):
    """Whoever is killed midway leaves none: MLflow's own file would look like an older MLflow's."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    upgrade, path = utils._upgrade_db, tmp_path / "mlflow.db"

    def killed(engine):
        raise SystemExit

    monkeypatch.setattr(utils, "_upgrade_db", killed)
    with pytest.raises(SystemExit):
        Tracker(tmp_path)
    assert not list(tmp_path.iterdir())

    def beside_another(engine):
        assert not path.exists()
        monkeypatch.setattr(utils, "_upgrade_db", upgrade)
        Tracker(tmp_path).client.create_experiment("of the other")
        upgrade(engine)

    monkeypatch.setattr(utils, "_upgrade_db", beside_another)
    assert Tracker(tmp_path).client.get_experiment_by_name("of the other")
    assert [one.name for one in tmp_path.iterdir()] == ["mlflow.db"]


def test_an_address_that_mlflow_does_not_know_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "foo://x")
    with pytest.raises(UserError, match="^MLflow at foo://x: "):
        Tracker(tmp_path)
