"""Time training and sampling by 1, 2, ... devices of this machine, in one run; without GPUs by processes of one thread.

python -m benchmarks.scaling                                 # all GPUs, DDPM++ at batch 512 in all
python -m benchmarks.scaling --devices 1 2 --channels 16 --blocks 1 --size 8 --batch-size 8 --images 64   # a laptop

`apart` are as many trainings of a part of the batch each that exchange nothing: what the devices can do at one time.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import NOISE, hardware, network, parser, report, seconds, told
from benchmarks.train_step import METHODS, Step
from cm_core.model import ModelSpec, build_seeded
from cm_core.parallel import ranks
from cm_core.parallel.graphs import with_cuda_graphs
from cm_core.parallel.rows import by_rows
from cm_core.sampling import ImageNoise, multistep
from flows.distributed.launch import launch
from flows.stages.models import pick_device, to_device
from flows.stages.sample import write_images

WARM_UP = 3  # kernels are compiled and chosen, then recorded


def measure(args: argparse.Namespace, count: int) -> dict[str, float]:
    """Return images/s of training and of sampling by `count` processes, and of trainings that exchange nothing."""
    with tempfile.TemporaryDirectory() as folder:
        found = launch(count, _work, args, get_context("spawn").Barrier(count), Path(folder)).values()
    training, sampling = (min(rates[name] for rates in found) for name in ("training", "sampling"))
    return {"training": training, "apart": sum(rates["apart"] for rates in found), "sampling": sampling}


def _work(args: argparse.Namespace, barrier: Barrier, folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    with ranks.process_group():
        count, rank, device = ranks.world_size(), ranks.rank(), pick_device()
        rates = {
            "training": _train(args, device, args.batch_size, ranks.wait_for_all),
            "sampling": _sample(args, folder, device),
        }
    gc.collect()  # a network and its recorded passes hold each other
    rates["apart"] = rates["training"] if count == 1 else _train(args, device, args.batch_size // count, barrier.wait)
    told({"devices": count, "process": rank, **rates})
    return rates


def _train(args: argparse.Namespace, device: torch.device, batch: int, wait_for_all: Callable[[], object]) -> float:
    step = Step(argparse.Namespace(**vars(args) | {"batch_size": batch}), METHODS["ict"], "fused", device)
    if ranks.world_size() > 1:
        student = step.models.student
        student.network_pass = by_rows(student.network_pass)
    for _ in range(WARM_UP):
        step()
    wait_for_all()
    return batch / seconds(step, device, repeats=args.steps)


@torch.no_grad()
def _sample(args: argparse.Namespace, folder: Path, device: torch.device) -> float:
    spec = ModelSpec(form="skip", network=network(args), noise=NOISE, image_shape=(3, args.size, args.size))
    f = to_device(build_seeded(spec, 0, autocast=torch.bfloat16).eval().requires_grad_(False), device)
    f.network_pass = with_cuda_graphs(f.net)

    def draw(indices: range) -> Tensor:
        return multistep(f, ImageNoise(0, indices, spec.image_shape, device), [80.0], sigma_min=NOISE.sigma_min)

    for _ in range(WARM_UP):
        draw(range(args.sample_batch))

    def write() -> None:
        write_images(folder / "images.npy", draw, args.images, spec, batch_size=args.sample_batch)

    ranks.wait_for_all()
    return args.images / seconds(write, device, repeats=1)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    there = torch.cuda.device_count() or 2
    arguments.add_argument(
        "--devices", nargs="+", type=int, default=list(range(1, there + 1)), help="how many, in turn"
    )
    arguments.add_argument("--batch-size", type=int, default=512, help="of a training step, all devices together")
    arguments.add_argument("--steps", type=int, default=10, help="training steps that are timed")
    arguments.add_argument("--images", type=int, default=50_000, help="images that are sampled")
    arguments.add_argument("--sample-batch", type=int, default=1000, help="images of a sampling batch, each device")
    args = arguments.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for count in args.devices:
        row: dict[str, Any] = {"devices": count}
        for name, rate in measure(args, count).items():
            key = f"{name} images/s"
            row |= {key: rate, f"{name} speed-up": rate / rows[0][key] if rows else 1.0}
        rows.append(row)
    report(args, hardware(), rows)


if __name__ == "__main__":
    main()
