"""A store for the tests of checkpoints, faults between it and its workers, and workers."""

import pytest

from fault_proxy import (
    fault_proxy,
)
from flows.checkpoints import s3_store, store
from s3_states import URI, Worker
from servers import point_aws_at, shared_s3

server = shared_s3("states")
LEASE = 3600.0


@pytest.fixture
def s3(server, monkeypatch):
    """An empty bucket, states in it, no long waits, and leases that end only where a test says so."""
    for entry in server.list_objects_v2(Bucket="states").get("Contents", ()):
        server.delete_object(Bucket="states", Key=entry["Key"])
    monkeypatch.setenv("CM_STATE", URI)
    monkeypatch.setattr(s3_store, "PATIENCE", (0.05,))
    monkeypatch.setattr(s3_store, "LEASE_SECONDS", LEASE)
    monkeypatch.setattr(store, "RETRY_EVERY", 0.1)
    return server


@pytest.fixture
def proxy(s3, monkeypatch):
    with fault_proxy(s3.meta.endpoint_url) as proxy:
        point_aws_at(monkeypatch, proxy.url)
        yield proxy


@pytest.fixture
def workers(tmp_path):
    return [Worker(tmp_path / name) for name in "ab"]
