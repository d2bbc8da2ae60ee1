"""`cm edit`: inpaint, colourise, super-resolve, repaint, denoise or interpolate a user's pictures with a student."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.drawing import MODEL, Context, add_guidance_option, usual_mid_sigmas
from flows.commands.editor import Editor, factors, to_picture, write
from flows.commands.output import positive
from flows.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cm_core.editing import Operator
    from flows.commands.drawing import Drawn, Pictures

    Task = Callable[[Namespace, Context], Drawn]

RESIZES = ("center-crop", "center-crop-dhariwal", "pad", "stretch", "none")  # as in flows.stages.prepare
FILLING_STEPS = 39  # the paper's (CM, App. D: 40 levels, the last of which needs no call)
STROKE_SIGMA, STROKE_STEPS = 5.38, 2  # (CM, App. D)
BLEND_SIGMA = 1.0


def add_parsers(commands: Any) -> None:
    """Declare the subcommand and its tasks."""
    parser = commands.add_parser("edit", help="edit your own pictures with a student: inpaint, colorize, superres, ...")
    tasks = parser.add_subparsers(title="tasks", metavar="TASK", required=True)

    task = _add_task(tasks, inpaint, "invent a part of a picture", steps=FILLING_STEPS)
    task.add_argument(
        "--mask", metavar="MASK", type=Path, required=True, help="a picture of the same size, white where to invent"
    )
    _add_task(tasks, colorize, "invent the colours of a picture", steps=FILLING_STEPS)
    task = _add_task(tasks, superres, "invent the details of a small picture", steps=FILLING_STEPS)
    task.add_argument("--factor", metavar="P", type=positive, required=True, help="how many times each side grows")
    task = _add_task(tasks, stroke, "turn a rough painting into an image", steps=STROKE_STEPS)
    _add_sigma(task, f"noise level to start from, lower keeps more of the painting; default {STROKE_SIGMA}")
    task = _add_task(tasks, denoise, "remove noise of a known level", steps=1, count=1)
    _add_sigma(task, "standard deviation of the noise: grey levels / 127.5", needed=True)
    task = _add_task(tasks, interpolate, "blend two pictures, or two samples", steps=1, pictures="*")
    task.add_argument("--seeds", metavar="SEED", type=int, nargs=2, help="blend the first samples of these seeds")
    _add_sigma(task, f"noise level at which pictures are blended; default {BLEND_SIGMA}")


def _add_task(
    tasks: Any, function: "Task", text: str, *, steps: int, count: int = 8, pictures: str = ""
) -> ArgumentParser:
    """Declare one task with the common options."""
    task = tasks.add_parser(function.__name__, help=text, description=f"{text[0].upper()}{text[1:]}.")
    several = {"nargs": pictures, "dest": "images"} if pictures else {"dest": "image"}
    task.add_argument(metavar="IMAGE", type=Path, **several, help="PNG, JPEG, WebP, GIF, BMP, TIFF or PNM")
    task.add_argument("--model", metavar="MODEL", help=f"{MODEL}; default: out/student of the workspace")
    task.add_argument("--steps", metavar="N", type=positive, default=steps, help=f"network calls; default {steps}")
    task.add_argument("--seed", metavar="N", type=int, default=0, help="result i is drawn from (seed, i); default 0")
    task.add_argument("--n", metavar="N", type=positive, default=count, help=f"number of results; default {count}")
    task.add_argument("--label", metavar="CLASS", type=int, help="class of the result, for a model of classes")
    add_guidance_option(task)
    task.add_argument(
        "--resize",
        choices=RESIZES,
        default=RESIZES[0],
        help=f"how other sizes get to the model's; default {RESIZES[0]}",
    )
    task.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        default=Path("out/edited"),
        help="folder of the results; PATH.png shows them all; default out/edited",
    )
    task.set_defaults(command=edit, task=function)
    return task


def _add_sigma(task: ArgumentParser, text: str, *, needed: bool = False) -> None:
    task.add_argument("--sigma", metavar="SIGMA", type=float, required=needed, help=text)


def edit(args: Namespace) -> None:
    """Run a task and write its results."""
    write(args.task(args, Context()), args.out)


def inpaint(args: Namespace, context: Context) -> "Drawn":
    """Invent the pixels under the mask; keep every other pixel."""
    import torch

    from cm_core import editing

    editor = Editor(args, context)
    pixels, size = editor.read(args.image)
    mask = torch.from_numpy(editor.read_mask(args.mask, size)).to(editor.device)
    editor.say(f"{args.mask}: {mask.float().mean():.0%} of the pixels are to be invented")
    operator, y = editing.inpaint(mask), editor.to_tensor(pixels)
    return _fill_in(editor, y, operator, {"image": pixels, "given": to_picture(operator.given(y))})


def colorize(args: Namespace, context: Context) -> "Drawn":
    """Invent the colours; keep the luminance."""
    from cm_core import editing

    editor = Editor(args, context)
    pixels, _ = editor.read(args.image)
    grey = editing.to_grey(editor.to_tensor(pixels))
    return _fill_in(editor, grey, editing.colorize(device=editor.device), {"image": pixels, "grey": to_picture(grey)})


def superres(args: Namespace, context: Context) -> "Drawn":
    """Invent the details; keep the mean of every patch."""
    from cm_core import editing

    editor, factor = Editor(args, context), args.factor
    _, height, width = editor.spec.image_shape
    if factor not in factors(editor.spec):
        raise UserError(f"--factor {factor}: must be 2 or more and divide the model's {width}x{height} pixels")
    operator = editing.superres(factor, device=editor.device)
    small = (width // factor, height // factor)
    if editor.size_of(args.image) == small:
        pixels = editor.read(args.image, small)[0].repeat(factor, axis=0).repeat(factor, axis=1)
        editor.say(f"{args.image}: taken as the small picture, {small[0]}x{small[1]}")
        return _fill_in(editor, editor.to_tensor(pixels), operator, {"given": pixels})
    pixels, _ = editor.read(args.image)
    editor.say(f"{args.image}: averaged to {small[0]}x{small[1]} first; a picture of that size is taken as it is")
    y = editor.to_tensor(pixels)
    return _fill_in(editor, y, operator, {"image": pixels, "given": to_picture(operator.given(y))})


def _fill_in(editor: Editor, y: "Tensor", operator: "Operator", shown: "Pictures") -> "Drawn":
    from cm_core import editing

    sigmas = editing.filling_sigmas(editor.spec.noise, editor.args.steps)
    return editor.edit(partial(editing.fill_in, operator=operator), y, sigmas, shown)


def stroke(args: Namespace, context: Context) -> "Drawn":
    """Repaint a rough picture from the noise level that hides its roughness."""
    from cm_core import editing

    editor = Editor(args, context)
    sigmas = editor.levels(STROKE_SIGMA if args.sigma is None else args.sigma)
    pixels, _ = editor.read(args.image)
    return editor.edit(editing.repaint, editor.to_tensor(pixels), sigmas, {"image": pixels})


def denoise(args: Namespace, context: Context) -> "Drawn":
    """Remove noise of a known level with one call; further steps add noise again and remove it."""
    from cm_core import editing

    if args.steps == 1 and args.n > 1:
        raise UserError(f"--n {args.n}: one network call adds no noise, so that all results would be alike; --steps 2")
    editor = Editor(args, context)
    sigmas = editor.levels(args.sigma)
    pixels, size = editor.read(args.image)
    if size != editor.size:
        editor.say(
            f"{args.image}: resizing changes noise; --sigma speaks of the {editor.size[0]}x{editor.size[1]} pixels"
        )
    return editor.edit(editing.denoise, editor.to_tensor(pixels), sigmas, {"image": pixels})


def interpolate(args: Namespace, context: Context) -> "Drawn":
    """Blend two pictures at a noise level, or the noises of two samples; --n frames, both ends included."""
    if args.seeds is not None and (args.images or args.sigma is not None):
        raise UserError("--seeds blends samples, from noise alone; it goes with neither pictures nor --sigma")
    if args.seeds is None and len(args.images) != 2:
        raise UserError(f"interpolate takes two pictures, or --seeds A B; got {len(args.images)} pictures")
    from cm_core import editing

    editor = Editor(args, context)
    if args.seeds is not None:
        sigmas = [editor.spec.noise.sigma_max, *usual_mid_sigmas(editor.spec, args.steps - 1, editor.name)]
        a, b = map(editor.noise, args.seeds)
        return editor.blend(partial(editing.interpolate_samples, a=a, b=b), sigmas, {})
    sigmas = editor.levels(BLEND_SIGMA if args.sigma is None else args.sigma)
    pictures = [editor.read(path)[0] for path in args.images]
    shown = {f"image {name}": pixels for name, pixels in zip("AB", pictures, strict=True)}
    x, y = map(editor.to_tensor, pictures)
    return editor.blend(partial(editing.interpolate_images, noise=editor.noise(args.seed), a=x, b=y), sigmas, shown)
