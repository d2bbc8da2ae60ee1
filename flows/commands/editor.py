"""Shared code of the tasks of `cm edit`: read pictures in the student's shape, draw results, write them."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.drawing import (
    Context,
    Drawn,
    at_weight,
    check_guidance,
    check_label,
    refuse_latents,
    save_images,
)
from flows.errors import UserError
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cm_core.editing import Draws
    from cm_core.model import ModelSpec
    from cm_core.sampling import ImageNoise
    from cm_core.solvers import Denoiser
    from flows.commands.drawing import Pictures
    from flows.inference.generate import Sampler

BACKGROUND = "white"  # behind transparent pixels
COLUMNS, SHOWN = 8, 64  # results in a row of the grid, and in all
TRAITS = {  # of flows.data.images, reported to the user
    "exif_rotated": "turned upright as its EXIF says",
    "alpha": f"transparent pixels shown on {BACKGROUND}",
    "several_frames": "its first frame alone",
    "sixteen_bit": "16 bits cut to 8",
    "palette": "a palette turned into colours",
    "cmyk": "CMYK turned into RGB",
    "colour_profile": "its colours converted to sRGB",
}


class Editor:
    """A student and a command's options: reads pictures in its shape and draws results."""

    def __init__(self, args: Namespace, context: Context) -> None:
        from flows.stages.models import pick_device

        self.args, self.name = args, args.model or str(workspace_root() / "out" / "student")
        self.context, self.say = context, context.say
        self.spec, self.net = context.load(self.name)
        check_task(args.task.__name__, self.spec, self.name)
        check_label(self.spec, args.label, self.name, needed=True)
        check_guidance(self.spec, args.guidance, self.name)
        self.device = pick_device()
        self.size = self.spec.image_shape[2], self.spec.image_shape[1]

    def levels(self, sigma: float) -> list[float]:
        """Return the noise levels from --sigma down, one per step; raise UserError if the model does not cover them."""
        from cm_core.editing import falling_sigmas

        try:
            return falling_sigmas(self.spec.noise, sigma, self.args.steps)
        except ValueError as error:
            raise UserError(f"--sigma {sigma:g} --steps {self.args.steps}: {error}") from error

    def size_of(self, path: Path) -> tuple[int, int]:
        """Return width and height of a picture after EXIF rotation."""
        from flows.data.images import open_image, upright_size

        with open_image(lambda: path, str(path)) as image:
            return upright_size(image, str(path))

    def read(self, path: Path, wanted: tuple[int, int] | None = None) -> "tuple[np.ndarray, tuple[int, int]]":
        """Return a picture in the model's channels, uint8 [H, W, C], and its original size; log every conversion.

        It is resized to the `wanted` size, else the model's. Raises UserError if that is impossible.
        """
        size, (width, height) = self.size_of(path), wanted or self.size
        same = size == (width, height)
        if not same and (width != height or self.args.resize == "none"):
            raise UserError(f"{path}: is {size[0]}x{size[1]} pixels, where {self.name} makes {width}x{height}")
        pixels, traits = self._convert(path, resize="none" if same else self.args.resize)
        notes = [] if same else [f"{self.args.resize} from {size[0]}x{size[1]} to {width}x{height}"]
        notes += ["enlarged on the way"] if "upscaled" in traits else []
        notes += [text for trait, text in TRAITS.items() if trait in traits]
        if pixels.shape[-1] == 1 and "greyscale" not in traits:
            notes.append("its colours dropped, for the model makes grey images")
        if notes:
            self.say(f"{path}: {', '.join(notes)}")
        return pixels, size

    def read_mask(self, path: Path, size: tuple[int, int]) -> "np.ndarray":
        """Return where a mask is white or transparent, bool [H, W], resized like its picture of `size`."""
        own = self.size_of(path)
        if own not in (size, self.size):
            allowed = " or ".join(f"{w}x{h}" for w, h in dict.fromkeys((size, self.size)))
            raise UserError(f"{path}: the mask is {own[0]}x{own[1]} pixels, where {allowed} are expected")
        pixels, _ = self._convert(path, resize="none" if own == self.size else self.args.resize, mask=True)
        mask = pixels[..., 0] > 127
        if not mask.any():
            raise UserError(f"{path}: the mask is black all over; white is what is to be invented")
        return mask

    def _convert(self, path: Path, *, resize: str, mask: bool = False) -> "tuple[np.ndarray, set[str]]":
        from flows.data.images import convert, open_image

        channels, colours = (1, "ignore") if mask else (self.spec.image_shape[0], "srgb")
        options: dict[str, Any] = {
            "resize": resize,
            "resolution": self.size[0],
            "background": BACKGROUND,
            "colours": colours,
        }
        with open_image(lambda: path, str(path)) as image:
            return convert(image, str(path), channels=channels, **options)

    def to_tensor(self, pixels: "np.ndarray") -> "Tensor":
        """Return one picture as model input, [1, C, H, W] in -1..1."""
        import torch

        from cm_core.tensors import from_pixels

        return from_pixels(torch.from_numpy(pixels.copy())[None].to(self.device))

    def noise(self, seed: int) -> "Draws":
        """Return the noise of the first image of a seed."""
        from cm_core.sampling import ImageNoise

        return ImageNoise(seed, range(1), self.spec.image_shape, self.device)

    def edit(self, change: Callable, y: "Tensor", sigmas: Sequence[float], shown: "Pictures") -> Drawn:
        """Draw --n results of a function (model, noise, images, sigmas, sigma_min) on the picture y [1, C, H, W]."""

        def sampler(f: "Denoiser", noise: "ImageNoise") -> "Tensor":
            images = y.expand(len(noise), -1, -1, -1)
            return change(f, noise, images, sigmas=sigmas, sigma_min=self.spec.boundary)

        return self._draw(sampler, sigmas, shown)

    def blend(self, change: Callable, sigmas: Sequence[float], shown: "Pictures") -> Drawn:
        """Draw --n frames of a function (model, weights between A and B, sigmas, sigma_min) in one batch."""
        import torch

        weights = torch.linspace(0, 1, self.args.n, device=self.device)
        known = {"weights": weights, "sigmas": sigmas, "sigma_min": self.spec.boundary}
        return self._draw(lambda f, _: change(f, **known), sigmas, shown, batch_size=self.args.n)

    def _draw(self, sampler: "Sampler", sigmas: Sequence[float], shown: "Pictures", **options: int) -> Drawn:
        drawn = self.context.draw(self.spec, self.net, sampler, self.args, **options)
        calls = f"{len(sigmas)} network call" + ("s" if len(sigmas) > 1 else "")
        levels = f"{sigmas[0]:.4g}" if len(sigmas) == 1 else f"{sigmas[0]:.4g} to {sigmas[-1]:.4g}"
        return Drawn(*drawn, f"{calls} at sigma {levels}{at_weight(self.spec, self.args.guidance)}", shown)


def check_task(task: str, spec: "ModelSpec", name: str) -> None:
    """Raise UserError if a model cannot do a task, whatever the options."""
    channels, height, width = spec.image_shape
    if spec.truncated_at is not None:
        raise UserError(
            f"{name}: was not trained below sigma {spec.truncated_at:g} (TCM); editing needs all noise levels"
        )
    if not spec.is_consistency_function:
        kinds = {"denoiser": "teacher", "euler": "student of progressive distillation"}
        what = (kinds | {"average_velocity": "student of MeanFlow", "generator": "one-step generator"})[spec.form]
        raise UserError(f"{name}: is a {what}; editing needs a consistency model")
    refuse_latents(spec, name, "editing")
    if task == "colorize" and channels != 3:
        raise UserError(f"{name}: makes images of {channels} channel; colorize needs a model of RGB images")
    if task == "superres" and not factors(spec):
        raise UserError(f"{name}: no whole factor divides its {width}x{height} pixels")


def factors(spec: "ModelSpec") -> list[int]:
    """Return the factors by which a model can enlarge pictures to its size."""
    _, height, width = spec.image_shape
    return [factor for factor in range(2, min(height, width) + 1) if height % factor == width % factor == 0]


def write(drawn: Drawn, out: Path) -> None:
    """Write the results of an edit, and beside them a grid with the pictures they were made from; print the paths."""
    from flows.reports.figures import save_rows

    results, rows = drawn.images, {name: pixels[None] for name, pixels in drawn.shown.items()}
    for start in range(0, min(len(results), SHOWN), COLUMNS):
        row = results[start : start + COLUMNS]
        rows[f"{start} to {start + len(row) - 1}" if len(row) > 1 else str(start)] = row
    save_images(results, out)
    grid = out.with_name(out.name + ".png")
    save_rows(rows, grid)
    print(f"{out}: {len(results)} image{'s' if len(results) > 1 else ''}, {drawn.how}; {grid} shows them")


def to_picture(x: "Tensor") -> "np.ndarray":
    """Return one image [1, C, H, W] in -1..1 as uint8 [H, W, C]."""
    from cm_core.tensors import to_pixels

    return to_pixels(x)[0].cpu().numpy()
