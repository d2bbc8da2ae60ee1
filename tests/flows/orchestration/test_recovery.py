"""A flow run whose worker is killed."""

import os
import signal
import subprocess
import sys

import pytest

from miniature import REPOSITORY
from processes import runs, wait_until

WORKER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
# A flow that is asked to stop and does not.
FLOW = """
import os, signal, time
from flows.orchestration import recovery

recovery.LOOK_EVERY = 0.05
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
recovery.end_with_worker()
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_flow_whose_worker_is_killed_is_asked_to_stop_and_then_killed():
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CM_GRACE": "1"}
    worker = subprocess.Popen([sys.executable, "-c", WORKER, FLOW], env=env, stdout=subprocess.PIPE, text=True)
    with worker:
        pid = int(worker.stdout.readline())
        worker.send_signal(signal.SIGKILL)
        assert worker.stdout.readline() == "asked\n"
        wait_until(lambda: not runs(pid))
