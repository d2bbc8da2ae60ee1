"""S3-compatible stores that want to be asked otherwise: one setting of AWS serves states, DVC, MLflow and `cm gc`."""

import hashlib
import json
import os
import subprocess
import sys
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest

from fault_proxy import error, fault_proxy
from flows.environment import adopt
from flows.storage.bucket import Bucket
from live import environment, make_live_workspace
from servers import aws_variables, shared_s3

DOMAIN = "store.example"
NEW_HEADERS = ("x-amz-checksum-", "x-amz-sdk-checksum-", "x-amz-trailer")
client = shared_s3("team")


def knows_no_new_headers(exchange):
    """Be MinIO of 2021."""
    sent = {name.lower() for name in exchange.sent}
    if any(name.startswith(NEW_HEADERS) for name in sent):
        error(400, "InvalidArgument")(exchange)
    elif exchange.path.endswith("?delete") and "content-md5" not in sent:
        error(400, "MissingContentMD5")(exchange)
    else:
        exchange.forward()


def lies_below_a_path(exchange):
    if exchange.path.startswith("/store/"):
        exchange.path = exchange.path.removeprefix("/store")
        exchange.forward()
    else:
        error(404, "NoSuchBucket")(exchange)


def has_a_host_for_each_bucket(exchange):
    """Be a store behind an HTTP proxy, which also spares the tests a domain name."""
    address = urlsplit(exchange.path)
    bucket, dot, domain = (address.hostname or "").partition(".")
    if dot and domain == DOMAIN:
        exchange.path = f"/{bucket}{address.path}?{address.query}"
        exchange.unheard = {"host"}
        exchange.forward()
    else:
        error(400, "InvalidRequest")(exchange)


STORES = {
    "no new headers": (knows_no_new_headers, {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}),
    "below a path": (lies_below_a_path, {}),
    "virtual hosts": (has_a_host_for_each_bucket, {}),
}


@pytest.fixture(params=STORES)
def store(request, client, monkeypatch, tmp_path):
    """Point AWS_* at such a store; yield the proxy that plays it."""
    behaviour, variables = STORES[request.param]
    with fault_proxy(client.meta.endpoint_url) as proxy:
        proxy.strike(behaviour)
        endpoint = proxy.url + "/store" * (behaviour is lies_below_a_path)
        if behaviour is has_a_host_for_each_bucket:
            (tmp_path / "config").write_text("[default]\ns3 =\n    addressing_style = virtual\n")
            endpoint = f"http://{DOMAIN}"
            variables = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "HTTP_PROXY": proxy.url, "http_proxy": proxy.url}
        for name, value in {"AWS_ENDPOINT_URL": endpoint, **variables}.items():
            monkeypatch.setenv(name, value)
        with patch.dict(os.environ):
            adopt()
            yield proxy


def test_a_bucket_is_written_read_listed_and_cleaned(store, tmp_path):
    bucket, large = Bucket(f"s3://team/{tmp_path.name}"), tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 2**15 + b"and a second part")
    etag = bucket.write("head", b"one", replacing=None)
    assert bucket.write("head", b"two", replacing=None) is None and bucket.write("head", b"two", replacing=etag)
    bucket.upload(large, "large")
    bucket.download("large", tmp_path / "back", hashlib.sha256(large.read_bytes()).hexdigest())
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    bucket.move("large", "moved")
    assert sorted(entry.key for entry in bucket.entries()) == ["head", "moved"]
    bucket.remove(["head", "moved"])
    assert not list(bucket.entries()) and store.seen


@pytest.mark.slow
def test_doctor_reaches_it_by_every_client(store, tmp_path):
    """Doctor writes, reads and removes as the clients of states, DVC and MLflow do."""
    root = make_live_workspace(tmp_path / "workspace")
    (root / ".dvc" / "config.local").write_text(
        "[core]\n    remote = team\n['remote \"team\"']\n    url = s3://team/dvc\n"
    )
    env = environment(root, **aws_variables(), CM_STATE="s3://team/states", NO_PROXY="")
    create = (
        "import mlflow, sys\n"
        "mlflow.MlflowClient(sys.argv[1]).create_experiment('consistency-models', 's3://team/mlflow')\n"
    )
    subprocess.run([sys.executable, "-c", create, f"sqlite:///{root / 'mlflow.db'}"], env=env, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "doctor", "--json"], cwd=root, env=env, capture_output=True
    )
    found = {check["name"]: (check["ok"], check["says"]) for check in json.loads(done.stdout)["checks"]}
    for name, place in {
        "DVC remote": "dvc/files/md5",
        "MLflow artifacts": "mlflow",
        "training states": "states",
    }.items():
        assert found[name][0] and found[name][1].startswith(f"s3://team/{place}, written, read and removed"), found[
            name
        ]
