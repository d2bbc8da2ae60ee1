"""Run as a program: a stage of a folder, as `cm stage` runs it, by as many processes as CM_DEVICES and CM_NODES say.

Prints each step. Beside the states, a file `stop` asks for the end and a file `kill` has process 1 killed.
"""

import os
import signal
import sys
from pathlib import Path

from flows.distributed.launch import several_processes
from flows.errors import StageFailed, UserError
from flows.monitor import Monitor
from flows.recipes.recipe import load_active
from flows.stage_runner import run
from flows.stages.training import StageStopped
from flows.workspace.dvc_files import read_stages
from small_stages import run_small


class Printing(Monitor):
    def __init__(self, states):
        self.states = states

    def metrics(self, values, step):
        print(step, flush=True)
        if step == 5 and (self.states / "kill").exists():
            (self.states / "kill").unlink()
            here = os.getpid()
            (child,) = map(int, Path(f"/proc/{here}/task/{here}/children").read_text().split())
            os.kill(child, signal.SIGKILL)

    def remark(self, text):
        print(text, flush=True)

    def stop_requested(self):
        return (self.states / "stop").exists()


def main(root, stage):
    recipe, states = load_active(root), root / "states"
    states.mkdir(exist_ok=True)
    monitor, facts = Printing(states), lambda: run.facts(read_stages(root)[stage], root, {})
    try:
        with several_processes(stage, getattr(recipe, stage), root, states, facts=facts, monitor=monitor):
            run_small(stage, recipe, root / "out", monitor, state_dir=states)
    except (StageFailed, StageStopped, UserError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
