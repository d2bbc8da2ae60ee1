"""Time sampling: images drawn by one network call each, quantised and written as one array; and the multistep samplers.

python -m benchmarks.sample                                  # 50,000 images of DDPM++, on the GPU
python -m benchmarks.sample --channels 16 --blocks 1 --size 8 --images 32 --batch-size 16     # a laptop, seconds
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import NOISE, hardware, network, parser, report, seconds, told
from cm_core.model import ModelSpec, build_seeded
from cm_core.networks.modes import plain_layers
from cm_core.parallel.graphs import with_cuda_graphs
from cm_core.sampling import ImageNoise, TeacherSampler, multistep
from flows.stages.models import pick_device, to_device
from flows.stages.sample import write_images

VARIANTS = ("fused", "fp32", "autocast")
SAMPLERS = {"one step": (1, [80.0]), "two steps": (2, [80.0, 0.821]), "heun, 18 levels": (35, None)}


def measure(args: Any, name: str, variant: str, device: torch.device) -> dict[str, Any]:
    """Return one row of the table."""
    calls, sigmas = SAMPLERS[name]
    spec = ModelSpec(
        form="skip" if sigmas else "denoiser", network=network(args), noise=NOISE, image_shape=(3, args.size, args.size)
    )
    f = build_seeded(spec, 0, autocast=None if variant == "fp32" else torch.bfloat16).eval().requires_grad_(False)
    f = to_device(f, device) if variant == "fused" else f.to(device)
    if variant == "fused":
        f.network_pass = with_cuda_graphs(f.net)
    sample = partial(multistep, f, sigmas=sigmas, sigma_min=NOISE.sigma_min) if sigmas else _teacher(f)
    images = args.images if calls == 1 else max(args.batch_size, args.images // calls)

    def draw(indices: range) -> Tensor:
        return sample(ImageNoise(0, indices, spec.image_shape, device))

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for _ in range(2):  # kernels are compiled and chosen, then recorded
            draw(range(args.batch_size))
        path = Path(folder) / "images.npy"
        duration = seconds(
            lambda: write_images(path, draw, images, spec, batch_size=args.batch_size), device, repeats=1
        )
    row = {"sampler": name, "variant": variant, "images": images, "seconds": duration, "images/s": images / duration}
    return row | {"network calls/s": calls * images / duration}


def _teacher(f: Any) -> Callable[[ImageNoise], Tensor]:
    return partial(TeacherSampler(num_steps=18).sample, f, levels=NOISE)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=50_000)
    arguments.add_argument("--batch-size", type=int, default=1000)
    arguments.add_argument(
        "--variants", nargs="+", choices=("fused", "fp32", "autocast"), default=["fused", "autocast"]
    )
    args = arguments.parse_args(argv)
    device, rows = pick_device(), []
    for name in SAMPLERS:
        rows.append(told(measure(args, name, "fused", device)))
    for variant in args.variants:
        if variant != "fused":
            with plain_layers():
                rows.append(told(measure(args, "one step", variant, device)))
    report(args, hardware(), rows)


if __name__ == "__main__":
    main()
