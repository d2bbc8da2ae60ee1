"""MLflow's database: made whole, and of the installed MLflow, which would upgrade an older one without a word."""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.errors import UserError


def check_database(uri: str) -> None:
    """Raise UserError for a database that another version of MLflow wrote; nothing of it is changed.

    An address of a server, or of a database without MLflow's tables, is accepted.
    """
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow.store.db import utils

    found = _schema_version(uri)
    if found is None:
        return
    script = ScriptDirectory.from_config(utils._get_alembic_config(uri))  # there is no public way to ask
    if found == script.get_current_head():
        return
    known = False
    with suppress(CommandError):  # for an unknown revision
        known = script.get_revision(found) is not None
    remedy = "back it up, then `mlflow db upgrade` with its address" if known else "install the MLflow that wrote it"
    age = "an older" if known else "a newer"
    raise UserError(
        f"{_shown(uri)}: {age} MLflow than {mlflow.__version__} wrote this database (schema {found}); {remedy}"
    )


def make_database(uri: str) -> None:
    """Make MLflow's tables in a SQLite file that is not there yet; any other address is left alone.

    MLflow itself makes an old release's tables and upgrades them step by step, for a minute on a loaded machine. A
    process that meets such a file, or another's that was killed, would take it for an older MLflow's. So the file is
    made aside and gets its name when it is whole; of processes that make it at once, one wins. Raises UserError where
    it cannot be written.
    """
    path = _sqlite_file(uri)
    if path is None or path.exists():
        return
    from mlflow.store.db import utils
    from sqlalchemy import create_engine, make_url

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{path.name}-", dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            engine = create_engine(make_url(uri).set(database=str(made)))
            utils._initialize_tables(engine)  # what MLflow's own store begins with
            engine.dispose()
            with suppress(FileExistsError):
                os.link(made, path)
    except OSError as error:
        raise UserError(f"MLflow at {_shown(uri)}: {error}") from error


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite database; None for any other address."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:  # a folder
        return None
    return (
        Path(url.database)
        if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
        else None
    )


def _schema_version(uri: str) -> str | None:
    """Return the revision of MLflow's tables; None where there are none, or MLflow itself must say what is wrong."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError

    if (path := _sqlite_file(uri)) and not path.is_file():  # connecting would make it
        return None
    try:
        engine = create_engine(uri)
        with engine.connect() as connection:
            return connection.execute(text("select version_num from alembic_version")).scalar()
    except SQLAlchemyError:  # a folder, a server's address, no such table, no answer
        return None


def _shown(uri: str) -> str:
    from sqlalchemy import make_url

    return make_url(uri).render_as_string(hide_password=True)
