"""Several processes for one stage, one per device, started and monitored by torch.distributed.elastic.

On one machine `cm stage` is the launcher, for CM_DEVICES=n; on several, torchrun is (docs/operations.md). Either way
each process is a flows.stage_runner.worker. CM_SHARD=1 also shards the weights. The world size is a fact of the
machines and no part of a recipe: it changes results by rounding alone, and a training can resume with another.
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
from flows.distributed.devices import devices_for
from flows.errors import USER_ERROR, StageFailed, UserError
from flows.settings import Settings, variable
from flows.stages.training import StageStopped

SHARD = variable("shard")
SHUTDOWN_VARIABLE, SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"  # seconds to save a state after a signal
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of processes stopped by a signal
CONSEQUENCES = (ranks.EXIT_PEER_LOST, STOPPED[1], -signal.SIGTERM)  # when one rank fails, the others get SIGTERM
RESUMES = "started again, a training resumes from its last saved state"

Facts = Mapping[str, Any]  # the inputs that decide a stage's results, by name


def launch(count: int, entrypoint: Callable[..., Any] | str, *arguments: Any) -> dict[int, Any]:
    """Run a function or a program in `count` processes of this machine; return the function's results by rank.

    Each process reads its rank from torchrun's environment variables (ranks.process_group). If one fails, elastic ends
    the others. Raises elastic's ChildFailedError, and SignalException after a signal, which all processes receive.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())  # the caller reports in one line how a process ended
    elastic.propagate = False
    here: Facts = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1", "run_id": "stage"}
    with TemporaryDirectory() as folder:
        logs = DefaultLogsSpecs(folder)
        config = LaunchConfig(1, 1, count, logs_specs=logs, max_restarts=0, **here)  # DVC and Prefect restart
        return elastic_launch(config, entrypoint)(*arguments)


def launch_stage(stage: str, count: int, program: str, *arguments: str) -> None:
    """Run a stage in `count` processes of this machine, each of which runs `program`.

    Raises:
        StageFailed: a process was lost; the last saved state is whole.
        UserError: the message of a process that refused its input.
        SystemExit: 128 + signal, when a signal stopped the stage; or the code of rank 0, which has reported why.
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
    """Return how a stage ended, from elastic's failures by rank: the first is the cause of the others."""
    rank, cause = min(failures.items(), key=lambda item: (item[1].exitcode in CONSEQUENCES, item[1].timestamp))
    code = cause.exitcode
    if code in STOPPED or (code == USER_ERROR and 0 in failures and failures[0].exitcode == code):
        return SystemExit(code)
    if code == USER_ERROR:
        return UserError(cause.message["message"].partition(": ")[2])
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return StageFailed(f"{stage}: rank {rank} {how}; {RESUMES}")


def processes_for(stage: str, section: Any, count: int | None = None) -> int:
    """Return how many processes of this machine share a stage; one if the recipe's `section` has nothing to compute.

    Raises UserError if the stage cannot run with this `count`, else CM_DEVICES, and CM_SHARD.
    """
    if section is None or getattr(section, "is_imported", False):
        return 1
    train = getattr(section, "train", None)
    said = f"{variable('devices')}={devices_for(stage)}" if count is None else f"{count} processes"
    count = count or devices_for(stage)
    if train is None:
        return count
    if train.batch_size % (count * section.method.batch_multiple):
        apart = f" / method.num_steps={multiple}" if (multiple := section.method.batch_multiple) > 1 else ""
        raise UserError(f"{said}: must divide {stage}.train.batch_size={train.batch_size}{apart}")
    obstacle = why_not_sharded(section.method, train)
    if Settings.read().shard and count > 1 and obstacle:
        raise UserError(f"{SHARD}=1: {stage}.{obstacle}; allowed there: {SHARD}=0")
    return count


@contextmanager
def worker_group(
    stage: str, section: Any, facts: Callable[[], Facts], is_over: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Join the process group if a launcher has started several processes for this stage.

    `facts` decide the stage's results; local rank 0 of each node computes them, and all nodes must agree.
    Raises ProcessLost, and UserError with one message on every rank if nodes differ or the world size does not fit.
    """
    with ranks.process_group(is_over), sharding.sharded_weights(Settings.read().shard):
        if ranks.world_size() > 1:
            processes_for(stage, section, ranks.world_size())
            _compare(stage, facts)
        try:
            yield
        except StageStopped:
            ranks.wait_for_all()  # otherwise elastic might end rank 0's node while it saves the state
            raise


def _compare(stage: str, facts: Callable[[], Facts]) -> None:
    known = {"PyTorch": torch.__version__, "the processor": _processor(), SHARD: int(Settings.read().shard)}
    own: Facts | UserError = known
    if ranks.local_rank() == 0:  # the node's other processes read the same files
        try:
            own = {**known, **facts()}
        except UserError as error:  # such as a missing input: all ranks must raise it
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


def _processor() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()


def hardware() -> str:
    """Return the devices of this stage in words, such as `8 x NVIDIA H100 80GB HBM3` or `CPU (AVX512)`."""
    if not torch.cuda.is_available():
        return f"CPU ({_processor()})"
    count = int(os.environ.get("WORLD_SIZE", 1))
    return f"{count} x {_processor()}" if count > 1 else _processor()
