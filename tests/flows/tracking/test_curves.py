"""What a pipeline run shows by itself: the curves of its stages, results before hashes, a colour of its own."""

import json

import pytest

from flows.commands.runs import describe
from flows.tracking import stage_run
from flows.tracking.curves import curves_of
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.registry import Registry
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import COLOUR, COLOURS, KIND, MOST_METRICS, Tracker, model_label

METRICS = {"fid_classifier": {"real": 0.5, "untrained": 90.0, "nfe_2": 1.5, "nfe_1": 2.66123, "nfe_1_ema1": 4.0}}


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "CM_PARENT_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return Tracker(tmp_path)


def pipeline(tracker, recipe="digits"):
    return PipelineRun(tracker, f"{recipe} · cd", {"git.revision": "1" * 40, "recipe": recipe}, {})


def history(tracker, run_id, key):
    return [(point.step, point.value) for point in tracker.client.get_metric_history(run_id, key)]


def outputs(folder, steps, first=10):
    """Write the files of a pipeline that hold curves; return them as {stage/path: file}."""
    files = {
        "student/metrics.jsonl": "".join(
            json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(first, steps, 10)
        ),
        "evaluate/plots/fid_over_training.csv": "row,step,fid\nnfe_1,100,9.0\nnfe_1,200,5.0\nnfe_2,100,7.0\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {name: folder / name for name in files}


def test_the_loss_is_on_the_pipeline_run_while_its_student_trains(tracker, tmp_path, monkeypatch):
    """In one request for the points of some seconds; and to the end of a training that fails."""
    requests, write = [], Tracker.log_curves
    monkeypatch.setattr(Tracker, "log_curves", lambda *one: [requests.append(one[2]), write(*one)])
    with pipeline(tracker) as parent:
        monkeypatch.setattr(stage_run, "CURVE_EVERY", 3600)
        with StageRun(tmp_path, "student", parent.run_id, lambda: {"recipe": "digits"}) as run:
            for step in (1, 2, 3):
                run.metrics({"loss": 1 / step}, step)
        assert history(tracker, parent.run_id, "curves/student_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
        assert len(requests) == 1
        monkeypatch.setattr(stage_run, "CURVE_EVERY", 0)
        with pytest.raises(ZeroDivisionError), StageRun(tmp_path, "teacher", parent.run_id, dict) as run:
            run.metrics({"loss": 4.0}, 1)
            run._written[-1][1].result()
            assert history(tracker, parent.run_id, "curves/teacher_loss") == [(1, 4.0)], "before it has ended"
            monkeypatch.setattr(stage_run, "CURVE_EVERY", 3600)
            run.metrics({"loss": 3.0}, 2)
            raise ZeroDivisionError
        assert history(tracker, parent.run_id, "curves/teacher_loss") == [(1, 4.0), (2, 3.0)]
        with StageRun(tmp_path, "features", parent.run_id, dict) as run:
            run.metrics({"loss": 1.0}, 1)
    assert not [key for key in tracker.client.get_run(parent.run_id).data.metrics if "features" in key]


def test_a_run_whose_stages_were_cached_has_their_curves_too(tracker, tmp_path, monkeypatch):
    """What it has already is not written twice, as after a resume; a request holds as much as MLflow takes."""
    files, sizes = outputs(tmp_path, 25_000), []
    write = tracker.client.log_batch
    with pipeline(tracker) as parent:
        tracker.log_curves(parent.run_id, {"curves/student_loss": [(10, 0.1), (20, 0.05)]})
        monkeypatch.setattr(
            tracker.client,
            "log_batch",
            lambda run, metrics=(), **more: [sizes.append(len(metrics)), write(run, metrics, **more)],
        )
        tracker.log_curves(parent.run_id, tracker.missing(parent.run_id, curves_of(files, METRICS)))
    losses = history(tracker, parent.run_id, "curves/student_loss")
    assert losses == [(step, 1 / step) for step in range(10, 25_000, 10)]
    assert sizes == [MOST_METRICS, MOST_METRICS, len(losses) - 2 + 2 + 3 - 2 * MOST_METRICS]
    assert history(tracker, parent.run_id, "curves/fid_against_nfe") == [(1, 2.66123), (2, 1.5)]
    assert history(tracker, parent.run_id, "curves/fid_over_training_nfe_1") == [(100, 9.0), (200, 5.0)]
    assert describe(tracker.client.get_run(parent.run_id))["metrics"] == {}, "the last point of a curve is no result"


def test_results_come_before_hashes(tracker):
    """As MLflow's pages list them; with the bounds in the table alone, in numbers of four digits."""
    with pipeline(tracker) as parent:
        tags = tracker.client.get_run(parent.run_id).data.tags
        assert tags["result"] == "none yet"
        parent.log_stages({"prepare": {"out/prepare": "a" * 32}, "evaluate": {"x": "b" * 32, "y": "c" * 32}})
        protocol = {"rows": {"nfe_1": {"nfe": 1}, "real": {"nfe": None}}}
        parent.log_evaluation(METRICS, protocol, {}, {})
    run = tracker.client.get_run(parent.run_id)
    assert run.data.tags["result"] == "FID 2.66 at 1 call, 1.5 at 2" and run.data.tags["features"] == "classifier"
    shown = [key for key in run.data.tags if not key.startswith("mlflow.")]
    assert shown[:3] == ["result", "recipe", "stage"] and "a" * 32 in run.data.tags["dvc.outs"].split()
    assert [key for key, value in run.data.tags.items() if "a" * 32 in value] == ["dvc.outs"]
    note = run.data.tags["mlflow.note.content"]
    assert "| features of `classifier` | calls | FID ↓ |" in note and "| nfe_1 | 1 | 2.661 |" in note
    assert "| real |  | 0.5000 |" in note and "| untrained |" in note and "- recipe: `digits`" in note
    assert set(run.data.metrics) == {"nfe_1/fid", "nfe_2/fid", "nfe_1_ema1/fid", "curves/fid_against_nfe"}


def test_runs_that_are_shown_together_have_different_colours(tracker):
    seen = []
    for _ in range(len(COLOURS) + 2):
        with pipeline(tracker) as parent:
            seen.append(tracker.client.get_run(parent.run_id).data.tags[COLOUR])
    assert sorted(seen[: len(COLOURS)]) == sorted(COLOURS) and seen[len(COLOURS) :] == seen[:2]


def test_an_experiment_of_an_earlier_version_opens_the_view_of_trainings(tracker, tmp_path):
    ((key, value),) = KIND.items()
    assert tracker.client.get_experiment(tracker.experiment_id).tags[key] == value
    tracker.client.delete_experiment_tag(tracker.experiment_id, key)
    assert Tracker(tmp_path).client.get_experiment(tracker.experiment_id).tags[key] == value
    tracker.client.set_experiment_tag(tracker.experiment_id, key, "finetuning")
    assert Tracker(tmp_path).client.get_experiment(tracker.experiment_id).tags[key] == "finetuning", "somebody's choice"


def test_runs_and_versions_of_earlier_versions_count_by_the_short_keys(tracker):
    """With their feature network, and against new versions for the title of champion."""
    with pipeline(tracker) as parent:
        old = {"fid_classifier/nfe_1": 2.5, "fid-min_classifier/teacher_nfe_35": 2.0, "seconds/prepare": 1.0}
        tracker.log_numbers(parent.run_id, old)
    shown = describe(tracker.client.get_run(parent.run_id))
    assert shown["metrics"] == {"nfe_1/fid": 2.5, "teacher_nfe_35/fid-min": 2.0, "seconds/prepare": 1.0}
    assert shown["features"] == "classifier"
    registry, tags = Registry(tracker), {"data": "d", "protocol": "p"}
    for key, fid in (("fid_classifier/nfe_1", 2.0), ("nfe_1/fid", 3.0), ("nfe_1/fid", 1.0)):
        model = tracker.client.create_logged_model(tracker.experiment_id, "student").model_id
        registry.register("cm-digits", model, {key: fid}, tags)
        champion = registry.read("cm-digits").champion
        assert champion.numbers == {"nfe_1/fid": min(fid, 2.0)}


@pytest.mark.parametrize("title", ["digits-cd seed=3 · student", "a data.source.path=s3://b/c's mu0=0.9 · student"])
def test_a_logged_model_is_named_as_its_run(tracker, title):
    model = tracker.client.create_logged_model(tracker.experiment_id, model_label(title))
    assert model.name.startswith(title.split()[0]) and model.name.endswith(" · student")
