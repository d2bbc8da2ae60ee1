"""One process of a shared stage, started once per device by torchrun or by `cm stage`."""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from cm_core.parallel import ranks
from flows.distributed.launch import RESUMES
from flows.environment import adopt
from flows.errors import USER_ERROR, UserError
from flows.stage_runner.run import run_stage, share_stage


def main(argv: Sequence[str]) -> int:
    """Run the stage `argv[0]` of the workspace in the current folder and return the exit code.

    Rank 0 acts as `cm stage`, the others only compute. An error common to all ranks is printed once per node.
    """
    adopt()
    stage, root = argv[0], Path.cwd()
    several_nodes = int(os.environ["GROUP_WORLD_SIZE"]) > 1
    try:
        record(run_stage if os.environ["RANK"] == "0" else share_stage)(stage, root)
        return 0
    except UserError as error:
        code, line = USER_ERROR, str(error)
    except ranks.ProcessLost as error:  # on one node the launcher knows its exit code
        code, line = ranks.EXIT_PEER_LOST, f"{stage}: {error}; {RESUMES}" if several_nodes else ""
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    if line and ranks.local_rank() == 0:
        print(f"cm: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code:
        os._exit(exit_code)  # a regular exit would abort, with another code, on the broken group's threads
