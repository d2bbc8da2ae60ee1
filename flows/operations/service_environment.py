"""Addresses of the services, and the environment variables of their servers and clients."""

from dataclasses import dataclass
from pathlib import Path

from flows.errors import UserError
from flows.operations.deploy import HEARTBEAT_SECONDS

HOST = "127.0.0.1"
MLFLOW_SCHEMA = "mlflow"  # a PostgreSQL schema: both servers have a table alembic_version


@dataclass(frozen=True)
class Services:
    """Addresses of a workspace's services, running or planned."""

    prefect: str
    """Address of the Prefect server."""
    mlflow: str
    """Address of the MLflow server."""

    @property
    def prefect_api(self) -> str:
        """Address of Prefect's API."""
        return f"{self.prefect}/api"


def client_variables(root: Path, services: Services) -> dict[str, str]:
    """Return the environment variables of a process of this workspace that uses the services."""
    return {
        "PREFECT_API_URL": services.prefect_api,
        "PREFECT_HOME": str(root / ".cm" / "prefect"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "MLFLOW_TRACKING_URI": services.mlflow,
        "DO_NOT_TRACK": "true",  # Prefect, MLflow
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
    }


def server_variables(root: Path, services: Services, database: str | None) -> dict[str, str]:
    """Return the servers' further environment variables, which keep passwords out of command lines."""
    port = services.prefect.rpartition(":")[2]
    prefect_database, mlflow_database = _database_urls(root, database)
    return {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": port,  # --port alone would leave the UI on 4200
        "PREFECT_SERVER_UI_API_URL": services.prefect_api,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": prefect_database,
        # In memory, Prefect's default, a restart would lose the slots' holders and never free the slots.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "MLFLOW_BACKEND_STORE_URI": mlflow_database,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 GB for LLM jobs
    }


def _database_urls(root: Path, database: str | None) -> tuple[str, str]:
    """Return the database URLs of Prefect and MLflow."""
    if database is None:
        return f"sqlite+aiosqlite:///{root / '.cm' / 'prefect' / 'prefect.db'}", f"sqlite:///{root / 'mlflow.db'}"
    from sqlalchemy import make_url

    url = make_url(database)
    schema = {"options": f"-csearch_path={MLFLOW_SCHEMA}"}
    urls = url.set(drivername="postgresql+asyncpg"), url.set(drivername="postgresql+psycopg2", query=schema)
    return urls[0].render_as_string(hide_password=False), urls[1].render_as_string(hide_password=False)


def prepare_database(database: str) -> None:
    """Create MLflow's schema in a PostgreSQL database. Raises UserError if it is unreachable or not PostgreSQL."""
    import psycopg2
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(database)
    except ArgumentError:
        raise UserError("--database: not an address; expected postgresql://user:password@host:port/name") from None
    shown = url.render_as_string(hide_password=True)
    if url.drivername != "postgresql" or not url.database or url.query:
        raise UserError(f"--database {shown}: expected postgresql://user:password@host:port/name")
    try:
        connection = psycopg2.connect(url.render_as_string(hide_password=False))
    except psycopg2.OperationalError as error:
        raise UserError(f"--database {shown}: {' '.join(str(error).split())}") from None
    with connection, connection.cursor() as cursor:
        cursor.execute(f"create schema if not exists {MLFLOW_SCHEMA}")
    connection.close()
