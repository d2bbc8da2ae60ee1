"""Shared code of the tasks of `cm edit`: read pictures in the student's shape, draw results and write them."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.drawing import load, save_images
from flows.errors import UserError
from flows.stage_runner.progress import Bar
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cm_core.editing import Draws
    from cm_core.solvers import Denoiser

    Make = Callable[[Denoiser, Draws, int], Tensor]  # (model, noise, number of images) -> images

BACKGROUND = "white"  # behind transparent pixels
COLUMNS, SHOWN = 8, 64  # results in a row of the grid, and in all
TRAITS = {  # of flows.data.images, reported to the user
    "exif_rotated": "turned upright as its EXIF says",
    "alpha": f"transparent pixels shown on {BACKGROUND}",
    "several_frames": "its first frame alone",
    "sixteen_bit": "16 bits cut to 8",
    "palette": "a palette turned into colours",
    "cmyk": "CMYK turned into RGB",
}


class Editor:
    """A student and a command's options: reads pictures in its shape, draws results, writes them."""

    def __init__(self, args: Namespace) -> None:
        from cm_core.editing import NOT_CONSISTENT
        from flows.stages.models import pick_device, to_device

        self.args, self.name = args, args.model or str(workspace_root() / "out" / "student")
        self.spec, net = load(self.name)
        if self.spec.form in NOT_CONSISTENT:
            what = "teacher" if self.spec.form == "denoiser" else "student of progressive distillation"
            raise UserError(f"{self.name}: is a {what}; editing needs a consistency model")
        self._check_label()
        self.device = pick_device()
        self.net = to_device(net, self.device)
        self.size = self.spec.image_shape[2], self.spec.image_shape[1]

    def _check_label(self) -> None:
        label, classes = self.args.label, self.spec.num_classes
        if classes and (label is None or not 0 <= label < classes):
            given = "no --label" if label is None else f"--label {label}"
            raise UserError(f"{given}: {self.name} makes images of {classes} classes, --label 0 to {classes - 1}")
        if label is not None and not classes:
            raise UserError(f"--label {label}: {self.name} knows no classes")

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
            return upright_size(image)

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
            print(f"{path}: {', '.join(notes)}")
        return pixels, size

    def read_mask(self, path: Path, size: tuple[int, int]) -> "np.ndarray":
        """Return where a mask is white or transparent, bool [H, W], resized like its picture of `size`."""
        own = self.size_of(path)
        if own not in (size, self.size):
            allowed = " or ".join(f"{w}x{h}" for w, h in dict.fromkeys((size, self.size)))
            raise UserError(f"{path}: the mask is {own[0]}x{own[1]} pixels, where {allowed} are expected")
        pixels, _ = self._convert(path, resize="none" if own == self.size else self.args.resize, channels=1)
        mask = pixels[..., 0] > 127
        if not mask.any():
            raise UserError(f"{path}: the mask is black all over; white is what is to be invented")
        return mask

    def _convert(self, path: Path, *, resize: str, channels: int | None = None) -> "tuple[np.ndarray, set[str]]":
        from flows.data.images import convert, open_image

        channels = channels or self.spec.image_shape[0]
        with open_image(lambda: path, str(path)) as image:
            return convert(
                image, str(path), channels=channels, resize=resize, resolution=self.size[0], background=BACKGROUND
            )

    def to_tensor(self, pixels: "np.ndarray") -> "Tensor":
        """Return one picture as model input, [1, C, H, W] in -1..1."""
        import torch

        from cm_core.tensors import from_pixels

        return from_pixels(torch.from_numpy(pixels.copy())[None].to(self.device))

    def noise(self, seed: int, indices: range) -> "Draws":
        """Return the noise of images by their numbers."""
        from cm_core.sampling import ImageNoise

        return ImageNoise(seed, indices, self.spec.image_shape, self.device)

    def weights(self, count: int) -> "Tensor":
        """Return the interpolation weight of each frame between A and B, [F]."""
        import torch

        return torch.linspace(0, 1, count, device=self.device)

    def draw(self, make: "Make", *, at_once: bool = False) -> "np.ndarray":
        """Return --n results, uint8 [N, H, W, C], drawn in batches unless they depend on each other."""
        from flows.inference.generate import BATCH, draw_images

        labels = [self.args.label] * self.args.n if self.spec.num_classes else None
        with Bar("editing") as bar:
            return draw_images(
                self.spec,
                self.net,
                lambda f, noise: make(f, noise, len(noise)),
                n=self.args.n,
                seed=self.args.seed,
                device=self.device,
                labels=labels,
                batch_size=self.args.n if at_once else BATCH,
                on_batch=bar.progress,
            )

    def write(self, results: "np.ndarray", sigmas: Sequence[float], shown: "Mapping[str, np.ndarray]") -> None:
        """Write the results and a grid with their source pictures; print the paths."""
        from flows.reports.figures import save_rows

        rows = {name: pixels[None] for name, pixels in shown.items()}
        for start in range(0, min(len(results), SHOWN), COLUMNS):
            row = results[start : start + COLUMNS]
            rows[f"{start} to {start + len(row) - 1}" if len(row) > 1 else str(start)] = row
        save_images(results, self.args.out)
        grid = self.args.out.with_name(self.args.out.name + ".png")
        save_rows(rows, grid)
        calls = f"{len(sigmas)} network call" + ("s" if len(sigmas) > 1 else "")
        levels = f"{sigmas[0]:.4g}" if len(sigmas) == 1 else f"{sigmas[0]:.4g} to {sigmas[-1]:.4g}"
        count = f"{len(results)} image" + ("s" if len(results) > 1 else "")
        print(f"{self.args.out}: {count}, {calls} at sigma {levels}; {grid} shows them")


def to_array(x: "Tensor") -> "np.ndarray":
    """Return images [B, C, H, W] in -1..1 as uint8 [B, H, W, C]."""
    from cm_core.tensors import to_pixels

    return to_pixels(x).cpu().numpy()
