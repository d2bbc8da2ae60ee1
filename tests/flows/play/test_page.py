"""The page of `cm play` in Chromium: what it shows is what the shown command writes, on a real server."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from browsers import chromium
from cm_core.model import ModelSpec, save_model
from cm_core.networks import SongUNetParams
from cm_core.noise import Noise
from miniature import REPOSITORY
from processes import WAIT
from servers import client

pytestmark = pytest.mark.slow


class Play:
    """`cm play` on a free port."""

    def __init__(self, root, *options):
        self.root, self.scratch = root, Path(tempfile.mkdtemp(dir=root))
        self.env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(self.scratch)}
        self.env.pop("MLFLOW_TRACKING_URI", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "play", *options],
            cwd=root,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.address, _ = (self.process.stdout.readline().strip() for _ in range(2))
        if not self.address.startswith("http://127.0.0.1:"):
            self.process.kill()
            pytest.fail(f"{self.address} {self.process.stderr.read()}")

    def interrupt(self):
        """Press Ctrl-C; return exit code, output and errors. A long drawing would go on for many minutes."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def played(workspace):
    play = Play(workspace)
    yield play
    assert play.interrupt() == (0, "stopped\n", "")


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser, played):
    """Open the page; fail if its console reports anything."""
    contexts, complaints = [], []

    def open_page(width=1280, model="out/student", scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * WAIT)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(played.address)
        page.locator("#thumbs img").nth(15).wait_for()
        if page.locator("#model").input_value() != model:
            with page.expect_response("**/draw"):
                page.locator("#model").select_option(model)
        settle(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [text for text in complaints if "400 (Bad Request)" not in text]


def settle(page):
    """Wait until nothing is being drawn."""
    page.locator("#output[aria-busy=false]").wait_for(state="attached")


def choose(page, task):
    page.locator(f"input[name=task][value={task}]").check(force=True)


def draw(page):
    with page.expect_response("**/draw"):
        page.locator("#go").click()
    settle(page)


def shown(page):
    """Return the pixels of the large result, as the browser decoded them."""
    data = page.evaluate("""async () => {
        const image = document.getElementById("large");
        await image.decode();
        const canvas = Object.assign(document.createElement("canvas"),
            { width: image.naturalWidth, height: image.naturalHeight });
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
    }""")
    side = round((len(data) / 4) ** 0.5)
    return np.array(data, np.uint8).reshape(side, side, 4)[..., :3]


def download(page, locator, folder):
    with page.expect_download() as started:
        locator.click()
    path = Path(folder) / started.value.suggested_filename
    started.value.save_as(path)
    return path


def run_shown_command(page, played, folder, result):
    """Run the command of the page where its pictures have been downloaded to; return one of its results."""
    for link in page.locator("#inputs a").all():
        download(page, link, folder)
    words = shlex.split(page.locator("#command").text_content())
    assert words[0] == "cm"
    words[words.index("--model") + 1] = str(played.root / words[words.index("--model") + 1])
    (folder / "params").mkdir()
    for name in ("dvc.yaml", "params/active.yaml"):
        (folder / name).write_text((played.root / name).read_text())
    subprocess.run([sys.executable, "-m", "flows.cli", *words[1:]], cwd=folder, env=played.env, check=True)
    path = page.locator("#where").text_content().removeprefix("It writes this result to ").removesuffix(".")
    assert path.endswith(f"/{result:06d}.png")
    return np.asarray(Image.open(folder / path).convert("RGB"))


def stroke(page, *points, width=8):
    """Drag the mouse over pixels (x, y) of the picture."""
    box = page.locator("#picture").bounding_box()
    unit = box["width"] / width
    for index, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + (x + 0.5) * unit, box["y"] + (y + 0.5) * unit, steps=5)
        if index == 0:
            page.mouse.down()
    page.mouse.up()


def test_samples_are_those_of_the_command(open_page, played, tmp_path):
    page = open_page()
    with page.expect_response("**/draw"):
        page.locator("input[name=few][value='2']").check(force=True)
    settle(page)
    page.locator("#seed").fill("11")
    draw(page)
    page.locator("#thumbs button").nth(6).click()
    time_shown = page.locator("#time").text_content()
    assert re.fullmatch(r"[\d.]+ ms for 16 images, seed 11; 2 network calls at sigma 80, .+", time_shown)
    np.testing.assert_array_equal(shown(page), run_shown_command(page, played, tmp_path, 6))
    saved = download(page, page.locator("#save"), tmp_path)
    np.testing.assert_array_equal(np.asarray(Image.open(saved)), shown(page))


def test_a_student_that_takes_a_weight_of_guidance_draws_at_the_one_chosen(open_page, played, tmp_path):
    page = open_page(model="out/weights")
    assert page.locator("#guidance").input_value() == "2"
    page.locator("#guidance").fill("7.5")
    draw(page)
    assert "--guidance 7.5" in page.locator("#command").text_content()
    np.testing.assert_array_equal(shown(page), run_shown_command(page, played, tmp_path, 0))
    page.locator("#guidance").fill("9")
    page.locator("#go").click()
    assert not page.locator("#guidance").evaluate("input => input.checkValidity()")
    with page.expect_response("**/draw"):
        page.locator("#model").select_option("out/student")
    settle(page)
    assert page.locator("#guidance").is_hidden() and "--guidance" not in page.locator("#command").text_content()


def test_what_is_painted_over_is_invented_and_nothing_else(open_page, played, tmp_path):
    page = open_page()
    choose(page, "inpaint")
    page.locator("#picture").wait_for()
    page.locator("#brush").fill("1")
    stroke(page, (2, 2), (5, 2), (5, 6))
    page.locator("#erase").check()
    stroke(page, (5, 6), (5, 6))
    page.locator("#steps").fill("5")
    draw(page)
    page.locator("#thumbs button").nth(1).click()
    result = run_shown_command(page, played, tmp_path, 1)
    np.testing.assert_array_equal(shown(page), result)
    mask = np.asarray(Image.open(tmp_path / "mask.png").convert("L")) > 0
    expected = np.zeros((8, 8), bool)
    expected[2, 2:6] = expected[2:6, 5] = True
    np.testing.assert_array_equal(mask, expected)
    given = np.asarray(Image.open(tmp_path / "picture.png"))
    assert (result[~mask] == given[~mask]).all() and (result[mask] != given[mask]).any()


def test_strokes_by_keyboard_on_a_grey_model_that_knows_no_colours(open_page, played, tmp_path):
    page = open_page(model="out/grey")
    assert page.locator("input[value=colorize]").is_disabled()
    assert "needs a model of RGB images" in page.locator("#about").text_content()
    choose(page, "stroke")
    page.locator("#grey").fill("0")
    page.locator("#fill").click()
    page.locator("#grey").fill("255")
    page.locator("#brush").fill("1")
    page.locator("#picture").focus()
    for key in ("ArrowRight", "ArrowDown", " ", "ArrowDown", " "):
        page.keyboard.press(key)
    draw(page)
    assert page.locator("#told").text_content() == ""
    np.testing.assert_array_equal(shown(page), run_shown_command(page, played, tmp_path, 0))
    expected = np.zeros((8, 8), np.uint8)
    expected[1:3, 1] = 255
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png")), expected)


def test_an_own_picture_is_edited_as_the_file_it_is(open_page, played, tmp_path):
    page = open_page(model="out/classes")
    page.locator("#label").select_option("2")
    settle(page)
    photo = (played.root / "my photo.jpg").read_bytes()
    handle = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "my photo.jpg", { type: "image/jpeg" }));
            return transfer;
        }""",
        list(photo),
    )
    with page.expect_response("**/picture"):
        page.dispatch_event("#output", "drop", {"dataTransfer": handle})
    page.get_by_text("my photo.jpg: center-crop from 60x40 to 8x8").wait_for()
    choose(page, "colorize")
    page.locator("#steps").fill("3")
    draw(page)
    assert page.locator("#inputs a").count() == 0, "the user has the file"
    assert "'my photo.jpg'" in page.locator("#command").text_content()
    (tmp_path / "my photo.jpg").write_bytes(photo)
    np.testing.assert_array_equal(shown(page), run_shown_command(page, played, tmp_path, 0))

    (tmp_path / "no picture.png").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "no picture.png")
    page.locator("#error").get_by_text("no picture.png: not an image in one of the formats").wait_for()


def test_the_slider_leads_from_one_seed_to_the_other(open_page, played, tmp_path):
    page = open_page()
    first = shown(page)
    with page.expect_response("**/draw"):
        choose(page, "interpolate")
    settle(page)
    page.locator("#from").fill("0")
    draw(page)
    assert np.abs(shown(page).astype(int) - first).max() <= 1, "batches of another size may round differently"
    page.locator("#slider").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert page.locator("#place").text_content() == "0.40 of the way from seed 0 to seed 2"
    np.testing.assert_array_equal(shown(page), run_shown_command(page, played, tmp_path, 6))


@pytest.mark.parametrize("task", ["superres", "denoise"])
def test_other_edits_are_those_of_the_command(open_page, played, tmp_path, task):
    page = open_page()
    choose(page, task)
    page.locator("#picture").wait_for()
    if task == "denoise":
        page.locator("#noise").click()
    draw(page)
    np.testing.assert_array_equal(shown(page), run_shown_command(page, played, tmp_path, 0))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_fits_the_window_and_enlarges_by_whole_factors(open_page, tmp_path_factory, width, scheme):
    page = open_page(width, scheme=scheme)
    folder = Path(os.environ.get("CM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    for task in ("sample", "inpaint", "stroke", "denoise", "interpolate"):
        choose(page, task)
        settle(page)
        if task not in ("sample", "interpolate"):
            page.locator("#picture").wait_for()
        if task == "inpaint":
            stroke(page, (2, 2), (5, 5))
        draw(page)
        page.screenshot(path=folder / f"play-{task}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("#large").evaluate("image => image.width") % 8 == 0
        assert page.locator("#large").evaluate("image => image.width") >= 240
        assert page.locator("#large").evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    unnamed = page.locator("input, select, canvas, button").evaluate_all(
        "all => all.filter(one => one.offsetParent && !one.labels?.length && !one.textContent.trim()"
        " && !one.querySelector('img[alt]') && one.tagName !== 'CANVAS').map(one => one.outerHTML)"
    )
    assert not unnamed
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, colour[4:-1].split(","))) < 60) == (scheme == "dark")


def test_a_workspace_without_models_says_how_to_get_one(browser, tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    play, page = Play(tmp_path), browser.new_page()
    page.goto(play.address)
    page.locator("#error").get_by_text("No models yet; cm run RECIPE trains one.").wait_for()
    assert not page.locator("#form").is_visible()
    page.close()
    assert play.interrupt() == (0, "stopped\n", "")


def test_ctrl_c_ends_a_long_drawing_at_once(workspace):
    spec = ModelSpec(network=SongUNetParams(channels=64), noise=Noise(), form="skip", image_shape=(3, 64, 64))
    (workspace / "large").mkdir()
    save_model(workspace / "large", spec, spec.build().state_dict())
    play = Play(workspace, "large")
    sockets = psutil.Process(play.process.pid).net_connections()
    assert [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN] == ["127.0.0.1"]
    asked = client()
    asked.get(f"{play.address}/models")
    asked.get(f"{play.address}/model", params={"name": "large"})
    command = {"model": "large", "task": "sample", "steps": 64, "seed": 0, "n": 64}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{play.address}/draw", json=command, timeout=3)
    assert httpx.get(play.address, timeout=60).status_code == 200, "the page stays responsive"
    assert play.interrupt() == (0, "stopped\n", "")
    assert not list(play.scratch.glob("cm-play-*"))
