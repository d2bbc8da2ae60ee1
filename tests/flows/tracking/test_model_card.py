"""The card of a registered student: what MLflow shows, and the same facts in a folder of the Hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch

from cm_core.model import load_model
from command import run
from flows.recipes.recipe import Recipe, validate
from flows.reports.figures import save_grid
from flows.tracking.model_card import LONGEST, collect_card, log_card
from flows.tracking.registry import Registry, register_student
from flows.tracking.tracker import MODEL_FILES, Tracker
from flows.workspace.dvc_files import dvc_md5
from miniature import make_bare_workspace, save_untrained
from servers import free_port

SECRET = "https://me:secret@example.org/teacher.pkl?signature=secret"
ROW = {"model": "student", "nfe": 1, "sigmas": [80.0], "num_images": 50_000}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace with one registered student."""
    return make_bare_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(autouse=True)
def surroundings(root, monkeypatch):
    """The workspace, without servers of the user's."""
    for name in ("MLFLOW_TRACKING_URI", "CM_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def version(root):
    return register(root, recipe_of(), outputs(root))


def outputs(root: Path, rows: int = 1) -> dict[str, Path]:
    """Write the files of a run from which its card is made; return {stage/path: file}."""
    save_untrained(root / "out" / "student", form="skip", image_shape=(1, 2, 2))
    names = [f"nfe_{row + 1}" for row in range(rows)]
    values = {name: 2.5 for name in names}
    contents = {
        "prepare/dataset.json": {"name": "My pictures", "counts": {"train": 50_000}, "licence": "CC0"},
        "teacher/origin.json": {"sha256": "a" * 64, "format": "NVlabs EDM", "licence": "CC BY-NC-SA 4.0"},
        "evaluate/metrics.json": {"fid_inception": values, "kid_inception": values},
        "evaluate/protocol.json": {
            "network": {"name": "inception-v3-compat", "sha256": "b" * 64},
            "reference": {"images": "50000 training images", "sha256": "c" * 64},
            "torch_fidelity": "0.4.0",
            "weights": "of the last training step",
            "settings": {},
            "samples": {},
            "rows": {name: ROW for name in names},
        },
        "sample/samples.json": {
            "rows": [{"name": name, "model": "student"} for name in names],
            "grids": {name: f"{name}_grid.png" for name in names},
        },
    }
    for path, content in contents.items():
        (root / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "out" / path).write_text(json.dumps(content))
    save_grid(torch.zeros(4, 2, 2, 1, dtype=torch.uint8).numpy(), root / "out" / "sample" / "nfe_1_grid.png")
    folder = root / "out"
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def register(root: Path, recipe: Recipe, files: dict[str, Path]):
    """Log, describe and register the student, as a pipeline run does; return its version in MLflow."""
    tracker = Tracker(root)
    training = tracker.start_run("student", {"hardware": "2 x NVIDIA A"}, command="test", parent_run_id=None)
    tracker.log_numbers(training, {"images_per_s": 1000.0})
    model_id = tracker.log_student(
        training, recipe, {name: files[f"student/{name}"] for name in MODEL_FILES}, dvc_md5(root / "out" / "student")
    )
    metrics = json.loads(files["evaluate/metrics.json"].read_text())
    card = collect_card(tracker, "cm-My-pictures", recipe, "my-recipe", files, metrics, {"student": training})
    name, version = register_student(
        tracker,
        model_id,
        dataset="My pictures",
        data_version="1",
        protocol=json.loads(files["evaluate/protocol.json"].read_text()),
        metrics=metrics,
        tags={},
        description=log_card(tracker, model_id, card, recipe, files),
    )
    assert name == card.name and Registry(tracker).read(name).versions.keys() == {version.number}
    return tracker.client.get_model_version(name, str(version.number))


def recipe_of(**student) -> Recipe:
    train = {"num_steps": 6000, "batch_size": 100, **student}
    return validate({"teacher": {"weights": SECRET}, "student": {"train": train}}, source="test")


def test_mlflow_shows_the_card_of_a_registered_student(root, version):
    for fact in (
        "# cm-My-pictures",
        "| `nfe_1` | 1 | 2.500 | 2,500 | 50,000 |",
        "inception-v3-compat (SHA-256 `bbbbbbbbbbbb`) against",
        "My pictures, 50,000 training images. Licence: CC0.",
        f"The teacher was imported, not trained: NVlabs EDM, SHA-256 `{'a' * 64}`, licence CC BY-NC-SA 4.0.",
        "| student | 6,000 | 100 | 10 | 2 x NVIDIA A |",
        "the recipe `my-recipe`",
        f"cm sample --model models:/{version.source.removeprefix('models:/')}",
    ):
        assert fact in version.description, fact
    model_id = version.source.removeprefix("models:/")
    picture = (
        f"ajax-api/2.0/mlflow/logged-models/{model_id}/artifacts/files?artifact_file_path=model_card%2Fsamples.png"
    )
    assert f"![Samples]({picture})" in version.description
    logged = Path(mlflow.artifacts.download_artifacts(version.source), "model_card")
    assert (logged / "model_card.md").read_text() == version.description.replace(picture, "samples.png")
    assert (logged / "samples.png").read_bytes() == (root / "out" / "sample" / "nfe_1_grid.png").read_bytes()
    texts = [path.read_text() for path in logged.iterdir() if path.suffix != ".png"]
    assert not any("secret" in text for text in texts) and "example.org/teacher.pkl" in texts[0] + texts[1] + texts[2]


def test_a_long_description_is_cut_where_mlflow_would_refuse_it(root, tmp_path):
    files, recipe, logged = outputs(tmp_path, rows=200), recipe_of(), []
    nothing = SimpleNamespace(client=SimpleNamespace(log_model_artifacts=lambda *what: logged.append(what)))
    metrics = json.loads(files["evaluate/metrics.json"].read_text())
    card = collect_card(nothing, "cm-x", recipe, "my-recipe", files, metrics, {})
    description = log_card(nothing, "m-1", card, recipe, files)
    assert len(description) == LONGEST and len(logged) == 1
    assert description.endswith("`model_card/model_card.md` among the model's artifacts goes on")


@pytest.mark.parametrize("name", ["models:/cm-My-pictures/1", "models:/cm-My-pictures@champion", "out/student"])
def test_the_hub_gets_the_card_with_its_front_matter(root, version, tmp_path, capsys, name):
    hub = pytest.importorskip("huggingface_hub")
    code, told, _ = run(capsys, "export", name, "--to", "hub", "--out", str(tmp_path / "hub"))
    assert code == 0 and "no metrics" not in told
    card = hub.ModelCard((tmp_path / "hub" / "README.md").read_text())
    assert (card.data.license, card.data.datasets) == ("cc-by-nc-sa-4.0", ["My-pictures"])
    fid = next(result for result in card.data.eval_results if result.metric_type == "fid")
    assert fid.metric_value == 2.5 and fid.metric_name == "fid (inception-v3-compat, 50,000 images, network calls: 1)"
    assert fid.metric_args["network_sha256"] == "b" * 64 and fid.metric_args["reference"] == "50000 training images"
    assert "| student | 6,000 | 100 | 10 | 2 x NVIDIA A |" in card.content
    assert "secret" not in (tmp_path / "hub" / "recipe.yaml").read_text()
    assert (tmp_path / "hub" / "samples.png").read_bytes() == (root / "out/sample/nfe_1_grid.png").read_bytes()


def test_a_folder_of_logged_weights_finds_its_card(root, version, tmp_path, capsys):
    """By its files' hash, as DVC has it: changed weights in the same place are another model."""
    student = tmp_path / "student"
    shutil.copytree(root / "out" / "student", student)
    code, told, _ = run(capsys, "export", str(student), "--to", "hub", "--out", str(tmp_path / "hub"))
    assert code == 0 and "no metrics" not in told
    (student / "another.txt").write_text("")
    code, told, complaint = run(capsys, "export", str(student), "--to", "hub", "--out", str(tmp_path / "other"))
    assert code == 0, complaint
    assert "its card has no metrics" in told


def test_a_server_that_is_away_gives_no_card_without_metrics(root, version, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, _, complaint = run(capsys, "export", "out/student", "--to", "hub", "--out", str(tmp_path / "hub"))
    assert code == 2 and "MLflow at http://127.0.0.1" in complaint and not (tmp_path / "hub").exists()


def test_a_registered_model_is_imported(root, version, tmp_path, capsys):
    code, told, complaint = run(capsys, "import", "models:/cm-My-pictures/1", "--out", str(tmp_path / "model"))
    assert code == 0 and "this package, consistency function skip" in told, complaint
    (spec, model), (first, original) = load_model(tmp_path / "model"), load_model(root / "out" / "student")
    assert spec == first
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in original.state_dict().items())
    facts = json.loads((tmp_path / "model" / "origin.json").read_text())
    assert facts["weights"] == "models:/cm-My-pictures/1" and facts["format"] == "this package"
