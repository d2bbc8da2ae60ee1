"""Compiled kernels are found by the next worker; a store that does not answer costs one line."""

import importlib
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from flows.checkpoints.store import KERNELS_VARIABLE, share_kernels
from servers import free_port, point_aws_at, shared_s3

s3 = shared_s3("states")


@pytest.fixture
def key(tmp_path):
    """A key of this test alone, as Triton makes one for each kernel."""
    return tmp_path.name


@pytest.fixture
def shared(s3, monkeypatch, tmp_path):
    """The environment that a training with its checkpoints in a bucket gives Triton."""
    for name in (KERNELS_VARIABLE, "TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER", "TRITON_REMOTE_CACHE_BACKEND"):
        monkeypatch.setenv(name, "")  # so that what is set now is undone
        del os.environ[name]
    monkeypatch.setenv("CM_STATE", "s3://states/in flight")
    share_kernels(tmp_path)


@pytest.fixture
def backend(shared, monkeypatch):
    """The class that Triton is told of; only its base comes from Triton, which machines without a GPU lack."""
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", SimpleNamespace(RemoteCacheBackend=object))
    monkeypatch.delitem(sys.modules, "flows.checkpoints.kernel_cache", raising=False)
    module, _, name = os.environ["TRITON_REMOTE_CACHE_BACKEND"].partition(":")
    yield getattr(importlib.import_module(module), name)
    sys.modules.pop(module)


def test_what_one_worker_compiled_another_finds(backend, key, monkeypatch, tmp_path):
    backend(key).put("kernel.cubin", b"code")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another"))
    assert backend(key).get(["kernel.cubin", "kernel.ptx"]) == {"kernel.cubin": b"code"}
    assert backend("XYZ").get(["kernel.cubin"]) == {}


def test_what_lies_here_is_not_asked_for(backend, key, s3, tmp_path):
    folder = tmp_path / ".cm" / "states" / "compiled" / "shared" / key
    folder.mkdir(parents=True)
    (folder / "kernel.cubin").write_bytes(b"ours")
    s3.put_object(Bucket="states", Key=f"in flight/compiled/{key}/kernel.cubin", Body=b"theirs")
    assert backend(key).get(["kernel.cubin"]) == {"kernel.cubin": b"ours"}


def test_the_first_of_two_writers_is_kept(backend, key, s3):
    for code in (b"first", b"second"):
        backend(key).put("kernel.cubin", code)
    stored = s3.get_object(Bucket="states", Key=f"in flight/compiled/{key}/kernel.cubin")
    assert stored["Body"].read() == b"first"


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_asked_once(backend, key, monkeypatch, capsys):
    point_aws_at(monkeypatch, f"http://127.0.0.1:{free_port()}")
    for _ in range(2):
        backend(key).put("kernel.cubin", b"code")
        assert backend(key).get(["kernel.cubin"]) == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compiled kernels are not shared by this training: s3://states/in flight/compiled/{key}/")


def test_without_a_bucket_triton_is_told_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv("CM_STATE", raising=False)
    before = dict(os.environ)
    share_kernels(tmp_path)
    assert dict(os.environ) == before


@pytest.mark.slow
def test_triton_compiles_a_kernel_once_for_all(shared, s3, tmp_path):
    pytest.importorskip("triton")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cm_core.networks.kernels.layout import _sum_columns

    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32", "columns": "i32"}
    tile = {"height": 64, "width": 16}
    source = ASTSource(_sum_columns, signature | dict.fromkeys(tile, "constexpr"), tile)
    target = GPUTarget("cuda", 90, 32)  # no GPU is needed to compile for one
    made = compile(source, target=target).asm["cubin"]
    stored = {entry["Key"] for entry in s3.list_objects_v2(Bucket="states")["Contents"]}
    shutil.rmtree(tmp_path / ".cm")
    assert compile(source, target=target).asm["cubin"] == made
    assert {entry["Key"] for entry in s3.list_objects_v2(Bucket="states")["Contents"]} == stored
    assert any(key.endswith("_sum_columns.cubin") for key in stored)
