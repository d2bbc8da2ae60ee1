"""Dynamic loss scaling for fp16 gradients, entirely on the device: no step waits for the host (1710.03740)."""

import torch
from torch import Tensor

INITIAL, GROWTH, BACKOFF = 2.0**16, 2.0, 0.5
GROWTH_INTERVAL = 500  # consecutive good steps before the scale grows
LEAST = 2.0**-24  # after 40 overflows and no growth; 1 is no limit: a weight of 1 / (t - r) goes below it


class LossScale:
    """A loss scale as large as the gradients allow; a step whose gradients overflow is skipped and counted."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(INITIAL, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), device=device)
        self.overflow = torch.zeros((), device=device)  # 1 where this step's gradients are not finite

    def unscale(self, gradients: list[Tensor], norm: Tensor) -> Tensor:
        """Unscale the gradients, whose norm is given; return the unscaled norm."""
        self.overflow.copy_(~norm.isfinite())
        inverse = 1 / self.scale
        torch._foreach_mul_(gradients, inverse)
        return norm * inverse

    def update(self) -> None:
        """Count the step and update the scale: down after an overflow, up after GROWTH_INTERVAL good steps."""
        self.skipped += self.overflow
        self.good_steps.copy_(torch.where(self.overflow > 0, 0, self.good_steps + 1))
        grows = self.good_steps == GROWTH_INTERVAL
        self.scale *= torch.where(self.overflow > 0, BACKOFF, torch.where(grows, GROWTH, 1.0))
        self.good_steps.masked_fill_(grows, 0)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a resume needs, by name."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}
