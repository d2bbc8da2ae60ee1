"""Grids and rows of images, written as deterministic PNG bytes.

Images are uint8 [N, H, W, C] with C = 1 or 3, as every artifact of the pipeline stores them.
"""

import importlib.util
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

SEPARATOR = (255, 255, 255, 0)  # between tiles the page is seen; white where a reader knows no transparency
GAP = 2  # pixels between tiles, after upscaling
MIN_SIDE = 32  # pixels of the shorter side of a tile, at least
MARGIN, CAPTION = 14, 32  # pixels to the right of and above a picture of a montage
INK = "#222222"
NAMES, NAMES_WIDTH = "names of rows", "width of names"  # texts in a PNG of rows, for `read_rows`


def save_grid(images: np.ndarray, path: Path, *, columns: int | None = None) -> None:
    """Write `images` [N, H, W, C] as one picture in rows of `columns`, by default as square as possible.

    Small images are enlarged by a whole factor. Raises ValueError for no images, or not uint8 [N, H, W, 1 or 3].
    """
    _check_images(images)
    columns = columns or math.ceil(math.sqrt(len(images)))
    Image.fromarray(tile(enlarge(images), columns)).save(path, format="PNG")


def save_rows(rows: Mapping[str, np.ndarray], path: Path) -> None:
    """Write one named row of tiles per entry, e.g. the steps of a sampler; `read_rows` separates them again.

    Raises ValueError for no rows, or a row that is not uint8 [N, H, W, 1 or 3].
    """
    if not rows:
        raise ValueError("rows is empty: at least one row of images is needed")
    for images in rows.values():
        _check_images(images)
    strips = {name: tile(enlarge(images), len(images)) for name, images in rows.items()}
    font = _font()
    margin = max(math.ceil(font.getlength(name)) for name in strips) + 12
    width = margin + max(strip.shape[1] for strip in strips.values())
    canvas = Image.new("RGBA", (width, sum(strip.shape[0] for strip in strips.values())), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for name, strip in strips.items():
        pen.text((6, top + strip.shape[0] // 2), name, font=font, fill=INK, anchor="lm")
        canvas.paste(Image.fromarray(strip), (margin, top))
        top += strip.shape[0]
    texts = PngInfo()
    texts.add_text(NAMES, "\n".join(strips))
    texts.add_text(NAMES_WIDTH, str(margin))
    canvas.save(path, format="PNG", pnginfo=texts)


def read_rows(path: Path) -> tuple[list[str], Image.Image]:
    """Return the names of a picture's rows, which `save_rows` wrote, and the rows without them."""
    with Image.open(path) as picture:
        names, margin = picture.text[NAMES].split("\n"), int(picture.text[NAMES_WIDTH])  # type: ignore[attr-defined]
        return names, picture.crop((margin, 0, picture.width, picture.height))


def save_montage(pictures: Mapping[str, Path], path: Path, *, columns: int, min_width: int = 260) -> None:
    """Lay out pictures in rows of `columns`, each under its name; narrow ones are enlarged by a whole factor.

    Raises ValueError without pictures.
    """
    if not pictures:
        raise ValueError("pictures is empty: at least one picture is needed")
    opened = {name: _open_rgb(file, min_width) for name, file in pictures.items()}
    width = max(picture.width for picture in opened.values()) + MARGIN
    height = max(picture.height for picture in opened.values()) + CAPTION
    columns = min(columns, len(opened))
    canvas = Image.new("RGB", (columns * width, math.ceil(len(opened) / columns) * height), "white")
    pen, font = ImageDraw.Draw(canvas), _font()
    for index, (name, picture) in enumerate(opened.items()):
        left, top = (index % columns) * width, (index // columns) * height
        pen.text((left + GAP, top + CAPTION - 6), name, font=font, fill=INK, anchor="ls")
        canvas.paste(picture, (left, top + CAPTION))
    canvas.save(path, format="PNG")


def _open_rgb(path: Path, width: int) -> Image.Image:
    with Image.open(path) as picture:
        factor = max(1, math.ceil(width / picture.width))
        size = (picture.width * factor, picture.height * factor)
        return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def enlarge(images: np.ndarray) -> np.ndarray:
    """Repeat pixels by the smallest whole factor that makes the shorter side at least MIN_SIDE."""
    factor = max(1, math.ceil(MIN_SIDE / min(images.shape[1:3])))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Lay `images` [N, H, W, C] out in rows of `columns`; return RGBA uint8 with thin separators."""
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 4)
    canvas = np.full(shape, SEPARATOR, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        place = canvas[top : top + height, left : left + width]
        place[..., :3], place[..., 3] = image, 255  # grey broadcasts to RGB
    return canvas


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font, which has Greek letters; Pillow's has none."""
    matplotlib = importlib.util.find_spec("matplotlib")
    assert matplotlib and matplotlib.origin, "the package depends on it"
    return ImageFont.truetype(str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"), size=13)


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be uint8 [N, H, W, 1 or 3] with N > 0, got {images.dtype} {list(images.shape)}")
