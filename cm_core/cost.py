"""What a training step costs: floating-point operations and bytes, counted without computing anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cm_core.methods.base import Batch, Method, Models, StepContext, grid_on
from cm_core.model import ModelSpec
from cm_core.networks.layers import Attention, Block

FP32 = 4  # bytes a value
HEADROOM = 3 << 30  # bytes for the libraries' workspaces, the batches and the allocator's fragments
MATMUL_SIZE = 8192  # of the square matrices that measure a GPU's rate
COUNTED_BATCH = 2  # images with which the operations are counted; they grow in proportion


@dataclass(frozen=True)
class StepCost:
    """What training one image, and holding the training, takes."""

    parameters: int
    flops_per_image: float  # of a whole step: all forward and backward passes
    state_bytes: int  # weights, gradients, moments, averages, the target's and the teacher's copies
    image_bytes: int  # activations kept for the backward pass
    checkpointed_image_bytes: int  # the same when blocks compute theirs again

    def peak_bytes(self, batch_size: int, *, checkpointed: bool) -> int:
        """Estimate the largest memory of a step whose passes take `batch_size` images at a time."""
        each = self.checkpointed_image_bytes if checkpointed else self.image_bytes
        return self.state_bytes + batch_size * each + HEADROOM


def step_cost(method: Method, spec: ModelSpec, *, num_emas: int, bytes_per_value: int) -> StepCost:
    """Count what one step of `method` takes on networks of `spec`; `bytes_per_value` is 2 for bf16, 4 for fp32."""
    with _nothing_computed():
        models = _models(method, spec)
        flops = _count_flops(method, spec, models)
        kept, checkpointed = _count_kept_values(models.student, spec)
    parameters = sum(p.numel() for p in models.student.parameters())
    copies = 4 + num_emas + 1 + method.keeps_target + method.needs_teacher  # weights, gradients, 2 moments; 1 for grids
    return StepCost(
        parameters=parameters,
        flops_per_image=flops,
        state_bytes=parameters * (FP32 * copies + bytes_per_value),
        image_bytes=kept * bytes_per_value,
        checkpointed_image_bytes=checkpointed * bytes_per_value,
    )


@contextmanager
def _nothing_computed() -> Iterator[None]:
    """Tensors have shapes alone within this context; none of them may stay in a cache."""
    grid_on.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        grid_on.cache_clear()


def _models(method: Method, spec: ModelSpec) -> Models:
    student, distance = spec.build(), getattr(method, "distance", None)
    # LPIPS is left out: its weights may be a download, and it takes a small part of the operations of a U-Net.
    build = distance.build if distance is not None and distance.kind != "lpips" else lambda _: _mean_square
    return Models(student, student, student, build(spec.image_shape))


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def _count_flops(method: Method, spec: ModelSpec, models: Models) -> float:
    labels = torch.zeros(COUNTED_BATCH, dtype=torch.int64) if spec.num_classes else None
    batch = Batch(torch.empty(COUNTED_BATCH, *spec.image_shape), labels)
    context = StepContext(0, 1, spec.noise, torch.Generator(), 0)
    with FlopCounterMode(display=False) as counter:
        method.loss(models, batch, context).per_sample.mean().backward()
    return counter.get_total_flops() / COUNTED_BATCH


def _count_kept_values(model: nn.Module, spec: ModelSpec) -> tuple[int, int]:
    """Return how many values a forward pass keeps for one image, and how many if each block computes its own again.

    Kept are what norms read and write, a block's input, and queries, keys, values and output of attention.
    """
    kept: dict[nn.Module, int] = {}
    inputs: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, nn.GroupNorm):
            kept[module] = args[0].numel() + out.numel()
        elif isinstance(module, Attention):
            kept[module] = 4 * out.numel()
        elif isinstance(module, Block):
            inputs[module] = args[0].numel()

    handles = [module.register_forward_hook(note) for module in model.modules()]
    model(torch.empty(1, *spec.image_shape), torch.ones(1))
    for handle in handles:
        handle.remove()
    largest = max((sum(kept.get(inner, 0) for inner in block.modules()) for block in inputs), default=0)
    return sum(kept.values()), sum(inputs.values()) + largest


def matmul_rate(device: torch.device, *, repeats: int = 20) -> float:
    """Measure the bf16 matrix product of a GPU, FLOP/s; takes some 50 ms."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        a @ b
    end.record()
    end.synchronize()
    return 2 * MATMUL_SIZE**3 * repeats / (start.elapsed_time(end) / 1000)
