"""Formats, modes, bit depths and colour profiles: converted as arithmetic says, or refused in one line."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.data import formats
from flows.data.images import convert, open_image
from flows.errors import UserError
from fuzz_images import originals
from image_encoders import ADOBE_RGB, DISPLAY_P3, SRGB, SRGB_CURVE, cmyk_icc, grid, icc, packed, png, tiff
from image_sources import colours, encoded, one_image, refused, write_tree

# --- formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, fmt, exact",
    [
        *((f"x{extension}", "JPEG", False) for extension in (".jpg", ".JPE", ".jfif")),
        *((f"x{extension}", fmt, True) for extension, fmt in ((".qoi", "QOI"), (".jp2", "JPEG2000"), (".dib", "BMP"))),
        ("x.avif", "AVIF", False),
        ("x.heic", "HEIF", False),
        ("x.jxl", "JXL", False),
    ],
)
def test_formats_by_their_extensions(tmp_path, name, fmt, exact):
    if fmt not in formats.readable():
        pytest.skip(f"no package for {fmt} here")
    smooth = np.add.outer(np.arange(0, 64, 4), np.arange(0, 128, 8))[..., None].repeat(3, 2).astype(np.uint8)
    options = {} if exact else {"quality": 95}
    pixels, _ = one_image(tmp_path, encoded(smooth, fmt, **options), name)
    np.testing.assert_allclose(pixels.astype(int), smooth, atol=0 if exact else 6)


def test_what_is_not_read_names_what_to_install_or_do(tmp_path, monkeypatch):
    missing = {**dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"), ".jxl": "pillow-jxl-plugin"}
    monkeypatch.setattr(formats, "missing_plugins", lambda: missing)
    heic = b"\0\0\0\x18ftypheic" + bytes(40)
    files = {"a.heic": heic, "b.jpg": heic, "c.cr2": b"", "d.psd": b"", "e.png": encoded(colours(1)[0])}
    source = {"kind": "images", "path": str(write_tree(tmp_path / "in", files))}
    parts = ["a.heic: .heic files need the package pillow-heif: pip install pillow-heif"]
    parts += ["b.jpg: is HEIC by its contents; .heic files need the package pillow-heif"]
    parts += ["c.cr2: .cr2 is a camera's raw format", "d.psd: .psd is not read; save it as PNG"]
    refused(tmp_path, source, "4 of 5 images", *parts)


# --- modes and bit depths ------------------------------------------------------------------------------------


def read(content: bytes, channels: int = 3, background: str = "white", **fields) -> np.ndarray:
    """Return the pixels of the one row that `content` holds."""
    image = open_image(lambda: io.BytesIO(content), "x")
    return convert(image, "x", channels=channels, resize="none", resolution=None, background=background, **fields)[0][0]


def over(colour: np.ndarray, alpha: np.ndarray, behind: int) -> np.ndarray:
    return colour * alpha[:, None] + behind * (1 - alpha[:, None])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("background, behind", [("white", 255), ("black", 0)])
def test_png_grey_of_every_depth_and_its_transparent_level(bits, background, behind):
    highest = (1 << bits) - 1
    levels = np.random.default_rng(bits).integers(0, highest + 1, 50)
    wanted = levels >> 8 if bits == 16 else levels * 255 // highest
    assert read(png(levels, bits, 0), 1)[:, 0].tolist() == wanted.tolist()
    for key in {0, highest, int(levels[0])}:
        content = png(levels, bits, 0, [(b"tRNS", struct.pack(">H", key))])
        shown = np.where(levels == key, behind, wanted)
        assert read(content, 1, background)[:, 0].tolist() == shown.tolist()
        assert read(content, 3, background).tolist() == shown[:, None].repeat(3, 1).tolist()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour_type", [2, 4, 6])
@pytest.mark.parametrize("background, behind", [("white", 255), ("black", 0)])
def test_png_with_colour_and_alpha(bits, colour_type, background, behind):
    samples = {2: 3, 4: 2, 6: 4}[colour_type]
    row = np.random.default_rng(0).integers(0, 1 << bits, (40, samples))
    row[:3, -1] = 0, (1 << bits) - 1, 1 << bits - 1
    pixels = read(png(row.ravel(), bits, colour_type), 3, background)
    eight = row >> 8 if bits == 16 else row
    colour = eight[:, : samples - (colour_type > 2)].repeat(3 if colour_type == 4 else 1, 1)
    alpha = eight[:, -1] / 255 if colour_type > 2 else np.ones(40)
    np.testing.assert_allclose(pixels, over(colour, alpha, behind), atol=1)


def test_png_palettes_of_every_depth_with_alpha():
    palette = np.array([[10, 20, 30], [200, 100, 50]])
    indices = np.array([0, 1, 1, 0, 1])
    for bits in (1, 2, 4, 8):
        chunk = (b"PLTE", palette.astype(np.uint8).tobytes())
        assert read(png(indices, bits, 3, [chunk])).tolist() == palette[indices].tolist()
        pixels = read(png(indices, bits, 3, [chunk, (b"tRNS", bytes([0, 128]))]))
        wanted = over(palette[indices], np.array([0, 128 / 255])[indices], 255)
        np.testing.assert_allclose(pixels, wanted, atol=1)


def test_transparent_colours_of_png():
    key = (b"tRNS", struct.pack(">HHH", 4, 5, 6))
    assert read(png([1, 2, 3, 4, 5, 6], 8, 2, [key])).tolist() == [[1, 2, 3], [255] * 3]
    with pytest.raises(UserError, match="x: has a transparent colour of 16 bits"):
        read(png([1, 2, 3, 4, 5, 6], 16, 2, [key]))


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_tiff_grey_of_every_depth_whether_black_or_white_is_zero(bits, photometric):
    highest = (1 << bits) - 1
    levels = np.random.default_rng(bits).integers(0, highest + 1, 48)
    data = levels.astype("<u2").tobytes() if bits == 16 else packed(levels, bits)
    content = tiff(data, 48, bits, photometric=photometric)
    if (bits, photometric) == (12, 0):
        with pytest.raises(UserError, match="x: damaged image, or a kind of TIF that is not read"):
            read(content, 1)
        return
    shown = levels if photometric else highest - levels
    wanted = shown >> bits - 8 if bits > 8 else shown * 255 // highest
    assert read(content, 1)[:, 0].tolist() == wanted.tolist()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [None, 0, 1, 2])  # none, unspecified, premultiplied, plain alpha
def test_tiff_colour_with_every_kind_of_fourth_sample(bits, extra):
    row = np.array([[10, 20, 30, 255], [60, 50, 40, 128], [0, 0, 0, 0]]) * (257 if bits == 16 else 1)
    row = row if extra is not None else row[:, :3]
    data = row.astype("<u2" if bits == 16 else np.uint8).tobytes()
    pixels = read(tiff(data, 3, bits, samples=row.shape[1], photometric=2, extra=extra))
    eight = row >> 8 if bits == 16 else row
    alpha = eight[:, -1] / 255 if extra else np.ones(3)
    wanted = eight[:, :3] + 255 * (1 - alpha[:, None]) if extra == 1 else over(eight[:, :3], alpha, 255)
    np.testing.assert_allclose(pixels, wanted, atol=2)


@pytest.mark.parametrize("extra, wanted", [(0, [0, 100, 0]), (1, [0, 227, 255]), (2, [0, 177, 255])])
def test_tiff_grey_with_every_kind_of_second_sample(extra, wanted):
    content = tiff(bytes([0, 255, 100, 128, 0, 0]), 3, 8, samples=2, extra=extra)
    np.testing.assert_allclose(read(content, 1)[:, 0], wanted, atol=1)


def test_tiff_cmyk_and_lab():
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [100, 50, 20, 10]])
    pixels = read(tiff(inks.astype(np.uint8).tobytes(), 4, 8, samples=4, photometric=5))
    np.testing.assert_allclose(pixels, (255 - inks[:, :3]) * (255 - inks[:, 3:]) / 255, atol=1)
    lab = np.array([[-1, 0, 0], [-128, 20, -10]]).astype(np.int8).view(np.uint8)
    # By the formulas of CIE L*a*b* at D50, Bradford's matrix to sRGB, and sRGB's curve.
    np.testing.assert_allclose(
        read(tiff(lab.tobytes(), 2, 8, samples=3, photometric=8)), [[255] * 3, [147, 107, 137]], atol=1
    )


@pytest.mark.parametrize(
    "content, part",
    [
        (tiff(np.array([1, 2], np.int8).tobytes(), 2, 8, sample_format=2), "sign"),
        (tiff(np.array([1, 2], np.int16).tobytes(), 2, 16, sample_format=2), "no set range"),
        (tiff(np.array([1, 2], np.uint32).tobytes(), 2, 32), "no set range"),
        (tiff(np.array([1, 2], np.float32).tobytes(), 2, 32, sample_format=3), "no set range"),
        (tiff(np.array([1, 2], np.float64).tobytes(), 2, 64, sample_format=3), "kind of TIF that is not read"),
        (tiff(bytes(6), 2, 8, samples=3, photometric=9), "kind of TIF that is not read"),
        (b"Pf\n2 1\n-1.0\n" + np.array([0.5, 1], np.float32).tobytes(), "no set range"),
    ],
)
def test_pixels_without_a_set_range_are_refused(content, part):
    with pytest.raises(UserError, match=f"^x: .*{part}"):
        read(content)


@pytest.mark.parametrize("highest", [1, 15, 255, 1000, 65535])
def test_pnm_of_any_highest_level(highest):
    levels = np.linspace(0, highest, 7).round().astype(int)
    data = levels.astype(">u2" if highest > 255 else np.uint8).tobytes()
    pixels = read(f"P5 7 1 {highest}\n".encode() + data, 1)[:, 0]
    np.testing.assert_allclose(pixels, levels * 255 / highest, atol=1)


# --- colours -------------------------------------------------------------------------------------------------

# The same three colours in each space: sRGB's red, green and blue, by CSS Color 4 and by Adobe's specification.
PURE = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
IN_P3 = [[234, 51, 35], [117, 251, 76], [0, 0, 245]]
IN_ADOBE = [[219, 0, 0], [144, 255, 60], [0, 0, 250]]


@pytest.mark.parametrize(
    "colorants, curve, given", [(DISPLAY_P3, SRGB_CURVE, IN_P3), (ADOBE_RGB, 2.19921875, IN_ADOBE)]
)
@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_profiles_are_converted_to_srgb(tmp_path, colorants, curve, given, fmt):
    patches = np.array(given, np.uint8).repeat(16, 0)[None].repeat(16, 0)  # whole blocks of a JPEG
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100}}
    content = encoded(patches, fmt, icc_profile=icc(colorants, curve), **lossless.get(fmt, {}))
    pixels, counts = one_image(tmp_path, content, f"x.{fmt.lower()}")
    loss = 4 if fmt in ("JPEG", "AVIF") else 0
    # Half a level of rounding in P3 is up to three levels of sRGB where a channel is dark.
    np.testing.assert_allclose(pixels[8, 8::16].astype(int), PURE, atol=4 + loss)
    assert counts == {"colour_profile"}
    ignored, counts = one_image(tmp_path / "ignored", content, f"x.{fmt.lower()}", colours="ignore")
    np.testing.assert_allclose(ignored[8, 8::16].astype(int), given, atol=loss)
    assert counts == set()


def test_pixels_in_srgb_keep_their_bytes_whatever_made_their_profile(tmp_path):
    pixels, counts = one_image(tmp_path, encoded(grid(), icc_profile=icc(SRGB, SRGB_CURVE)))
    np.testing.assert_array_equal(pixels, grid())
    assert counts == set()


@pytest.mark.parametrize("mode", ["RGBA", "P", "PA", "LA", "L", "1", "I;16"])
def test_profiles_of_other_modes(mode):
    profile = icc(DISPLAY_P3, SRGB_CURVE) if mode in ("RGBA", "P", "PA") else icc(None, 1.0)
    if mode in ("RGBA", "PA"):
        image = Image.new("RGBA", (2, 1), (234, 51, 35, 255))
        image.putpixel((1, 0), (234, 51, 35, 128))
        wanted = [[255, 0, 0], [255, 127, 127]]
        image = image.quantize(4) if mode == "PA" else image
    elif mode == "P":
        image, wanted = Image.new("RGB", (2, 1), (234, 51, 35)).quantize(2), [[255, 0, 0]] * 2
    elif mode == "I;16":
        image, wanted = Image.fromarray(np.array([[0, 128 << 8]], np.uint16)), [[0] * 3, [188] * 3]
    elif mode == "1":
        image, wanted = Image.new("1", (2, 1), 1), [[255] * 3] * 2
    else:
        image = Image.new(mode, (2, 1), (128, 255) if mode == "LA" else 128)
        wanted = [[188] * 3] * 2  # half of the light, by sRGB's curve
    np.testing.assert_allclose(read(saved(image, profile)), wanted, atol=2)


def saved(image: Image.Image, profile: bytes) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=profile)
    return buffer.getvalue()


def test_greys_with_a_profile_for_colours(tmp_path):
    greys = np.arange(0, 256, 8, dtype=np.uint8)[None]
    for name, profile, wanted in (
        ("p3", icc(DISPLAY_P3, SRGB_CURVE), greys),  # the same curve
        ("linear", icc(DISPLAY_P3, 1.0), np.where(greys <= 0, 0, 255 * (1.055 * (greys / 255) ** (1 / 2.4) - 0.055))),
    ):
        pixels, counts = one_image(tmp_path / name, encoded(greys, icc_profile=profile))
        np.testing.assert_allclose(pixels[..., 0], wanted, atol=0 if name == "p3" else 2)
        assert counts == {"greyscale"} | ({"colour_profile"} if name == "linear" else set())


def test_cmyk_with_a_profile():
    """Full cyan of this printer is L = 50.2, a = 20, b = -10, which sRGB writes as 147, 107, 137 (see above)."""
    profile = cmyk_icc([128, 128 + 20, 128 - 10])
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]], np.uint8)
    content = tiff(inks.tobytes(), 3, 8, samples=4, photometric=5, profile=profile)
    np.testing.assert_allclose(read(content), [[255] * 3, [147, 107, 137], [0] * 3], atol=2)
    assert read(content, colours="ignore").tolist() == [[255] * 3, [0, 255, 255], [0] * 3]


def test_profiles_that_do_not_fit_are_refused_by_name(tmp_path):
    for name, profile, part in (
        ("a.png", icc(None, 2.2), "for GRAY, its pixels are RGB"),
        ("b.png", b"x" * 200, "damaged"),
    ):
        content = encoded(colours(1)[0], icc_profile=profile)
        folder = write_tree(tmp_path / name[0], {name: content})
        refused(tmp_path, {"kind": "images", "path": str(folder)}, name, part, "data.colours=ignore")
        pixels, _ = one_image(tmp_path / f"{name}-ignored", content, colours="ignore")
        np.testing.assert_array_equal(pixels, colours(1)[0])


def test_the_gamma_of_a_png():
    linear = png([128, 64, 255], 8, 2, [(b"gAMA", struct.pack(">I", 100_000))])
    np.testing.assert_allclose(read(linear), [[188, 137, 255]], atol=1)
    assert read(linear, colours="ignore").tolist() == [[128, 64, 255]]
    usual = (b"gAMA", struct.pack(">I", 45_455))
    assert read(png([128, 64, 255], 8, 2, [usual])).tolist() == [[128, 64, 255]]
    wide = (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
    with pytest.raises(UserError, match="other primaries than sRGB's"):
        read(png([128, 64, 255], 8, 2, [usual, wide]))
    # An sRGB chunk says more than both.
    assert read(png([128, 64, 255], 8, 2, [(b"sRGB", b"\0"), usual, wide])).tolist() == [[128, 64, 255]]


def test_a_camera_set_to_adobe_rgb_without_a_profile():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}  # the interoperability index
    content = encoded(colours(1, (16, 16))[0], "JPEG", exif=exif)
    with pytest.raises(UserError, match="x: of unknown colours .Adobe RGB by its EXIF, and no profile"):
        read(content)
    assert read(content, colours="ignore").shape == (16, 3)


def test_a_damaged_compressed_profile_is_one_line():
    chunk = (b"iCCP", b"name\0\0" + zlib.compress(b"x" * 300)[:20])
    with pytest.raises(UserError, match="^x: "):
        read(png([1, 2, 3], 8, 2, [chunk]))


def test_no_format_hides_that_it_was_cut_off():
    for extension, files in originals().items():
        for content in files:
            whole = pixels_of(content)
            for part in (0.3, 0.5, 0.8, 0.9, 0.97):
                try:
                    found = pixels_of(content[: int(len(content) * part)])
                except UserError:
                    continue  # as most do; else only what follows the pixels may be missing
                np.testing.assert_array_equal(found, whole, err_msg=extension)


def pixels_of(content: bytes) -> np.ndarray:
    image = open_image(lambda: io.BytesIO(content), "x")
    return convert(image, "x", channels=3, resize="none", resolution=None, background="white")[0]


@pytest.mark.slow
def test_two_thousand_mutated_files_of_every_format(tmp_path):
    """No traceback, no hang, no memory above 2 GB, in `prepare` and in the reader of `cm edit`."""
    (tmp_path / "in").mkdir()
    script = Path(__file__).parents[2] / "support" / "fuzz_images.py"
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "in"), "2000", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stderr.splitlines()[-1])
    assert report["read"] + report["refused"] == 2000 and report["refused"] == report["skipped"]
    assert report["read"] > 200 and report["refused"] > 200 and report["formats"] == len(formats.readable()) >= 10
    assert report["one line"] and report["one line of headers"]
    assert report["longest"] < 60 and report["memory"] < 2 * 10**9
