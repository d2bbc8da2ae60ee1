"""`cm up` and what it rests on: ports, databases, devices, turns, and its end, whoever brings it about."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from types import SimpleNamespace

import psutil
import pytest

from flows.distributed.devices import devices_for, hold_devices, refuse_unusable_gpus, visible_devices
from flows.errors import RunEnding, UserError
from flows.operations import service_environment, services, stop_flag
from flows.operations.process_trees import end_trees, still_runs
from flows.recipes.recipe import load_recipe, write_active
from flows.workspace.dvc_files import load_yaml, read_stages
from live import Up, cm, environment, make_live_workspace
from miniature import REPOSITORY
from processes import WAIT, command_line, wait_until
from servers import client, http_server


@pytest.mark.parametrize(
    ("recipe", "idle"), [("digits-cd", {"base"}), ("digits-ct", {"teacher", "base"}), ("digits-tcm", set())]
)
def test_every_stage_says_what_it_needs_and_one_that_a_recipe_lacks_needs_no_gpu(tmp_path, recipe, idle):
    entries = load_yaml(REPOSITORY / "dvc.yaml")["stages"]
    assert all(entry["meta"]["needs"] in ("cpu", "gpu") for entry in entries.values())
    shutil.copyfile(REPOSITORY / "dvc.yaml", tmp_path / "dvc.yaml")
    write_active(load_recipe(recipe, root=REPOSITORY), tmp_path)
    needs = {name: stage.needs for name, stage in read_stages(tmp_path).items()}
    assert {name for name, need in needs.items() if need == "cpu"} == {"prepare", *idle}


def test_devices_are_those_that_the_environment_shows(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-8a")
    assert visible_devices() == ["2", "GPU-8a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_devices() == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: a (UUID: x)'\necho 'GPU 1: b (UUID: y)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_devices() == ["0", "1"]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [("1,0", ["1", "0"]), ("-1", []), ("1,-1,0", ["1"]), ("GPU-8a", ["GPU-8a"]), ("MIG-1", ["MIG-1"])]
    + [(odd, None) for odd in ("abc", "2", "0,0", "0,,1", "GPU-zz")],
)
def test_a_device_that_cuda_would_not_find_is_refused(monkeypatch, tmp_path, given, chosen):
    listing = "GPU 0: a (UUID: GPU-8a1)\n  MIG 1g.10gb Device 0: (UUID: MIG-1f)\nGPU 1: b (UUID: GPU-9b2)\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    if chosen is None:
        with pytest.raises(
            UserError, match=f"^CUDA_VISIBLE_DEVICES={given}: .* is no GPU, .*there are 0, 1 and GPU-8a1"
        ):
            visible_devices()
    else:
        assert visible_devices() == chosen


def test_a_stage_waits_for_a_gpu_of_its_machine_alone(monkeypatch):
    """Where there is none, on the CPU: a slot of the server's limit stands for another machine's GPU."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.orchestration.gpu_slots import takes_slot

    stages = read_stages(REPOSITORY)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        for devices, waiting in (("0", {"features", "teacher", "student", "sample", "edit", "evaluate"}), ("", set())):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
            assert {name for name, stage in stages.items() if takes_slot(stage)} == waiting
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with temporary_settings({PREFECT_API_URL: None}):
        assert not takes_slot(stages["student"]), "no server, no limit"


def unwanted():
    raise AssertionError("a device was free")


def test_a_device_is_held_by_one_alone(tmp_path):
    waits = []
    with hold_devices(tmp_path, ["0", "1"], 1, unwanted, lambda: False) as first:
        with hold_devices(tmp_path, ["0", "1"], 1, unwanted, lambda: False) as second:
            assert [first, second] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
            with hold_devices(tmp_path, ["0", "1"], 1, lambda: waits.append(1), lambda: True) as third:
                assert third == {} and waits == [1], "the run ends before its turn"
        with hold_devices(tmp_path, ["0", "1"], 1, unwanted, lambda: False) as again:
            assert again == second
    with hold_devices(tmp_path, [], 1, unwanted, lambda: False) as none:
        assert none == {}


def test_devices_are_held_together_or_not_at_all(tmp_path):
    with hold_devices(tmp_path, ["0", "1", "2"], 2, print, lambda: False) as pair:
        assert pair == {"CUDA_VISIBLE_DEVICES": "0,1"}
        with hold_devices(tmp_path, ["0", "1", "2"], 2, bool, lambda: True) as late:
            assert late == {}, "one device is not enough"
            with hold_devices(tmp_path, ["0", "1", "2"], 1, print, lambda: False) as single:
                assert single == {"CUDA_VISIBLE_DEVICES": "2"}, "who waits for two holds none"


@pytest.mark.parametrize(
    "value, complaint",
    [
        ("two", "must be a number of devices, 1 or more"),
        ("0", "must be a number of devices, 1 or more"),
        ("3", "there are 2 GPUs"),
    ],
)
def test_a_number_of_devices_that_cannot_be_is_refused(monkeypatch, value, complaint):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("CM_DEVICES", value)
    with pytest.raises(UserError, match=rf"CM_DEVICES={value}: {complaint}"):
        devices_for("teacher")
    assert devices_for("evaluate") == 1


def test_a_device_comes_back_when_its_holder_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from flows.distributed.devices import hold_devices\n"
        "with hold_devices(Path(sys.argv[1]), ['0'], 1, print, bool): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, env=environment(REPOSITORY), stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with holder:
        with hold_devices(tmp_path, ["0"], 1, holder.kill, lambda: False) as held:
            assert held == {"CUDA_VISIBLE_DEVICES": "0"}
        assert holder.wait() == -signal.SIGKILL, "it was waited for"


@pytest.mark.slow
def test_a_stage_waits_for_its_slot_while_the_server_or_its_database_is_away(monkeypatch, caplog):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from flows.orchestration import gpu_slots

    monkeypatch.setattr(gpu_slots, "LOOK_EVERY", 0.02)
    path, lease = "/api/v2/concurrency_limits/increment-with-lease", uuid.uuid4()
    answers, run = {path: (500, {}, b"{}")}, SimpleNamespace(ending=False)
    stage = read_stages(REPOSITORY)["student"]

    def come_back():
        wait_until(lambda: asked.count(path) >= 3, every=0.01)
        body = json.dumps({"lease_id": str(lease), "limits": [{"id": str(uuid.uuid4()), "name": "gpu", "limit": 1}]})
        answers[path] = (200, {"Content-Type": "application/json"}, body.encode())

    with (
        http_server(answers) as (url, asked),
        temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True) as client,
    ):
        threading.Thread(target=come_back).start()
        with caplog.at_level("INFO", logger="flows.orchestration.gpu_slots"):
            assert gpu_slots._take_slots(client, stage, 1, run) == lease
    assert caplog.messages == ["student: waits for a slot of the limit `gpu`"]
    with temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        with get_client(sync_client=True) as client:  # nobody listens there any more
            assert gpu_slots._ask_for_slots(client, stage, 1) is None


@pytest.mark.slow
def test_a_stage_does_not_wait_for_a_server_that_fails_each_time(monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from flows.errors import StageFailed
    from flows.orchestration import gpu_slots

    monkeypatch.setattr(gpu_slots, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(gpu_slots, "BROKEN_AFTER", 0.5)
    path, run = "/api/v2/concurrency_limits/increment-with-lease", SimpleNamespace(ending=False)
    answers = {path: (500, {}, b"{}")}
    stage = read_stages(REPOSITORY)["student"]
    with (
        http_server(answers) as (url, asked),
        temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True) as client,
    ):
        with pytest.raises(StageFailed, match=r"^student: .* answered 500 .*a slot of the limit `gpu`; its log"):
            gpu_slots._take_slots(client, stage, 1, run)
        assert len(asked) > 1
        answers[path] = (423, {"Retry-After": "0"}, b"{}")  # taken by others: no fault, however long it lasts
        deadline = threading.Timer(1.5, lambda: setattr(run, "ending", True))
        deadline.start()
        with pytest.raises(RunEnding):
            gpu_slots._take_slots(client, stage, 1, run)
        deadline.join()


def test_a_gpu_that_pytorch_cannot_use_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("The driver is\ntoo old")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError, match=r"^GPU 1: PyTorch \S+ cannot use it: The driver is too old; .*the CPU$"):
        refuse_unusable_gpus()
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        refuse_unusable_gpus()


def test_a_stage_is_not_computed_on_the_cpu_beside_a_gpu(tmp_path):
    """The stage itself refuses, with this machine's PyTorch that has no CUDA."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("PyTorch has a GPU here")
    for name in ("dvc.yaml", "params", "flows", "cm_core"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    command = [sys.executable, "-m", "flows.cli", "stage", "teacher"]
    env = environment(tmp_path, CUDA_VISIBLE_DEVICES="0")
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "cm: GPU 0: PyTorch" in ended.stderr, ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_port_is_kept_for_its_server_and_refused_by_its_option_where_one_listens():
    """Whoever asks for any port, or for this one, does not get it before the server has started."""
    with services._reserve(0, "--mlflow-port") as kept, socket.socket() as stranger:
        port = kept.getsockname()[1]
        with pytest.raises(OSError, match="Address already in use"):
            stranger.bind((services.HOST, port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((services.HOST, port))
        with socket.create_server((services.HOST, port)):  # sets SO_REUSEADDR
            socket.create_connection((services.HOST, port)).close()
            with pytest.raises(UserError, match=rf"--mlflow-port {port}: Address already in use; choose another"):
                services._reserve(port, "--mlflow-port")


def test_both_servers_share_a_database_but_no_table(tmp_path):
    prefect, mlflow = service_environment.database_urls(tmp_path, "postgresql://me:p%40ss@db.example:5433/cm")
    assert prefect == "postgresql+asyncpg://me:p%40ss@db.example:5433/cm"
    assert mlflow == "postgresql+psycopg2://me:p%40ss@db.example:5433/cm?options=-csearch_path%3Dmlflow"
    prefect, mlflow = service_environment.database_urls(tmp_path, None)
    assert mlflow == f"sqlite:///{tmp_path}/mlflow.db", "what `mlflow ui` and runs without a server use"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "not an address; expected postgresql://"),
        ("mysql://me:secret@db/cm", r"mysql://me:\*\*\*@db/cm: expected postgresql://"),
        ("postgresql://me:secret@db/cm?sslmode=require", "expected postgresql://user:password@host:port/name"),
        ("postgresql://me:secret@127.0.0.1:1/cm", r"me:\*\*\*@127.0.0.1:1/cm: .*refused"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_without_its_password(url, says):
    with pytest.raises(UserError, match=says) as refused:
        service_environment.prepare_database(url)
    assert "secret" not in str(refused.value)


def test_nothing_leaves_the_machine_and_no_secret_stands_in_a_command_line(tmp_path):
    at = service_environment.Services("http://127.0.0.1:4200", "http://127.0.0.1:5000")
    database = "postgresql://me:secret@db/cm"
    variables = service_environment.client_variables(tmp_path, at) | service_environment.server_variables(
        tmp_path, at, database
    )
    assert variables["DO_NOT_TRACK"] == "true", "MLflow takes no other word"
    assert variables["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false" and variables["DVC_NO_ANALYTICS"] == "1"
    assert variables["PREFECT_SERVER_UI_API_URL"] == "http://127.0.0.1:4200/api"
    for command in services._server_commands(tmp_path, at).values():
        assert "secret" not in " ".join(command)
    assert "127.0.0.1" in services._server_commands(tmp_path, at)["mlflow"]


def test_prefect_forgets_runs_only_when_told(tmp_path, monkeypatch):
    from prefect.settings.models.server.services import ServerServicesDBVacuumSettings

    def vacuum():
        """Return what Prefect's server makes of its environment."""
        at = service_environment.Services("http://127.0.0.1:4200", "http://127.0.0.1:5000")
        for name, value in service_environment.server_variables(tmp_path, at, None).items():
            monkeypatch.setenv(name, value)
        return ServerServicesDBVacuumSettings()

    assert "flow_runs" not in vacuum().enabled_vacuum_types
    monkeypatch.setenv("CM_KEEP_RUNS", "30")
    told = vacuum()
    assert told.enabled_vacuum_types == {"events", "flow_runs", "orphans"} and told.retention_period.days == 30


def test_without_services_there_is_nothing_to_stop_to_show_or_to_use(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert not services.down(tmp_path) and services.running(tmp_path) is None
    services.use_running(tmp_path)
    assert "PREFECT_API_URL" not in os.environ


@pytest.fixture
def leftover(tmp_path):
    """A workspace whose `cm up` was killed, and the child that it left."""
    at = service_environment.Services("http://127.0.0.1:1", "http://127.0.0.1:2")
    logs = services.folder_of(tmp_path) / "logs"
    logs.mkdir(parents=True)
    child = services.Child("prefect", ["http.server", "0"], cwd=tmp_path, env=os.environ, logs=logs)
    services._write_note(tmp_path, at, [child])
    yield tmp_path, child
    end_trees([child.pid], 1)


def test_what_a_killed_up_has_left_the_next_one_ends(leftover):
    root, child = leftover
    assert services.running(root) is None, "nobody holds the lock"
    with services._hold(root), pytest.raises(services.ServiceEnded, match=r"prefect ended with code"):
        child.check()
    assert not (services.folder_of(root) / "services.json").exists()


def test_a_second_up_says_in_one_line_where_the_first_is(leftover):
    root, _ = leftover
    note = services._note_file(root).read_text()
    with services._hold(root):
        services._note_file(root).write_text(note)
        with pytest.raises(UserError, match=r"run already: Prefect http://127.0.0.1:1, MLflow http://127.0.0.1:2"):
            with services._hold(root):
                pass


def test_a_log_is_kept_for_one_more_start(tmp_path):
    for _ in range(2):
        child = services.Child("x", ["platform"], cwd=tmp_path, env=os.environ, logs=tmp_path)
        wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)  # noqa: B023
    with pytest.raises(services.ServiceEnded, match=r"x ended with code 0; the end of .*x\.log:\nLinux"):
        child.check()
    assert (tmp_path / "x.log.1").read_text() == (tmp_path / "x.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("up", "--prefect-port", "70000"), "'70000' is not a port"),
        (("up", "--database", "nonsense", "--prefect-port", "0", "--mlflow-port", "0"), "--database: not an address"),
        (("deploy", "--gpus", "1"), "PREFECT_API_URL is not set"),
        (("deploy", "--gpus", "0"), "'0' is not a whole number above 0"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, arguments, says):
    root = make_live_workspace(tmp_path / "workspace")
    ended = cm(root, *arguments)
    assert ended.returncode == 2 and says in ended.stderr and ended.stderr.count("\n") == 1


def test_servers_take_no_settings_of_another_server(tmp_path, monkeypatch):
    theirs = {"MLFLOW_STATIC_PREFIX": "/x", "PREFECT_SERVER_API_BASE_PATH": "/x", "PREFECT_UI_SERVE_BASE": "/x"}
    started = {}

    class Recorded:
        def __init__(self, name, command, *, env, **_):
            started[name], self.name, self.pid, self.log = env, name, os.getpid(), tmp_path

    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(services, "Child", Recorded)
    monkeypatch.setattr(services, "answering", lambda _: {"prefect": True})
    at = service_environment.Services("http://127.0.0.1:1", "http://127.0.0.1:2", metrics="http://127.0.0.1:3")
    with stop_flag.stop_signal() as stop:
        services._Children(tmp_path, at, print).start_servers(None, stop)
    assert set(started) == {"prefect", "mlflow"}
    for env in started.values():
        assert not set(theirs) & set(env) and env["MLFLOW_BACKEND_STORE_URI"].endswith("mlflow.db")


slow = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_live_workspace(tmp_path_factory.mktemp("up") / "workspace")


@pytest.fixture
def begin_up(root):
    """Start `cm up`; what a failed test leaves running is stopped."""
    begun = []

    def begin():
        begun.append(Up(root))
        return begun[-1]

    yield begin
    for up in begun:
        if up.process.poll() is None:
            up.stop()


@slow
def test_up_status_down_and_up_again(root, begin_up):
    up = begin_up()
    status = cm(root, "status", "--json")
    assert status.returncode == 0 and '"running": true' in status.stdout
    (experiment,) = re.findall(rf"{up.note['mlflow']}/#/experiments/(\w+)/runs", up.welcome)
    page = f"{up.note['mlflow']}/api/2.0/mlflow/experiments/get?experiment_id={experiment}"
    assert client().get(page).json()["experiment"]["name"] == "consistency-models", "no run has made it yet"
    second = cm(root, "up")
    assert second.returncode == 2 and second.stderr.count("\n") == 1 and up.note["prefect"] in second.stderr
    pools = {pool["name"]: pool["type"] for pool in up.post("/work_pools/filter")}
    assert pools == {"gpu": "process"}
    limit = up.get("/v2/concurrency_limits/gpu")
    assert (limit["limit"], limit["active"]) == (max(1, len(visible_devices())), True)
    deployed = up.get("/deployments/name/consistency/tiny")
    assert deployed["schedules"] == [] and deployed["tags"] == ["digits", "cd", "gpu"]
    nightly = {"schedule": {"cron": "0 2 * * *"}, "active": True}
    up.api.post(f"/deployments/{deployed['id']}/schedules", json=[nightly]).raise_for_status()
    up.api.patch(f"/deployments/{deployed['id']}", json={"tags": [*deployed["tags"], "mine"]}).raise_for_status()
    scheduled = {"state": {"type": {"any_": ["SCHEDULED"]}}}
    wait_until(lambda: up.post("/flow_runs/count", flow_runs=scheduled) > 0)
    for connection in psutil.net_connections("tcp"):
        if connection.pid in {child.pid for child in up.children} and connection.status == psutil.CONN_LISTEN:
            assert connection.laddr.ip == "127.0.0.1"
    assert cm(root, "down").stdout == "stopped\n"
    assert up.process.wait(WAIT) == 0
    assert not [child for child in up.children if still_runs(child)]
    assert cm(root, "status").returncode == 1

    again = begin_up()
    found = again.get("/deployments/name/consistency/tiny")
    assert found["id"] == deployed["id"]
    assert [one["schedule"]["cron"] for one in found["schedules"]] == ["0 2 * * *"], "what a user has made stays"
    assert found["tags"] == ["digits", "cd", "gpu", "mine"]
    worker = next(child for child in again.children if "worker" in command_line(child))
    worker.send_signal(signal.SIGKILL)
    assert again.process.wait(WAIT) == 1
    said = again.errors()
    assert said.startswith("cm: worker-gpu ended with code -9; the end of ") and "worker-gpu.log:" in said
    wait_until(lambda: not [child for child in again.children if still_runs(child)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_whatever_it_interrupts(monkeypatch, number):
    """Here it comes while the flag waits, where a threading.Event would hold a lock."""
    monkeypatch.setattr(stop_flag.time, "sleep", lambda _: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with stop_flag.stop_signal() as stop:
        assert not stop.is_set()
        assert stop.wait(60) and stop.is_set()
    assert signal.getsignal(number) is before
