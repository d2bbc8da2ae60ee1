"""Time what the pipeline costs when nothing is left to compute: the command, `dvc repro`, a flow all cached.

python -m benchmarks.overhead                                # after `make demo`

Each line is the best of three, the first of which brings files into memory. Beside it, what the project promises: less
for a flow where `cm up` runs, which then starts no engine of its own.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import hardware, parser, report
from flows.operations.services import running

ROOT = Path(__file__).parents[1]
CM = [sys.executable, "-m", "flows.cli"]
COMMANDS: dict[str, tuple[Sequence[str], float]] = {
    "cm --help": ([*CM, "--help"], 0.4),
    "cm recipes": ([*CM, "recipes"], 0.4),
    "dvc repro, nothing changed": ([sys.executable, "-m", "dvc", "repro"], 3.0),
    "cm run, all cached": ([*CM, "run", "digits-cd"], 20.0),
}
WITH_SERVERS = {"cm run, all cached": 8.0}  # where `cm up` runs
REPEATS = 3


def timed(command: Sequence[str]) -> float:
    """Return how long a command takes. Raises CalledProcessError, its output printed, where it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    duration = time.perf_counter() - started
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return duration


def open_samples(folder: Path) -> float:
    """Return how long it takes to open 50,000 images of 32 x 32 and to look at one."""
    path = folder / "images.npy"
    np.save(path, np.zeros((50_000, 32, 32, 3), np.uint8))
    started = time.perf_counter()
    np.load(path, mmap_mode="r")[49_999].sum()
    return time.perf_counter() - started


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="these commands alone")
    args = arguments.parse_args(argv)
    rows: list[dict[str, Any]] = []
    promised = WITH_SERVERS if running(ROOT) else {}
    for name in args.only:
        command, promise = COMMANDS[name]
        best = min(timed(command) for _ in range(REPEATS))
        rows.append({"what": name, "seconds": best, "at most": promised.get(name, promise)})
    with tempfile.TemporaryDirectory() as folder:
        opened = min(open_samples(Path(folder)) for _ in range(REPEATS))
    rows.append({"what": "opening 50,000 images", "seconds": opened, "at most": 0.05})
    report(args, hardware(), rows)


if __name__ == "__main__":
    main()
