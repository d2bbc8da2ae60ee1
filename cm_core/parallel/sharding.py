"""A training's weights sharded over its ranks by PyTorch's FSDP2; no other module depends on it.

Each rank holds its shards of weights, gradients, moments and EMAs. A block gathers its weights while it computes and
reduce-scatters the gradients. The results are those of whole weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cm_core.networks.blocks import ResidualBlock
from cm_core.parallel import ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_wanted: ContextVar[bool] = ContextVar("wanted", default=False)


@contextmanager
def sharded_weights(wanted: bool = True) -> Iterator[None]:
    """Shard the weights of the trainings within this context: a fact of the machines and no part of a recipe."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def is_wanted() -> bool:
    """Whether this training is to shard its weights; never with one rank."""
    return _wanted.get() and ranks.world_size() > 1


def shard(net: nn.Module, device: torch.device) -> None:
    """Shard `net`, which is on the CPU, onto `device`, block by block, so that no device holds all weights.

    Rank 0's weights count, bitwise. Copy the net before; its memory layout stays that of the CPU.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    net.load_state_dict(dict(ranks.broadcast_from_main(net.state_dict())))
    assert dist.group.WORLD is not None, "the caller has joined the processes"
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    for module in [*(module for module in net.modules() if isinstance(module, ResidualBlock)), net]:
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # sum, not mean: ranks split the rows, not the loss
        sharded.set_force_sum_reduction_for_comms(True)  # plain sums, which gloo supports
    if device.type == "cuda":
        net.register_forward_pre_hook(_with_channels_last)


def _with_channels_last(_: nn.Module, args: tuple[Tensor, *tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """Convert images to the kernels' memory layout, which whole weights would impose: sharded ones are contiguous."""
    image, *others = args
    return image.contiguous(memory_format=torch.channels_last) if image.ndim == 4 else image, *others


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether this tensor is sharded."""
    return hasattr(tensor, "full_tensor")  # a DTensor; importing that class takes a second


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, any other unchanged; a collective call."""
    if is_sharded(tensor):
        with ranks.exchange():
            return tensor.full_tensor()
    return tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor; a whole tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors, those that were sharded on the CPU and on rank 0 alone; a collective call."""
    found = {}
    for name, tensor in tensors.items():
        together = whole(tensor.detach())
        if not is_sharded(tensor):
            found[name] = together
        elif ranks.is_main():
            found[name] = together.cpu()
    return found


def put(place: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, present on every rank, into one that may be sharded, without communication."""
    if is_sharded(place):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)
    with torch.no_grad():
        place.copy_(tensor)
