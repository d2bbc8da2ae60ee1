"""Compiled kernels are found by the next worker, only if signed; a store that does not answer costs one line."""

import importlib
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from flows.checkpoints.store import share_kernels
from flows.errors import UserError
from servers import free_port, point_aws_at, shared_s3

s3 = shared_s3("kernels")


@pytest.fixture
def key(tmp_path):
    """A key of this test alone, as Triton makes one for each kernel."""
    return tmp_path.name


@pytest.fixture
def shared(s3, monkeypatch, tmp_path):
    """The environment that a training gives Triton where kernels are shared."""
    for name in ("TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER", "TRITON_REMOTE_CACHE_BACKEND"):
        monkeypatch.setenv(name, "")  # so that what is set now is undone
        del os.environ[name]
    (tmp_path / "signing").write_bytes(os.urandom(32))
    monkeypatch.setenv("CM_KERNELS", "s3://kernels/of ours")
    monkeypatch.setenv("CM_KERNELS_KEY", str(tmp_path / "signing"))
    share_kernels(tmp_path)


@pytest.fixture
def backend(shared, monkeypatch):
    """The class that Triton is told of; only its base comes from Triton, which machines without a GPU lack."""
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", SimpleNamespace(RemoteCacheBackend=object))
    monkeypatch.delitem(sys.modules, "flows.checkpoints.kernel_cache", raising=False)
    module, _, name = os.environ["TRITON_REMOTE_CACHE_BACKEND"].partition(":")
    found = getattr(importlib.import_module(module), name)
    found._given_up.clear()
    yield found
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
    s3.put_object(Bucket="kernels", Key=f"of ours/{key}/kernel.cubin", Body=b"theirs")
    assert backend(key).get(["kernel.cubin"]) == {"kernel.cubin": b"ours"}


def test_the_first_of_two_writers_is_kept(backend, key, s3):
    for code in (b"first", b"second"):
        backend(key).put("kernel.cubin", code)
    stored = s3.get_object(Bucket="kernels", Key=f"of ours/{key}/kernel.cubin")
    assert stored["Body"].read()[32:] == b"first"


@pytest.mark.parametrize("forgery", ["unsigned", "of another key", "of another file", "altered", "short"])
def test_what_was_not_signed_for_its_place_is_not_loaded(backend, key, s3, monkeypatch, tmp_path, capsys, forgery):
    backend(key).put("kernel.so", b"ours")
    place = {"Bucket": "kernels", "Key": f"of ours/{key}/kernel.so"}
    ours = s3.get_object(**place)["Body"].read()
    if forgery == "of another key":
        (tmp_path / "other").write_bytes(bytes(32))
        with monkeypatch.context() as patch:
            patch.setenv("CM_KERNELS_KEY", str(tmp_path / "other"))
            s3.delete_object(**place)
            backend(key).put("kernel.so", b"evil")
    elif forgery == "of another file":
        backend(key).put("other.so", b"old")
        body = s3.get_object(Bucket="kernels", Key=f"of ours/{key}/other.so")["Body"].read()
        s3.put_object(**place, Body=body)
    else:
        body = {"unsigned": b"evil" * 20, "altered": ours[:-1] + b"!", "short": b"evil"}[forgery]
        s3.put_object(**place, Body=body)
    assert backend(key).get(["kernel.so"]) == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{key}/kernel.so: not signed with the key of CM_KERNELS_KEY")


@pytest.mark.parametrize("value", [None, "key", "/nowhere/key", "/dev/null"])
def test_kernels_are_not_shared_without_a_key(monkeypatch, tmp_path, value):
    monkeypatch.setenv("CM_KERNELS", "s3://kernels/of ours")
    monkeypatch.setenv("CM_KERNELS_KEY", value or "")
    with pytest.raises(UserError, match="CM_KERNELS_KEY"):
        share_kernels(tmp_path)


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_asked_once(backend, key, monkeypatch, capsys):
    point_aws_at(monkeypatch, f"http://127.0.0.1:{free_port()}")
    for _ in range(2):
        backend(key).put("kernel.cubin", b"code")
        assert backend(key).get(["kernel.cubin"]) == {}
    for verb, line in zip(("stored", "fetched"), capsys.readouterr().err.splitlines(), strict=True):
        assert line.startswith(f"compiled kernels are not {verb} by this training: s3://kernels/of ours/{key}/")


@pytest.mark.parametrize("state", ["", "s3://states/in flight"])
def test_unless_asked_for_triton_is_told_nothing(monkeypatch, tmp_path, state):
    monkeypatch.setenv("CM_STATE", state)
    monkeypatch.delenv("CM_KERNELS", raising=False)
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
    stored = {entry["Key"] for entry in s3.list_objects_v2(Bucket="kernels")["Contents"]}
    shutil.rmtree(tmp_path / ".cm")
    assert compile(source, target=target).asm["cubin"] == made
    assert {entry["Key"] for entry in s3.list_objects_v2(Bucket="kernels")["Contents"]} == stored
    assert any(key.endswith("_sum_columns.cubin") for key in stored)
