"""The data report: what a person should know about the images before they train."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flows.data.survey import Pixels, find_duplicates, low_frequencies, measure
from image_sources import encoded, prepared, two_classes, write_tree
from miniature import REPOSITORY


def smooth(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Pictures with most of their power in low frequencies, uint8 [count, side, side, 3]."""
    rng, k = np.random.default_rng(seed), np.arange(side)
    cosines = np.cos(np.pi * k[:, None] * (k + 0.5) / side)
    waves = rng.standard_normal((count, 3, side, side)) / (1 + k + k[:, None])
    pixels = 128 + 60 * np.einsum("nckl,ki,lj->nijc", waves, cosines, cosines, optimize=True) / 2
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(pixels, "JPEG", quality=70))))


def report_of(tmp_path, files: dict[str, bytes], **fields) -> dict:
    prepared(tmp_path / "out", {"kind": "images", "path": str(write_tree(tmp_path / "in", files))}, **fields)
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_duplicates_within_and_across_splits_are_found_and_nothing_else():
    train, heldout = smooth(400), smooth(100, seed=1)
    train[7] = train[3]
    train[11] = jpeg(train[10])
    heldout[5] = train[20]
    heldout[6] = jpeg(train[21])
    heldout[8] = np.clip(train[22].astype(int) + 9, 0, 255)  # a little brighter
    heldout[90] = jpeg(heldout[89])
    pixels = Pixels(train, heldout)
    pairs = find_duplicates(pixels, measure(pixels))
    assert pairs.exact.tolist() == [[3, 7], [20, 405]]
    assert pairs.near.tolist() == [[10, 11], [21, 406], [22, 408], [489, 490]]


@pytest.mark.parametrize("shape", [(8, 8), (4, 4), (17, 32)])
def test_frequencies_differ_by_no_more_than_pixels(shape):
    """So no near duplicate is missed; and a picture of low frequencies alone differs by exactly as much."""
    images = np.random.default_rng(0).uniform(0, 255, (2, 200, *shape)).astype(np.float32)
    found = np.linalg.norm(low_frequencies(images[0]) - low_frequencies(images[1]), axis=1)
    assert (found <= (images[0] - images[1]).std((1, 2)) * 1.0001).all() and found.mean() > 1
    wave = np.cos(np.pi * (np.arange(shape[1]) + 0.5) / shape[1])[None, None].repeat(shape[0], 1).astype(np.float32)
    assert np.linalg.norm(low_frequencies(10 * wave)) == pytest.approx((10 * wave).std(), rel=1e-4)


def test_digits_hold_no_duplicates(tmp_path):
    prepared(tmp_path, {"kind": "digits"})
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["findings"] == []
    assert sum(one["train"] + one["heldout"] for one in report["classes"]) == 1797
    assert report["originals"] == {"sizes": {"8x8": 1797}, "modes": {"array L": 1797}}


def test_a_leak_names_both_images_and_a_relabelled_duplicate_is_told(tmp_path):
    images = smooth(24)
    files = {f"train/{'ab'[i % 2]}/{i}.png": encoded(images[i]) for i in range(20)}
    files |= {f"test/{'ab'[i % 2]}/{i}.png": encoded(images[i]) for i in range(20, 24)}
    files["test/a/leak.png"] = encoded(images[4])
    files["test/a/near.png"] = encoded(jpeg(images[6]))
    files["train/b/twin.png"] = encoded(images[8])  # which is an a
    files["train/a/night.png"] = encoded(np.zeros((32, 32, 3), np.uint8))
    files["notes.txt"] = b"not an image"
    report = report_of(tmp_path, files)
    assert report["images"] == {"train": 22, "heldout": 6}
    assert report["classes"] == [{"name": "a", "train": 11, "heldout": 4}, {"name": "b", "train": 11, "heldout": 2}]
    exact, near = report["duplicates"]["exact"], report["duplicates"]["near"]
    assert exact["leaked"] == [["train: a/4.png", "heldout: a/leak.png"]]
    assert near["leaked"] == [["train: a/6.png", "heldout: a/near.png"]]
    assert (exact["train"], exact["labelled_otherwise"], near["train"]) == (1, 1, 0)
    assert report["extremes"]["darkest"][0] == report["extremes"]["most uniform"][0] == "train: a/night.png"
    assert report["uniform_images"] == 1
    assert report["ignored"] == {"count": 1, "names": ["notes.txt"]}
    said = "\n".join(report["findings"])
    for part in ("leak: 1 of 6 held-out images are exact duplicates", "heldout: a/leak.png", "labelled otherwise"):
        assert part in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "heldout: a/leak.png" in page and page.count("data:image/png;base64,") == 3
    assert "http://" not in page and "https://" not in page


def test_uneven_classes_gaps_and_skipped_images_are_told(tmp_path):
    images = smooth(70)
    files = {f"{'a' if i < 60 else 'b'}/{i}.png": encoded(images[i]) for i in range(64)}
    files["b/bad.png"] = files["b/60.png"][:80]
    report = report_of(tmp_path, files, damaged="skip", heldout_fraction=0)
    said = "\n".join(report["findings"])
    assert "classes are uneven: 60 training images of a, 4 of b" in said
    assert "1 images cannot be used and are left out" in said and "b/bad.png" in said
    np.savez(tmp_path / "x.npz", images=images, labels=np.resize([1, 2, 7], 70))
    prepared(tmp_path / "gaps", {"kind": "array", "path": str(tmp_path / "x.npz")})
    report = json.loads((tmp_path / "gaps" / "report.json").read_text())
    assert "no training image has a label among 0, 3, 4, 5, 6" in "\n".join(report["findings"])


def test_held_out_classes_of_other_proportions_are_told(tmp_path):
    images = smooth(400)
    folders = ["train/a"] * 100 + ["train/b"] * 100 + ["test/a"] * 180 + ["test/b"] * 20
    files = {f"{folder}/{i}.png": encoded(images[i]) for i, folder in enumerate(folders)}
    said = "\n".join(report_of(tmp_path, files)["findings"])
    assert "held-out images have other proportions of classes: 40% would have to change class" in said


def test_names_from_outside_are_text_in_the_page_and_in_prefect(tmp_path, monkeypatch):
    from flows.orchestration import artifacts

    evil = "<img src=x onerror=alert(1)>`|"
    files = {name.replace("cat", evil): content for name, content in two_classes().items()}
    report_of(tmp_path, files)
    assert "<img src=x" not in (tmp_path / "out" / "report.html").read_text()
    shown = []
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, **known: shown.append((text, known["key"])))
    artifacts.show_data_report(tmp_path / "out" / "report.json")
    ((text, key),) = shown
    assert key == "data-report" and r"\<img src=x onerror=alert(1)\>\`\|" in text
    assert "8 training" not in text and "6 training images, 2 held out" in text


def test_a_crowd_of_images_that_are_alike_in_their_low_frequencies_alone():
    rng = np.random.default_rng(0)
    images = np.full((2000, 16, 16, 1), 100, np.uint8) + rng.integers(0, 40, (2000, 16, 16, 1), dtype=np.uint8)
    pixels = Pixels(images, images[:0])
    pairs = find_duplicates(pixels, measure(pixels))
    assert len(pairs.exact) == len(pairs.near) == 0


@pytest.mark.slow
def test_more_than_a_million_images_fit_into_bounded_memory(tmp_path):
    """In a process of its own: this one's peak of memory may be that of an earlier test."""
    count, path = 1_300_000, tmp_path / "images.npy"
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 16, 16, 1))
    some, rng = smooth(20_000, 16)[..., :1], np.random.default_rng(0)
    for start in range(0, count, len(some)):
        mixed = some.astype(np.float32) + some[rng.permutation(len(some))] - 128  # two pictures added make a third
        images[start : start + len(some)] = mixed.clip(0, 255)
    images[1_200_000], images[1_250_000] = images[100], np.clip(images[200].astype(int) + 2, 0, 255)
    images.flush()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", MEASURED, str(path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [100, 1_200_000] in report["exact"] and [200, 1_250_000] in report["near"]
    assert report["gib"] < 2.5 and report["seconds"] < 300, report


MEASURED = """
import json, re, sys, time
from pathlib import Path
import numpy as np
from flows.data.survey import Pixels, measure, find_duplicates

def peak():  # of this program alone: getrusage's begins with that of the process that started it
    return int(re.search(r"^VmHWM:\\s+(\\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1]) / 2**20

images, before = np.load(sys.argv[1], mmap_mode="r"), peak()
pixels = Pixels(images, images[:0])
pairs = find_duplicates(pixels, measure(pixels))
found = {"exact": pairs.exact.tolist(), "near": pairs.near.tolist()}
print(json.dumps({**found, "gib": peak() - before, "seconds": time.process_time()}))
"""
