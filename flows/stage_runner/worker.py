"""What the other processes of a stage do: compute their rows, and say nothing."""

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from cm_core.parallel import ranks
from flows.distributed.launch import EXIT_PEER_LOST, Place
from flows.errors import USER_ERROR, UserError
from flows.monitor import Monitor
from flows.recipes.recipe import load_active
from flows.stage_runner.run import fill_parameters, stage_function
from flows.stages.training import StageStopped

WRITE_TOGETHER = ("sample",)  # stages whose processes, on the main node, fill the same files


def main(argv: Sequence[str]) -> None:
    """Run stage `argv[0]`, its states in folder `argv[1]`, as the process with the place `argv[2]`, JSON."""
    stage, state_dir, place = argv[0], Path(argv[1]), Place(**json.loads(argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process decides, and all stop after the same step
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    function, root = stage_function(stage), Path.cwd()
    try:
        store = ranks.call(place.host, place.port)
        with TemporaryDirectory() as scratch, ranks.member(store, place.rank, place.count, device=place.device):
            on_main_node = place.rank == place.device
            out_dir = root / "out" / stage if on_main_node and stage in WRITE_TOGETHER else Path(scratch)
            given = {"out_dir": out_dir, "state_dir": state_dir, "monitor": Monitor()}
            with suppress(StageStopped):
                function(**fill_parameters(function, given, load_active(root), root))
    except UserError as error:
        print(f"cm: {error}", file=sys.stderr, flush=True)
        os._exit(USER_ERROR)
    except ranks.ProcessLost:
        os._exit(EXIT_PEER_LOST)  # whoever watches over all of them says which was lost


def _end_with_caller() -> None:
    """End when the process that started this one has: its end of standard input is then closed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
