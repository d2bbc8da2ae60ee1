"""Prefect inside this process: no server to start, no account, no network; its console shows only the pipeline."""

import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prefect
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.context import get_run_context
from prefect.events.worker import EventsWorker
from prefect.exceptions import MissingContextError, PrefectHTTPStatusError
from prefect.logging.handlers import APILogHandler, APILogWorker, PrefectConsoleHandler
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_SERVER_API_BASE_PATH,
    PREFECT_SERVER_CORS_ALLOWED_ORIGINS,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    PREFECT_SERVER_DATABASE_MIGRATE_ON_START,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED,
    temporary_settings,
)

import flows
from flows.atomic import reserve_port
from flows.environment import take_space
from flows.errors import UserError
from flows.json_log import JsonFormatter, json_wanted

PREFECT = Path(prefect.__file__).parent
# Of this process's server: what another website or user deployed there, the workers of the next `cm up` would run.
LOGIN = f"cm:{secrets.token_urlsafe(32)}"
_served: list[Path] = []  # the folder of the history that this process's server keeps
STARTUP_SECONDS = 120  # the first start creates the database; Prefect's default of 20 is too short on a loaded machine


@contextmanager
def embedded_prefect(root: Path) -> Iterator[None]:
    """Run flows without a server, their history under .cm/prefect of the workspace `root`.

    PREFECT_HOME, if set, holds the history instead; PREFECT_API_URL, if set, is the server to use.
    """
    os.environ.setdefault("DO_NOT_TRACK", "true")
    _plain_console()
    if PREFECT_API_URL.value():
        _refuse_silent_server()
        yield
        return
    home = Path(PREFECT_HOME.value()) if os.environ.get("PREFECT_HOME") else root / ".cm" / "prefect"
    _check_space(home)
    settings: dict[Any, Any] = {
        PREFECT_HOME: home,
        PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{home / 'prefect.db'}",  # not another server's
        PREFECT_SERVER_DATABASE_MIGRATE_ON_START: True,
        PREFECT_API_AUTH_STRING: LOGIN,
        PREFECT_SERVER_API_AUTH_STRING: LOGIN,
        PREFECT_SERVER_CORS_ALLOWED_ORIGINS: "",
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True,  # profiles that Prefect 2 wrote, and some people's, forbid it
        PREFECT_SERVER_API_BASE_PATH: "/api",
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: STARTUP_SECONDS,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        # Disable the automations of `cm up`: no worker is here to restart a run, and they kept SQLite locked.
        PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED: False,
    }
    with temporary_settings(settings):
        _start_server()
        try:
            yield
        except PrefectHTTPStatusError:
            _check_space(home)  # the server's answer does not say why it failed
            raise


def _check_space(home: Path) -> None:
    """Raise UserError unless a history can be written into this folder."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        take_space(home)
    except OSError as error:
        raise UserError(f"{home}: {error.strerror}; Prefect keeps the history of runs there") from error


def log_to_prefect() -> None:
    """Send our log lines to the flow run's page, without configuration by a worker."""
    logging.getLogger("prefect.flow_runs").addFilter(_says_something)
    logger = logging.getLogger(flows.__name__)
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, APILogHandler) for handler in logger.handlers):
        logger.addHandler(APILogHandler())
        logger.handlers[-1].addFilter(_is_of_a_run)
    if json_wanted():
        _log_json()


def _log_json() -> None:
    """Write JSON where Prefect would write to the console; its own handler wraps and marks up what it prints."""
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, PrefectConsoleHandler)]:
        plain = logging.StreamHandler(sys.stderr)
        plain.setLevel(handler.level)
        plain.setFormatter(JsonFormatter(lambda: {"run": runtime.flow_run.id, "stage": runtime.task_run.name}))
        for one in handler.filters:
            plain.addFilter(one)
        root.removeHandler(handler)
        root.addHandler(plain)


def _says_something(record: logging.LogRecord) -> bool:
    """Whether a line is neither the engine's last word on a cancelled flow run, whose final state its runner sets, nor
    the traceback of a refusal, whose line is the state's message."""
    refused = record.exc_info is not None and isinstance(record.exc_info[1], UserError)
    return not refused and record.getMessage() != "Finished in state Running()"


def _is_of_a_run(_: logging.LogRecord) -> bool:
    """Whether Prefect knows the current run; threads of our own may have none."""
    try:
        return bool(get_run_context())
    except MissingContextError:
        return False


def _start_server() -> None:
    """Start Prefect's temporary server immune to Ctrl-C, which a terminal sends to it as well.

    An interrupted flow needs it until the end; it stops with this process, or when another workspace is to have the
    history: Prefect would use the server that runs, with the first one's. Of a port that Prefect chooses itself a
    server of another run may be first, which it would take for its own.
    """
    from prefect.server.api.server import SubprocessASGIServer

    server, home = SubprocessASGIServer(), PREFECT_HOME.value()
    if server.running and _served != [home]:
        for sender in (APILogWorker, EventsWorker):
            sender.drain_all()
        server.stop()
        server = SubprocessASGIServer()
    _served[:] = [home]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the server's process
    try:
        with reserve_port("127.0.0.1") as kept:
            if not server.running:
                server.port = kept.getsockname()[1]
            with get_client(sync_client=True) as client:
                client.api_healthcheck()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _refuse_silent_server() -> None:
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem:
        raise UserError(
            f"PREFECT_API_URL={PREFECT_API_URL.value()}: no server answers ({problem}); start it or unset it"
        )


def _plain_console() -> None:
    """Show the pipeline's log lines and warnings on the console until the process ends; errors are raised instead."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(_is_ours)
            handler.setFormatter(logging.Formatter("%(message)s"))


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a record comes from this project, or is a warning from outside Prefect's engine."""
    if not Path(record.pathname).is_relative_to(PREFECT):
        return True
    return record.levelno >= logging.WARNING and record.module not in ("flow_engine", "task_engine")
