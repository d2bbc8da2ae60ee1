"""A training's weights divided among its processes, by PyTorch's FSDP2; no other module knows how.

Of weights, gradients, moments and averages a process holds its part. A block gathers its weights for as long as it
computes, and hands everybody the sum of the gradients of their part. The numbers are those of whole weights.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cm_core.networks.layers import Block
from cm_core.parallel import ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

VARIABLE = "CM_SHARD"  # 1: divide the weights; a fact of the machines and no part of a recipe


def is_wanted(processes: int | None = None) -> bool:
    """Whether weights are to be divided among so many processes, or those of this training."""
    return (processes or ranks.world_size()) > 1 and os.environ.get(VARIABLE) == "1"


def shard(net: nn.Module, device: torch.device) -> None:
    """Divide the weights of `net`, which is on the CPU, on `device`: block by block, so that no device holds all.

    The net is the first process's to the bit. It must be copied before; its layout stays that of the CPU.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    net.load_state_dict(dict(ranks.broadcast_from_main(net.state_dict())))
    assert dist.group.WORLD is not None, "the caller has joined the processes"
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    for module in [*(module for module in net.modules() if isinstance(module, Block)), net]:
        divided = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        divided.set_gradient_divide_factor(1.0)  # a sum: passes are divided, not the loss
        divided.set_force_sum_reduction_for_comms(True)  # and a plain one, which gloo can do
    if device.type == "cuda":
        net.register_forward_pre_hook(_with_channels_last)


def _with_channels_last(_: nn.Module, args: tuple[Tensor, *tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """Bring images into the layout of the kernels, which whole weights would impose: divided ones are contiguous."""
    image, *others = args
    return image.contiguous(memory_format=torch.channels_last) if image.ndim == 4 else image, *others


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether processes hold a part each of this tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor; to import that class takes a second


def whole(tensor: Tensor) -> Tensor:
    """Return a divided tensor whole, any other as it is; all processes must call."""
    if is_sharded(tensor):
        with ranks.exchange():
            return tensor.full_tensor()
    return tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of it where it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors, those that were divided on the CPU and in the first process alone; all must call."""
    found = {}
    for name, tensor in tensors.items():
        together = whole(tensor.detach())
        if not is_sharded(tensor):
            found[name] = together
        elif ranks.is_main():
            found[name] = together.cpu()
    return found


def put(place: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be divided; nothing is sent."""
    if is_sharded(place):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)
    with torch.no_grad():
        place.copy_(tensor)
