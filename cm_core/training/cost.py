"""Cost of a training step: floating-point operations and bytes, counted without computing anything."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cm_core.methods.base import Batch, Method, Models, StepContext, grid_on
from cm_core.model import ModelSpec
from cm_core.networks.blocks import ResidualBlock
from cm_core.networks.dropout import seed_on
from cm_core.networks.edm2 import MPAttention
from cm_core.networks.layers import Attention
from cm_core.networks.magnitude import MPConv
from cm_core.parallel import ranks
from cm_core.training.config import Train, why_not_sharded

FP32 = 4  # bytes per value
HEADROOM = 3 << 30  # bytes for the libraries' workspaces, the batches and fragmentation
MATMUL_SIZE = 8192  # side of the square matrices that measure a GPU's rate
KEPT_BY_MP_CONV = 3  # times its input: that itself, and the inputs of the SiLU and the product or sum before it
COUNTED_BATCH = 2  # images, or a method's multiples of them, for counting operations, which grow in proportion


@dataclass(frozen=True)
class StepCost:
    """Operations per training image, and memory of the training."""

    parameters: int
    flops_per_image: float  # of a whole step: all forward and backward passes
    forward_flops: float  # one forward pass
    state_bytes: int  # weights, gradients, moments, EMAs, the target's and the teacher's copies
    whole_bytes: int  # of these, never sharded: the grids' copy and half-precision weights
    image_bytes: int  # activations kept for the backward pass
    checkpointed_image_bytes: int  # the same with activation checkpointing

    def peak_bytes(self, train: Train) -> int:
        """Estimate the peak memory of a step, without the data set's images and LPIPS."""
        each = self.checkpointed_image_bytes if train.checkpoint_activations else self.image_bytes
        return self.state_bytes + -(-train.batch_size // train.accumulate) * each + HEADROOM

    def peak_bytes_among(self, processes: int, train: Train, *, sharded: bool) -> int:
        """Estimate it for rank 0 of several, which split the batch and optionally shard the weights."""
        divisor = processes if sharded else 1
        part = -(-(self.state_bytes - self.whole_bytes) // divisor)
        own = train.model_copy(update={"batch_size": train.batch_size // processes})
        return replace(self, state_bytes=self.whole_bytes + part).peak_bytes(own)

    def flops_per_train_image(self, train: Train) -> float:
        """Return the operations including recomputation: one more forward pass for each way of saving memory."""
        ways = train.checkpoint_activations + (train.accumulate > 1)
        return self.flops_per_image + ways * self.forward_flops


def advice(
    cost: StepCost,
    method: Method,
    train: Train,
    memory: int,
    section: str,
    processes: int = 1,
    *,
    sharded: bool = False,
) -> str | None:
    """Return how to fit a training into `memory` bytes, or that nothing helps; None if it fits.

    `processes` ranks split the batch, and the weights if `sharded`.
    """
    needed = cost.peak_bytes_among(processes, train, sharded=sharded)
    if needed <= memory:
        return None
    problem = f"does not fit: about {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}"
    can_shard = processes > 1 and not sharded and why_not_sharded(method, train) is None
    if can_shard and cost.peak_bytes_among(processes, train, sharded=True) <= memory:
        return f"{problem}; it would with the environment variable CM_SHARD=1"
    rows = train.batch_size // processes
    for checkpointed in (False, True):
        for parts in range(1, rows + 1):
            if rows % parts == 0:
                change = {"accumulate": parts, "checkpoint_activations": checkpointed}
                if cost.peak_bytes_among(processes, train.model_copy(update=change), sharded=sharded) <= memory:
                    asked = f"{section}.train.accumulate={parts}"
                    asked += f" {section}.train.checkpoint_activations=true" if checkpointed else ""
                    return f"{problem}; it would with {asked}"
    return f"{problem}, not even one image at a time; take a smaller network"


def step_cost(method: Method, spec: ModelSpec, *, num_emas: int, bytes_per_value: int) -> StepCost:
    """Count the cost of one step of `method` on networks of `spec`; `bytes_per_value` is 2 for bf16, 4 for fp32."""
    if hasattr(spec.network, "dropout"):  # whose masks count nothing, and would take most of the time
        spec = spec.model_copy(update={"network": spec.network.model_copy(update={"dropout": 0.0})})
    with _nothing_computed():
        parameters = sum(p.numel() for p in spec.build().parameters())
        models = _models(method, spec)
        flops, forward_flops = _count_flops(method, spec, models)
        passes = _count_kept_passes(method, spec, models)
        kept, checkpointed = (passes * values for values in _count_kept_values(models.student, spec))
        heads = 0 if models.discriminator is None else sum(p.numel() for p in models.discriminator.parameters())
    trained = 2 if method.cycle > 1 else 1  # each with weights, gradients and 2 moments; 1 for grids
    copies = 4 * trained + num_emas + 1 + method.keeps_target + method.needs_teacher + method.needs_base
    return StepCost(
        parameters=parameters,
        flops_per_image=flops,
        forward_flops=forward_flops,
        state_bytes=parameters * (FP32 * copies + bytes_per_value) + 4 * FP32 * heads,
        whole_bytes=parameters * (FP32 + bytes_per_value),
        image_bytes=kept * bytes_per_value,
        checkpointed_image_bytes=checkpointed * bytes_per_value,
    )


@contextmanager
def _nothing_computed() -> Iterator[None]:
    """Tensors have shapes but no data within this context; none of them may stay in a cache."""
    grid_on.cache_clear()
    seed_on(torch.device("cpu"))  # made outside, to be a real tensor for the trainings that come after
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        grid_on.cache_clear()


def _models(method: Method, spec: ModelSpec) -> Models:
    student, frozen, distance = spec.build(), spec.build().requires_grad_(False), getattr(method, "distance", None)
    for norm in (module for model in (student, frozen) for module in model.modules()):
        if isinstance(norm, nn.GroupNorm):  # which count nothing; PyTorch puts their shapes' tangents on a wrong device
            norm.register_parameter("weight", None)
            norm.register_parameter("bias", None)
    # LPIPS is left out: its weights may need a download, and it is a small part of a U-Net's operations.
    build = distance.build if distance is not None and distance.kind != "lpips" else lambda _: _mean_square
    models = Models(student, student, frozen, build(spec.image_shape), method.build_weighting(), base=frozen)
    if method.cycle == 1:
        return models
    return replace(models, score=frozen, discriminator=method.build_discriminator(frozen, spec.image_shape))


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def _count_flops(method: Method, spec: ModelSpec, models: Models) -> tuple[float, float]:
    """Return the operations per image of a step, the mean over a cycle, and of a forward pass."""
    flops, images = 0.0, COUNTED_BATCH * method.batch_multiple
    for step, count in enumerate((1, method.cycle - 1)[: method.cycle]):
        trained = models if step == 0 else replace(models, score=models.student)  # of the student's size
        with FlopCounterMode(display=False) as counter:
            _loss(method, spec, trained, step).mean().backward()
        flops += count / method.cycle * counter.get_total_flops() / images
    batch = _counted_batch(spec, images)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        models.student(batch.x0, torch.ones(images), *batch.conditions)
    return flops, forward.get_total_flops() / images


def _loss(method: Method, spec: ModelSpec, models: Models, step: int) -> Tensor:
    context = StepContext(step, method.cycle, spec.noise, torch.Generator())
    return method.loss(models, _counted_batch(spec, COUNTED_BATCH * method.batch_multiple), context).per_sample


def _counted_batch(spec: ModelSpec, images: int) -> Batch:
    labels = torch.zeros(images, dtype=torch.int64) if spec.num_classes else None
    weights = None if spec.guidance_range is None else torch.ones(images)
    return Batch(torch.empty(images, *spec.image_shape), labels, weights)


def _count_kept_passes(method: Method, spec: ModelSpec, models: Models) -> int:
    """Return the passes of a student's step that keep activations; one through an encoder counts as a whole one."""
    kept: list[bool] = []
    every = {id(m): m.net for m in (models.student, models.teacher, models.discriminator) if m is not None}
    handles = [net.register_forward_hook(lambda _, args, out: kept.append(out.requires_grad)) for net in every.values()]
    _loss(method, spec, models, 0)
    for handle in handles:
        handle.remove()
    return max(sum(kept), 1)


def _count_kept_values(model: nn.Module, spec: ModelSpec) -> tuple[int, int]:
    """Return the values that a forward pass keeps per image, without and with activation checkpointing.

    Kept are the norms' inputs and outputs, a block's input, and queries, keys, values and output of attention; in
    EDM2's network the inputs of convolutions and of what comes before them.
    """
    kept: dict[nn.Module, int] = {}
    inputs: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, nn.GroupNorm):
            kept[module] = args[0].numel() + out.numel()
        elif isinstance(module, Attention | MPAttention):
            kept[module] = 4 * out.numel()
        elif isinstance(module, MPConv) and out.ndim == 4:
            kept[module] = KEPT_BY_MP_CONV * args[0].numel()
        elif isinstance(module, ResidualBlock):
            inputs[module] = sum(arg.numel() for arg in args if arg is not None and arg.ndim == 4)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    model(torch.empty(1, *spec.image_shape), torch.ones(1))
    for handle in handles:
        handle.remove()
    largest = max((sum(kept.get(inner, 0) for inner in block.modules()) for block in inputs), default=0)
    return sum(kept.values()), sum(inputs.values()) + largest


class Speed:
    """Throughput meter: images/s and, on a GPU, the model FLOPs utilisation against its measured matrix products."""

    def __init__(self, method: Method, spec: ModelSpec, train: Train, device: torch.device, *, first: int) -> None:
        self._batch_size, self._started, self._first = train.batch_size, time.monotonic(), first
        self._limit: float | None = None
        self.cost: StepCost | None = None
        if device.type == "cuda":
            self.cost = step_cost(method, spec, num_emas=len(train.emas), bytes_per_value=2 if train.autocast else FP32)
            self._limit = ranks.world_size() * matmul_rate(device) / self.cost.flops_per_image

    def measured(self, step: int) -> dict[str, float]:
        """Return the numbers since the last call, `step` steps after the training's beginning."""
        now = time.monotonic()
        images, seconds = (step - self._first) * self._batch_size, now - self._started
        self._started, self._first = now, step
        found = {"images_per_s": images / seconds}
        if self._limit is not None:
            found["share_of_limit"] = found["images_per_s"] / self._limit
            found["memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found


def matmul_rate(device: torch.device, *, repeats: int = 20) -> float:
    """Measure the bf16 matrix-product rate of a GPU, FLOP/s; takes about 50 ms."""
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
