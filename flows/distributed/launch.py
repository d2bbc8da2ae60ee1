"""Several processes for one stage, a device each: torch.distributed.elastic starts them and watches over them.

On one machine `cm stage` is the launcher, for CM_DEVICES=n; on several, torchrun is (docs/operations.md). Either way
each process is a flows.stage_runner.worker. CM_SHARD=1 divides the weights among them, too. Numbers of processes are
facts of the machines and no part of a recipe: results differ by rounding alone, and a training goes on with others.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cm_core.parallel import ranks, sharding
from cm_core.training.config import why_not_sharded
from flows.distributed.devices import COUNT_VARIABLE, devices_for
from flows.errors import USER_ERROR, StageFailed, UserError
from flows.settings import Settings
from flows.stages.training import StageStopped

SHUTDOWN_VARIABLE, SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"  # seconds to save a state after a signal
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of processes that were asked to end
CONSEQUENCES = (ranks.EXIT_PEER_LOST, STOPPED[1], -signal.SIGTERM)  # when one has failed, others get SIGTERM
RESUMES = "started again, a training goes on from its last saved state"

Facts = Mapping[str, Any]  # what decides the results of a stage, by name


def launch(count: int, entrypoint: Callable[..., Any] | str, *arguments: Any) -> dict[int, Any]:
    """Run a function or a program in `count` processes of this machine; return what the function does, by rank.

    A process finds its place in torchrun's environment variables (ranks.process_group). When one fails the others are
    ended. Raises elastic's ChildFailedError, and SignalException when this process gets a signal, which all get.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())  # how a process ended is said by the caller, in one line
    elastic.propagate = False
    here: Facts = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1", "run_id": "stage"}
    with TemporaryDirectory() as folder:
        logs = DefaultLogsSpecs(folder)
        config = LaunchConfig(1, 1, count, logs_specs=logs, max_restarts=0, **here)  # DVC and Prefect start again
        return elastic_launch(config, entrypoint)(*arguments)


def launch_stage(stage: str, count: int, program: str, *arguments: str) -> None:
    """Run a stage by `count` processes of this machine, each of which runs `program`.

    Raises:
        StageFailed: a process was lost; the last saved state is whole.
        UserError: what a process said that refused.
        SystemExit: 128 + signal, when the stage was asked to end; or with the code of rank 0, which has said why.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault(SHUTDOWN_VARIABLE, SHUTDOWN)
    try:
        launch(count, program, *arguments)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        raise _ending(stage, error.failures) from None


def _ending(stage: str, failures: Mapping[int, Any]) -> BaseException:
    """Return how a stage ends by elastic's failures of its ranks: the first counts, others are a consequence."""
    rank, cause = min(failures.items(), key=lambda item: (item[1].exitcode in CONSEQUENCES, item[1].timestamp))
    code = cause.exitcode
    if code in STOPPED or (code == USER_ERROR and 0 in failures and failures[0].exitcode == code):
        return SystemExit(code)
    if code == USER_ERROR:
        return UserError(cause.message["message"].partition(": ")[2])
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return StageFailed(f"{stage}: rank {rank} {how}; {RESUMES}")


def processes_for(stage: str, section: Any, count: int | None = None) -> int:
    """Return how many processes of this machine share a stage; one where the recipe's `section` is empty.

    Raises UserError for a `count`, or else for a CM_DEVICES, and a CM_SHARD with which the stage cannot run.
    """
    if section is None:
        return 1
    train = getattr(section, "train", None)
    said = f"{COUNT_VARIABLE}={devices_for(stage)}" if count is None else f"{count} processes"
    count = count or devices_for(stage)
    if train is None:
        return count
    if train.batch_size % count:
        raise UserError(f"{said}: must divide {stage}.train.batch_size={train.batch_size}")
    obstacle = why_not_sharded(section.method, train)
    if Settings.read().shard and count > 1 and obstacle:
        raise UserError(f"{sharding.VARIABLE}=1: {stage}.{obstacle}; allowed there: {sharding.VARIABLE}=0")
    return count


@contextmanager
def worker_group(
    stage: str, section: Any, facts: Callable[[], Facts], is_over: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Be one of the processes that share a stage, where a launcher has started several.

    `facts` decide what the stage makes; one process of each node asks for them, and all must have the same.

    Raises:
        UserError: in every process, in the same words: nodes differ, or the stage cannot be shared by so many.
        ProcessLost: processes are gone.
    """
    with ranks.process_group(is_over):
        if ranks.world_size() > 1:
            processes_for(stage, section, ranks.world_size())
            _compare(stage, facts)
        try:
            yield
        except StageStopped:
            ranks.wait_for_all()  # else the node of rank 0 might be ended with the others while it saves the state
            raise


def _compare(stage: str, facts: Callable[[], Facts]) -> None:
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    shards = os.environ.get(sharding.VARIABLE, "0")
    known = {"PyTorch": torch.__version__, "the processor": processor, sharding.VARIABLE: shards}
    own: Facts | UserError = known
    if ranks.local_rank() == 0:  # the other processes of the node have its files, too
        try:
            own = {**known, **facts()}
        except UserError as error:  # such as a missing input: all must hear of it
            own = error
    everyone = ranks.all_gather((socket.gethostname(), ranks.local_rank(), own))
    main_host, _, ours = everyone[0]
    for rank, (host, local_rank, theirs) in enumerate(everyone):
        if isinstance(theirs, UserError):
            raise UserError(f"{stage}: rank {rank} ({host}): {theirs}")
        for name in sorted(theirs if local_rank else ours.keys() | theirs.keys()):
            here, there = ours.get(name, "missing"), theirs.get(name, "missing")
            if here != there:
                raise UserError(
                    f"{stage}: {name} is {there} on rank {rank} ({host}) and {here} on rank 0 ({main_host}); "
                    "all must compute the same"
                )
