"""The commands of the documentation for backup and restore, run as they stand there, around a loss of everything.

Those for Compose run with a stand-in for Docker, whose containers are this machine and whose volumes are folders.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.recipes.recipe import Recipe, write_active
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.tracker import MODEL_FILES, Tracker, fetch_student
from live import environment
from miniature import PICTURE, REPOSITORY, commit, git, make_workspace, save_untrained
from servers import binary, mlflow_server, needs_postgres, postgres, s3_server


def commands(heading, page="operations"):
    """Return the blocks of commands below a heading: those of the backup, those of the restore."""
    text = (REPOSITORY / f"docs/{page}.md").read_text().partition(f"# {heading}\n")[2].partition("\n#")[0]
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
def test_databases_and_a_bucket_come_back(tmp_path, monkeypatch):
    save_untrained(tmp_path / "student", form="skip", image_shape=(1, 8, 8))
    files = {name: tmp_path / "student" / name for name in MODEL_FILES}
    back_up, restore = commands("PostgreSQL and a bucket")
    with s3_server(monkeypatch, "team") as s3:
        variables = {
            **os.environ,
            "BUCKET": "team",
            "PATH": f"{Path(binary('pg_restore')).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
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


DOCKER = """
import os, subprocess, sys
from pathlib import Path

match sys.argv[1:]:
    case ["compose", "--file", "infra/compose.yaml", "exec", "--no-TTY", "postgres", *command]:
        code = subprocess.run(command).returncode
    case ["compose", "--file", "infra/compose.yaml", "create" | "start" | "stop" | "up", *_]:
        code = 0
    case ["run", "--rm", "--volume", one, "--volume", two, "--volume", three, image, "tar", *words]:
        assert image == os.environ["IMAGE"], image
        inside = dict(reversed(volume.split(":")) for volume in (one, two, three))
        root = Path(os.environ["VOLUMES"])
        for place, name in inside.items():  # the container's file system: its folders are links to volumes
            target = Path(name) if name.startswith("/") else root / name
            target.mkdir(parents=True, exist_ok=True)
            (root / place[1:]).unlink(missing_ok=True)
            (root / place[1:]).symlink_to(target)
        there = {"/": root, "/backup/volumes.tar.gz": f"{root}/backup/volumes.tar.gz"}
        words = [word[1:] if word in inside else there.get(word, word) for word in words]
        links = ["--keep-directory-symlink", "--dereference"]
        code = subprocess.run(["tar", "--directory", root, *links, *words]).returncode
    case unknown:
        sys.exit(f"docker: {unknown}")
sys.exit(code)
"""


@pytest.mark.slow
@needs_postgres
def test_databases_and_volumes_of_compose_come_back(tmp_path):
    compose = yaml.safe_load((REPOSITORY / "infra" / "compose.yaml").read_text())
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "docker").write_text(f"#!{sys.executable}{DOCKER}")
    (tools / "docker").chmod(0o755)
    volumes = [tmp_path / name / "consistency_s3" for name in ("before", "after")]
    volumes[0].mkdir(parents=True)
    (volumes[0] / "object").write_bytes(b"bytes")
    assert {"s3", "mlflow"} <= compose["volumes"].keys() and compose["name"] == "consistency"
    for folder, script in zip(volumes, commands("Backup", "infra"), strict=True):
        with postgres() as database:
            host, _, port = database.place.partition(":")
            login = {"PGHOST": host, "PGPORT": port, "PGPASSWORD": "postgres"}
            path = f"{tools}:{Path(binary('pg_restore')).parent}:{os.environ['PATH']}"
            docker = {"VOLUMES": str(folder.parent), "IMAGE": compose["services"]["postgres"]["image"]}
            variables = {**os.environ, **login, **docker, "PATH": path}

            psql = "psql --quiet --tuples-only --no-align --username"
            role = "create role cm superuser login password 'postgres'"
            shell(f'{psql} postgres -c "{role}" -c "create database prefect"', tmp_path, **variables)
            shell(f"{psql} cm -f {REPOSITORY}/infra/databases.sql prefect", tmp_path, **variables)
            names = ("prefect", "mlflow")
            for name in names if folder == volumes[0] else ():
                shell(f"{psql} cm -c \"create table kept as select '{name}' as name\" {name}", tmp_path, **variables)
            shell(script, tmp_path, **variables)
            kept = [shell(f"{psql} cm -c 'select name from kept' {name}", tmp_path, **variables) for name in names]
            assert kept == [f"{name}\n" for name in names]
    assert (volumes[1] / "object").read_bytes() == b"bytes"
