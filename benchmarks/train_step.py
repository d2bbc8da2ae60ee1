"""Time one training step of this project and of its peers in the same run.

    python -m benchmarks.train_step                      # ECT/CT, EDM and CD steps of DDPM++ at batch 512, on the GPU
    python -m benchmarks.train_step --methods ict --batch-size 128 --variants fused autocast
    python -m benchmarks.train_step --channels 16 --blocks 1 --size 8 --batch-size 4 --steps 1    # a laptop, seconds

Variants: `fused` is what a training on a GPU does; `kernels` the same without CUDA graphs, `blocks` with train.compile
in place of this package's kernels; the peers are this network with
every optimisation off: `fp32`, `autocast` (bf16), `compile` (bf16, channels last, torch.compile of the whole network),
and `diffusers`, a UNet2DModel of about equal operations under bf16 autocast, channels last.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import NOISE, hardware, network, parser, report, seconds, synchronise, told
from cm_core.methods.base import Method, Models
from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf
from cm_core.methods.cmt import CMT
from cm_core.methods.dmd import DMD
from cm_core.methods.edm import EDM
from cm_core.methods.ict import ICT
from cm_core.methods.meanflow import MeanFlow
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.methods.tcm import TCM
from cm_core.model import ModelSpec, build_seeded
from cm_core.networks.modes import plain_layers
from cm_core.parallel.graphs import with_cuda_graphs
from cm_core.precision import Precision, set_float32_products
from cm_core.precond import Precond
from cm_core.training.batches import Batches
from cm_core.training.config import Train
from cm_core.training.cost import step_cost
from cm_core.training.optimizers import Optimizer
from cm_core.training.passes import compile_blocks
from cm_core.training.state import TrainState
from cm_core.training.trainer import Trainer
from flows.stages.models import pick_device, to_device
from flows.stages.student import build_discriminator
from flows.stages.training import build_weighting

METHODS: dict[str, Method] = {
    "ict": ICT(),  # four forward passes, as CT and ECT
    "edm": EDM(),
    "cd": CD(),
    "pd": PD(),
    "sct": SCM(),
    "scd": SCM(distil=True),
    "cd_inf": CMInf(),
    "ct_inf": CMInf(distil=False),
    "meanflow": MeanFlow(),
    "imf": MeanFlow(tangent="predicted"),
    "dmd": DMD(),
    "dmd_plain": DMD(gan_weight=0),
    "sid": DMD(objective="sid", student_every=2, u_min=0, u_max=0.8, score_loss="edm", gan_weight=0),
    "cmt": CMT(),
    "tcm": TCM(),
}
DEFAULT_METHODS = ("ict", "edm", "cd")
VARIANTS = ("fused", "kernels", "blocks", "fp32", "autocast", "compile", "diffusers")
NUM_IMAGES = 10_000


class Step:
    """A training that can be asked for its next step."""

    def __init__(self, args: Any, method: Method, variant: str, device: torch.device) -> None:
        shape = (3, args.size, args.size)
        precision = "fp32" if variant == "fp32" else getattr(args, "precision", "bf16")
        set_float32_products(precision)
        optimizer = (
            Optimizer(kind="adam", learning_rate=1e-3) if isinstance(method, EDM) else Optimizer(learning_rate=4e-4)
        )
        self.train = Train(batch_size=args.batch_size, precision=precision, optimizer=optimizer, flip=True)
        self.spec = ModelSpec(form=method.form, network=network(args), noise=NOISE, image_shape=shape)
        student = self._model(variant, device)
        teacher = None
        if method.needs_teacher:
            teacher = self._model(variant, device, form="denoiser").eval().requires_grad_(False)
        distance = method.distance.build(shape) if hasattr(method, "distance") else None
        base = self._model(variant, device).requires_grad_(False) if method.needs_base else None
        score = discriminator = None
        if method.cycle > 1:
            assert teacher is not None, "a critic judges by a teacher"
            score = self._model(variant, device, form="denoiser").train()
            discriminator = build_discriminator(method, teacher, shape, 0)
        pixels = np.random.default_rng(0).integers(0, 256, (max(NUM_IMAGES, args.batch_size), *shape[1:], 3), np.uint8)
        batches = Batches(pixels, None, batch_size=args.batch_size, seed=0, device=device, flip=True)
        state = TrainState(
            student,
            self.train,
            teacher=teacher if method.replaces_teacher else None,
            weighting=build_weighting(method, 0, device),
            score=score,
            discriminator=discriminator,
            cycle=method.cycle,
        )
        self.models = Models(student.train(), student, teacher, distance, state.weighting, score, discriminator, base)
        self.trainer = Trainer(state, method, self.models, batches, NOISE, seed=0)

    def _model(self, variant: str, device: torch.device, *, form: str | None = None) -> Precond:
        spec = self.spec if form is None else self.spec.model_copy(update={"form": form})
        model = build_seeded(spec, 0, autocast=self.train.autocast)
        if variant == "diffusers":
            model.net = DiffusersUNet(self.spec)
        model = model.to(device) if variant in ("fp32", "autocast") else to_device(model, device)
        if variant == "fused":
            model.network_pass = with_cuda_graphs(model.net)
        elif variant == "blocks":
            compile_blocks(model)
        elif variant == "compile":
            model.net.compile()
        return model

    def __call__(self) -> None:
        self.trainer.step()


class DiffusersUNet(nn.Module):
    """diffusers' UNet2DModel with the widths, depths and attention of DDPM++, behind this project's interface."""

    def __init__(self, spec: ModelSpec) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        params, (channels, size, _) = spec.network, spec.image_shape
        widths = [params.channels * mult for mult in params.channel_mult]
        attends = [size >> level in params.attn_resolutions for level in range(len(widths))]
        self.unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            layers_per_block=params.num_blocks,
            down_block_types=["AttnDownBlock2D" if on else "DownBlock2D" for on in attends],
            up_block_types=["AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attends)],
            attention_head_dim=None,
            norm_num_groups=min(32, widths[0] // 4),
        )

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: None = None, augment_labels: None = None
    ) -> Tensor:
        return self.unet(x, noise_labels).sample


@contextmanager
def environment(variant: str) -> Iterator[None]:
    """Switch off what the variant is to do without."""
    with nullcontext() if variant in ("fused", "kernels", "blocks") else plain_layers():
        yield


def measure(args: Any, name: str, variant: str, device: torch.device, peak: float | None) -> dict[str, Any]:
    """Return one row of the table."""
    method, started = METHODS[name], time.perf_counter()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with environment(variant):
        step = Step(args, method, variant, device)
        step()
        synchronise(device)
        first = time.perf_counter() - started
        step()
        step()
        each = seconds(step, device, repeats=args.steps)
    flops = step_cost(method, step.spec, num_emas=1, bytes_per_value=2).flops_per_image
    rate = args.batch_size / each
    return {
        "method": name,
        "variant": variant,
        "batch": args.batch_size,
        "images/s": rate,
        "% of matmul": 100 * rate * flops / peak if peak else None,
        "ms a step": 1000 * each,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "first step s": first,
    }


def check(args: Any, device: torch.device) -> dict[str, float]:
    """Compare outputs and gradients of the fused bf16 and fp32 forms with the plain fp32 form, same weights."""
    spec = ModelSpec(form="skip", network=network(args), noise=NOISE, image_shape=(3, args.size, args.size))
    model = to_device(build_seeded(spec, 0), device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # residual branches start near zero, where errors would not show
            p.add_(torch.randn(p.shape, generator=generator, device=device) * 0.5 / math.sqrt(max(p[0].numel(), 16)))
    x = torch.randn(16, *spec.image_shape, generator=generator, device=device)
    sigma = torch.rand(16, generator=generator, device=device) * 5 + 0.1

    def run() -> list[Tensor]:
        model.zero_grad()
        out = model(x, sigma)
        out.square().mean().backward()
        return [out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])]

    with plain_layers():
        exact = run()
        model.autocast = torch.bfloat16
        autocast = run()
    fused = run()
    model.autocast = None
    fused_fp32 = run()
    forms = {"fused fp32": fused_fp32, "fused bf16": fused, "plain autocast": autocast}
    return {
        f"{form}, {what}": ((found - true).norm() / true.norm()).item()
        for form, results in forms.items()
        for what, found, true in zip(("output", "gradient"), results, exact, strict=True)
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT_METHODS))
    arguments.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments.add_argument("--batch-size", type=int, default=512)
    arguments.add_argument("--precision", choices=get_args(Precision), default="bf16", help="of all variants but fp32")
    arguments.add_argument("--steps", type=int, default=10, help="steps that are timed, after three that are not")
    args = arguments.parse_args(argv)
    device, facts = pick_device(), hardware()
    set_float32_products("fp32")
    facts |= {f"relative error of {form}": round(error, 7) for form, error in check(args, device).items()}
    peak = facts["matmul_tflops"] and facts["matmul_tflops"] * 1e12
    rows: list[dict[str, Any]] = []
    for name in args.methods:
        for variant in args.variants:
            if variant == "diffusers" and not installed("diffusers"):
                facts["diffusers"] = "not installed"
                continue
            rows.append(told(measure(args, name, variant, device, peak)))
    report(args, facts, rows)


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    from importlib.util import find_spec

    return find_spec(package) is not None


if __name__ == "__main__":
    main()
