"""A worker in a container: SIGTERM ends it as `cm down` does, so that trainings save their states.

    python -m flows.operations.worker prefect worker start --pool gpu ...

By itself a worker that gets SIGTERM kills its flow runs at once.
"""

import sys
from collections.abc import Sequence

import psutil

from flows.operations.process_trees import end_worker
from flows.operations.services import LOOK_EVERY
from flows.operations.stop_flag import stop_signal
from flows.workspace.process import flow_grace

STOPPED = 0  # the exit code after SIGTERM: an orchestrator asked for it


def main(command: Sequence[str]) -> int:
    """Run a Python module's command until it ends or a signal comes; return its exit code, or STOPPED."""
    with stop_signal() as stop:
        # Its own session: what is sent to the container's process group reaches this process alone.
        worker = psutil.Popen([sys.executable, "-m", *command], start_new_session=True)
        while worker.poll() is None:
            if stop.wait(LOOK_EVERY):
                end_worker(worker.pid, flow_grace())
                worker.wait()
                return STOPPED
        return worker.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
