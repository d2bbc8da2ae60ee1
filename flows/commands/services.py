"""`cm up`, `cm down`, `cm status`, `cm deploy`: the servers and worker of a machine, and their registration."""

import os
import re
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.commands.output import CHARTS, add_json_option, positive, print_json, print_table
from flows.errors import UserError
from flows.operations.checks import check_before_a_run
from flows.operations.service_environment import HOST, Services, login, login_file
from flows.operations.services import (
    LOOK_EVERY,
    METRICS_PORT,
    MLFLOW_PORT,
    PREFECT_PORT,
    ServiceEnded,
    answering,
    down,
    folder_of,
    read_note,
    running,
    up,
)
from flows.operations.stop_flag import stop_signal
from flows.workspace.locations import workspace_root

FAILED = 1


def add_parsers(commands: Any) -> None:
    """Declare the subcommands."""
    parser = commands.add_parser("up", help="run Prefect, MLflow and workers on this machine until Ctrl-C")
    parser.add_argument("--prefect-port", type=port, default=PREFECT_PORT, metavar="PORT", help="0: any free one")
    parser.add_argument("--mlflow-port", type=port, default=MLFLOW_PORT, metavar="PORT", help="0: any free one")
    parser.add_argument("--metrics-port", type=port, default=METRICS_PORT, metavar="PORT", help="0: any free one")
    parser.add_argument("--database", metavar="URL", help="postgresql://user:password@host/name in place of files")
    parser.add_argument(
        "--public-url", type=_address, metavar="URL", help="of a reverse proxy, with its path: https://host/path"
    )
    parser.add_argument("--no-workers", action="store_true", help="the servers alone; `prefect worker start` adds any")
    parser.set_defaults(command=start)

    parser = commands.add_parser("down", help="stop the services that `cm up` runs in any terminal")
    parser.set_defaults(command=stop)

    parser = commands.add_parser("status", help="list the services of `cm up`: which run, which answer")
    add_json_option(parser)
    parser.set_defaults(command=status)

    parser = commands.add_parser("metrics", help="serve the metrics of a machine and its servers for Prometheus")
    parser.add_argument("--host", default=HOST, help=f"address to listen at; default {HOST}")
    parser.add_argument("--port", type=port, default=METRICS_PORT, metavar="PORT", help="0: any free one")
    parser.set_defaults(command=metrics)

    parser = commands.add_parser("deploy", help="register pool, limit and recipes with the server of PREFECT_API_URL")
    parser.add_argument("--pool-type", default="process", metavar="TYPE", help="a template in infra/work-pools")
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="heavy stages at once, all workers' together; without it the limit stays as it is, a new one is 1",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the pool's template and the automations, edited or not"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--folder", type=Path, metavar="PATH", help="the workspace on the workers; without it, this one")
    place.add_argument("--repository", metavar="URL", help="a git repository that workers clone instead")
    parser.add_argument("--branch", default="main", metavar="NAME", help="of the repository")
    parser.set_defaults(command=register)


def port(text: str) -> int:
    """Read the number of a port from the command line."""
    if not text.isdecimal() or int(text) > 65535:
        raise ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def _address(text: str) -> str:
    if not re.fullmatch(r"https?://[\w.:-]+(/[\w./~-]*)?", text):
        raise ArgumentTypeError(f"{text!r} is not an address, https://host or https://host/path")
    return text.rstrip("/")


def start(args: Namespace) -> int:
    """Run the services; return 1 if one of them exits unexpectedly."""
    root = workspace_root()
    check_before_a_run()
    try:
        up(
            root,
            prefect_port=args.prefect_port,
            mlflow_port=args.mlflow_port,
            metrics_port=args.metrics_port,
            database=args.database,
            worker=not args.no_workers,
            public=args.public_url,
            on_start=lambda name: print(f"starting {name}", flush=True),
            on_ready=lambda services: print(_welcome(services, root), flush=True),
        )
    except ServiceEnded as error:
        print(f"cm: {error}", file=sys.stderr)
        return FAILED
    print("stopped")
    return 0


def _welcome(services: Services, root: Path) -> str:
    from flows.tracking.tracker import Tracker

    experiment = Tracker(root).experiment_id  # made here if it is new, so that the link leads somewhere
    shown = login(root) if sys.stdout.isatty() else f"the line in {login_file(root)}"  # logs are for others as well
    return f"""Prefect  {services.prefect_pages}/v2/deployments
         asks each browser once for its password: {shown}
MLflow   {services.mlflow_pages}/#/experiments/{experiment}/runs{CHARTS}
metrics  {services.metrics}, for Prometheus, by the same password
logs     {folder_of(root) / "logs"}
Ctrl-C or `cm down` stops all of it; trainings save their state and go on with the next `cm up`"""


def stop(args: Namespace) -> None:
    """Stop the services."""
    print("stopped" if down(workspace_root()) else "nothing runs")


def metrics(args: Namespace) -> None:
    """Serve metrics until SIGINT or SIGTERM."""
    from flows.operations.metrics_server import observed

    with stop_signal() as stop, observed(workspace_root(), args.host, args.port) as observe:
        while not stop.wait(LOOK_EVERY):
            observe()


def status(args: Namespace) -> int:
    """Print the services; return 1 unless all run and respond."""
    found = read_status()
    if args.json:
        print_json(found)
    elif not found["running"]:
        print("nothing runs; `cm up` starts Prefect, MLflow and workers")
    else:
        services = found["services"].items()
        rows = [(name, _state(service), service.get("url", ""), service["log"]) for name, service in services]
        print_table(("service", "state", "address", "log"), rows)
    return 0 if found["ok"] else FAILED


def _state(service: Mapping[str, Any]) -> str:
    if not service["alive"]:
        return "ENDED"
    if "answers" not in service:
        return "runs"
    return "answers" if service["answers"] else "no answer"


def read_status() -> dict[str, Any]:
    """Return the services in the form of `cm status --json`."""
    import psutil

    root = workspace_root()
    services = running(root)
    if services is None:
        return {"ok": False, "running": False, "services": {}}
    answers = answering(services)
    found = {
        name: {"pid": child["pid"], "alive": psutil.pid_exists(child["pid"]), "log": child["log"]}
        for name, child in read_note(root)["children"].items()
    }
    for name, url in (("prefect", services.prefect), ("mlflow", services.mlflow)):
        found[name] |= {"url": url, "answers": answers[name]}
    sound = all(service["alive"] and service.get("answers", True) for service in found.values())
    return {"ok": sound, "running": True, "services": found}


def register(args: Namespace) -> None:
    """Register and list all deployments."""
    if not os.environ.get("PREFECT_API_URL"):
        raise UserError("PREFECT_API_URL is not set; `cm up` registers with its own server by itself")
    from flows.operations.deploy import deploy, from_repository, in_folder

    root = workspace_root()
    steps = from_repository(args.repository, args.branch) if args.repository else in_folder(args.folder or root)
    names = deploy(root, gpus=args.gpus, pool_type=args.pool_type, pull_steps=steps, overwrite=args.overwrite)
    print("\n".join([*names, f"registered with {os.environ['PREFECT_API_URL']}"]))
