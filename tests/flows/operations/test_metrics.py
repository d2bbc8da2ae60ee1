"""Metrics for Prometheus: of real servers with real runs, by the password alone, and those that the dashboards draw."""

import json
import re
import socket
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from flows.errors import UserError
from flows.operations import metrics, metrics_server
from flows.operations.metrics import Metrics
from flows.operations.metrics_server import DiskWatch, serving
from flows.tracking.gpu_usage import ENERGY, GPU_HOURS
from flows.tracking.person import USER
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import Tracker
from miniature import REPOSITORY, make_workspace
from processes import wait_until
from s3_states import NAME, URI, Worker
from servers import client, shared_s3

METRIC = re.compile(r"\bcm_\w+")
s3 = shared_s3("states")


def values(text: bytes | str) -> dict[tuple, float]:
    """Return {(name, label values by the labels' order in the alphabet): value} of the samples."""
    families = text_string_to_metric_families(text.decode() if isinstance(text, bytes) else text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def speeds(found):
    return {(key[3], key[1]): value for key, value in found.items() if key[0] == "cm_images_per_second"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "CM_STATE", "CM_METRICS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(metrics, "read_gpus", lambda: iter([(0.5, 1 << 30, 80 << 30, None)]))
    return make_workspace(tmp_path)


def test_runs_of_mlflow_are_counted_once(root):
    """The stages of a run, its GPU-hours by person, the speed of a running training, the last success."""
    tracker = Tracker(root)
    with PipelineRun(tracker, "before", {"recipe": "old seed=3"}, {}):
        pass
    observer = Metrics(root, prefect=False, tracker=tracker)
    before = values(observer.text())
    assert before["cm_last_success_timestamp_seconds", "old"] > 1e9
    with pytest.raises(KeyError), PipelineRun(tracker, "two", {"recipe": "two", USER: "ada"}, {}) as parent:
        with StageRun(root, "teacher", parent.run_id, lambda: {"recipe": "two"}) as stage:
            stage.metrics({"images_per_s": 250.0}, 1)
            wait_until(lambda: speeds(values(observer.text())))
            during = values(observer.text())
            assert speeds(during) == {("teacher", "two"): 250.0}
            known = (("cm_gpu_hours_total", "two", "ada"), ("cm_runs_total", "two", "failed"))
            assert [during.get(key) for key in known] == [0, 0]
        tracker.log_numbers(stage._run_id, {GPU_HOURS: 2.0, ENERGY: 1.5})
        raise KeyError
    for _ in range(2):
        after = values(observer.text())
        assert after["cm_stage_seconds_count", "two", "teacher", "finished"] == 1
        assert (after["cm_runs_total", "two", "failed"], after["cm_runs_total", "old", "finished"]) == (1, 1)
        assert (after["cm_gpu_hours_total", "two", "ada"], after["cm_energy_kwh_total", "two", "ada"]) == (2.0, 1.5)
        assert ("cm_last_success_timestamp_seconds", "two") not in after
        assert not speeds(after), "it trains no more"
    assert after["cm_gpu_utilization_ratio", "0"] == 0.5 and after["cm_gpu_memory_bytes", "0"] == 80 << 30
    assert ("cm_gpu_power_watts", "0") not in after, "the card does not measure it"
    assert after["cm_disk_free_bytes", "cache"] > 0


def test_the_first_failure_of_a_recipe_is_an_increase(root):
    """Prometheus sees an increase only of what was there before: what rules count of recipes begins at 0."""
    recipes = root / "params" / "recipes"
    recipes.mkdir()
    for name in ("one", "two"):
        (recipes / f"{name}.yaml").touch()
    tracker = Tracker(root)
    observer = Metrics(root, prefect=False, tracker=tracker)
    rules = (REPOSITORY / "infra" / "monitoring" / "rules.yml").read_text()
    counted = re.findall(r'increase\((\w+)\{status="(\w+)"\}', rules)
    assert counted == [("cm_runs_total", "failed")] and rules.count("increase(") == len(counted)
    before = values(observer.text())
    assert [before[name, recipe, status] for name, status in counted for recipe in ("one", "two")] == [0, 0]
    with pytest.raises(KeyError), PipelineRun(tracker, "one", {"recipe": "one"}, {}):
        raise KeyError
    assert values(observer.text())["cm_runs_total", "one", "failed"] == 1


def test_a_rule_notices_that_nobody_answers_prometheus():
    """Of metrics that are gone no other rule fires."""
    monitoring = REPOSITORY / "infra" / "monitoring"
    (job,) = yaml.safe_load((monitoring / "prometheus.yml").read_text())["scrape_configs"]
    (group,) = yaml.safe_load((monitoring / "rules.yml").read_text())["groups"]
    assert f'up{{job="{job["job_name"]}"}} == 0' in [rule["expr"] for rule in group["rules"]]


def test_a_source_that_does_not_answer_is_named_and_the_others_are_read(root, caplog):
    tracker = Tracker(root)
    observer = Metrics(root, prefect=False, tracker=tracker)
    assert values(observer.text())["cm_source_up", "mlflow"] == 1
    tracker.experiment_id = None  # a search that MLflow refuses
    tracker.client._tracking_client.store.engine.dispose()
    (root / "mlflow.db").write_bytes(b"no database")
    found = values(observer.text())
    assert (found["cm_source_up", "mlflow"], found["cm_source_up", "machine"]) == (0, 1)
    assert "no answer from mlflow" in caplog.text


def test_the_password_is_asked_for_also_on_the_loopback(root, monkeypatch):
    monkeypatch.setenv(metrics_server.CREDENTIALS, "cm:secret")
    observer = Metrics(root, prefect=False, tracker=None)
    with serving(observer, "127.0.0.1", 0) as url, client() as asked:
        assert [asked.get(url).status_code, asked.get(url, auth=("cm", "guess")).status_code] == [401, 401]
        answer = asked.get(url, auth=("cm", "secret"))
        assert answer.status_code == 200 and "cm_disk_free_bytes" in answer.text
        assert asked.get(url.replace("/metrics", "/"), auth=("cm", "secret")).status_code == 404
        port = int(url.rpartition(":")[2].partition("/")[0])
        with pytest.raises(UserError, match="Address already in use"), serving(observer, "127.0.0.1", port):
            pass
    monkeypatch.setenv("CM_METRICS_PASSWORD", "for Prometheus")
    with serving(observer, "127.0.0.1", 0) as url, client() as asked:
        codes = [asked.get(url, auth=("cm", password)).status_code for password in ("secret", "for Prometheus")]
        assert codes == [401, 200], "who reads metrics need not have what opens the server"
    for name in (metrics_server.CREDENTIALS, "CM_METRICS_PASSWORD"):
        monkeypatch.delenv(name)
    with (
        pytest.raises(UserError, match="neither CM_METRICS_PASSWORD nor PREFECT_API_AUTH_STRING is set"),
        serving(observer, "0.0.0.0", 0),
    ):
        pass


def test_a_client_that_says_nothing_is_hung_up_on(root, monkeypatch):
    """Before the password: anybody who reaches the port could otherwise take a thread for each connection."""
    monkeypatch.setenv(metrics_server.CREDENTIALS, "cm:secret")
    assert 0 < metrics_server._Quiet.timeout <= 60
    monkeypatch.setattr(metrics_server._Quiet, "timeout", 0.1)
    with serving(Metrics(root, prefect=False, tracker=None), "127.0.0.1", 0) as url:
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=60) as silent:
            assert silent.recv(1) == b"", "the server hangs up"


def test_runs_of_others_in_the_experiment_are_passed_over(root):
    """Anybody may log to MLflow; one such run must not silence all metrics."""
    tracker = Tracker(root)
    observer = Metrics(root, prefect=False, tracker=tracker)
    client, foreign = tracker.client, tracker.client.create_run(tracker.experiment_id).info.run_id
    client.log_metric(foreign, "images_per_s", 1.0)
    assert values(observer.text())["cm_source_up", "mlflow"] == 1
    client.set_terminated(foreign)
    found = values(observer.text())
    assert not [key for key in found if key[0].startswith(("cm_stage_seconds", "cm_runs_total", "cm_images"))]


def test_a_disk_that_gets_full_is_reported_once(root, monkeypatch):
    told = []
    monkeypatch.setattr("prefect.events.emit_event", lambda *event, **more: told.append((*event, more)))
    monkeypatch.setattr(metrics_server, "LOOK_EVERY", 0.0)
    monkeypatch.setenv("CM_DISK_LOW", str(1 << 30))  # GiB: no disk has so many
    watch = DiskWatch(root)
    watch.look(), watch.look()
    assert [event[0] for event in told] == ["cm.disk.low"] * 3, "workspace, cache and states"
    monkeypatch.setenv("CM_DISK_LOW", "1")
    watch.look()
    monkeypatch.setenv("CM_DISK_LOW", str(1 << 30))
    watch.look()
    assert len(told) == 6 and socket.gethostname() in told[0][1]["prefect.resource.name"]


def exported() -> set[str]:
    """Return the names of all samples that the endpoint can have."""
    families = Metrics(REPOSITORY, prefect=False, tracker=None).registry.collect()
    ends = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",), "gauge": ("",)}
    return {f"{family.name}{end}" for family in families for end in ends[family.type]}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "infra" / "monitoring").glob("*.*")), ids=lambda path: path.name)
def test_what_dashboards_and_rules_name_is_exported(path):
    named = set(METRIC.findall(path.read_text()))
    assert named <= exported(), named - exported()
    if path.suffix == ".json":
        panels = json.loads(path.read_text())["panels"]
        assert len(named) >= 10 and all(panel["targets"] for panel in panels if panel["type"] != "row")


def test_the_documentation_lists_what_is_exported():
    families = {re.sub("_(bucket|count|sum)$", "", name) for name in exported()}
    assert set(METRIC.findall((REPOSITORY / "docs" / "monitoring.md").read_text())) - {"cm_core"} == families


@pytest.mark.slow
def test_leases_of_trainings_age_by_the_stores_clock(root, s3, monkeypatch):
    monkeypatch.setenv("CM_STATE", URI)
    observer = Metrics(root, prefect=False, tracker=None)
    with Worker(root).hold():
        found = values(observer.text())
        assert 0 <= found["cm_lease_age_seconds", "training", NAME] < 60
    assert not [key for key in values(observer.text()) if key[0] == "cm_lease_age_seconds"]
