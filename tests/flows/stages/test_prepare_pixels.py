"""Colours, bit depths, transparency, rotation and sizes in the stage prepare."""

import io

import numpy as np
import pytest
from PIL import Image

from image_sources import (
    colours,
    encoded,
    one_image,
    png16,
    prepared,
    refused,
    write_tree,
)


def test_grey_images_keep_one_channel_unless_some_have_colour(tmp_path):
    grey = colours(1)[0][..., 0]
    pixels, counts = one_image(tmp_path, encoded(grey))
    np.testing.assert_array_equal(pixels, grey[..., None])
    assert counts == {"greyscale"}
    write_tree(tmp_path / "in", {"colour.png": encoded(colours(1)[0])})
    dataset, facts = prepared(tmp_path / "mixed", {"kind": "images", "path": str(tmp_path / "in")}, heldout_fraction=0)
    assert dataset.image_shape == (3, 6, 6)
    np.testing.assert_array_equal(dataset.train_images[1], grey[..., None].repeat(3, 2))
    assert facts["counts"]["greyscale"] == 1


def test_luma_of_colour_images(tmp_path):
    colour = colours(1)[0]
    pixels, _ = one_image(tmp_path, encoded(colour), channels="grey")
    luma = colour @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(pixels[..., 0], luma, atol=0.51)


def test_palette(tmp_path):
    indices = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    indices.putpalette([10, 20, 30, 200, 100, 0])
    buffer = io.BytesIO()
    indices.save(buffer, "PNG")
    pixels, counts = one_image(tmp_path, buffer.getvalue())
    assert pixels.tolist() == [[[10, 20, 30], [200, 100, 0]], [[200, 100, 0], [10, 20, 30]]]
    assert counts == {"palette"}


@pytest.mark.parametrize("background, behind", [("white", 255), ("black", 0)])
def test_alpha_shows_the_background(tmp_path, background, behind):
    rgba = np.full((2, 2, 4), 100, np.uint8)
    rgba[..., 3] = [[255, 0], [51, 255]]
    pixels, counts = one_image(tmp_path, encoded(rgba), background=background)
    assert pixels[0, 0].tolist() == [100] * 3
    assert pixels[0, 1].tolist() == [behind] * 3
    np.testing.assert_allclose(pixels[1, 0], 0.2 * 100 + 0.8 * behind, atol=1)
    assert counts == {"alpha"}


def test_grey_with_alpha_stays_grey(tmp_path):
    pixels, counts = one_image(tmp_path, encoded(np.array([[[77, 255], [9, 0]]], np.uint8)))
    assert pixels[..., 0].tolist() == [[77, 255]]
    assert counts == {"greyscale", "alpha"}


def test_sixteen_bits_keep_the_high_byte(tmp_path):
    pixels, counts = one_image(tmp_path / "grey", png16([[0, 0x80FF], [0x1200, 0xFFFF]], 0))
    assert pixels[..., 0].tolist() == [[0, 0x80], [0x12, 0xFF]]
    assert counts == {"greyscale", "sixteen_bit"}
    pixels, counts = one_image(tmp_path / "rgb", png16([[0x1234, 0x5678, 0x9ABC]], 2))
    assert pixels.tolist() == [[[0x12, 0x56, 0x9A]]]
    assert counts == {"sixteen_bit"}


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(tmp_path, fmt):
    colour = colours(1, (4, 6))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    options = {"lossless": True} if fmt == "WEBP" else {}
    pixels, counts = one_image(tmp_path, encoded(colour, fmt, exif=exif, **options), f"x.{fmt.lower()}")
    np.testing.assert_array_equal(pixels, np.rot90(colour, -1))
    assert counts == {"exif_rotated"}


def test_cmyk_and_animations(tmp_path):
    buffer = io.BytesIO()
    Image.new("CMYK", (4, 4)).save(buffer, "JPEG")
    pixels, counts = one_image(tmp_path / "jpeg", buffer.getvalue(), "x.jpg")
    assert pixels.shape == (4, 4, 3)
    assert counts == {"cmyk"}
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    pixels, counts = one_image(tmp_path / "frames", buffer.getvalue())
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert counts == {"several_frames"}


def test_center_crop_takes_the_largest_centred_square(tmp_path):
    colour = np.zeros((8, 20, 3), np.uint8)
    colour[:, 6:14] = colours(1, (8, 8))[0]
    pixels, counts = one_image(tmp_path, encoded(colour), resolution=8, resize="center-crop")
    np.testing.assert_array_equal(pixels, colour[:, 6:14])
    assert counts == {"resized"}


def test_center_crop_dhariwal_halves_by_box(tmp_path):
    colour = colours(1, (32, 48))[0] & 0xF0  # multiples of 16: their means over 2 and 4 pixels are whole numbers
    pixels, _ = one_image(tmp_path, encoded(colour), resolution=8, resize="center-crop-dhariwal")
    np.testing.assert_array_equal(pixels, colour.reshape(8, 4, 12, 4, 3).mean(axis=(1, 3))[:, 2:10])


def test_pad_keeps_everything_between_black_bars(tmp_path):
    pixels, counts = one_image(tmp_path, encoded(np.full((4, 8, 3), 200, np.uint8)), resolution=16, resize="pad")
    assert (pixels[:4] == 0).all() and (pixels[-4:] == 0).all() and (pixels[4:12] == 200).all()
    assert counts == {"resized", "upscaled"}


def test_stretch_ignores_proportions(tmp_path):
    rows = np.repeat(np.array([0, 255], np.uint8), 32)[:, None, None].repeat(8, 1).repeat(3, 2)  # [64, 8, 3]
    pixels, _ = one_image(tmp_path, encoded(rows), resolution=8, resize="stretch")
    assert (pixels[0] == 0).all() and (pixels[-1] == 255).all()
    np.testing.assert_array_equal(pixels, pixels[:, :1].repeat(8, 1))


def test_images_of_the_right_size_pass_untouched(tmp_path):
    colour = colours(1, (8, 8))[0]
    for policy in ("none", "center-crop", "center-crop-dhariwal", "pad", "stretch"):
        pixels, counts = one_image(tmp_path / policy, encoded(colour), resolution=8, resize=policy)
        np.testing.assert_array_equal(pixels, colour)
        assert counts == set()


def test_mixed_sizes_need_a_policy(tmp_path):
    folder = write_tree(tmp_path / "in", {"a.png": encoded(colours(1)[0]), "b.png": encoded(colours(1, (6, 9))[0])})
    source = {"kind": "images", "path": str(folder)}
    refused(tmp_path, source, "b.png", "9x6", "6x6", "data.resize")
    refused(tmp_path, source, "a.png", "6x6", "8x8", resolution=8)
    dataset, facts = prepared(tmp_path / "out", source, resolution=8, resize="center-crop", heldout_fraction=0)
    assert dataset.train_images.shape == (2, 8, 8, 3)
    assert facts["counts"]["resized"] == 2


def test_oblong_images_are_allowed_when_all_are_alike(tmp_path):
    pixels, _ = one_image(tmp_path, encoded(colours(1, (4, 6))[0]))
    assert pixels.shape == (4, 6, 3)
