"""The files of infra/ against the schemas of Compose, Kubernetes and Prefect, and against this repository."""

import inspect
import json
import re
import shlex
import shutil
import stat
import subprocess
from fnmatch import fnmatch
from importlib.resources import files
from ipaddress import ip_address, ip_network
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from docker.models.containers import _create_container_args

from flows.errors import UserError
from flows.operations.deploy import POOLS_DIR, automations, from_repository, in_folder, read_template

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
KUBERNETES = "1.30"
PINNED = re.compile(r".+:[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?$")  # a tag with a number in it
SECRETIVE = re.compile(r"password|secret|token|auth_string|database_(connection_)?url|backend_store_uri", re.I)
NAMES_A_SECRET = re.compile(r"_SECRET_(NAME|KEY)$")
POOL_TYPES = sorted(path.stem for path in (ROOT / POOLS_DIR).glob("*.json"))
DATABASE_URL = re.compile(r"://\w+:[^@\s]+@")


@pytest.fixture(scope="module")
def compose():
    """The file without GPUs' override, variables at their defaults."""
    return yaml.safe_load(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", (INFRA / "compose.yaml").read_text()))


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
    listed = subprocess.run(["git", "ls-files", "infra"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "infra/compose.yaml" in listed.stdout.splitlines()
    for name in listed.stdout.splitlines():
        assert not DATABASE_URL.search((ROOT / name).read_text()), name


def test_secrets_are_made_once_in_a_folder_of_the_owner_alone(compose, tmp_path):
    shutil.copy(INFRA / "make-secrets.sh", tmp_path)
    (tmp_path / "secrets").mkdir(mode=0o755)  # as git checks it out
    subprocess.run([tmp_path / "make-secrets.sh"], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    named = {Path(secret["file"]).name for secret in compose["secrets"].values()}
    others = {"s3_root_password", "s3_worker_password", "s3_mlflow_password"}  # parts of s3_identities
    assert named | others == made.keys() and not named & others
    assert made["s3_worker_password"] in made["aws_credentials_worker"] and "=worker" in made["aws_credentials_worker"]
    assert f":{made['postgres_password']}@" in made["mlflow_database_url"]
    assert len(set(made.values())) == len(made) and all(len(text) >= 48 for text in made.values())
    assert all((made[name] in made["s3_identities"]) for name in others)
    subprocess.run([tmp_path / "make-secrets.sh"], check=True)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made


def test_both_servers_ask_for_a_password_and_their_clients_have_it(compose):
    prefect, mlflow = compose["services"]["prefect"]["environment"], compose["services"]["mlflow"]
    assert prefect["FROM_FILE_PREFECT_SERVER_API_AUTH_STRING"] == "/run/secrets/prefect_login"
    assert "*" not in prefect["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    assert prefect["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    assert "--app-name=basic-auth" in mlflow["command"]
    for name in ("deploy", "worker", "metrics"):
        environment = compose["services"][name]["environment"]
        assert environment["FROM_FILE_PREFECT_API_AUTH_STRING"] == "/run/secrets/prefect_login"
        assert name == "deploy" or environment["FROM_FILE_MLFLOW_TRACKING_PASSWORD"]
    pods = {one["metadata"]["name"]: pod_of(one)["containers"] for one in MANIFESTS if pod_of(one).get("containers")}
    given = {name: {variable["name"] for variable in pods[name][0]["env"]} for name in pods}
    assert {"PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_CSRF_PROTECTION_ENABLED"} <= given["prefect"]
    assert "PREFECT_API_AUTH_STRING" in given["worker"] & given["deploy"] & given["metrics"]
    assert "MLFLOW_AUTH_ADMIN_PASSWORD" in given["mlflow"] and "--app-name=basic-auth" in pods["mlflow"][0]["args"]


@pytest.mark.parametrize("user, buckets", [("worker", {"dvc", "states"}), ("mlflow", {"mlflow"})])
def test_users_of_the_store_reach_their_own_buckets_alone(compose, tmp_path, user, buckets):
    def holders(secret):
        return {name for name, one in compose["services"].items() if secret in one.get("secrets", ())}

    assert holders("aws_credentials_root") == {"buckets"} and holders("s3_identities") == {"s3"}, "no worker has them"
    shutil.copy(INFRA / "make-secrets.sh", tmp_path)
    (tmp_path / "secrets").mkdir()
    subprocess.run([tmp_path / "make-secrets.sh"], check=True)
    identities = json.loads((tmp_path / "secrets" / "s3_identities").read_text())["identities"]
    (own,) = [one for one in identities if one["name"] == user]
    assert set(own["actions"]) == {f"{action}:{name}" for action in ("Read", "Write", "List") for name in buckets}
    (key,) = own["credentials"]
    credentials = (tmp_path / "secrets" / f"aws_credentials_{user}").read_text()
    assert f"={key['accessKey']}\n" in credentials and f"={key['secretKey']}\n" in credentials
    policy = json.loads((INFRA / "s3-policies" / f"{user}.json").read_text())  # the same for other stores
    for statement in policy["Statement"]:
        assert {
            resource.removeprefix("arn:aws:s3:::").removesuffix("/*") for resource in statement["Resource"]
        } == buckets
        assert all(
            action != "s3:*" and "Bucket" not in action.replace("ListBucket", "") for action in statement["Action"]
        )


def test_the_server_in_a_container_knows_how_long_runs_are_kept():
    """By our own entry, which turns CM_KEEP_RUNS into Prefect's settings."""
    variables = (INFRA / "compose.yaml").read_text()
    assert re.search(r"^ +CM_KEEP_RUNS: \$\{CM_KEEP_RUNS:-\}", variables, re.M), "empty by default"
    service = yaml.safe_load(variables)["services"]["prefect"]
    (pod,) = (pod_of(one) for one in MANIFESTS if one["metadata"]["name"] == "prefect" and pod_of(one))
    (container,) = pod["containers"]
    assert container["args"] == service["command"] == ["python", "-m", "flows.operations.prefect_server"]
    assert {"name": "CM_KEEP_RUNS", "value": ""} in container["env"] and "CM_KEEP_RUNS" in service["environment"]


def test_every_bucket_that_is_made_is_used_and_shared(compose):
    made = set(re.findall(r"'(\w+)'", compose["services"]["buckets"]["command"][2].partition("for name in")[2]))
    worker, mlflow = (compose["services"][name] for name in ("worker", "mlflow"))
    used = {worker["environment"]["DVC_REMOTE_URL"], worker["environment"]["CM_STATE"]}
    used |= {word.partition("=")[2] for word in mlflow["command"] if word.startswith("--artifacts-destination=")}
    assert used == {f"s3://{name}" for name in made} and len(made) == 3
    environment = filled("docker")["env"]
    assert {environment["DVC_REMOTE_URL"], environment["CM_STATE"]} <= used
    for path in (INFRA / "kubernetes").rglob("*.yaml"):
        assert "s3://" not in path.read_text(), "names of buckets are the store's, not ours to choose"


@pytest.mark.parametrize(
    "path",
    ["infra/secrets/s3_root_password", ".env", "deploy/.env.local", ".venv/bin/python", "mlflow.db", "mlflow.db-wal"]
    + [".git/config", ".cm/prefect-login", ".dvc/config.local", ".dvc/cache/files/md5/0", "flows/__pycache__/a.pyc"],
)
def test_what_is_secret_or_left_by_runs_stays_out_of_the_image(path):
    assert is_ignored(path)


def test_what_git_tracks_is_in_the_image():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    left_out = [path for path in [*tracked.splitlines(), ".git/HEAD", ".git/objects/00"] if is_ignored(path)]
    assert not left_out, "a run would record it as deleted"


def is_ignored(path):
    """Whether .dockerignore leaves a path out: a pattern matches it or a folder above it."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    if f"!{path}" in patterns:
        return False
    for place in [path, *map(str, Path(path).parents)][:-1]:
        name = Path(place).name
        for pattern in patterns:
            if fnmatch(name if pattern.startswith("**/") else place, pattern.removeprefix("**/")):
                return True
    return False


def test_the_entry_point_turns_secret_files_into_variables(tmp_path):
    (tmp_path / "secret").write_text("postgresql://there\n")
    script = INFRA / "entrypoint.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    env = {"PATH": "/usr/bin:/bin", "FROM_FILE_ADDRESS": str(tmp_path / "secret")}
    said = subprocess.run([script, "printenv", "ADDRESS"], env=env, capture_output=True, text=True, check=True)
    assert said.stdout == "postgresql://there\n"
    env["FROM_FILE_ADDRESS"] = str(tmp_path / "gone")
    assert subprocess.run([script, "true"], env=env, capture_output=True, check=False).returncode


def test_the_entry_point_gives_dvc_the_remote_that_workers_share(tmp_path):
    from flows.workspace.locations import remote_address, shared_remote

    for name in ("infra", ".dvc"):
        (tmp_path / name).mkdir()
    shutil.copy(INFRA / "entrypoint.sh", tmp_path / "infra")
    shutil.copy(ROOT / ".dvc" / "config", tmp_path / ".dvc")
    for variables, remote in (({}, None), ({"DVC_REMOTE_URL": "s3://dvc"}, "s3://dvc")):
        env = {"PATH": "/usr/bin:/bin", **variables}
        subprocess.run([tmp_path / "infra" / "entrypoint.sh", "true"], env=env, check=True)
        assert shared_remote(tmp_path) == remote
    assert remote_address(tmp_path) == "s3://dvc"


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
        assert manifest["kind"] == "Job" or {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
        for variable in container.get("env", ()):
            secretive = SECRETIVE.search(variable["name"]) and not NAMES_A_SECRET.search(variable["name"])
            assert "valueFrom" in variable or not secretive, variable["name"]


def test_pods_keep_to_what_the_namespace_enforces():
    """What the level `restricted` of Kubernetes' pod security asks for, and no service account but the worker's."""
    namespace = MANIFESTS[[one["kind"] for one in MANIFESTS].index("Namespace")]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = {one["metadata"]["name"]: pod_of(one) for one in MANIFESTS if pod_of(one).get("containers")}
    pods["run"] = filled("kubernetes")["job_manifest"]["spec"]["template"]["spec"]
    assert pods.keys() == {"prefect", "mlflow", "worker", "deploy", "metrics", "node", "run"}
    for name, pod in pods.items():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (1000, 1000, 1000), name
        assert pod["enableServiceLinks"] is False, "MLflow would take the service's MLFLOW_PORT=tcp://... for its port"
        assert (pod.get("automountServiceAccountToken") is False) == (name != "worker"), name
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name


def test_kubernetes_worker_watches_its_namespace_and_hides_the_password():
    (container,) = next(pod_of(one) for one in MANIFESTS if one["metadata"]["name"] == "worker" and pod_of(one))[
        "containers"
    ]
    given = {
        variable["name"].removeprefix("PREFECT_INTEGRATIONS_KUBERNETES_"): variable for variable in container["env"]
    }
    assert given["OBSERVER_NAMESPACES"]["value"] == "consistency"
    login = given["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"]
    assert given["WORKER_API_AUTH_STRING_SECRET_NAME"]["value"] == login["name"]
    assert given["WORKER_API_AUTH_STRING_SECRET_KEY"]["value"] == login["key"]


def test_network_policies_close_the_namespace_and_name_labels_that_pods_have():
    policies = {one["metadata"]["name"]: one["spec"] for one in MANIFESTS if one["kind"] == "NetworkPolicy"}
    assert policies["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    labels = {one["spec"]["template"]["metadata"]["labels"]["app"] for one in MANIFESTS if one["kind"] == "Deployment"}
    labels |= {filled("kubernetes")["job_manifest"]["spec"]["template"]["metadata"]["labels"]["app"]}
    labels |= {JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["metadata"]["labels"]["app"]}
    named = set(re.findall(r"app: (\w+)", (INFRA / "kubernetes" / "network.yaml").read_text()))
    named |= {
        label
        for spec in policies.values()
        for one in spec["podSelector"].get("matchExpressions", ())
        for label in one["values"]
    }
    assert named <= labels and labels - named == {"worker"}
    open_to = {name: policies[name]["ingress"][0] for name in ("servers", "metrics")}
    ports = {port["port"] for one in open_to.values() for port in one["ports"]}
    assert ports == {port["port"] for one in MANIFESTS if one["kind"] == "Service" for port in one["spec"]["ports"]}


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        *((one, False) for one in ("169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200")),
        *((one, False) for one in ("fd00:ec2::254", "fd00:ec2::23")),  # the same by IPv6
        *((one, True) for one in ("93.184.215.14", "10.96.0.10", "169.254.20.10")),  # outside, a service, a node's DNS
        ("2606:2800:21f:cb07::1", True),
    ],
)
def test_runs_reach_all_but_the_clouds_metadata(address, allowed):
    (rule,) = next(one for one in MANIFESTS if one["metadata"]["name"] == "runs")["spec"]["egress"]
    assert "ports" not in rule, "DNS by UDP and TCP"
    there, blocks = ip_address(address), [peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer]
    open_to = [
        block
        for block in blocks
        if there in ip_network(block["cidr"]) and not any(there in ip_network(one) for one in block["except"])
    ]
    assert bool(open_to) == allowed
    assert {"namespaceSelector": {}} in rule["to"], "to some plugins a pod is in no block of addresses"


def test_prometheus_finds_the_metrics_and_its_password_opens_nothing_else(compose):
    """The server's password lets a worker run any command; what asks for metrics has another."""
    (job,) = yaml.safe_load((INFRA / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    service = compose["services"]["metrics"]
    (target,) = job["static_configs"][0]["targets"]
    assert service["ports"] == [f"{target}:{target.rpartition(':')[2]}"] and job["basic_auth"]["username"] == "cm"
    secret = Path(service["environment"]["FROM_FILE_CM_METRICS_PASSWORD"]).name
    assert Path(job["basic_auth"]["password_file"]).name == secret.replace("_", "-")
    assert {name for name, one in compose["services"].items() if secret in one.get("secrets", ())} == {"metrics"}
    (pod,) = (pod_of(one) for one in MANIFESTS if one["metadata"]["name"] == "metrics" and pod_of(one))
    (container,) = pod["containers"]
    (password,) = (one["valueFrom"] for one in container["env"] if one["name"] == "CM_METRICS_PASSWORD")
    assert password["secretKeyRef"]["name"] == "metrics" and container["args"] == service["command"]


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
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}, {"secretRef": {"name": "mlflow-client"}}]
    seconds = int(filled("kubernetes")["env"]["CM_GRACE"])
    assert pod["terminationGracePeriodSeconds"] > 3 * seconds, "a training saves its state"


def test_a_container_that_its_worker_ends_has_the_time_that_is_promised():
    """Docker's client takes no other time for a container, so the promise must fit into what Prefect's worker gives."""
    from prefect.workers.base import BaseWorker

    given = inspect.signature(BaseWorker.kill_infrastructure).parameters["grace_seconds"].default
    assert 0 < 3 * int(filled("docker")["env"]["CM_GRACE"]) < given
    with pytest.raises(TypeError, match="stop_timeout"):  # should this pass one day, let the pool ask for more
        _create_container_args({"version": "1.41", "image": "x", "stop_timeout": 120})


@pytest.mark.parametrize("pool_type", ["docker", "kubernetes"])
def test_a_container_of_a_flow_run_is_stopped_as_one_of_a_worker(pool_type):
    assert filled(pool_type)["env"] and read_template(ROOT, pool_type)["variables"]["properties"]["command"][
        "default"
    ].startswith("python -m flows.operations.worker prefect flow-run execute")


def test_containers_of_a_host_share_the_locks_of_its_gpus(compose):
    """Docker gives whoever asks for one GPU the first; all of them, and a lock, give each stage another."""
    configuration = filled("docker")
    made = configuration["container_create_kwargs"]
    assert made["device_requests"] == [{"driver": "nvidia", "count": -1, "capabilities": [["gpu"]]}]
    worker = compose["services"]["worker"]
    (devices,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert devices["count"] == "all"
    folder = "/opt/consistency/.cm/devices"  # of gpu_slots, in the image's workspace
    assert f"devices:{folder}" in worker["volumes"] and f"consistency_devices:{folder}" in configuration["volumes"]
    assert f" {folder}" in (INFRA / "Dockerfile").read_text(), "a volume takes its owner from the folder it covers"


def test_containers_of_flow_runs_have_shared_memory_and_secrets_as_files():
    configuration = filled("docker")
    assert configuration["container_create_kwargs"]["shm_size"] == "8g"
    assert "/etc/consistency/secrets:/run/secrets:ro" in configuration["volumes"]
    assert configuration["env"]["AWS_SHARED_CREDENTIALS_FILE"] == "/run/secrets/aws_credentials_worker"


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
    assert f"\n{makefile} " in (ROOT / "requirements-cuda.lock").read_text()
    locks = set(re.findall(r"--require-hashes --requirement (\S+?);? ", text))
    assert locks == {f"requirements{name}.lock" for name in ("", "-cuda", "-integrations")}, "no tools for tests"
    assert text.rindex("USER cm") < text.index("ENTRYPOINT")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    ours = [one["image"] for one in compose["services"].values() if "build" in one]
    assert set(ours) == {f"consistency-pipeline:{version}"}
