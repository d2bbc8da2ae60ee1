"""MLflow as a team runs it: a server on PostgreSQL, its files in S3; what a pipeline logs comes back through HTTP."""

import json
import urllib.request
from urllib.parse import urlencode

import numpy as np
import pytest
import torch

from cm_core.model import ModelSpec, build_seeded, load_model, save_model
from cm_core.networks import MLPParams
from cm_core.noise import Noise
from flows.recipes.recipe import Recipe
from flows.reports.figures import save_grid
from flows.reports.model_card import Card
from flows.tracking.model_card import LONGEST, log_card, read_card
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.registry import Registry, register_student
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import MODEL_FILES, Tracker, fetch_student
from servers import mlflow_server, needs_postgres, postgres, s3_server

SAMPLES = {"rows": [{"name": "nfe_1", "model": "student"}], "grids": {"nfe_1": "grid.png"}}
SPEC = ModelSpec(form="skip", network=MLPParams(), noise=Noise(), image_shape=(1, 4, 4))
METRICS = {"fid_classifier": {"real": 0.5, "nfe_1": 2.5}}
PROTOCOL = {
    "reference": {},
    "network": {},
    "samples": {},
    "torch_fidelity": "0.4.0",
    "settings": {},
    "rows": {"nfe_1": {"model": "student", "num_images": 10}},
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of the server, and a client of the bucket that its files go to."""
    with postgres() as database, s3_server(monkeypatch, "mlflow") as s3:
        store = f"postgresql+psycopg2://postgres:postgres@{database.place}/postgres"
        with mlflow_server(tmp_path, "--artifacts-destination", "s3://mlflow/artifacts", store=store) as uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(name)  # a worker needs no key: its files go through the server
            yield uri, s3


def log_pipeline(root):
    """Log a student's training and a pipeline run around it, as the flow does; return the parent's id."""
    save_grid(np.zeros((4, 4, 4, 1), np.uint8), root / "grid.png")
    (root / "dataset.json").write_text('{"name": "made up", "source": "s3://bucket/a", "counts": {"train": 4}}')
    save_model(root, SPEC, build_seeded(SPEC, 1).state_dict())
    files = {f"student/{name}": root / name for name in MODEL_FILES}
    with PipelineRun(Tracker(root), "made up", {"recipe": "mine"}, {"student.method.kind": "cd"}) as parent:
        with StageRun(root, "student", parent.run_id, lambda: {"recipe": "mine"}, watch_machine=True) as run:
            for step in range(1, 51):
                run.metrics({"loss": 1 / step}, step)
            run.image("samples", root / "grid.png", 50)
            run.submit(lambda tracker, run_id: tracker.set_tags(run_id, {"dvc.out": "s" * 32}))
        run_ids = parent.log_stages({"student": {"out/student": "s" * 32}})
        parent.tracker.log_dataset(parent.run_id, root / "dataset.json", "p" * 32, "training")
        parent.log_evaluation(METRICS, PROTOCOL, {}, {"evaluate/grid.png": root / "grid.png"})
        outs = {"out/student": "s" * 32}
        model_id = parent.log_student(Recipe(), files, outs, METRICS, run_ids["student"])
        named = {"dataset": "made up", "data_version": "p" * 32, "protocol": PROTOCOL, "metrics": METRICS}
        (root / "samples.json").write_text(json.dumps(SAMPLES))
        files |= {"sample/samples.json": root / "samples.json", "sample/grid.png": root / "grid.png"}
        text = log_card(parent.tracker, model_id, Card(name="cm-made-up", spec=SPEC), Recipe(), files)
        described = text.ljust(LONGEST, ".")  # the database takes no more
        register_student(parent.tracker, model_id, **named, tags={"run_id": parent.run_id}, description=described)
    return parent.run_id


@pytest.mark.slow
@needs_postgres
def test_what_a_pipeline_logs_comes_back_through_the_server(server, tmp_path):
    uri, s3 = server
    parent_id = log_pipeline(tmp_path)

    tracker = Tracker(tmp_path / "elsewhere")  # another worker, with nothing but the address
    parent = tracker.client.get_run(parent_id)
    assert parent.info.status == "FINISHED" and parent.data.metrics["nfe_1/fid"] == 2.5
    assert parent.inputs.dataset_inputs[0].dataset.digest == "p" * 32
    lineage = json.loads(artifact(uri, parent_id, "lineage.json"))
    stage = tracker.client.get_run(lineage["runs"]["student"])
    assert stage.data.tags["mlflow.parentRunId"] == parent_id
    losses = tracker.client.get_metric_history(stage.info.run_id, "loss")
    assert [(m.step, m.value) for m in losses] == [(step, 1 / step) for step in range(1, 51)]
    on_parent = tracker.client.get_metric_history(parent_id, "curves/student_loss")
    assert [(m.step, m.value) for m in on_parent] == [(m.step, m.value) for m in losses]
    assert stage.data.metrics["system/system_memory_usage_percentage"] > 0
    (picture,) = [
        file.path for file in tracker.client.list_artifacts(stage.info.run_id, "images") if file.path.endswith(".png")
    ]
    assert artifact(uri, stage.info.run_id, picture).startswith(b"\x89PNG")
    assert artifact(uri, parent_id, "evaluate/grid.png") == (tmp_path / "grid.png").read_bytes()

    assert Registry(tracker).read("cm-made-up").aliases == {"candidate": 1, "champion": 1}
    spec, model = load_model(fetch_student("models:/cm-made-up@champion", tmp_path))
    x, sigma = torch.randn(2, 1, 4, 4), torch.full((2,), 80.0)
    torch.testing.assert_close(model(x, sigma), build_seeded(SPEC, 1).eval()(x, sigma))
    assert spec == SPEC
    description = tracker.client.get_model_version("cm-made-up", "1").description
    assert description.startswith("# cm-made-up\n") and len(description) == LONGEST
    card, folder = read_card(fetch_student("models:/cm-made-up@champion", tmp_path))
    assert card == Card(name="cm-made-up", spec=SPEC)
    assert (folder / "samples.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    stored = {entry["Key"] for entry in s3.list_objects_v2(Bucket="mlflow")["Contents"]}
    assert any(key.startswith("artifacts/") and key.endswith("student/ema.safetensors") for key in stored)
    (experiment,) = [one for one in experiments(uri) if one["name"] == "consistency-models"]
    assert experiment["artifact_location"].startswith("mlflow-artifacts:/"), "no worker needs the bucket's keys"


def artifact(uri, run_id, path):
    with urllib.request.urlopen(f"{uri}/get-artifact?{urlencode({'run_uuid': run_id, 'path': path})}") as answer:
        return answer.read()


def experiments(uri):
    with urllib.request.urlopen(f"{uri}/api/2.0/mlflow/experiments/search?max_results=10") as answer:
        return json.load(answer)["experiments"]
