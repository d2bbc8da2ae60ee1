"""Grids and charts show everything where it belongs; files are the same bytes each time."""

import re

import numpy as np
import pytest
from PIL import Image

from flows.reports.charts import save_bars, save_lines
from flows.reports.figures import (
    CAPTION,
    GAP,
    MARGIN,
    enlarge,
    read_rows,
    save_grid,
    save_montage,
    save_rows,
    tile,
)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)


def test_grid_holds_each_image_enlarged_by_a_whole_factor(images, tmp_path):
    save_grid(images, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (3 * 34 + 2, 3 * 34 + 2, 4)
    top, left = GAP + 34, GAP + 34  # index 4: second row, second column
    shown = grid[top : top + 32 : 4, left : left + 32 : 4, :3]
    np.testing.assert_array_equal(shown, images[4].repeat(3, axis=-1))


def test_between_tiles_and_where_one_is_missing_the_page_is_seen(images):
    grid = tile(images, columns=3)
    assert (grid[-8 - GAP :, 8 + 2 * GAP :] == (255, 255, 255, 0)).all()
    assert (grid[:GAP, :, 3] == 0).all() and (grid[GAP : GAP + 8, GAP : GAP + 8, 3] == 255).all()


def test_large_images_are_not_enlarged():
    assert enlarge(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 64, 64, 3)


def test_colour_survives(tmp_path):
    red = np.zeros((1, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    save_grid(red, tmp_path / "red.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "red.png"))[10, 10], [255, 0, 0, 255])


def test_rows_keep_their_order_beside_their_labels(images, tmp_path):
    save_rows({"dark": np.zeros_like(images), "bright grey": np.full_like(images, 200)}, tmp_path / "rows.png")
    picture = np.asarray(Image.open(tmp_path / "rows.png"))
    right = picture[:, -(GAP + 16), :3]
    assert (right[GAP : GAP + 32] == 0).all()
    assert (right[-GAP - 32 : -GAP] == 200).all()
    assert (picture[:, :60] < 100).any(), "no label is drawn"
    names, rows = read_rows(tmp_path / "rows.png")
    assert names == ["dark", "bright grey"] and rows.size == (7 * 34 + 2, 2 * 36)
    np.testing.assert_array_equal(np.asarray(rows), picture[:, -rows.width :])


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8, 1)), np.zeros((0, 8, 8, 1), np.uint8), np.zeros((8, 8), np.uint8)])
def test_anything_but_uint8_images_is_refused(bad, tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \[N, H, W, 1 or 3\]"):
        save_grid(bad, tmp_path / "grid.png")


def test_bytes_are_the_same_each_time(images, tmp_path):
    def write(folder):
        folder.mkdir()
        save_grid(images, folder / "grid.png")
        save_rows({"a": images, "b": images}, folder / "rows.png")
        save_lines(
            {"student": ([1, 2], [3.0, 2.0])},
            folder / "lines.png",
            xlabel="network calls",
            ylabel="FID",
            title="FID",
            log_x=True,
            levels={"real": 1.0},
        )
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first == second
    assert not any(b"Software" in content or b"tIME" in content for content in first.values())


def test_a_montage_shows_each_picture_under_its_name(images, tmp_path):
    for name, value in (("first", 50), ("second", 150), ("third", 250)):
        save_grid(np.full_like(images[:1], value), tmp_path / f"{name}.png")
    pictures = {name: tmp_path / f"{name}.png" for name in ("first", "second", "third")}
    save_montage(pictures, tmp_path / "montage.png", columns=2, min_width=100)
    montage = np.asarray(Image.open(tmp_path / "montage.png"))
    width, height = 108 + MARGIN, 108 + CAPTION  # 36 pixels wide, three times enlarged
    assert montage.shape == (2 * height, 2 * width, 3)
    centres = [(row * height + CAPTION + 54, column * width + 54) for row, column in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert [int(montage[centre][0]) for centre in centres] == [50, 150, 250, 255]
    assert (montage[:CAPTION, :width] < 100).any(), "no name is drawn"


def test_bars_are_the_same_bytes_each_time_and_grow_with_the_categories(tmp_path):
    sizes = []
    for count in (2, 9):
        names = [f"method {index}" for index in range(count)]
        series = {"nfe_1": {name: index + 1.0 for index, name in enumerate(names)}, "nfe_2": {names[0]: 0.5}}
        for path in (tmp_path / "a.png", tmp_path / "b.png"):
            save_bars(series, path, categories=names, xlabel="FID", title="all", levels={"real": 0.1})
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        sizes.append(Image.open(tmp_path / "a.png").size)
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]


def test_a_chart_in_a_page_has_the_colours_of_the_page_and_no_other(tmp_path):
    curves = {f"curve {index}": ([1, 2, 35], [3.0, 2.5, 2.0], [0.1, 0.0, 0.2]) for index in range(7)}
    words = {"xlabel": "NFE", "ylabel": "FID", "title": "FID <b>"}
    levels = {"floor": 0.1}
    svg = save_lines(
        curves, tmp_path / "a.png", **words, markers=True, log_x=True, log_y=True, values=True, levels=levels
    )
    assert svg.startswith("<svg role=") and 'aria-label="FID &lt;b&gt;"' in svg and "<b>" not in svg
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {"none", *(f"var(--{name})" for name in COLOURS)}
    assert not re.search("font-family|https?:|#[0-9a-f]{6}", svg)
    assert "2.5" in svg and "floor" in svg
    again = save_lines(
        curves, tmp_path / "b.png", **words, markers=True, log_x=True, log_y=True, values=True, levels=levels
    )
    assert svg == again


COLOURS = ("ink", "soft", "line", *(f"series-{number}" for number in range(1, 7)))
