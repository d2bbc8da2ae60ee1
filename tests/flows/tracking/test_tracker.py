"""`cm stage`: parameters filled by name, MLflow runs that say what was made from what, states that outlive a stop."""

import io
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from cm_core.model import ModelSpec, build_seeded, load_model, save_model
from cm_core.networks.mlp import MLPParams
from cm_core.noise import Noise
from cm_core.training.trainer import loss_by_sigma
from flows.checkpoints import store
from flows.distributed.launch import hardware
from flows.errors import UserError
from flows.recipes.recipe import Recipe, write_active
from flows.reports.figures import save_grid
from flows.reports.metrics_table import of_student, short_keys
from flows.stage_runner import run as running
from flows.stage_runner.progress import Bar, StageMonitor
from flows.stages.training import StageStopped
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import LINEAGE, MODEL_FILES, Tracker, fetch_student
from flows.workspace.dvc_files import dvc_md5
from miniature import REPOSITORY, git, make_workspace

STAGES = """
stages:
  prepare:
    cmd: cm stage prepare
    params:
    - params/active.yaml: [seed]
    outs: [out/prepare]
  teacher:
    cmd: cm stage teacher
    deps: [out/prepare]
    params:
    - params/active.yaml: [seed, noise]
    outs: [out/teacher]
  student:
    cmd: cm stage student
    deps: [out/prepare, out/teacher]
    params:
    - params/active.yaml: [seed, student]
    outs: [out/student]
"""
SPEC = ModelSpec(form="skip", network=MLPParams(), noise=Noise(), image_shape=(1, 4, 4))


def prepare(seed, out_dir, monitor):
    assert list(out_dir.iterdir()) == []
    (out_dir / "dataset.json").write_text('{"name": "made up", "source": "https://a.example/b.zip", "counts": {}}')


def teacher(seed, noise, prepare_dir, out_dir, state_dir, monitor):
    assert (seed, noise) == (0, Noise()) and (prepare_dir / "dataset.json").exists()
    done = len(list(state_dir.glob("step-*")))
    for step in range(done + 1, 4):
        monitor.metrics({"step": step, "loss": 1 / step, "odd": float("nan")}, step)
        monitor.progress(step, 3, "steps")
        (state_dir / f"step-{step}").mkdir()
        if step == int(os.environ.get("TEST_STOP_AT", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        if monitor.stop_requested():
            raise StageStopped("stopped")
    save_grid(torch.zeros(4, 4, 4, 1, dtype=torch.uint8).numpy(), out_dir / "grid.png", columns=2)
    monitor.image("samples/1-step", out_dir / "grid.png", 3)
    (out_dir / "large.npy").write_text("not for MLflow")
    (out_dir / "resumed.json").write_text(str(done))


def student(seed, student, teacher_dir, out_dir, state_dir, monitor):
    save_model(out_dir, SPEC, build_seeded(SPEC, 1).state_dict())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = make_workspace(tmp_path_factory.mktemp("workspace"))
    (root / "dvc.yaml").write_text(STAGES)
    (root / "flows").symlink_to(REPOSITORY / "flows")
    write_active(Recipe(), root, "mine")
    return root


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """The three stages above in place of the real ones, and an environment without a flow."""
    for function in (prepare, teacher, student):
        module = types.SimpleNamespace(**{function.__name__: function})
        monkeypatch.setitem(sys.modules, f"flows.stages.{function.__name__}", module)
    for name in ("CM_HOME", "CM_STATE", "CM_PARENT_RUN_ID", "CM_RUN_TAGS", "MLFLOW_TRACKING_URI", "CM_PROGRESS_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def tracker(root):
    return Tracker(root)


def newest(tracker, stage):
    return tracker.client.search_runs([tracker.experiment_id], f"tags.stage = '{stage}'")[0]


def test_everything_a_stage_did_is_in_mlflow(root, tracker, monkeypatch, tmp_path):
    """Also from another working directory: one place at the workspace root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flows.tracking.stage_run.EVERY", 3600.0)
    running.run_stage("prepare", root)
    assert tracker.client.get_experiment(tracker.experiment_id).artifact_location == (root / "mlruns").as_uri()
    prepared = dvc_md5(root / "out/prepare")
    assert newest(tracker, "prepare").data.tags["git.revision"] == git(root, "rev-parse", "HEAD").strip()
    (data,) = newest(tracker, "prepare").inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest, data.dataset.source_type) == ("made up", prepared, "http")

    parent = tracker.client.create_run(tracker.experiment_id).info.run_id
    given = {"recipe": "given", "git.revision": "1" * 40, "prefect.flow_run": "brave-owl"}
    monkeypatch.setenv("CM_PARENT_RUN_ID", parent)
    monkeypatch.setenv("CM_RUN_TAGS", json.dumps(given))
    (root / "out/teacher").mkdir()
    (root / "out/teacher/old.txt").write_text("of an earlier run")
    running.run_stage("teacher", root)
    run = newest(tracker, "teacher")
    made = dvc_md5(root / "out/teacher")
    assert not (root / "out/teacher/old.txt").exists()
    assert run.info.status == "FINISHED" and run.info.run_name == "given · teacher"
    assert run.data.params["noise.sigma_max"] == "80.0" and "student.init_from" not in run.data.params
    assert run.data.tags["mlflow.parentRunId"] == parent and run.data.tags["hardware"] == hardware()
    assert run.data.tags["dvc.out"] == made and run.data.tags["dvc.deps"] == prepared
    lineage = json.loads(Path(tracker.client.download_artifacts(run.info.run_id, LINEAGE)).read_text())
    assert lineage == {"inputs": {"out/prepare": prepared}, "outputs": {"out/teacher": made}}
    assert run.data.tags.items() >= given.items()
    assert "- recipe: `given`" in run.data.tags["mlflow.note.content"]
    assert run.inputs.dataset_inputs[0].dataset.digest == prepared
    losses = tracker.client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in losses] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    machine = tracker.client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
    assert [m.step for m in machine] == [1], "at the training's steps, not at every one"
    assert 0 < run.data.metrics["system/system_memory_usage_percentage"] <= 100
    assert not [name for name in newest(tracker, "prepare").data.metrics if name.startswith("system/")]
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id, "teacher")}
    assert files == {"teacher/grid.png", "teacher/resumed.json"}
    pictures = [file.path for file in tracker.client.list_artifacts(run.info.run_id, "images")]
    assert any(path.startswith("images/samples~1-step+step+3") for path in pictures)
    assert tracker.find_stage_run("teacher", made) == run.info.run_id
    assert tracker.find_stage_run("teacher", "0" * 32) is None


def test_the_measured_student_is_a_model_that_loads_and_is_logged_once(root, tracker):
    running.run_stage("prepare", root)
    (root / "out/teacher").mkdir(exist_ok=True)
    running.run_stage("student", root)
    run = newest(tracker, "student")
    (logged_by_the_stage,) = run.outputs.model_outputs
    assert run.data.tags["recipe"] == "mine"
    files, outs = (
        {f"student/{name}": root / "out/student" / name for name in MODEL_FILES},
        {"out/student": run.data.tags["dvc.out"]},
    )
    metrics = {"fid_classifier": {"nfe_1": 2.5, "real": 0.5}}
    parents = [PipelineRun(tracker, "name", {"recipe": "mine"}, {}) for _ in range(3)]
    with parents[0] as first, parents[1] as second, parents[2] as without_its_training:
        model_id = first.log_student(Recipe(), files, outs, metrics, run.info.run_id)
        assert model_id == logged_by_the_stage.model_id
        assert second.log_student(Recipe(), files, outs, metrics, run.info.run_id) == model_id
        assert without_its_training.log_student(Recipe(), files, outs, metrics, None) == model_id
    for run_id in (run.info.run_id, *(parent.run_id for parent in parents)):
        assert [output.model_id for output in tracker.client.get_run(run_id).outputs.model_outputs] == [model_id]
    spec, model = load_model(fetch_student(f"models:/{model_id}", root))
    x, sigma = torch.randn(2, 1, 4, 4), torch.full((2,), 80.0)
    torch.testing.assert_close(model(x, sigma), build_seeded(SPEC, 1).eval()(x, sigma))
    logged = tracker.client.get_logged_model(model_id)
    assert spec == SPEC and {metric.key for metric in logged.metrics} == {"nfe_1/fid"}
    assert logged.name == "mine · student", "a name that says what it is of"
    assert logged.source_run_id == run.info.run_id and logged.params["method.kind"] == "cd"


def test_an_imported_student_is_named_with_its_origin(root, tracker, monkeypatch):
    origin = {"sha256": "1" * 64, "format": "OpenAI", "licence": "MIT"}

    def imported(seed, student, teacher_dir, out_dir, state_dir, monitor):
        save_model(out_dir, SPEC, build_seeded(SPEC, 2).state_dict())
        (out_dir / "origin.json").write_text(json.dumps(origin))
        (out_dir / "decoder.safetensors").write_bytes(b"of a model of latents")

    monkeypatch.setitem(sys.modules, "flows.stages.student", types.SimpleNamespace(student=imported))
    for stage in ("prepare", "teacher"):
        running.run_stage(stage, root)
    write_active(Recipe.model_validate({"student": {"weights": "https://me:secret@host/cd.pt?token=1"}}), root, "mine")
    try:
        running.run_stage("student", root)
    finally:
        write_active(Recipe(), root, "mine")
    tags = {f"import.{key}": value for key, value in origin.items()} | {"import.weights": "https://host/cd.pt"}
    assert newest(tracker, "student").data.tags.items() >= tags.items()
    query = f"tags.`dvc.out` = '{dvc_md5(root / 'out/student')}'"
    (model,) = tracker.client.search_logged_models([tracker.experiment_id], query)
    assert model.tags.items() >= tags.items()
    assert (fetch_student(f"models:/{model.model_id}", root) / "decoder.safetensors").is_file()


def test_a_stopped_training_goes_on_and_its_state_goes_when_dvc_has_the_result(root, tracker, monkeypatch, tmp_path):
    monkeypatch.setenv("CM_STATE", str(tmp_path))
    monkeypatch.setenv("TEST_STOP_AT", "2")
    running.run_stage("prepare", root)
    with pytest.raises(SystemExit) as stop:
        running.run_stage("teacher", root)
    assert stop.value.code == 128 + signal.SIGTERM
    assert newest(tracker, "teacher").info.status == "KILLED"
    monkeypatch.delenv("TEST_STOP_AT")
    running.run_stage("teacher", root)
    assert (root / "out/teacher/resumed.json").read_text() == "2"
    resumed = newest(tracker, "teacher").info.run_id
    machine = tracker.client.get_metric_history(resumed, "system/cpu_utilization_percentage")
    assert [m.step for m in machine] == [3], "it goes on where the training does"

    outs = {"out/teacher": dvc_md5(root / "out/teacher")}
    assert store.drop_finished(root, lambda made: False) == []
    seen = []
    (dropped,) = store.drop_finished(root, lambda made: seen.append(made) or True)
    assert seen == [outs] and Path(dropped).name.startswith("teacher-") and not Path(dropped).exists()


def test_a_state_is_one_process_at_a_time_and_is_not_dropped_in_use(tmp_path):
    holder = f"""
import sys
from pathlib import Path
from flows.checkpoints.store import hold_checkpoint
with hold_checkpoint(Path({str(tmp_path)!r}), "teacher", "key", lambda: print("waits", flush=True), print) as held:
    print("has", held.folder.name, flush=True)
"""
    with store.hold_checkpoint(
        tmp_path, "teacher", "key", lambda: pytest.fail("nobody to wait for"), pytest.fail
    ) as held:
        store.mark_finished(held.folder, {})
        other = subprocess.Popen(
            [sys.executable, "-c", holder], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert other.stdout.readline() == "waits\n"
        assert store.drop_finished(tmp_path, lambda outs: True) == []
    assert other.stdout.readline() == "has teacher-key\n"
    assert other.wait() == 0


def test_another_place_for_states(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_STATE", str(tmp_path / "elsewhere"))
    with store.hold_checkpoint(tmp_path, "teacher", "key", lambda: None, pytest.fail) as held:
        assert held.folder == tmp_path / "elsewhere" / "teacher-key" and held.folder.is_dir()
    monkeypatch.setenv("CM_STATE", "ftp://bucket/states")
    with pytest.raises(UserError, match="CM_STATE=ftp://bucket/states: must be a folder of this machine or s3://"):
        store.states_bucket()


def test_a_pipeline_run_that_fails_ends_with_its_children(tracker):
    with pytest.raises(KeyboardInterrupt), PipelineRun(tracker, "name", {"recipe": "mine"}, {"seed": 0}) as parent:
        tags = {"mlflow.parentRunId": parent.run_id}
        child = tracker.client.create_run(tracker.experiment_id, tags=tags).info.run_id
        raise KeyboardInterrupt
    assert [tracker.client.get_run(run_id).info.status for run_id in (parent.run_id, child)] == ["KILLED", "KILLED"]


def test_a_failed_stage_leaves_a_failed_run(root, tracker, monkeypatch):
    def broken(seed, out_dir, monitor):
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(sys.modules, "flows.stages.prepare", types.SimpleNamespace(prepare=broken))
    with pytest.raises(ZeroDivisionError):
        running.run_stage("prepare", root)
    run = newest(tracker, "prepare")
    assert run.info.status == "FAILED" and run.data.tags["error"] == "ZeroDivisionError: by zero"


def test_what_cannot_run_is_refused_in_one_line(root, tmp_path):
    with pytest.raises(UserError, match="no stage 'teach'; there are prepare, teacher, student"):
        running.run_stage("teach", root)
    (root / "out/teacher").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="out/teacher: missing"):
        running.run_stage("student", root)
    with pytest.raises(UserError, match=f"set PYTHONPATH={tmp_path}"):
        running.run_stage("teacher", tmp_path)


class SilentRun:
    def metrics(self, values, step):
        self.last = values


def test_progress_is_a_line_now_and_then_and_a_file(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CM_PROGRESS_FILE", str(tmp_path / "progress.json"))
    monitor = StageMonitor(Bar("teacher", lines=True), SilentRun(), lambda: False)
    monitor.metrics({"step": 1, "loss": 0.25}, 1)
    for done in range(1, 1001):
        monitor.progress(done, 1000, "steps")
    monitor.remark("done early")
    assert capsys.readouterr().out == "teacher: 1,000 of 1,000 steps, loss 0.25\nteacher: done early\n"
    assert (tmp_path / "progress.json").read_text() == '{"done": 1000, "total": 1000, "unit": "steps"}'
    assert list(tmp_path.iterdir()) == [tmp_path / "progress.json"]


def test_a_terminal_gets_a_bar_and_a_resumed_training_begins_where_it_stopped(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with Bar("teacher", lines=True) as bar:
        bar.metrics({"loss": 0.25}, 600)
        bar.progress(600, 1000, "steps")
        (task,) = bar._bar.tasks
        assert (task.completed, task.total, task.speed) == (600, 1000, None), (
            "steps of another process took no time here"
        )
        bar.progress(700, 1000, "steps")
        bar.remark("saved [1]")
    assert "700 of 1,000 steps, loss 0.25" in sys.stderr.getvalue() and "teacher: saved [1]" in sys.stderr.getvalue()


def test_numbers_get_keys_that_mlflow_groups():
    fids = {"nfe_1": 2, "real": 0.5, "untrained": 9, "teacher_nfe_35": 1}
    metrics = {"fid_classifier": fids, "is_classifier": {"nfe_1": 3}}
    assert short_keys(metrics) == {"nfe_1/fid": 2, "nfe_1/is": 3, "teacher_nfe_35/fid": 1}
    assert of_student(metrics) == {"nfe_1/fid": 2, "nfe_1/is": 3}


def test_losses_at_any_noise_level_have_names_that_mlflow_takes(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sigmas = 2.0 ** torch.arange(-40, 41)
    values = loss_by_sigma(torch.ones(1, 81), sigmas[None])
    with StageRun(tmp_path, "student", None, dict) as run:
        run.metrics(values, 1)
    logged = Tracker(tmp_path).client.get_run(run._run_id).data.metrics
    assert logged == values and len(values) == 81
    assert [float(key.rpartition("/")[2]) for key in values] == pytest.approx((sigmas * 2**0.5).tolist(), rel=5e-3)


def test_a_tracking_server_out_of_reach_is_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9: ") as refused:
        Tracker(Path(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_stage_hears_of_it_when_tracking_fails(root, monkeypatch):
    def refuse(self, origin):
        raise UserError("MLflow is out of reach")

    monkeypatch.setattr("flows.tracking.tracker.Tracker.__init__", refuse)
    with pytest.raises(UserError, match="out of reach"):
        running.run_stage("prepare", root)


def test_a_training_does_not_end_for_a_number_that_could_not_be_written(root, monkeypatch, tracker, tmp_path):
    monkeypatch.setenv("CM_STATE", str(tmp_path))

    def refuse(self, *_, **__):
        raise ConnectionError("gone for a while")

    running.run_stage("prepare", root)
    monkeypatch.setattr(Tracker, "log_numbers", refuse)
    with pytest.raises(ConnectionError):
        running.run_stage("teacher", root)
    assert (root / "out/teacher/resumed.json").exists(), "it trained to its end all the same"
    assert newest(tracker, "teacher").data.tags["dvc.out"] == dvc_md5(root / "out/teacher")


def test_what_could_not_be_written_for_a_while_is_written_in_the_end(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    away, write = {2, 3}, Tracker.log_numbers

    def sometimes(self, run_id, values, *, step):
        if step in away:
            away.remove(step)
            raise ConnectionError("gone for a while")
        write(self, run_id, values, step=step)

    monkeypatch.setattr(Tracker, "log_numbers", sometimes)
    with StageRun(tmp_path, "teacher", None, dict) as run:
        for step in range(1, 6):
            run.metrics({"loss": 0.5}, step)
    logged = Tracker(tmp_path).client.get_metric_history(run._run_id, "loss")
    assert sorted(entry.step for entry in logged) == [1, 2, 3, 4, 5] and not away


def test_a_recipe_of_any_length_is_logged(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    params = {f"section.key{number}": number for number in range(250)}
    with PipelineRun(Tracker(tmp_path), "long", {"recipe": "long"}, params) as parent:
        pass
    assert len(parent.tracker.client.get_run(parent.run_id).data.params) == 250
