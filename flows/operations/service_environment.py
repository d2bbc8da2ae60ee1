"""Addresses of the services, and the environment variables of their servers and clients."""

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit

from flows.errors import UserError
from flows.json_log import json_wanted
from flows.operations.deploy import HEARTBEAT_SECONDS
from flows.settings import Settings, variable

HOST = "127.0.0.1"
OF_MLFLOW = ("MLFLOW_TRACKING_URI", variable("mlflow_url"), variable("records"))  # of one server, together
MLFLOW_SCHEMA = "mlflow"  # a PostgreSQL schema: both servers have a table alembic_version


@dataclass(frozen=True)
class Services:
    """Addresses of a workspace's services, running or planned."""

    prefect: str
    """Address of the Prefect server."""
    mlflow: str
    """Address of the MLflow server."""
    metrics: str = ""
    """Address of the metrics for Prometheus; empty where none are served."""
    public: str | None = None
    """Address at which a reverse proxy shows both, Prefect below /prefect and MLflow below /mlflow."""
    records: str | None = None
    """Address of the database that keeps MLflow's records, without its password; None: mlflow.db in the workspace."""

    @property
    def prefect_pages(self) -> str:
        """Address of Prefect's pages for browsers."""
        return f"{self.public}/prefect" if self.public else self.prefect

    @property
    def mlflow_pages(self) -> str:
        """Address of MLflow's pages for browsers."""
        return f"{self.public}/mlflow" if self.public else self.mlflow

    @property
    def prefect_api(self) -> str:
        """Address of Prefect's API."""
        return f"{self.prefect}/api"


def login_file(root: Path) -> Path:
    """Return the file with user and password of this workspace's Prefect server."""
    return root / ".cm" / "prefect-login"


def login(root: Path) -> str:
    """Return `user:password` of this workspace's Prefect server; the first call makes them.

    Raises UserError if other users of the machine may read them.
    """
    path = login_file(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with NamedTemporaryFile("w", dir=path.parent) as file, suppress(FileExistsError):  # made with mode 0600
            file.write(f"cm:{secrets.token_urlsafe(32)}")
            file.flush()
            os.link(file.name, path)  # whole, and of two processes that make it one wins
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path}: other users may read this password; remove the file, a new one is made")
    return path.read_text()


def client_variables(root: Path, services: Services) -> dict[str, str]:
    """Return the environment variables of a process of this workspace that uses the services."""
    return {
        "PREFECT_API_URL": services.prefect_api,
        "PREFECT_API_AUTH_STRING": login(root),
        "PREFECT_HOME": str(root / ".cm" / "prefect"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_UI_URL": services.prefect_pages,
        "MLFLOW_TRACKING_URI": services.mlflow,
        variable("mlflow_url"): services.mlflow_pages,
        variable("records"): services.records or str(root / "mlflow.db"),
        "DO_NOT_TRACK": "true",  # Prefect, MLflow
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        **({"PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json"} if json_wanted() else {}),
    }


def server_variables(root: Path, services: Services, database: str | None) -> dict[str, str]:
    """Return the servers' further environment variables, which keep passwords out of command lines."""
    port, mlflow_port = (address.rpartition(":")[2] for address in (services.prefect, services.mlflow))
    public = urlsplit(services.public or "")
    origin = [f"{public.scheme}://{public.netloc}"] if services.public else []
    prefect_database, mlflow_database = database_urls(root, database)
    return {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": port,  # --port alone would leave the UI on 4200
        "PREFECT_SERVER_UI_API_URL": f"{services.prefect_pages}/api",
        # A deployment can have its worker run commands: no other website may create one, nor anyone without the secret.
        "PREFECT_SERVER_API_AUTH_STRING": login(root),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join([services.prefect, f"http://localhost:{port}", *origin]),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # By default MLflow also takes 10.* and 192.168.*, hence a website 10.evil.example that resolves to 127.0.0.1.
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{mlflow_port},localhost:{mlflow_port}"
        + f",{public.netloc}" * len(origin),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": prefect_database,
        # In memory, Prefect's default, a restart would lose the slots' holders and never free the slots.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        **retention_variables(),
        "MLFLOW_BACKEND_STORE_URI": mlflow_database,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 GB for LLM jobs
        **(_public_variables(root, services.public) if services.public else {}),
    }


def _public_variables(root: Path, public: str) -> dict[str, str]:
    """Return what the servers must know behind a reverse proxy: its path for pages, its host and origin for checks."""
    address = urlsplit(public)
    return {
        "PREFECT_SERVER_UI_SERVE_BASE": f"{address.path}/prefect",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(root / ".cm" / "prefect" / "pages"),  # with that path written in
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"{address.scheme}://{address.netloc}",
    }


def retention_variables() -> dict[str, str]:
    """Return what makes Prefect's server delete flow runs that ended CM_KEEP_RUNS days ago; empty if it is unset.

    Their logs and artifacts go with them; MLflow keeps its runs. Raises UserError if the variable is no number of days.
    """
    days = Settings.read().keep_runs
    if days is None:
        return {}
    service, seconds = "PREFECT_SERVER_SERVICES_DB_VACUUM", days * 24 * 3600
    return {f"{service}_ENABLED": "events,flow_runs", f"{service}_RETENTION_PERIOD": str(seconds)}


def database_urls(root: Path, database: str | None) -> tuple[str, str]:
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
