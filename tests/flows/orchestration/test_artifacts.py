"""What a finished run shows on its page."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from flows.orchestration import artifacts

METRICS = {"fid_classifier": {"real": 0.1, "nfe_1": 2.66049, "teacher_nfe_35": 2.0}, "is_classifier": {"nfe_1": 9.1}}


@pytest.fixture
def shown(monkeypatch):
    found = {}
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, **said: found.update(text=text, **said))
    return found


def picture(path, side):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_result_is_one_page(shown, tmp_path):
    pictures = {
        name: picture(tmp_path / name.replace("/", "-"), 70)
        for name in (
            "evaluate/plots/fid.png",
            "sample/nfe_1_grid.png",
            "edit/inpaint.png",
            "prepare/preview.png",
            "evaluate/inpaint.png",
        )
    }
    artifacts.show_result("FID 2.66 at 1 call", METRICS, pictures, ["[Report](http://h/report)"], "<svg/>")
    assert shown["key"] == "result" and shown["description"] == "FID 2.66 at 1 call"
    text = shown["text"]
    assert text.startswith("[Report](http://h/report)\n\n| images | FID | IS |\n")
    assert "\n| 1 call | 2.660 | 9.100 |\n" in text and "\n| teacher 35 calls | 2.000 |  |\n" in text
    assert "\n\nMeasured by classifier.\n" in text
    assert re.findall(r"### (\w+)|!\[(.+?)\]", text) == [
        *(("Samples", ""), ("", "1 call"), ("Edits", ""), ("", "inpaint"), ("Evaluation", ""), ("", "fid")),
        *(("Lineage", ""), ("", "lineage")),
    ]


def test_small_pictures_grow_by_a_whole_factor_and_without_blur(tmp_path):
    path = picture(tmp_path / "a.png", 90)
    before = np.asarray(Image.open(path))
    after = np.asarray(Image.open(io.BytesIO(artifacts.enlarged(path))))
    assert np.array_equal(after, before.repeat(8, 0).repeat(8, 1))
    large = picture(tmp_path / "b.png", artifacts.WIDTH // 2 + 1)
    assert artifacts.enlarged(large) == large.read_bytes()


def test_a_result_stays_small_enough_for_prefects_database(shown, tmp_path, monkeypatch):
    pictures = {f"sample/{name}.png": picture(tmp_path / f"{name}.png", 300) for name in "abc"}
    monkeypatch.setattr(artifacts, "MOST_BYTES", 2 * len(artifacts.enlarged(pictures["sample/a.png"])) + 1)
    artifacts.show_result("done", METRICS, pictures, [], "<svg/>")
    encoded = re.findall(r"png;base64,([\w+/=]+)", shown["text"])
    assert [base64.b64decode(one) for one in encoded] == [artifacts.enlarged(pictures[f"sample/{n}.png"]) for n in "ab"]


def test_links_lead_to_the_report_the_run_and_the_model(monkeypatch):
    monkeypatch.setenv("CM_MLFLOW_URL", "https://ml.example/mlflow/")
    links = artifacts.links_to("sqlite:///mlflow.db", "1", "abc", "cm-digits")
    run = "https://ml.example/mlflow/#/experiments/1/runs/abc"
    assert links == [
        f"[Report]({run}/artifacts/evaluate/report.html)",
        f"[This run in MLflow]({run}?workflowType=machine_learning)",
        "[Model](https://ml.example/mlflow/#/models/cm-digits)",
    ]
    monkeypatch.delenv("CM_MLFLOW_URL")
    (local,) = artifacts.links_to("sqlite:///mlflow.db", "1", "abc", "cm-digits")
    assert "`make ui` in the workspace" in local


def test_a_sweep_has_neither_a_model_nor_a_lineage(shown, monkeypatch):
    monkeypatch.setenv("CM_MLFLOW_URL", "https://ml.example")
    (link,) = artifacts.links_to("sqlite:///mlflow.db", "1", "abc")
    assert link.startswith("[This run in MLflow](https://ml.example/#/experiments/1/runs/abc")
    artifacts.show_result("done", METRICS, {}, [link])
    assert "Lineage" not in shown["text"]
