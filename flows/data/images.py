"""Encoded images to uint8 pixels: formats, conversion, cropping, resizing; the preview grid."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from flows.errors import UserError

# Formats by name: by default Pillow also tries decoders that start other programs (EPS).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
MAX_PIXELS = cast(int, Image.MAX_IMAGE_PIXELS)  # Pillow's own bound, which only triggers a warning there
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
ORIENTATION = 0x0112  # EXIF tag; 1 is upright, from 5 on width and height swap
TRAITS = (
    "greyscale",
    "palette",
    "alpha",
    "cmyk",
    "sixteen_bit",
    "exif_rotated",
    "several_frames",
    "resized",
    "upscaled",
)


def open_image(read: Callable[[], Path | BytesIO], where: str) -> Image.Image:
    """Open an encoded image lazily; raise UserError, naming `where`, if it is not one of FORMATS or too large."""
    try:
        image = Image.open(read(), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{where}: not an image in one of the formats {', '.join(FORMATS)}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: cannot be opened ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{where}: a decompression bomb? It has {image.width}x{image.height} pixels, allowed are {MAX_PIXELS}"
        )
    return image


def is_grey(image: Image.Image) -> bool:
    """Whether the image stores no colour; a palette counts as colour."""
    return image.mode in GREY_MODES


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height as seen after the EXIF rotation."""
    width, height = image.size
    swapped = image.format != "TIFF" and _orientation(image) >= 5  # for a TIFF, Pillow returns the upright size
    return (height, width) if swapped else (width, height)


def convert(
    image: Image.Image, where: str, *, channels: int, resize: str, resolution: int | None, background: str
) -> tuple[np.ndarray, set[str]]:
    """Return pixels uint8 [H, W, C] and the image's TRAITS.

    Raises UserError, naming `where`, if the image is damaged or 8 bits cannot hold its pixels.
    """
    try:
        traits = _encoding_traits(image)
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
            traits.add("exif_rotated")
    except Exception as error:  # on damaged bytes decoders raise almost anything
        raise UserError(f"{where}: damaged image ({error})") from error
    image = _eight_bit_opaque(image, where, background).convert("L" if channels == 1 else "RGB")
    if resize != "none" and resolution and image.size != (resolution, resolution):
        traits |= {"resized", "upscaled"} if min(image.size) < resolution else {"resized"}
        image = RESIZE[resize](image, resolution)
    return np.asarray(image).reshape(image.height, image.width, channels), traits


def _encoding_traits(image: Image.Image) -> set[str]:
    found = {
        "greyscale": is_grey(image),
        "palette": image.mode == "P",
        "alpha": image.has_transparency_data,
        "cmyk": image.mode == "CMYK",
        "sixteen_bit": any(";16" in str(tile.args) for tile in getattr(image, "tile", ())),
        "exif_rotated": _orientation(image) != 1,
        # An MPO is a JPEG followed by previews of itself.
        "several_frames": image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
    }
    return {name for name, holds in found.items() if holds}


def _orientation(image: Image.Image) -> int:
    # Asking Pillow about a PNG without EXIF ahead of its pixels would decode the pixels.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _eight_bit_opaque(image: Image.Image, where: str, background: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # The high byte, as Pillow itself does with 16-bit colour.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"{where}: 32-bit pixels (mode {image.mode}) have no set range; save them with 8 or 16 bits")
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the largest centred square and resize it (Lanczos): EDM's dataset tool, `center-crop`."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """Downsample by halves (box), fit the shorter side (bicubic), centre-crop: ADM's ImageNet preparation."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def pad(image: Image.Image, size: int) -> Image.Image:
    """Fit the whole image (Lanczos) between black bars, as EDM's `center-crop-wide` does."""
    scale = size / max(image.size)
    fitted = [max(1, round(side * scale)) for side in image.size]
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(image.resize(fitted, Image.Resampling.LANCZOS), ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return canvas


def stretch(image: Image.Image, size: int) -> Image.Image:
    """Resize both sides (Lanczos), ignoring the aspect ratio: EDM's dataset tool without a transform."""
    return image.resize((size, size), Image.Resampling.LANCZOS)


RESIZE: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center-crop": center_crop,
    "center-crop-dhariwal": center_crop_adm,
    "pad": pad,
    "stretch": stretch,
}


def preview_grid(images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> Image.Image:
    """Show ten images of each of ten classes, one row per class; without labels, up to 100 evenly spaced."""
    if class_names:
        shown = np.unique(labels)[:10]
        rows = [np.flatnonzero(labels == label)[:10] for label in shown]
    else:
        chosen = np.unique(np.linspace(0, len(images) - 1, 100).astype(int))
        rows = [chosen[start : start + 10] for start in range(0, len(chosen), 10)]
    tiles = [[_tile(images[index]) for index in row] for row in rows]
    width, height = tiles[0][0].size
    left = 100 if class_names else 0  # room for the names
    grid = Image.new("RGB", (left + 10 * (width + 2), len(tiles) * (height + 2)), "white")
    draw = ImageDraw.Draw(grid)
    for row, row_tiles in enumerate(tiles):
        if class_names:  # the built-in font covers little more than ASCII
            name = class_names[shown[row]][:15].encode("ascii", "replace").decode()
            draw.text((4, row * (height + 2) + height // 2 - 6), name, fill="black")
        for column, tile in enumerate(row_tiles):
            grid.paste(tile, (left + column * (width + 2), row * (height + 2)))
    return grid


def _tile(pixels: np.ndarray) -> Image.Image:
    """Scale one image [H, W, C] to about 64 to 128 pixels, small ones by a whole factor so that pixels stay visible."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    side = max(image.size)
    if side <= 128:
        factor = max(1, 64 // side)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize([max(1, s * 128 // side) for s in image.size], Image.Resampling.BOX)
