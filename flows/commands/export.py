"""`cm export`: a model for diffusers, the Hugging Face Hub, torch.export, ONNX, or as one safetensors file."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.drawing import (
    MODEL,
    add_guidance_option,
    check_guidance,
    load,
    refuse_latents,
    usual_mid_sigmas,
)
from flows.commands.hub import export_to_hub
from flows.commands.output import cannot_write
from flows.errors import UserError

if TYPE_CHECKING:
    from cm_core.model import ModelSpec
    from cm_core.precond import Precond

DIFFERENCE = 1  # grey levels of 255 by which another engine may round otherwise


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "export", help="write a model for diffusers, the Hub, torch.export, ONNX or as one file"
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--to", choices=[*TARGETS, "hub"], required=True, help="the format")
    parser.add_argument(
        "--out", metavar="PATH", type=Path, help="the file or folder; default out/exported.SUFFIX, out/hub"
    )
    parser.add_argument(
        "--mid-sigmas",
        metavar="SIGMA",
        type=float,
        nargs="*",
        default=[],
        help="noise levels after sigma_max of the sampler in a graph; default none, one-step sampling",
    )
    parser.add_argument(
        "--steps", metavar="N", type=int, help="the same by number, at the levels that `cm sample` takes"
    )
    add_guidance_option(parser)
    parser.add_argument("--licence", metavar="ID", help="with --to hub: the weights' licence, as the Hub writes it")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="with --to hub: upload the folder to this repository; a new one is private"
    )
    parser.set_defaults(command=export)


def export(args: Namespace) -> None:
    """Write the model and say what was written."""
    if args.to == "hub":
        if args.guidance is not None:
            raise UserError(
                "--guidance is for the other formats; a student's weight on the Hub is its own, in the file"
            )
        export_to_hub(args)
        return
    if args.push or args.licence:
        raise UserError(f"--push and --licence are for --to hub, not --to {args.to}")
    spec, model = load(args.model)
    refuse_latents(spec, args.model, f"--to {args.to}")
    check_guidance(spec, args.guidance, args.model)
    if args.guidance is not None:  # the exported model's own weight
        spec, model.guidance = spec.model_copy(update={"guidance": args.guidance}), args.guidance
    write, suffix = TARGETS[args.to]
    if args.steps is not None:
        args.mid_sigmas = usual_mid_sigmas(spec, args.steps - 1, args.model)
    out = args.out or Path(f"out/exported{suffix}")
    try:
        with cannot_write(out):
            told = write(spec, model, out, [spec.noise.sigma_max, *args.mid_sigmas])
    except ValueError as error:
        raise UserError(f"--to {args.to}: {args.model}: {error}") from error
    except ImportError as error:
        raise UserError(f"--to {args.to} needs the package {error.name}: pip install {error.name}") from error
    print(f"{out}: {told}")


def _to_safetensors(spec: "ModelSpec", model: "Precond", out: Path, _: list[float]) -> str:
    from cm_core.formats.single import write_single

    write_single(out, spec, model.state_dict())
    return "weights, and model.json among the metadata; `cm import` reads it"


def _to_diffusers(spec: "ModelSpec", model: "Precond", out: Path, _: list[float]) -> str:
    from cm_core.formats.unet2d import draws_with, write_diffusers

    write_diffusers(out, spec, model.state_dict())
    return f"diffusers.DiffusionPipeline.from_pretrained({str(out)!r})({draws_with(spec)}) draws"


def _to_program(spec: "ModelSpec", model: "Precond", out: Path, sigmas: list[float]) -> str:
    from cm_core.formats.graphs import SamplerGraph, write_program

    graph = SamplerGraph(spec, model, sigmas)
    write_program(graph, out)
    return f"torch.export.load({str(out)!r}).module()({', '.join(graph.names())}) draws, {_shapes(spec, sigmas)}"


def _to_onnx(spec: "ModelSpec", model: "Precond", out: Path, sigmas: list[float]) -> str:
    from cm_core.checkpoint import whole_file
    from cm_core.formats.graphs import SamplerGraph, write_onnx

    with whole_file(out) as partial:
        difference = write_onnx(SamplerGraph(spec, model, sigmas), partial)
        if difference > DIFFERENCE:
            raise UserError(f"{out}: not written; onnxruntime's images differ by {difference} grey levels")
    return f"checked with onnxruntime, {difference} grey levels apart; {_shapes(spec, sigmas)}"


def _shapes(spec: "ModelSpec", sigmas: list[float]) -> str:
    channels, height, width = spec.image_shape
    labels = ", labels int64 [B]" if spec.num_classes else ""
    noise = f"noise float32 [B, {len(sigmas)}, {channels}, {height}, {width}] of unit variance{labels}"
    return f"{noise} -> images uint8 [B, {height}, {width}, {channels}]"


Target = tuple[
    Callable[["ModelSpec", "Precond", Path, list[float]], str], str
]  # writes and tells; suffix of the default
TARGETS: dict[str, Target] = {
    "safetensors": (_to_safetensors, ".safetensors"),
    "diffusers": (_to_diffusers, ""),
    "torch-export": (_to_program, ".pt2"),
    "onnx": (_to_onnx, ".onnx"),
}
