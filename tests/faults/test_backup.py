"""The commands of docs/operations.md for backup and restore, run as they stand there, around a loss of everything."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.recipes.recipe import Recipe, write_active
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.tracker import MODEL_FILES, Tracker, fetch_student
from live import environment
from miniature import PICTURE, REPOSITORY, commit, git, make_workspace, save_untrained
from servers import binary, mlflow_server, needs_postgres, postgres, s3_server


def commands(heading):
    """Return the blocks of commands below a heading: those of the backup, those of the restore."""
    text = (REPOSITORY / "docs/operations.md").read_text().partition(f"### {heading}\n")[2].partition("\n#")[0]
    blocks = [""]
    for line in text.splitlines():
        if line.startswith("    "):
            blocks[-1] += line[4:] + "\n"
        elif blocks[-1]:
            blocks.append("")
    back_up, restore = filter(None, blocks)
    return back_up, restore


def shell(script, folder, **variables):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.soak
def test_a_workspace_comes_back_with_runs_artifacts_and_results(tmp_path):
    root = make_workspace(tmp_path / "workspace")
    (root / "params/recipes").mkdir()
    (root / "params/recipes/tiny.yaml").write_text("seed: 4\n")
    write_active(Recipe(seed=4), root)
    git(root, "add", "--all")
    commit(root)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "cm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flows.cli "$@"\n')
    (tools / "cm").chmod(0o755)
    variables = environment(REPOSITORY) | {"BACKUP": str(tmp_path / "backup")}
    variables["PATH"] = f"{tools}:{variables['PATH']}"

    first = json.loads(shell("cm run tiny --json", root, **variables))
    listed = shell("cm runs --json", root, **variables)
    back_up, restore = commands("One machine")
    shell(back_up, root, **variables)
    shutil.move(root / "backup", tmp_path / "backup")
    git(tmp_path, "clone", "--quiet", "--bare", str(root), "bare")
    shutil.rmtree(root)

    git(tmp_path, "clone", "--quiet", "bare", "workspace")
    shell(restore, root, **variables)
    assert shell("cm runs --json", root, **variables) == listed
    again = json.loads(shell("cm run tiny --json", root, **variables))
    assert all(stage["cached"] for stage in again["stages"].values()) and again["metrics"] == first["metrics"]
    client = Tracker(root).client
    picture = client.download_artifacts(first["mlflow"]["run_id"], "evaluate/below/plot.png", str(tmp_path))
    assert Path(picture).read_bytes() == base64.b64decode(PICTURE)


@pytest.mark.slow
@needs_postgres
@pytest.mark.skipif(shutil.which("aws") is None, reason="needs the AWS command line")
def test_databases_and_a_bucket_come_back(tmp_path, monkeypatch):
    save_untrained(tmp_path / "student", form="skip", image_shape=(1, 8, 8))
    files = {name: tmp_path / "student" / name for name in MODEL_FILES}
    back_up, restore = commands("PostgreSQL and a bucket")
    with s3_server(monkeypatch, "team") as s3:
        variables = {
            **os.environ,
            "BUCKET": "team",
            "PATH": f"{Path(binary('pg_restore')).parent}:{os.environ['PATH']}",
        }

        def served(database):
            """Point the environment at an MLflow server on this database, its artifacts in the bucket."""
            url = f"postgresql+psycopg2://postgres:postgres@{database.place}/postgres"
            return mlflow_server(tmp_path, "--artifacts-destination", "s3://team/artifacts", store=url)

        def addresses(database):
            address = f"postgresql://postgres:postgres@{database.place}"
            return {"MLFLOW_DATABASE": f"{address}/postgres", "PREFECT_DATABASE": f"{address}/prefect"}

        with postgres() as database:
            shell('createdb --maintenance-db "$MLFLOW_DATABASE" prefect', tmp_path, **variables, **addresses(database))
            with served(database) as uri:
                monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
                with PipelineRun(Tracker(tmp_path), "kept", {"recipe": "mine"}, {"seed": 3}) as parent:
                    model_id = parent.tracker.log_student(parent.run_id, Recipe(), files, "v" * 32)
            shell(back_up, tmp_path, **variables, **addresses(database))
        for entry in s3.list_objects_v2(Bucket="team")["Contents"]:
            s3.delete_object(Bucket="team", Key=entry["Key"])

        with postgres() as database:
            shell('createdb --maintenance-db "$MLFLOW_DATABASE" prefect', tmp_path, **variables, **addresses(database))
            shell(restore, tmp_path, **variables, **addresses(database))
            with served(database) as uri:
                monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
                run = Tracker(tmp_path).client.get_run(parent.run_id)
                assert (run.info.status, run.data.params, run.data.tags["recipe"]) == (
                    "FINISHED",
                    {"seed": "3"},
                    "mine",
                )
                weights = fetch_student(f"models:/{model_id}", tmp_path) / MODEL_FILES[0]
                assert weights.read_bytes() == files[MODEL_FILES[0]].read_bytes()
