"""Sweeps: what a page may say; one run end to end: points share stages, failures are told, a second run is cached."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest

from command import run
from flows.errors import UserError
from flows.recipes.files import SWEEPS_DIR, names_in
from flows.recipes.recipe import load_recipe
from flows.reports.metrics_table import by_row
from flows.sweeps.page import Point, Sweep, load_sweep, value_text
from flows.sweeps.report import Outcome, table, write_report
from flows.tracking.tracker import Tracker
from miniature import REPOSITORY, commit, git

TINY = """
data: {source: digits, max_images: 90}
network: {kind: mlp, width: 16}
features: {kind: classifier, num_steps: 10, width: 8, batch_size: 32}
teacher: {train: {num_steps: 4, batch_size: 32, log_every: 2, save_every: 4, grid_every: 4}}
student:
  train: {num_steps: 4, batch_size: 32, log_every: 2, save_every: 4, grid_every: 4, emas: [{kind: constant, decay: 0}]}
sample: {num_images: 60, mid_sigmas: [[], [0.8]], teacher_images: 60}
evaluate: {kid_subsets: 2, isc_min_images: 30}
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A workspace with one recipe."""
    (tmp_path / "params" / "recipes").mkdir(parents=True)
    (tmp_path / "params" / "sweeps").mkdir()
    (tmp_path / "params" / "recipes" / "tiny.yaml").write_text(TINY)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(root, text):
    (root / "params" / "sweeps" / "mine.yaml").write_text(text)


def test_every_sweep_that_ships_is_ready_to_run():
    names = names_in(REPOSITORY / SWEEPS_DIR)
    assert {"digits-methods", "digits-cd-distance-solver-n", "digits-ct-curriculum"} <= set(names)
    for name in names:
        sweep = load_sweep(name, root=REPOSITORY)
        assert len({point.name for point in sweep.points}) == len(sweep.points) > 2
        lines = (REPOSITORY / "params" / "sweeps" / f"{name}.yaml").read_text().splitlines()
        assert f"#   cm sweep {name}" in lines[:4] and any(line.startswith("# Hardware:") for line in lines)


def test_a_grid_is_every_combination(root):
    write(root, "recipe: tiny\ngrid: {student.method.solver: [euler, heun], student.method.distance: [l1, {kind: l2}]}")
    sweep = load_sweep("mine", ["student.method.num_scales=9"], root=root)
    names = [
        "solver=euler distance=l1",
        "solver=euler distance=l2",
        "solver=heun distance=l1",
        "solver=heun distance=l2",
    ]
    assert [point.name for point in sweep.points] == names
    methods = [point.recipe.student.method for point in sweep.points]
    assert [(method.solver, method.distance.kind, method.num_scales) for method in methods][1] == ("euler", "l2", 9)


def test_points_start_from_the_page_and_a_kind_starts_afresh(root):
    write(root, "recipe: tiny\nset: {student.method.num_scales: 7}\npoints: {same: {}, ct: {student.method: ct}}")
    same, ct = load_sweep("mine", root=root).points
    assert same.recipe == load_recipe("tiny", ["student.method.num_scales=7"], root=root)
    assert ct.recipe.student.method == load_recipe("tiny", ["student.method=ct"], root=root).student.method


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: tiny", ["mine.yaml: give either grid:"]),
        ("recipe: tiny\ngrid: {seed: []}", ["grid.seed is an empty list"]),
        ("recipe: tiny\npoints: {a: {student.method.sover: heun}}", ["point a: student.method.sover", "solver?"]),
        (
            "recipe: tiny\ngrid: {student.method.num_scales: [9, 1]}",
            ["point num_scales=1: student.method.num_scales=1"],
        ),
        ("recipe: tiny\npoints: {a: {}, b: {student.method: cd}}", ["the points a and b are the same"]),
        ("recipe: tiny\ngrid: {data.max_images: [50, 90]}", ["differ in data", "measured alike"]),
        ("recipe: tiny\ngrid: {seed: [0, 1]}", ["differ in seed", "measured alike"]),
        ("recipe: nothing\npoints: {a: {}}", ["no recipe 'nothing'; there are tiny"]),
        ("recipe: tiny\npoint: {a: {}}", ["point: unknown key; allowed: recipe, set, grid, points, x"]),
        ("recipe: tiny\ngrid: {student.method.solver: [euler, heun]}\nx: student.method.solver", ["x=student.method"]),
        ("points: {a: {}}", ["recipe: Field required"]),
    ],
)
def test_a_bad_page_is_refused_in_one_line_before_anything_runs(root, capsys, text, words):
    write(root, text)
    code, out, err = run(capsys, "sweep", "mine")
    assert code == 2 and not out and err.count("\n") == 1 and all(word in err for word in words), err
    assert not (root / ".cm").exists() and not (root / "mlflow.db").exists()


def test_an_unknown_sweep_is_told_with_those_there_are(root):
    write(root, "recipe: tiny\npoints: {a: {}}")
    with pytest.raises(UserError, match="no sweep 'other'; there are mine"):
        load_sweep("other", root=root)


def test_a_dry_run_prints_the_points(root, capsys):
    write(root, "recipe: tiny\ngrid: {student.method.num_scales: [9, 18]}")
    code, out, _ = run(capsys, "sweep", "mine", "--dry-run")
    assert code == 0 and "2 points on the recipe tiny" in out and "num_scales=18" in out
    found = json.loads(run(capsys, "sweep", "mine", "--dry-run", "--json")[1])
    assert found[0] == {"name": "num_scales=9", "values": {"student.method.num_scales": 9}}
    assert not (root / ".cm").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"kind": "cd", "num_scales": 9}, "cd"),
        ({"method": {"kind": "cmt"}, "train": {"num_steps": 9}}, "cmt"),
        ([[], [0.8]], "[[], [0.8]]"),
        (None, "null"),
    ],
)
def test_a_value_is_told_by_its_kind_or_its_method(value, text):
    assert value_text(value) == text


def outcome(root, name, values, fid, untrained=50.0):
    recipe = load_recipe("tiny", [f"{key}={value}" for key, value in values.items()], root=root)
    fids = {"real": 0.5, "untrained": untrained, "nfe_1": fid, "nfe_2": fid / 2, "teacher_nfe_35": 1.5}
    return Outcome(Point(name, values, recipe), {"fid_classifier": fids, "is_classifier": {"nfe_1": 5.0}})


def test_the_table_has_each_calibration_once(root):
    outcomes = [
        outcome(root, "cd", {}, 4.0, untrained=2.0),
        outcome(root, "ct", {"student.method": "ct"}, 8.0),
        outcome(root, "ict", {"student.method": "ict"}, 6.0),
    ]
    rows = {name: row["fid"] for name, row in table(outcomes).items()}
    assert list(rows)[:4] == ["real", "untrained (the teacher's weights)", "untrained", "teacher_nfe_35"]
    assert list(rows)[4:] == [f"{name}, nfe_{n}" for name in ("cd", "ct", "ict") for n in (1, 2)]
    assert rows["untrained"] == 50.0 and rows["untrained (the teacher's weights)"] == 2.0 and rows["ict, nfe_2"] == 3.0
    outcomes[2] = outcome(root, "ict", {"student.method": "ict"}, 6.0, untrained=51.0)
    assert {"untrained, ct", "untrained, ict"} <= set(table(outcomes)), "two networks, two rows"


def test_the_report_is_a_csv_and_plots(root, tmp_path):
    points = [outcome(root, f"N{n}", {"student.method.num_scales": n}, 40.0 / n) for n in (6, 18)]
    for x, plots in ((None, ["fid.png"]), ("student.method.num_scales", ["fid_nfe_1.png", "fid_nfe_2.png"])):
        sweep = Sweep("mine", "tiny", x, tuple(point.point for point in points))
        files = write_report(sweep, points, tmp_path / str(x))
        assert [path.name for path in files] == ["table.csv", *plots]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])
    lines = list(csv.DictReader(files[0].open()))
    assert [line["images"] for line in lines][:3] == ["real", "untrained (the teacher's weights)", "teacher_nfe_35"]
    assert lines[-1] == {
        "images": "nfe_2",
        "point": "N18",
        "student.method.num_scales": "18",
        "fid_classifier": str(40.0 / 18 / 2),
        "is_classifier": "",
    }


def test_the_plot_has_lines_of_what_all_points_share(root, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("flows.sweeps.report.save_bars", lambda *_, levels, **__: drawn.append(levels))
    for untrained in (50.0, 51.0):
        points = [outcome(root, "cd", {}, 4.0), outcome(root, "pd", {"student.method": "pd"}, 8.0, untrained=untrained)]
        write_report(Sweep("mine", "tiny", None, tuple(one.point for one in points)), points, tmp_path)
    assert drawn[0] == {"real": 0.5, "untrained (the teacher's weights)": 50.0, "teacher_nfe_35": 1.5}
    assert drawn[1] == {"real": 0.5, "teacher_nfe_35": 1.5}


@pytest.fixture
def workspace(tmp_path):
    """A repository with this code, as it stands, and one tiny recipe."""
    root = tmp_path / "workspace"
    for name in git(REPOSITORY, "ls-files", "-co", "--exclude-standard").splitlines():
        if not name.startswith(("tests/", "docs/")) and (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, root / name)
    (root / "params" / "recipes" / "tiny.yaml").write_text(TINY)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    commit(root)
    return root


def cm(root, *argv):
    """Run the workspace's own `cm`; return exit code, stdout, stderr."""
    hidden = ("CM_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL")
    env = {key: value for key, value in os.environ.items() if key not in hidden} | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-m", "flows.cli", *argv], cwd=root, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def results_of(out):
    return json.loads(out[out.index('{\n  "name"') :])


@pytest.mark.soak
def test_a_sweep_computes_what_is_new_and_tells_what_failed(workspace):
    """Two methods, and one whose batch is larger than the data: the others are measured, the second time from cache."""
    page = "recipe: tiny\npoints:\n  cd: {student.method.num_scales: 4}\n"
    page += "  too large: {student.train.batch_size: 512}\n  ict: {student.method: {kind: ict, s1: 20}}\n"
    write(workspace, page)
    code, out, err = cm(workspace, "sweep", "mine", "--json")
    assert code == 1, err
    assert "1 of 3 points failed:" in err and "too large: " in err and "train.batch_size=512" in err
    results = results_of(out)
    assert list(results["points"]) == ["cd", "ict"] and results["network"] == "classifier"
    assert results["points"]["ict"]["cached"] == ["prepare", "features", "teacher", "base"]
    expected = ["cd, nfe_1", "cd, nfe_2", "ict, nfe_1", "ict, nfe_2"]
    assert [name for name in results["rows"] if "nfe" in name and "teacher" not in name] == expected
    folder = workspace / "out" / "sweeps" / "mine"
    assert {path.name for path in folder.iterdir()} == {"table.csv", "fid.png"}

    tracker = Tracker(workspace)
    sweep = tracker.client.get_run(results["mlflow"]["run_id"])
    assert sweep.info.status == "FAILED" and "too large" in sweep.data.tags["error"]
    assert sweep.data.metrics["cd/nfe_1/fid"] == results["rows"]["cd, nfe_1"]["fid"]
    assert {file.path for file in tracker.client.list_artifacts(sweep.info.run_id)} == {"table.csv", "fid.png"}
    query = f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'"
    points = tracker.client.search_runs([tracker.experiment_id], query)
    assert {run.info.status for run in points} == {"FINISHED", "FAILED"} and len(points) == 3
    for point in results["points"].values():
        measured = by_row_of(tracker, point["mlflow_run_id"])
        assert measured in [row["fid"] for row in results["rows"].values()]

    page = page.replace("  too large: {student.train.batch_size: 512}\n", "")
    write(workspace, page)
    code, out, err = cm(workspace, "sweep", "mine", "--json")
    assert code == 0, err
    again = results_of(out)
    assert all(len(point["cached"]) == 8 for point in again["points"].values())
    assert again["rows"] == results["rows"]

    names = json.loads(cm(workspace, "models", "--json")[1])
    assert [(row["name"], row["version"]) for row in names] == [("cm-digits", 2), ("cm-digits", 1)]
    best = min(names, key=lambda row: (row["metrics"]["nfe_1/fid"], row["version"]))
    assert best["aliases"][-1] == "champion"


def by_row_of(tracker, run_id):
    metrics = tracker.client.get_run(run_id).data.metrics
    return by_row({"fid_classifier": {"nfe_1": metrics["nfe_1/fid"]}})[1]["nfe_1"]["fid"]
