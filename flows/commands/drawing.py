"""Images from a trained model in a folder or logged to MLflow."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.commands.output import positive
from flows.errors import UserError
from flows.monitor import Monitor
from flows.operations.services import use_records
from flows.stage_runner.progress import Bar
from flows.workspace.locations import shared_root, workspace_root

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from cm_core.model import ModelSpec
    from cm_core.precond import Precond
    from flows.inference.generate import Sampler

    Pictures = Mapping[str, np.ndarray]  # name -> uint8 [H, W, C]

MODEL = "a folder with model.json, or models:/... of MLflow"
LOGGED = ("models:/", "runs:/")  # prefixes of MLflow model names
TEACHER_STEPS = 18  # EDM's on CIFAR-10


class Drawn(NamedTuple):
    """The result of a command that draws."""

    images: "np.ndarray"  # uint8 [N, H, W, C]
    seconds: float  # in the network, without loading and writing
    how: str  # network calls and noise levels
    shown: "Pictures" = {}  # of an edit: the picture, and what the model was given of it


def add_sampling_options(parser: ArgumentParser, *, count: int) -> None:
    """Add the options that choose the images to draw."""
    parser.add_argument(
        "--steps", metavar="N", type=positive, help="network calls of a student (1), or steps of a teacher (18)"
    )
    parser.add_argument(
        "--mid-sigmas",
        metavar="SIGMA",
        type=float,
        nargs="+",
        help="noise levels of a student's later steps; default: the logged model's, else those of the recipe in force, "
        "else a Karras grid",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="image i is drawn from (seed, i); default 0")
    parser.add_argument("--n", metavar="N", type=positive, default=count, help=f"number of images; default {count}")
    parser.add_argument("--label", metavar="CLASS", type=int, help="class of all images; default: all classes in turn")
    add_guidance_option(parser)


def add_guidance_option(parser: ArgumentParser) -> None:
    """Add the option for students that take a weight of guidance."""
    parser.add_argument(
        "--guidance",
        metavar="W",
        type=float,
        help="weight of classifier-free guidance, of a student trained with guidance_range; default: its own",
    )


def save_images(images: "np.ndarray", folder: Path) -> None:
    """Write images [N, H, W, C] as one PNG each, named by their number; all or, if one cannot be written, none."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:06d}.png" for index in range(len(images))]
    try:
        for path, image in zip(paths, images, strict=True):
            to_image(image).save(path)
    except OSError:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def to_image(pixels: "np.ndarray") -> "Image":
    """Return pixels [H, W, 1 or 3] as a picture, grey or RGB."""
    from PIL.Image import fromarray

    return fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def is_model(where: str) -> bool:
    """Whether `given` names a model rather than images."""
    return where.startswith(LOGGED) or (Path(where) / "model.json").is_file()


def load(model: str) -> "tuple[ModelSpec, Precond]":
    """Return the spec of a model and the model, on the CPU. Raises UserError if there is none."""
    from cm_core.model import load_model

    try:
        return load_model(locate(model))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{error}; a model is a folder such as out/student, or models:/... of MLflow") from error


@cache  # a command asks more than once, and the weights may be remote
def locate(model: str) -> Path:
    """Return the folder of a model; download one from MLflow."""
    if not model.startswith(LOGGED):
        return Path(model)
    from mlflow.exceptions import MlflowException

    from flows.tracking.tracker import fetch_student

    try:
        use_records(shared := shared_root(workspace_root()))
        return fetch_student(model, shared)
    except MlflowException as error:
        raise UserError(f"{model}: {' '.join(str(error).split())}") from error


class Context(NamedTuple):
    """The surroundings of a command that draws: where models come from, where notes and progress go."""

    load: "Callable[[str], tuple[ModelSpec, Precond]]" = load
    say: Callable[[str], None] = print
    bar: Callable[[str], AbstractContextManager[Monitor]] = Bar

    def draw(
        self, spec: "ModelSpec", net: "Precond", sampler: "Sampler", args: Namespace, **options: Any
    ) -> "tuple[np.ndarray, float]":
        """Return --n images of --seed and --label, and the seconds that they took; on the GPU when there is one."""
        from flows.inference.generate import draw_images
        from flows.stages.models import pick_device

        labels = None if args.label is None else [args.label] * args.n
        options |= {
            "n": args.n,
            "seed": args.seed,
            "labels": labels,
            "guidance": args.guidance,
            "device": pick_device(),
        }
        with self.bar("drawing") as bar:
            start = time.perf_counter()
            options["on_batch"] = lambda done, total: bar.progress(done, total, "images")
            images = draw_images(spec, net, sampler, **options)
            return images, time.perf_counter() - start


def draw(model: str, args: Namespace, context: Context) -> Drawn:
    """Return images of a model. Raises UserError for options that it does not take."""
    from flows.stages.models import pick_device, pixels_of

    spec, net = context.load(model)
    check_label(spec, args.label, model)
    check_guidance(spec, args.guidance, model)
    sampler, how = _choose_sampler(spec, args, model)
    decode = pixels_of(spec, locate(model), pick_device())
    return Drawn(*context.draw(spec, net, sampler, args, decode=decode), how + at_weight(spec, args.guidance))


def refuse_latents(spec: "ModelSpec", model: str, what: str) -> None:
    """Raise UserError for a model of latents, with which `what` is not possible."""
    if spec.latents:
        raise UserError(f"{model}: draws latents, which a decoder makes images of; {what} needs a model of pixels")


def check_label(spec: "ModelSpec", label: int | None, model: str, *, needed: bool = False) -> None:
    """Raise UserError unless --label is a class of the model, or may be left out."""
    classes = spec.num_classes
    if classes and (needed if label is None else not 0 <= label < classes):
        given = "no --label" if label is None else f"--label {label}"
        raise UserError(f"{given}: {model} makes images of {classes} classes, --label 0 to {classes - 1}")
    if label is not None and not classes:
        raise UserError(f"--label {label}: {model} knows no classes")


def check_guidance(spec: "ModelSpec", weight: float | None, model: str) -> None:
    """Raise UserError unless --guidance is a weight that the model takes, or left out."""
    try:
        if weight is not None:
            spec.checked_guidance(weight)
    except ValueError as error:
        raise UserError(f"--guidance {weight:g}: {model}: {error}") from error


def at_weight(spec: "ModelSpec", weight: float | None) -> str:
    """Return the end of a description: the weight of guidance, of a model that takes one."""
    weight = spec.guidance if weight is None else weight
    return "" if weight is None else f", guidance {weight:g}"


def _choose_sampler(spec: "ModelSpec", args: Namespace, model: str) -> "tuple[Sampler, str]":
    """Return the function from (model, noise) to images in -1..1, and its description."""
    from cm_core.sampling import TeacherSampler
    from flows.stages.models import few_step_sigmas, few_steps

    if spec.form == "denoiser":
        if args.mid_sigmas or args.steps == 1:
            raise UserError("this model is a teacher, whose sampler takes --steps 2 or more and no --mid-sigmas")
        sampler = TeacherSampler(num_steps=args.steps or TEACHER_STEPS)
        return partial(sampler.sample, levels=spec.noise), f"{sampler.solver}, {sampler.nfe} network calls"
    sigmas = few_step_sigmas(spec, _mid_sigmas(spec, args, model))
    try:
        spec.check_levels(sigmas)
    except ValueError as error:
        raise UserError(f"--mid-sigmas: {error}") from error
    calls, levels = "call" if len(sigmas) == 1 else "calls", ", ".join(f"{sigma:.4g}" for sigma in sigmas)
    how = f"{len(sigmas)} network {calls} at sigma {levels}"
    return partial(few_steps, spec, mid_sigmas=sigmas[1:]), how


def _mid_sigmas(spec: "ModelSpec", args: Namespace, model: str) -> list[float]:
    if spec.fixed_steps:
        if args.mid_sigmas or args.steps not in (None, spec.fixed_steps):
            raise UserError(f"this model was distilled to --steps {spec.fixed_steps}, and takes no --mid-sigmas")
        return []
    if args.mid_sigmas is None:
        return usual_mid_sigmas(spec, (args.steps or 1) - 1, model)
    if args.steps not in (None, len(args.mid_sigmas) + 1):
        raise UserError(f"--steps {args.steps} needs {args.steps - 1} --mid-sigmas, got {len(args.mid_sigmas)}")
    return args.mid_sigmas


def usual_mid_sigmas(spec: "ModelSpec", count: int, model: str) -> list[float]:
    """Return the levels of a logged model's recipe, else of the active recipe, else of a Karras grid."""
    from flows.inference import generate

    return generate.usual_mid_sigmas(spec, count, generate.read_levels(locate(model)) or _levels_in_force())


def _levels_in_force() -> "Sequence[Sequence[float]]":
    """Return the levels of the active recipe, so that the samples match the report's images."""
    from flows.recipes.recipe import load_active

    try:
        root = workspace_root()
    except UserError:  # a model in a folder can be sampled anywhere
        return ()
    return load_active(root).sample.mid_sigmas
