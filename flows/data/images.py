"""Encoded images to uint8 pixels: conversion, cropping, resizing; the preview grid."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from flows.data.archives import first_bytes
from flows.data.colour import ColourError, colour_space, to_srgb
from flows.data.formats import HEAD, extension_by_contents, readable, remedy
from flows.errors import UserError

MAX_PIXELS = cast(int, Image.MAX_IMAGE_PIXELS)  # Pillow's own bound, which only triggers a warning there
STRIP = 1 << 20  # pixels composed at a time
LARGE = 20 << 20  # pixels; of larger images one is decoded at a time, or many threads would take many times its memory
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
ORIENTATION = 0x0112  # EXIF tag; 1 is upright, from 5 on width and height swap
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags; photometric 0: white is zero
SIGNED = 2
TRAITS = (
    "greyscale",
    "palette",
    "alpha",
    "cmyk",
    "sixteen_bit",
    "colour_profile",
    "exif_rotated",
    "several_frames",
    "resized",
    "upscaled",
)
PREVIEW_CLASSES = 10  # of preview.png
_one_large = threading.Lock()


def open_image(read: Callable[[], Path | BytesIO], where: str) -> Image.Image:
    """Open an encoded image lazily; raise UserError, naming `where`, if its format is not read or it is too large."""
    try:
        image = Image.open(read(), formats=readable())
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{where}: {_unidentified(read)}") from error
    except UserError:
        raise
    except Exception as error:  # on damaged bytes decoders raise almost anything
        raise UserError(f"{where}: cannot be opened ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{where}: a decompression bomb? It has {image.width}x{image.height} pixels, allowed are {MAX_PIXELS}"
        )
    return image


def _unidentified(read: Callable[[], Path | BytesIO]) -> str:
    extension = extension_by_contents(first_bytes(read, HEAD))
    if extension and (advice := remedy(extension)):
        return f"is {extension[1:].upper()} by its contents; {advice}"
    if extension:
        return f"damaged image, or a kind of {extension[1:].upper()} that is not read"
    return f"not an image in one of the formats {', '.join(readable())}"


def is_grey(image: Image.Image) -> bool:
    """Whether the image stores no colour; a palette counts as colour."""
    return image.mode in GREY_MODES


def upright_size(image: Image.Image, where: str) -> tuple[int, int]:
    """Return width and height as seen after the EXIF rotation; raise UserError, naming `where`, for damaged EXIF."""
    width, height = image.size
    try:
        orientation = _orientation(image)
    except Exception as error:  # on damaged bytes its parser raises almost anything
        raise UserError(f"{where}: damaged EXIF ({error or type(error).__name__})") from error
    swapped = image.format != "TIFF" and orientation >= 5  # for a TIFF, Pillow returns the upright size
    return (height, width) if swapped else (width, height)


def convert(
    image: Image.Image,
    where: str,
    *,
    channels: int,
    resize: str,
    resolution: int | None,
    background: str,
    colours: str = "srgb",
) -> tuple[np.ndarray, set[str]]:
    """Return pixels uint8 [H, W, C] and the image's TRAITS.

    Raises UserError, naming `where`, if the image is damaged, its profile unusable, or 8 bits cannot hold its pixels.
    """
    with _turn(image):
        try:
            traits = _encoding_traits(image)
            space = colour_space(image) if colours == "srgb" else None
            coding = _coding(image)
            image.load()
            if _orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
                traits.add("exif_rotated")
            image, changed = to_srgb(_eight_bits(image, where, coding), space)
            traits |= {"colour_profile"} if changed else set()
            image = _opaque(image, background).convert("L" if channels == 1 else "RGB")
            if resize != "none" and resolution and image.size != (resolution, resolution):
                traits |= {"resized", "upscaled"} if min(image.size) < resolution else {"resized"}
                image = RESIZE[resize](image, resolution)
        except UserError:
            raise
        except ColourError as error:
            raise UserError(
                f"{where}: of unknown colours ({error}); save it in sRGB, or take it as that by data.colours=ignore"
            ) from error
        except Exception as error:  # on damaged bytes decoders raise almost anything
            raise UserError(f"{where}: damaged image ({error or type(error).__name__})") from error
    return np.asarray(image).reshape(image.height, image.width, channels), traits


def _turn(image: Image.Image) -> AbstractContextManager:
    return _one_large if image.width * image.height > LARGE else nullcontext()


def _encoding_traits(image: Image.Image) -> set[str]:
    found = {
        "greyscale": is_grey(image),
        "palette": image.mode == "P",
        "alpha": image.has_transparency_data,
        "cmyk": image.mode == "CMYK",
        "sixteen_bit": ";16" in _coding(image),
        "exif_rotated": _orientation(image) != 1,
        # An MPO is a JPEG followed by previews of itself.
        "several_frames": image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
    }
    return {name for name, holds in found.items() if holds}


def _coding(image: Image.Image) -> str:
    """Return how an image that is not loaded yet stores its samples, of PNG and TIFF: "I;16B", "L;2", ..."""
    return " ".join(str(tile.args) for tile in getattr(image, "tile", ()))


def _orientation(image: Image.Image) -> int:
    # Asking Pillow about a PNG without EXIF ahead of its pixels would decode the pixels.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _eight_bits(image: Image.Image, where: str, coding: str) -> Image.Image:
    """Return an image of 8 bits a channel; of more, their highest, as Pillow itself does with 16-bit colour."""
    key, tags = image.info.get("transparency"), getattr(image, "tag_v2", {})
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise UserError(f"{where}: pixels with a sign have no set range; save them without")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image)
        bits = tags.get(BITS, (16,))[0]
        if tags.get(PHOTOMETRIC) == 0:
            values = (1 << bits) - 1 - values
        grey = Image.fromarray((values >> bits - 8).astype(np.uint8))
        if key is not None:
            grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        return grey
    if image.mode in ("I", "F"):
        raise UserError(f"{where}: 32-bit pixels (mode {image.mode}) have no set range; save them with 8 or 16 bits")
    if isinstance(key, tuple) and ";16" in coding:
        raise UserError(f"{where}: has a transparent colour of 16 bits, {key}; save it with an alpha channel")
    if isinstance(key, int) and (scale := {"L;2": 85, "L;4": 17}.get(coding.strip("'"))):
        image.info["transparency"] = key * scale  # Pillow compares it with levels up to 255
    return image.convert("LA") if image.mode == "La" else image


def _opaque(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    opaque, rows = Image.new("RGB", image.size), max(1, STRIP // image.width)
    for top in range(0, image.height, rows):  # a large image needs no four copies
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        opaque.paste(Image.alpha_composite(Image.new("RGBA", part.size, background), part).convert("RGB"), (0, top))
    return opaque


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


def preview_grid(
    images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], rows: int = PREVIEW_CLASSES
) -> Image.Image:
    """Show ten images of each class, one row per class, up to `rows`; without labels, up to 100 evenly spaced."""
    if class_names:
        shown = np.unique(labels)[:rows]
        chosen = [np.flatnonzero(labels == label)[:10] for label in shown]
    else:
        spaced = np.unique(np.linspace(0, len(images) - 1, 100).astype(int))
        chosen = [spaced[start : start + 10] for start in range(0, len(spaced), 10)]
    tiles = [[_tile(images[index]) for index in row] for row in chosen]
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
