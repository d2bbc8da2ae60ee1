"""`cm alerts`: have the Prefect server send messages when a run fails, waits or is lost, when a disk gets full."""

import os
from argparse import Namespace
from typing import Any

from flows.errors import UserError
from flows.operations.alerts import ALERTS, DEFAULT, chosen, create_alerts
from flows.operations.services import use_running
from flows.workspace.locations import workspace_root


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("alerts", help="have the Prefect server send messages: runs that fail, full disks")
    parser.add_argument("address", metavar="ADDRESS", help="of apprise, such as ntfy://TOPIC")
    help = f"kinds, of {', '.join(ALERTS)}; default: {' '.join(DEFAULT)}"
    parser.add_argument("--on", nargs="+", metavar="KIND", help=help)
    parser.set_defaults(command=alerts)


def alerts(args: Namespace) -> None:
    """Create the automations that are missing, and list all."""
    kinds = chosen(args.on)
    use_running(workspace_root())
    if not os.environ.get("PREFECT_API_URL"):
        raise UserError("no Prefect server: start `cm up`, or set PREFECT_API_URL")
    for name, is_new in create_alerts(args.address, kinds).items():
        print(f"{name}: {'created' if is_new else 'there already, left as it is'}")
    print(f"change or remove them on {os.environ['PREFECT_API_URL'].removesuffix('/api')}/automations")
