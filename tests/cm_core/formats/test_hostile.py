"""Files that would run code, exhaust the memory, or are damaged: each refused in one line, and nothing of it run."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from cm_core.formats.base import Hints, UnreadableCheckpoint
from cm_core.formats.read import read_checkpoint
from foreign_checkpoints import edm_modules, edm_pickle, module_of

PROTO, STOP = b"\x80\x04", b"."
TINY = {
    "img_resolution": 8,
    "img_channels": 1,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


class Runs:
    """Runs a command when it is unpickled by Python's own reader."""

    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


class RunsInStorage:
    """A storage as EDM's pickles have them, bytes that are a pickle of their own."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


def refusal(path, hints=None):
    """Return the message with which a file is refused, one line that names it."""
    with pytest.raises(UnreadableCheckpoint) as refused:
        read_checkpoint(path, hints)
    text = str(refused.value)
    assert text.startswith(f"{path.name}: ") and "\n" not in text and len(text) < 400
    return text


def written(folder, data, name="model.pkl"):
    (folder / name).write_bytes(data)
    return folder / name


def test_a_command_in_a_pickle_is_not_run_and_is_named(tmp_path):
    marker = tmp_path / "run"
    data = pickle.dumps({"ema": Runs(marker)})
    assert "names 'posix.system', which is neither a tensor nor a plain value" in refusal(written(tmp_path, data))
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists(), "Python's own reader runs it"


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_command_is_not_run_in_any_protocol(tmp_path, protocol):
    data = pickle.dumps({"ema": Runs(tmp_path / "run")}, protocol=protocol)
    assert "'posix.system'" in refusal(written(tmp_path, data)) and not (tmp_path / "run").exists()


def test_a_command_in_the_pickle_of_a_storage_is_not_run(tmp_path):
    with edm_modules():
        inner = io.BytesIO()
        torch.save(Runs(tmp_path / "run"), inner, _use_new_zipfile_serialization=False)
        data = pickle.dumps({"ema": module_of("EDMPrecond", {"a": RunsInStorage(inner.getvalue())})})
    text = refusal(written(tmp_path, data))
    assert "PyTorch's restricted reader refuses it" in text and "posix.system" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_command_in_a_state_dict_is_not_run(tmp_path, as_zip):
    path = tmp_path / "cd.pt"
    torch.save({"time_embed.0.weight": Runs(tmp_path / "run")}, path, _use_new_zipfile_serialization=as_zip)
    text = refusal(path, Hints("skip"))
    assert ("posix.system" in text) == as_zip and not (tmp_path / "run").exists()


def test_calls_by_other_instructions_are_refused(tmp_path):
    old_style = b"cos\nsystem\n(S'touch run'\ntR."
    by_instruction = b"(S'touch run'\nios\nsystem\n."
    attributes = PROTO + b"cbuiltins\ngetattr\n."
    registry = PROTO + b"\x82\x01."  # EXT1: an extension by number
    called = PROTO + b"]" + b"(t" + b"R."  # calls a list
    state_of_a_name = PROTO + b"ccollections\nOrderedDict\n" + b"}" + b"b."
    for data in (old_style, by_instruction, attributes, registry, called, state_of_a_name):
        refusal(written(tmp_path, PROTO + data.removeprefix(PROTO)))


def test_truncated_files_are_refused_at_every_length(tmp_path):
    whole = edm_pickle({"map_layer0.weight": torch.zeros(32, 8)}, **TINY)
    assert "its network differs" in refusal(written(tmp_path, whole))
    for length in range(0, len(whole), 7):
        refusal(written(tmp_path, whole[:length]))
    path = tmp_path / "cd.pt"
    torch.save({"time_embed.0.weight": torch.zeros(500)}, path)
    data = path.read_bytes()
    for length in range(4, len(data), 97):
        refusal(written(tmp_path, data[:length], "cd.pt"), Hints("skip"))


HUGE = {
    "bytes": PROTO + b"\x8e" + struct.pack("<Q", 1 << 60) + b"abc" + STOP,
    "text": PROTO + b"\x8d" + struct.pack("<Q", 1 << 60) + b"abc" + STOP,
    "number": PROTO + b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"1" + STOP,
    "memo": PROTO + b"N" + b"r" + struct.pack("<I", (1 << 32) - 1) + STOP,
}


@pytest.mark.parametrize("name", HUGE)
def test_sizes_that_the_file_does_not_have_take_no_memory(tmp_path, name):
    tracemalloc.start()
    refusal(written(tmp_path, HUGE[name]))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


class View:
    """A tensor of any shape over four numbers."""

    def __init__(self, size, stride, offset=0):
        self.view = offset, size, stride, False, {}

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (torch.zeros(4).storage(), *self.view)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "view", [((10**6, 10**6), (0, 0)), ((4,), (1,), 1), ((2,), (-1,), 3), ((-1,), (1,)), ((2,), (1 << 40,))]
)
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path, view):
    with edm_modules():
        data = pickle.dumps({"ema": module_of("EDMPrecond", {"a": View(*view)})})
    assert "it has a tensor of shape" in refusal(written(tmp_path, data))


def test_cyclic_and_shared_modules_are_refused(tmp_path):
    itself = module_of("EDMPrecond", _init_kwargs=TINY, sigma_data=0.5)
    itself.meta["state"]["_modules"] |= {
        "model": module_of("Layer", modules={"again": itself.meta["state"]["_modules"]})
    }
    with edm_modules():
        cyclic = pickle.dumps({"ema": itself})
    assert "its module model.again is none" in refusal(written(tmp_path, cyclic))
    shared = module_of("Layer")
    for _ in range(40):  # 2^40 paths through 40 modules
        shared = module_of("Layer", modules={"a": shared, "b": shared})
    with edm_modules():
        bomb = pickle.dumps(
            {"ema": module_of("EDMPrecond", modules={"model": shared}, _init_kwargs=TINY, sigma_data=0.5)}
        )
    assert "has several places" in refusal(written(tmp_path, bomb))


def test_deep_nesting_is_refused(tmp_path):
    refusal(written(tmp_path, PROTO + b"]" * 10**5 + b"a" * (10**5 - 1) + STOP))
    deep_key = PROTO + b"}" + b")" + b"\x85" * 10**5 + b"Ns" + STOP  # hashing a tuple of so many levels ends Python
    assert "key of type tuple" in refusal(written(tmp_path, deep_key))


def test_a_zip_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"time_embed.0.weight": torch.zeros(10**6)}, path)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    refusal(packed, Hints("skip"))


def test_a_malformed_model_is_refused_in_one_line(tmp_path):
    with edm_modules():
        for ema in (None, 3, module_of("EDMPrecond"), module_of("EDMPrecond", _init_kwargs=[]), {"a": 1}):
            refusal(written(tmp_path, pickle.dumps({"ema": ema})))
    for change in (
        {"model_channels": 10**9},
        {"channel_mult": "1"},
        {"num_blocks": -1},
        {"num_blocks": 10**9},
        {"extra": 1},
        {"dropout": {}},
    ):
        refusal(written(tmp_path, edm_pickle({}, **{**TINY, **change})))
    refusal(written(tmp_path, b"{}", "diffusion_pytorch_model.safetensors"))
    refusal(Path(tmp_path))
