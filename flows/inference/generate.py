"""Images from a trained student, for the command line and for a server of the logged model."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cm_core.latents import ToPixels
from cm_core.model import ModelSpec
from cm_core.precond import Precond
from cm_core.sampling import ImageNoise
from cm_core.solvers import Denoiser
from cm_core.tensors import to_pixels
from flows.stages.models import fixed_labels, to_device

BATCH = 250  # images at a time; does not affect them
LEVELS_FILE = "sampling.json"  # beside the weights of a logged model: the levels that its recipe samples at

Sampler = Callable[[Denoiser, ImageNoise], Tensor]  # model and noise -> images in -1..1, [B, C, H, W]


@torch.no_grad()
def draw_images(
    spec: ModelSpec,
    model: Precond,
    sampler: Sampler,
    *,
    n: int,
    seed: int,
    device: torch.device,
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    batch_size: int = BATCH,
    decode: ToPixels = to_pixels,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Return images, uint8 [N, H, W, C]; image i is drawn from (seed, i).

    Without `labels` a conditional model draws every class equally often; without `guidance` a model that takes such a
    weight draws with its own. `decode` is for latents.
    """
    model, batches = to_device(model, device), []
    told = {} if guidance is None else {"guidance": guidance}
    for start in range(0, n, batch_size):
        indices = range(start, min(start + batch_size, n))
        chosen = fixed_labels(spec, indices, seed, device)
        if labels is not None:
            chosen = torch.tensor(labels[start : indices.stop], device=device)
        noise = ImageNoise(seed, indices, spec.image_shape, device)
        batches.append(decode(sampler(partial(model, labels=chosen, **told), noise)).cpu().numpy())
        on_batch(indices.stop, n)
    return np.concatenate(batches)


def usual_mid_sigmas(spec: ModelSpec, count: int, known: Sequence[Sequence[float]]) -> list[float]:
    """Return `count` noise levels after sigma_max: those of `known` with that length, else a Karras grid's.

    Of a truncated model none lies below its lowest level.
    """
    lowest = spec.truncated_at or spec.noise.sigma_min
    grid = spec.noise.model_copy(update={"sigma_min": lowest}).grid(count + 2).tolist()[1:-1]
    usable = (list(mid) for mid in known if len(mid) == count and all(sigma >= lowest for sigma in mid))
    return next(usable, grid)


def write_levels(folder: Path, mid_sigmas: Sequence[Sequence[float]]) -> Path:
    """Write the sampling levels of a recipe into the folder of its model."""
    path = folder / LEVELS_FILE
    path.write_text(json.dumps({"mid_sigmas": mid_sigmas}) + "\n")
    return path


def read_levels(folder: Path) -> list[list[float]]:
    """Read the output of `write_levels`; empty if a model has none."""
    path = folder / LEVELS_FILE
    return json.loads(path.read_text())["mid_sigmas"] if path.exists() else []
