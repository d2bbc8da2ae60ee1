"""How much of a consistency loss's signal a precision keeps: the relative error against IEEE fp32 of f(x_t) - f(x_r),
or of sCM's tangent g.

    python -m benchmarks.precision MODEL_FOLDER PREPARED_FOLDER

MODEL_FOLDER holds a trained network (a teacher, say), PREPARED_FOLDER the images of the stage `prepare`. Every method's
own pairs (x_t, x_r) are taken, as late in its training as the row says (sCM's after its warm-up), in each precision and
with each choice of parts of the network that compute in float32 (cm_core.networks.modes.FLOAT32_PARTS).
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import told
from cm_core.methods.base import Batch, Method, Models, StepContext
from cm_core.methods.ect import ECT
from cm_core.methods.ict import ICT
from cm_core.methods.scm import SCM
from cm_core.model import load_model
from cm_core.networks import modes
from cm_core.precision import autocast_dtype, set_float32_products
from cm_core.precond import Precond
from cm_core.tensors import from_pixels
from flows.stages.models import pick_device, to_device

SIGNALS: dict[str, Method] = {
    **{f"iCT, N = {n + 1}": ICT(s0=n, s1=n) for n in (80, 320, 1280)},
    **{f"ECT, q = 4, stage {stage}": ECT(q=4, num_stages=stage + 1) for stage in (3, 4, 7)},
    "sCM": SCM(),
}
HALF, WHOLE = ("bf16", "fp16"), ("fp32", "tf32")
PARTS = [set(parts) for n in range(4) for parts in combinations(("embedding", "input", "output"), n)]


class Recorder(nn.Module):
    """A model that remembers what it returned."""

    def __init__(self, model: Precond) -> None:
        super().__init__()
        self.model, self.outputs = model, []

    def forward(self, *args: Tensor | None) -> Tensor:
        self.outputs.append(self.model(*args))
        return self.outputs[-1]


@contextmanager
def float32_parts(parts: set[str]) -> Iterator[None]:
    """Let networks built within this context compute these parts in float32."""
    before, modes.FLOAT32_PARTS = modes.FLOAT32_PARTS, frozenset(parts)
    yield
    modes.FLOAT32_PARTS = before


@torch.no_grad()
def signal(folder: Path, method: Method, precision: str, parts: set[str], batch: Batch) -> Tensor:
    """Return f(x_t) - f(x_r) of a batch, or sCM's g before its bound, float32."""
    set_float32_products(precision)
    with float32_parts(parts):
        spec, _ = load_model(folder)
        _, model = load_model(folder, autocast=autocast_dtype(precision))
    spec = spec.model_copy(update={"form": method.form})
    consistency = spec.build(autocast=autocast_dtype(precision))
    consistency.net = to_device(model.net, batch.x0.device).eval()
    generator = torch.Generator(batch.x0.device).manual_seed(0)
    context = StepContext(999, 1000, spec.noise, generator)
    if isinstance(method, SCM):
        noise = torch.randn(len(batch.x0), generator=generator, device=batch.x0.device)
        sigma = (method.p_mean + method.p_std * noise).exp()
        return method.tangent_at(Models(consistency, consistency), batch, context, sigma, 1.0)[2].float()
    recorder = Recorder(consistency)
    method.loss(Models(recorder, recorder, distance=lambda a, b: (a - b).flatten(1).sum(1)), batch, context)
    at_t, at_r = recorder.outputs
    return at_t - at_r


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--batch-size", type=int, default=512)
    args = parser.parse_args(argv)
    device = pick_device()
    pixels = np.load(args.prepared / "train_images.npy", mmap_mode="r")[: args.batch_size]
    batch = Batch(from_pixels(torch.tensor(pixels, device=device)), None)
    for name, method in SIGNALS.items():
        true = signal(args.model, method, "fp32", set(), batch)
        for precision in (*WHOLE, *HALF):
            for parts in PARTS if precision in HALF else PARTS[:1]:
                error = signal(args.model, method, precision, parts, batch) - true
                each = (error.flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1).clamp(min=1e-20)).median()
                row = {"signal": name, "precision": precision, "float32 parts": sorted(parts)}
                told({**row, "error": (error.norm() / true.norm()).item(), "median of rows": each.item()})


if __name__ == "__main__":
    main()
