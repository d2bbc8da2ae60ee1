"""Colours of images that say in which space they are, as sRGB."""

from collections.abc import Callable
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

SPACES = {"RGB": "RGB ", "RGBA": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # mode -> colour space of its profile
SAME = 2  # levels of 255; profiles of sRGB by other makers differ so much from each other
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE
SRGB_GAMMA, SAME_GAMMA = 1 / 2.2, 0.02  # of PNG's gAMA
SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # of PNG's cHRM: white, red, green, blue
SAME_PRIMARIES = 0.01
INTEROP_IFD, ADOBE_RGB = 0xA005, "R03"  # EXIF of cameras that are set to Adobe RGB

ColourSpace = bytes | float | None  # an ICC profile, the gamma of a PNG, or sRGB


class ColourError(ValueError):
    """A colour space that cannot be converted from: a damaged or unfitting profile, or none where one is needed."""


def colour_space(image: Image.Image) -> ColourSpace:
    """Return what an opened image says about its colours. Raises ColourError if only a profile could say enough."""
    if profile := image.info.get("icc_profile"):
        return profile
    if image.format == "PNG" and "srgb" not in image.info:
        primaries = image.info.get("chromaticity", SRGB_PRIMARIES)
        if max(abs(a - b) for a, b in zip(primaries, SRGB_PRIMARIES, strict=True)) > SAME_PRIMARIES:
            raise ColourError("other primaries than sRGB's, and no profile")
        gamma = image.info.get("gamma") or SRGB_GAMMA
        return None if abs(gamma - SRGB_GAMMA) <= SAME_GAMMA else gamma
    if "exif" in image.info and image.getexif().get_ifd(INTEROP_IFD).get(1) == ADOBE_RGB:
        raise ColourError("Adobe RGB by its EXIF, and no profile")
    return None


def to_srgb(image: Image.Image, space: ColourSpace) -> tuple[Image.Image, bool]:
    """Return an image of 8 bits in sRGB, and whether its colours changed; one in sRGB keeps its bytes.

    Raises ColourError if a profile cannot be used.
    """
    if space is None:
        return image, False
    if image.mode == "LA":
        grey, alpha = image.split()
        colours, changed = to_srgb(grey, space)
        if changed:
            colours.putalpha(alpha)
        return (colours if changed else image), changed
    if image.mode not in SPACES:  # palettes, premultiplied alpha, bilevel
        image = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
    if isinstance(space, float):
        table, same = _table(space), list(range(256))
        return image.point([level for band in image.mode for level in (same if band == "A" else table)]), True
    transform = _transform(space, image.mode)
    return (image, False) if transform is None else (transform(image), True)


def _table(gamma: float) -> list[int]:
    """Return sRGB's level for each of 256 that a power function encoded."""
    linear = (np.arange(256) / 255) ** (1 / gamma)
    return (
        np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))
        .astype(int)
        .tolist()
    )


@lru_cache(256)
def _transform(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Return the transform to sRGB; None if it leaves every colour where it is."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = source.profile.xcolor_space
        as_colour = mode == "L" and space == SPACES["RGB"]  # greys are colours too
        if space != SPACES[mode] and not as_colour:
            raise ColourError(f"its profile is for {space.strip()}, its pixels are {mode}")
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        modes = "RGB" if as_colour else mode, "RGBA" if mode == "RGBA" else "RGB"
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.ImageCmsTransform(source, target, *modes, intent, flags=FLAGS)
    except (OSError, ImageCms.PyCMSError, TypeError) as error:
        raise ColourError(f"damaged profile: {error}") from error

    def apply(image: Image.Image) -> Image.Image:
        return transform.apply(image.convert("RGB") if as_colour else image)

    if mode == "CMYK":
        return apply
    probe = _probe(mode)
    moved = np.abs(np.asarray(apply(probe), int)[..., :3] - np.asarray(probe.convert("RGB"), int))
    return None if moved.max() <= SAME else apply


def _probe(mode: str) -> Image.Image:
    """Return colours from all over the space: a grid of 17 levels a channel, or every grey."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(17, -1, 3)
    return Image.fromarray(grid).convert(mode)
