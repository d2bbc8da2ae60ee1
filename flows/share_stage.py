"""What the other processes of a stage do: compute their rows, and say nothing. `flows.launch` starts them."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from cm_core import ranks
from flows.monitor import Monitor
from flows.recipe import load_active
from flows.run_stage import fill_parameters, stage_function
from flows.stages.training import StageStopped

WRITE_TOGETHER = ("sample",)  # stages whose processes fill the same files; of the others the first alone writes


def main(argv: Sequence[str]) -> None:
    """Run stage `argv[0]`, its states in folder `argv[1]`, as process `argv[2]` of `argv[3]`, met at port `argv[4]`."""
    stage, state_dir, rank, count, port = argv
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process decides, and all stop after the same step
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_first, daemon=True).start()
    function, root = stage_function(stage), Path.cwd()
    with TemporaryDirectory() as scratch, ranks.joined(int(rank), int(count), int(port)):
        out_dir = root / "out" / stage if stage in WRITE_TOGETHER else Path(scratch)
        given = {"out_dir": out_dir, "state_dir": Path(state_dir), "monitor": Monitor()}
        with suppress(StageStopped):
            function(**fill_parameters(function, given, load_active(root), root))


def _end_with_first() -> None:
    """End when the first process has: its end of standard input is then closed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
