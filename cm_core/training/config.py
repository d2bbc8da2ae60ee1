"""Training settings of a network: length, batch, optimiser, precision, EMAs, and memory savings."""

from typing import Literal

import torch
from pydantic import Field, model_validator

from cm_core.methods.base import Method
from cm_core.params import Params
from cm_core.precision import Precision, autocast_dtype
from cm_core.training.ema import AnyEma, ConstantEma, PowerEma
from cm_core.training.optimizers import Optimizer


class Snapshots(Params):
    """Snapshots of the power-function EMAs, from which an average of any width is rebuilt (EDM2, section 3)."""

    count: int = Field(16, ge=2)
    """Snapshots of each EMA, evenly spaced and one at the end; at most so many. Each is a file in the artifact."""
    precision: Literal["fp16", "fp32"] = "fp16"
    """Their numbers (EDM2: fp16)."""


class Train(Params):
    """Length, optimisation and precision of a network's training."""

    num_steps: int = Field(400_000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(512, ge=1)
    """Images per step."""
    optimizer: Optimizer = Optimizer(learning_rate=4e-4)
    """The optimiser and its step size."""
    ramp_steps: int = Field(0, ge=0)
    """Steps over which the learning rate grows linearly from zero; 0: none."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    """Decay of the learning rate: none, to zero at the end, or as the inverse square root of the step."""
    schedule_start: int = Field(0, ge=0)
    """Steps before the decay begins; the t_ref of inverse_sqrt (EDM2; sCM: 35,000, ECT: 2,000 on ImageNet-64)."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient; empty: no clipping."""
    emas: tuple[AnyEma, ...] = Field((ConstantEma(),), min_length=1)
    """EMAs of the weights; samples use the first."""
    snapshots: Snapshots | None = None
    """Keep snapshots of the EMAs of kind power, two widths at least, for `cm ema`; empty: none."""
    flip: bool = False
    """Flip images left to right at random (CM and EDM on natural images)."""
    precision: Precision = "fp32"
    """Arithmetic of the network's body; weights, preconditioning and loss stay fp32. fp16 trains with loss scaling."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches of a batch, each recomputed in the backward pass: less memory."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: much less memory, slower."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or skip the step and leave weights and optimiser as they were."""
    max_nonfinite: int = Field(10, ge=1)
    """Steps that `skip` skips before it stops, too."""
    compile: bool = False
    """Compile the blocks with torch.compile; on a GPU slower than the kernels of this package (docs/LOG.md)."""
    log_every: int = Field(100, ge=1)
    """Steps between two logged metrics; the host waits for the device only then."""
    save_every: int = Field(2_000, ge=1)
    """Steps between two saved training states; a multiple of log_every."""
    grid_every: int = Field(2_000, ge=1)
    """Steps between two sample grids; a multiple of log_every."""

    @model_validator(mode="after")
    def _multiples(self) -> "Train":
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} must divide batch_size={self.batch_size}")
        for name in ("save_every", "grid_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of log_every={self.log_every}")
        if self.snapshots and len(set(self.snapshot_emas.values())) < 2:
            raise ValueError("snapshots need two emas of kind power with different widths (EDM2: 0.05 and 0.10)")
        if self.schedule == "inverse_sqrt" and self.schedule_start == 0:
            raise ValueError("schedule=inverse_sqrt needs schedule_start, the step t_ref from which the rate falls")
        if self.schedule in ("linear", "cosine") and self.schedule_start >= self.num_steps:
            raise ValueError(f"schedule_start={self.schedule_start} must lie below num_steps={self.num_steps}")
        return self

    @property
    def snapshot_emas(self) -> dict[int, float]:
        """The places of the power-function EMAs, and their widths."""
        return {place: ema.width for place, ema in enumerate(self.emas) if isinstance(ema, PowerEma)}

    @property
    def snapshot_steps(self) -> list[int]:
        """The steps after which snapshots are taken: multiples of log_every, and the end."""
        if self.snapshots is None:
            return []
        every = self.log_every * -(-self.num_steps // (self.log_every * self.snapshots.count))
        return [*range(every, self.num_steps, every), self.num_steps]

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the network's body under autocast, None for float32."""
        return autocast_dtype(self.precision)


def why_not_sharded(method: Method, train: Train) -> str | None:
    """Return the setting that rules out sharded weights, and why; None if they can be sharded."""
    if method.forward_mode:
        return f"method.kind={method.kind} takes forward-mode derivatives, whose gradients FSDP2 gets wrong"
    if method.cycle > 1:
        return f"method.kind={method.kind} trains two networks in turn, which is not tried with it"
    if getattr(method, "adaptive_weight", False):
        return "method.adaptive_weight=true learns weights of the loss, which stay whole: no optimiser takes both kinds"
    if train.compile:
        return "train.compile=true is not tried with it"
    return None
