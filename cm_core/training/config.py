"""Training settings of a network: length, batch, optimiser, precision, EMAs, and memory savings."""

import torch
from pydantic import Field, model_validator

from cm_core.methods.base import Method
from cm_core.params import Params
from cm_core.precision import Precision, autocast_dtype
from cm_core.training.ema import AnyEma, ConstantEma
from cm_core.training.optimizers import Adam, RAdam


class Train(Params):
    """Length, optimisation and precision of a network's training."""

    num_steps: int = Field(400_000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(512, ge=1)
    """Images per step."""
    optimizer: Adam | RAdam = RAdam()
    """The optimiser and its step size."""
    ramp_steps: int = Field(0, ge=0)
    """Steps over which the learning rate grows linearly from zero; 0: none."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient; empty: no clipping."""
    emas: tuple[AnyEma, ...] = Field((ConstantEma(),), min_length=1)
    """EMAs of the weights; samples use the first."""
    flip: bool = False
    """Flip images left to right at random (CM and EDM on natural images)."""
    precision: Precision = "fp32"
    """Arithmetic of the network's body; weights, preconditioning and loss stay fp32. fp16 trains with loss scaling."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches of a batch, each recomputed in the backward pass: less memory."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: much less memory, slower."""
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
        return self

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the network's body under autocast, None for float32."""
        return autocast_dtype(self.precision)


def why_not_sharded(method: Method, train: Train) -> str | None:
    """Return the setting that rules out sharded weights, and why; None if they can be sharded."""
    if method.forward_mode:
        return f"method.kind={method.kind} takes forward-mode derivatives, whose gradients FSDP2 gets wrong"
    if train.compile:
        return "train.compile=true is not tried with it"
    return None
