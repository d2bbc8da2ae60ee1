"""`cm play`: a local page on which one draws images, edits pictures and gets the command that does the same."""

import os
import socket
import threading
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flows.commands.drawing import MODEL, is_model
from flows.commands.services import port
from flows.errors import UserError

HOST = "127.0.0.1"


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("play", help="open a local page that draws images and edits pictures")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{MODEL}; the page offers all registered ones, too")
    parser.add_argument("--port", type=port, default=0, metavar="PORT", help="default 0: any free one")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.set_defaults(command=play)


def play(args: Namespace) -> None:
    """Serve the page until Ctrl-C."""
    import webbrowser

    from flows.play.server import make_app, make_server
    from flows.play.studio import Studio

    if args.model and not is_model(args.model):
        raise UserError(f"{args.model}: holds no model.json; MODEL is {MODEL}")
    with TemporaryDirectory(prefix="cm-play-") as scratch, listen(args.port) as listener:
        studio = Studio(Path(scratch), args.model)
        address = f"http://{HOST}:{listener.getsockname()[1]}"
        print(f"{address}\nCtrl-C stops it", flush=True)
        if args.open:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            make_server(make_app(studio)).run(sockets=[listener])
    print("stopped", flush=True)
    if threading.active_count() > 1:  # a network call cannot be interrupted, and Python aborts if it exits during one
        os._exit(0)


def listen(number: int) -> socket.socket:
    """Return a socket that listens on the loopback interface. Raises UserError if the port is taken."""
    try:
        return socket.create_server((HOST, number))
    except OSError as error:
        raise UserError(f"--port {number}: {os.strerror(error.errno or 0)}") from error
