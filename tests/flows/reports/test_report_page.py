"""The report of a run in Chromium: a phone and a wide screen, by day and by night."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from browsers import chromium
from evaluation_artifacts import make_artifacts, run_evaluate
from flows.reports.run_facts import Measured, write_run_report

pytestmark = pytest.mark.slow
SCREENS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
TEXTS = """() => {
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const parts = text => text.match(/[\\d.]+/g).map(Number);
    const ground = element => {
        for (; element; element = element.parentElement) {
            const found = parts(getComputedStyle(element).backgroundColor);
            if (found.length < 4 || found[3] > 0) return found;
        }
        throw Error("nothing behind the text");
    };
    const speaks = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const texts = [...document.querySelectorAll("body *")].filter(one => speaks(one) && one.getClientRects().length);
    return texts.map(element => {
        const style = getComputedStyle(element);
        const colour = parts(element.closest("svg") ? style.fill : style.color);
        const [low, high] = [luminance(colour), luminance(ground(element))].sort((a, b) => a - b);
        return [element.textContent.trim().slice(0, 40), (high + 0.05) / (low + 0.05)];
    });
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    artifacts = make_artifacts(root / "artifacts")
    (artifacts / "student" / "origin.json").write_text(json.dumps({"method": "cd"}))
    run_evaluate(artifacts, root / "evaluate")
    found = json.loads((root / "evaluate" / "metrics.json").read_text())
    own = {
        f"{key}/{row}": value for key, rows in found.items() for row, value in rows.items() if row.startswith("nfe_")
    }
    facts = {"Recipe": "digits-cd", "Commit": "1" * 12, "Hardware": "a processor with a rather long name, 2 cores"}
    others = [Measured("champion", "version 3", {key: 0.9 * value for key, value in own.items()})]
    commands = ["git checkout 111111111111", "cm run digits-cd --set student.method.solver=euler"]
    write_run_report(
        root / "evaluate" / "report.html", root / "report.html", facts, commands=commands, own=own, others=others
    )
    return root / "report.html"


@pytest.fixture(scope="module")
def pages(report, tmp_path_factory):
    """Return the pages by screen; their screenshots stay in CM_SCREENSHOTS."""
    folder = Path(os.environ.get("CM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        found = {}
        for width, scheme in SCREENS:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.route("http*://**", lambda route: pytest.fail(f"the page asks for {route.request.url}"))
            page.goto(report.as_uri())
            page.screenshot(path=folder / f"report-{width}-{scheme}.png", full_page=True)
            found[width, scheme] = page
        yield found


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_fits_the_screen_and_its_text_stands_out(pages, screen):
    page = pages[screen]
    assert page.evaluate("document.documentElement.scrollWidth") == screen[0], "no sideways scrolling"
    faint = [(text, round(ratio, 2)) for text, ratio in page.evaluate(TEXTS) if ratio < 4.5]
    assert not faint, "contrast of WCAG AA"


@pytest.mark.parametrize("screen", SCREENS)
def test_the_first_screen_says_the_result_and_how_to_get_it_again(pages, screen):
    page = pages[screen]
    heading = page.locator("h1")
    assert heading.inner_text().startswith("CD reaches FID ") and "in one call, the teacher " in heading.inner_text()
    for element in (heading, page.get_by_text("cm run digits-cd"), page.get_by_text("1" * 12, exact=True)):
        box = element.bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 900


def test_night_is_dark_and_day_is_light(pages):
    shown = {}
    for screen, page in pages.items():
        grounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shown[screen] = np.mean([float(part) for part in grounds.strip("rgb()").split(",")])
    assert shown[1280, "light"] == shown[390, "light"] == 255 and max(shown[1280, "dark"], shown[390, "dark"]) < 40


@pytest.mark.parametrize("screen", SCREENS)
def test_small_images_are_enlarged_by_whole_factors_without_blur(pages, screen):
    found = pages[screen].evaluate("""[...document.querySelectorAll("img.pixels")].map(image =>
        [image.getBoundingClientRect().width / image.naturalWidth, getComputedStyle(image).imageRendering])""")
    assert found and {rendering for _, rendering in found} == {"pixelated"}
    whole = [factor for factor, _ in found if factor == round(factor) >= 1]
    assert len(whole) == len(found), found
    assert screen[0] == 390 or max(whole) >= 2, "the student's samples are large on a large screen"
