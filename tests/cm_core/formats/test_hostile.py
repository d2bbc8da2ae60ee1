"""Files that would run code, exhaust the memory, or are damaged: each refused in one line, and nothing of it run."""

import io
import json
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


class View:
    """A tensor of any shape over the numbers of a storage, four if none is given."""

    def __init__(self, size, stride, offset=0, storage=None):
        self.view = storage or torch.zeros(4).storage(), offset, size, stride, False, {}

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.view


def refusal(path, hints=None):
    """Return the message with which a file is refused, one line that names it."""
    with pytest.raises(UnreadableCheckpoint) as refused:
        read_checkpoint(path, hints)
    text = str(refused.value)
    assert text.startswith(f"{path.name}: ") and "\n" not in text and len(text) < 400
    return text


def refused_in_little_memory(path, hints=None):
    """Return the message of a refusal for which Python takes a few MB at most."""
    tracemalloc.start()
    try:
        text = refusal(path, hints)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    return text


def doubled(value, times):
    """Return a list or tuple that holds twice what holds twice ... a value: small in memory, 2^times in a message."""
    for _ in range(times):
        value = type(value)([value, value])
    return value


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


def test_a_command_in_the_weights_of_diffusers_is_not_run(tmp_path):
    config = {
        **{"_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [32], "attn_norm_num_groups": 32},
        **{"down_block_types": ["ResnetDownsampleBlock2D"], "up_block_types": ["ResnetUpsampleBlock2D"]},
        **{"downsample_type": "resnet", "upsample_type": "resnet"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    torch.save({"conv_in.weight": Runs(tmp_path / "run")}, tmp_path / "diffusion_pytorch_model.bin")
    assert "PyTorch's restricted reader refuses it" in refusal(tmp_path) and not (tmp_path / "run").exists()


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
    refused_in_little_memory(written(tmp_path, HUGE[name]))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "view",
    [
        *[((10**6, 10**6), (0, 0)), ((4,), (1,), 1), ((2,), (-1,), 3), ((-1,), (1,)), ((2,), (1 << 40,))],
        *[((1 << 25,), ("ab",)), ((10**4000,) * 50, (0,) * 50), ((1,) * 10**5, (1,) * 10**5)],
        ((doubled([1], 20),), (1,)),
    ],
)
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path, view):
    with edm_modules():
        data = pickle.dumps({"ema": module_of("EDMPrecond", {"a": View(*view)})})
    assert "it has a tensor of " in refused_in_little_memory(written(tmp_path, data))


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


@pytest.mark.parametrize("name", ["resample_filter", "channel_mult", "model_channels", "model_type", "label_dim"])
def test_a_list_of_2_to_the_20_elements_in_60_is_never_written_out(tmp_path, name):
    data = edm_pickle({"map_layer0.weight": torch.zeros(32, 8)}, **{**TINY, name: doubled([1], 20)})
    assert "described by more than" in refused_in_little_memory(written(tmp_path, data))


def test_other_parts_of_a_description_are_bounded_too(tmp_path):
    tuples, lists = doubled((1,), 20), doubled([1], 20)
    layer = module_of("Layer", {"weight": torch.zeros(32, 8)})
    for model in (
        module_of(tuples, _init_kwargs=TINY),
        module_of("EDMPrecond", modules={"model": layer}, _init_kwargs=TINY, sigma_data=lists),
        module_of("ECMPrecond", modules={"model": layer}, _init_kwargs=TINY, sigma_data=0.5, sigma_min=lists),
    ):
        with edm_modules():
            data = pickle.dumps({"ema": model})
        assert "described by more than" in refused_in_little_memory(written(tmp_path, data))
    named = PROTO + pickle.dumps(lists, protocol=4)[2:-1] + b"\x94h\x00" + b"\x93" + STOP
    assert "names what is no text" in refused_in_little_memory(written(tmp_path, named))


def test_names_and_numbers_that_grow_when_they_are_read_are_refused(tmp_path):
    long = module_of("Layer")
    for _ in range(100):
        long = module_of("Layer", modules={"x" * 10**4: long})
    shared = {str(i): 0.5 for i in range(300)} | {"last": torch.zeros(2)}  # a dict that every layer has
    layers = module_of("Layer", modules={str(i): module_of("Layer", shared) for i in range(300)})
    for inner, reason in ((long, "a module's name has more than"), (layers, "or has several places")):
        with edm_modules():
            model = module_of("EDMPrecond", modules={"model": inner}, _init_kwargs=TINY, sigma_data=0.5)
            data = pickle.dumps({"ema": model})
        assert reason in refused_in_little_memory(written(tmp_path, data))
    lists = pickle.dumps(doubled([1], 20), protocol=4)[2:-1]
    dtype = PROTO + b"cnumpy\ndtype\n" + lists + b"\x85R" + b"(K\x01" + lists + b"tb"
    scalar = dtype + b"C\x010\x86q\xff0" + b"cnumpy._core.multiarray\nscalar\nh\xffR" + STOP
    assert "a number of no plain type" in refused_in_little_memory(written(tmp_path, scalar))


def test_a_dict_that_is_copied_again_and_again_is_refused(tmp_path):
    filled = b"}(" + b"".join(b"M" + struct.pack("<H", key) + b"N" for key in range(10**4)) + b"u"
    arguments, name = filled + b"\x85q\x000", b"ccollections\nOrderedDict\nq\x010"
    copies = PROTO + arguments + name + b"(" + b"h\x01h\x00R" * 100 + b"l" + STOP
    assert "takes 0 positional arguments" in refused_in_little_memory(written(tmp_path, copies))


def test_the_message_is_one_short_line_whatever_the_file_names(tmp_path):
    for name in ("a\nb\x1b[31m\u2028c", "x" * 10**5):
        with edm_modules():
            data = pickle.dumps({"ema": module_of(name, _init_kwargs=TINY)})
        assert refusal(written(tmp_path, data)).isprintable()
        assert refusal(written(tmp_path, edm_pickle({}, **{**TINY, name: 1}))).isprintable()
        whole = edm_pickle({f"model.{name}.weight": torch.zeros(32, 8)}, **TINY)
        assert refusal(written(tmp_path, whole)).isprintable()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    buffer, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(10**6).storage(), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with edm_modules():
        data = pickle.dumps({"ema": module_of("EDMPrecond", {"a": RunsInStorage(packed.getvalue())})})
    assert len(data) < 10**5 and "a storage is a zip" in refusal(written(tmp_path, data))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_that_share_a_storage_are_refused_before_they_are_copied(tmp_path):
    storage = torch.zeros(10**6, dtype=torch.int8).storage()
    with edm_modules():
        views = {f"qkv{i}.qkv.weight": View((999_999,), (1,), i % 2, storage) for i in range(3)}
        model = module_of("SongUNet", views)
        data = pickle.dumps({"ema": module_of("EDMPrecond", modules={"model": model}, _init_kwargs=TINY, sigma_data=1)})
    assert "its tensors share their numbers" in refusal(written(tmp_path, data))


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
