"""The files of infra/ against the schemas of Compose, Kubernetes and Prefect, and against this repository."""

import json
import re
import shlex
import stat
import subprocess
from importlib.resources import files
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from flows.errors import UserError
from flows.operations.deploy import POOLS_DIR, automations, from_repository, in_folder, read_template

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
KUBERNETES = "1.30"
PINNED = re.compile(r".+:[\w.-]*\d[\w.-]*$")  # a tag with a number in it
SECRETIVE = re.compile(r"password|secret|token|database_(connection_)?url|backend_store_uri", re.I)
POOL_TYPES = sorted(path.stem for path in (ROOT / POOLS_DIR).glob("*.json"))
DATABASE_URL = re.compile(r"://\w+:[^@\s]+@")


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


def test_compose_follows_the_specification(compose):
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(compose)


def test_services_are_pinned_restarted_and_watched(compose):
    for name, service in compose["services"].items():
        assert PINNED.match(service["image"]) and not service["image"].endswith("latest"), name
        once = service["restart"] == "no"
        assert once or ("healthcheck" in service and service["restart"] == "unless-stopped"), name


def test_services_wait_for_what_they_need_and_mount_what_exists(compose):
    for name, service in compose["services"].items():
        for needed, how in service.get("depends_on", {}).items():
            once = compose["services"][needed]["restart"] == "no"
            expected = "service_completed_successfully" if once else "service_healthy"
            assert how["condition"] == expected, (name, needed)
        for source in (volume.partition(":")[0] for volume in service.get("volumes", ())):
            assert source in compose["volumes"] or (INFRA / source).exists(), (name, source)
        assert set(service.get("secrets", ())) <= compose["secrets"].keys(), name
    assert compose["services"]["worker"]["shm_size"] and compose["services"]["worker"]["deploy"]["resources"]


def test_secrets_are_read_from_files_that_git_does_not_take(compose):
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRETIVE.search(variable):
                assert value.startswith("/run/secrets/"), (name, variable)
                assert value.removeprefix("/run/secrets/") in service["secrets"], (name, variable)
    for secret in compose["secrets"].values():
        path = INFRA / secret["file"]
        assert subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, check=False).returncode == 0
    for path in INFRA.rglob("*.*"):
        if path.is_file() and path.parent.name != "secrets":
            assert not DATABASE_URL.search(path.read_text()), path


def test_the_entry_point_turns_secret_files_into_variables(tmp_path):
    (tmp_path / "secret").write_text("postgresql://there\n")
    script = INFRA / "entrypoint.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    env = {"PATH": "/usr/bin:/bin", "FROM_FILE_ADDRESS": str(tmp_path / "secret")}
    said = subprocess.run([script, "printenv", "ADDRESS"], env=env, capture_output=True, text=True, check=True)
    assert said.stdout == "postgresql://there\n"
    env["FROM_FILE_ADDRESS"] = str(tmp_path / "gone")
    assert subprocess.run([script, "true"], env=env, capture_output=True, check=False).returncode


JOBSET = yaml.safe_load((INFRA / "kubernetes" / "jobset" / "student.yaml").read_text())
MANIFESTS = [
    document
    for path in sorted((INFRA / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
] + [  # of a JobSet there is no schema here, but of its jobs
    {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, "spec": job["template"]["spec"]}
    for job in JOBSET["spec"]["replicatedJobs"]
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: f"{m['kind']}-{m['metadata']['name']}")
def test_kubernetes_takes_the_manifest(manifest):
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    for container in pod_of(manifest).get("containers", ()):
        assert PINNED.match(container["image"])
        assert container["resources"]["requests"] and container["resources"]["limits"]
        assert manifest["kind"] == "Job" or {"readinessProbe", "livenessProbe"} <= container.keys()
        for variable in container.get("env", ()):
            assert "valueFrom" in variable or not SECRETIVE.search(variable["name"]), variable["name"]


def pod_of(manifest):
    return manifest.get("spec", {}).get("template", {}).get("spec", {})


def torchrun_arguments(script):
    """Return the options and the program of the torchrun in a shell script."""
    (command,) = re.findall(r"torchrun (.*?)(?= &?$)", script.replace("\\\n", " ") + " ", re.M)
    words = shlex.split(command)
    program = words.index("-m") + 1
    return dict(zip(words[: program - 1 : 2], words[1 : program - 1 : 2], strict=True)), words[program:]


def test_a_jobset_starts_a_torchrun_on_every_node():
    assert JOBSET["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert set(JOBSET["spec"]) <= {"failurePolicy", "network", "replicatedJobs", "successPolicy", "suspend"}
    (job,) = JOBSET["spec"]["replicatedJobs"]
    assert set(job) <= {"name", "replicas", "template"}
    spec, name = job["template"]["spec"], JOBSET["metadata"]["name"]
    assert (
        spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] and not spec["backoffLimit"]
    )
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    options, program = torchrun_arguments(container["args"][2])
    assert options["--nnodes"] == str(spec["completions"]) and program == ["flows.stage_runner.worker", "student"]
    assert options["--nproc-per-node"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    # Pods are named JOBSET-JOB-INDEX-POD; the first is where the others meet, and sorts first: it gets rank 0.
    assert options["--rdzv-endpoint"] == f"{name}-{job['name']}-0-0.{name}:{container['ports'][0]['containerPort']}"
    seconds = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert int(seconds["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert subprocess.run(["bash", "-n", "-c", container["args"][2]], check=False).returncode == 0


def test_the_slurm_script_starts_a_torchrun_on_every_node(tmp_path):
    script = INFRA / "slurm" / "stage.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    for name, body in {
        "scontrol": 'echo "$3" | tr , "\\n"',
        "srun": 'printf "%s\\n" "$*"',
        "dvc": 'printf "%s\\n" "dvc $*"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    slurm = {"SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "8", "SLURM_JOB_ID": "7"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm}
    said = subprocess.run(
        [script, "teacher"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    started, stored = said.stdout.splitlines()
    options, program = torchrun_arguments(started)
    assert options["--nnodes"] == "2" and options["--nproc-per-node"] == "8" and options["--rdzv-endpoint"] == "a:29500"
    assert program == ["flows.stage_runner.worker", "teacher"] and stored == "dvc commit --force teacher"
    assert re.search(r"^#SBATCH --ntasks-per-node=1$", script.read_text(), re.M)


@pytest.mark.parametrize("pool_type", POOL_TYPES)
def test_prefect_takes_the_template_of_every_type_of_pool(pool_type):
    from prefect.server.schemas.actions import WorkPoolCreate

    template = read_template(ROOT, pool_type)
    pool = WorkPoolCreate(name="gpu", type=pool_type, base_job_template=template)
    assert pool.base_job_template == template
    jsonschema.Draft202012Validator.check_schema(template["variables"])
    properties = template["variables"]["properties"]
    assert all(field.get("description") for field in properties.values())


def test_a_template_without_its_variable_is_noticed():
    from prefect.server.schemas.actions import WorkPoolCreate

    template = read_template(ROOT, "kubernetes")
    del template["variables"]["properties"]["gpus"]
    with pytest.raises(ValueError, match="gpus"):
        WorkPoolCreate(name="gpu", type="kubernetes", base_job_template=template)
    with pytest.raises(UserError, match=r"nomad\.json: no such file; there are templates for docker, kubernetes"):
        read_template(ROOT, "nomad")


def filled(pool_type, **variables):
    """Return a template's job configuration as a worker fills it, without what has no value."""
    from prefect.utilities.templating import apply_values

    template = read_template(ROOT, pool_type)
    given = {key: one["default"] for key, one in template["variables"]["properties"].items() if "default" in one}
    return apply_values(template["job_configuration"], {**given, **variables})


def test_kubernetes_takes_the_jobs_of_flow_runs():
    environment = [{"name": "PREFECT_API_URL", "value": "http://prefect:4200/api"}]  # the worker turns it into a list
    job = filled("kubernetes", env=environment, command=["prefect", "flow-run", "execute"], gpus=2)["job_manifest"]
    job["metadata"]["generateName"] = "run-"
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert pod["terminationGracePeriodSeconds"] >= 60, "a training saves its state"


def test_containers_of_flow_runs_have_gpus_shared_memory_and_secrets_as_files():
    configuration = filled("docker")
    made = configuration["container_create_kwargs"]
    assert made["device_requests"] == [{"driver": "nvidia", "count": 1, "capabilities": [["gpu"]]}]
    assert made["shm_size"] == "8g"
    assert "/etc/consistency/secrets:/run/secrets:ro" in configuration["volumes"]
    assert configuration["env"]["AWS_SHARED_CREDENTIALS_FILE"] == "/run/secrets/aws_credentials"


def test_workers_find_the_workspace_or_clone_it():
    assert in_folder(Path("/srv/cm"))[0]["prefect.deployments.steps.set_working_directory"] == {"directory": "/srv/cm"}
    (public,) = from_repository("git@host.example:owner/name.git", "main")
    assert public["prefect.deployments.steps.git_clone"] == {
        "repository": "git@host.example:owner/name.git",
        "branch": "main",
    }
    (private,) = from_repository("https://host.example/owner/name.git", "main")
    token = private["prefect.deployments.steps.git_clone"]["access_token"]
    assert token == "{{ prefect.blocks.secret.git-token }}", "by reference"


def test_the_server_starts_crashed_runs_again_and_only_those_that_a_worker_takes():
    silent, crashed = automations()
    assert silent.trigger.posture.value == "Proactive" and silent.actions[0].state.value == "CRASHED"
    assert crashed.trigger.match_related["prefect.resource.role"] == ["deployment"]
    assert crashed.actions[0].state.value == "SCHEDULED"


def test_the_image_holds_the_locked_versions_and_no_root(compose):
    text = (INFRA / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.\d+\.\d+-\S+$", text, re.M) and "requirements.lock" in text
    makefile = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert f"ARG TORCH={makefile}\n" in text
    assert text.rindex("USER cm") < text.index("ENTRYPOINT")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    ours = [one["image"] for one in compose["services"].values() if "build" in one]
    assert set(ours) == {f"consistency-pipeline:{version}"}
