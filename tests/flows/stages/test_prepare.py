"""Stage prepare: from every source to the same arrays, and one clear line for what cannot be prepared."""

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from flows.data.dataset import load_dataset
from flows.monitor import Monitor
from flows.stages.prepare import Data, prepare
from image_sources import (
    colours,
    encoded,
    prepared,
    refused,
    two_classes,
    write_tar,
    write_tree,
    write_zip,
)
from servers import http_server, s3_server

# --- the section ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, shape",
    [
        ({}, (1, 8, 8)),
        ({"source": {"kind": "cifar10"}}, (3, 32, 32)),
        ({"source": {"kind": "cifar10"}, "channels": "grey", "resolution": 16, "resize": "stretch"}, (1, 16, 16)),
        ({"source": {"kind": "images", "path": "x"}, "channels": "rgb", "resolution": 64}, (3, 64, 64)),
        ({"source": {"kind": "images", "path": "x"}, "resolution": 64}, None),
        ({"source": {"kind": "images", "path": "x"}, "channels": "rgb"}, None),
    ],
)
def test_the_shape_known_beforehand(fields, shape):
    assert Data.model_validate(fields).image_shape() == shape


@pytest.mark.parametrize(
    "fields, part",
    [
        ({"resize": "pad"}, "data.resize=pad needs data.resolution"),
        ({"resolution": 16}, "data.resolution=16: digits has 8x8 pixels"),
        ({"heldout_fraction": 1.0}, "heldout_fraction"),
        ({"source": {"kind": "cifar10", "md5": "123"}}, "md5"),
    ],
)
def test_impossible_sections_are_refused_before_work(fields, part):
    with pytest.raises(ValidationError, match=part):
        Data.model_validate(fields)


# --- digits --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("digits")
    prepare(Data(), out_dir, Monitor())
    return out_dir


def test_digits(digits_dir):
    from sklearn.datasets import load_digits

    dataset = load_dataset(digits_dir)
    assert dataset.image_shape == (1, 8, 8)
    assert dataset.num_classes == 10
    assert dataset.class_names == tuple("0123456789")
    assert dataset.train_images.dtype == np.uint8
    assert dataset.train_labels.dtype == np.int64
    assert isinstance(dataset.train_images, np.memmap)
    together = np.concatenate([dataset.train_images, dataset.heldout_images])
    wanted = np.floor(load_digits().images * 255 / 16 + 0.5)
    assert sorted(map(bytes, together)) == sorted(map(bytes, wanted.astype(np.uint8)))
    facts = json.loads((digits_dir / "dataset.json").read_text())
    assert facts["counts"]["train"] + facts["counts"]["heldout"] == 1797
    assert facts["counts"]["greyscale"] == 1797
    assert "CC BY 4.0" in facts["licence"]


def test_digits_are_held_out_class_by_class(digits_dir):
    dataset = load_dataset(digits_dir)
    train, heldout = np.bincount(dataset.train_labels), np.bincount(dataset.heldout_labels)
    np.testing.assert_array_equal(heldout, np.round((train + heldout) * 0.25))


def test_two_runs_give_the_same_bytes(tmp_path, digits_dir):
    prepare(Data(), tmp_path, Monitor())
    names = ["dataset.json", "preview.png", "report.json", "report.html", "extremes.png"]
    names += [f"{split}_{part}.npy" for split in ("train", "heldout") for part in ("images", "labels")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / name).read_bytes() == (digits_dir / name).read_bytes(), name


def test_checksums_are_of_the_pixels(digits_dir):
    dataset = load_dataset(digits_dir)
    for split, images in (("train", dataset.train_images), ("heldout", dataset.heldout_images)):
        assert dataset.sha256[split] == hashlib.sha256(np.asarray(images).tobytes()).hexdigest()


def test_preview_shows_a_row_a_class_with_whole_multiples(digits_dir):
    dataset = load_dataset(digits_dir)
    preview = np.asarray(Image.open(digits_dir / "preview.png").convert("L"))
    first_three = dataset.train_images[np.flatnonzero(dataset.train_labels == 3)[0], :, :, 0]
    tile = preview[3 * 66 : 3 * 66 + 64, 100:164]
    np.testing.assert_array_equal(tile, first_three.repeat(8, 0).repeat(8, 1))


def test_max_images_and_no_held_out_part(tmp_path):
    dataset, facts = prepared(tmp_path, {"kind": "digits"}, max_images=50, heldout_fraction=0)
    assert dataset.train_images.shape == (50, 8, 8, 1)
    assert dataset.heldout_images.shape == (0, 8, 8, 1)
    assert len(set(dataset.train_labels)) > 5  # drawn from all, not from the front of a sorted list
    assert facts["sha256"]["heldout"] == hashlib.sha256(b"").hexdigest()


def test_growing_a_data_set_moves_few_images_to_the_other_split(tmp_path):
    numbered = np.arange(1000, dtype=np.uint16).view(np.uint8).reshape(1000, 1, 2, 1).repeat(3, 3)
    heldout = []
    for count in (900, 1000):
        np.save(tmp_path / f"{count}.npy", numbered[:count])
        dataset, _ = prepared(tmp_path / str(count), {"kind": "array", "path": str(tmp_path / f"{count}.npy")})
        heldout.append({bytes(image) for image in dataset.heldout_images})
    assert len(heldout[0]) == 225
    assert len(heldout[0] - heldout[1]) < 30  # drawn anew, about 169 would leave


# --- cifar10 -------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is how the official archive was made."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_string


def python2_pickle(value) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_files(count: int = 4) -> tuple[dict[str, bytes], np.ndarray]:
    """Members of a small archive in the official format, and its images [6 * count, 3, 32, 32]."""
    images = colours(6 * count, (32, 32)).transpose(0, 3, 1, 2)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {"batches.meta": python2_pickle({b"label_names": [b"airplane", b"automobile", b"bird"]})}
    for name, part in zip(names, np.split(images, 6), strict=True):
        labels = [index % 3 for index in range(count)]
        files[name] = python2_pickle({b"data": part.reshape(count, 3072).copy(), b"labels": labels})
    return {f"cifar-10-batches-py/{name}": content for name, content in files.items()}, images


def cifar_source(path: Path, *more: str) -> dict:
    return {"kind": "cifar10", "urls": [*more, str(path)], "md5": hashlib.md5(path.read_bytes()).hexdigest()}


def test_cifar10_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files, images = cifar_files()
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    dataset, facts = prepared(tmp_path / "local", cifar_source(path))
    np.testing.assert_array_equal(dataset.train_images, images[:20].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(dataset.heldout_images, images[20:].transpose(0, 2, 3, 1))
    assert list(dataset.train_labels) == [0, 1, 2, 0] * 5
    assert dataset.class_names == ("airplane", "automobile", "bird")
    assert facts["heldout"] == "as in the source"

    with http_server({"/cifar-10-python.tar.gz": (200, {}, path.read_bytes())}) as (url, asked):
        source = cifar_source(path) | {"urls": [f"{url}/moved", f"{url}/cifar-10-python.tar.gz"]}
        for name in ("first", "second"):
            again, _ = prepared(tmp_path / name, source)
            assert again.sha256 == dataset.sha256
    assert asked.count("/cifar-10-python.tar.gz") == 1  # kept from run to run


def test_cifar10_refuses_what_is_not_the_archive(tmp_path):
    files, _ = cifar_files()
    path = write_tar(tmp_path / "cifar.tar.gz", files)
    refused(tmp_path, cifar_source(path) | {"md5": "0" * 32}, str(path), "md5", "expected " + "0" * 32)
    del files["cifar-10-batches-py/test_batch"]
    refused(tmp_path, cifar_source(write_tar(tmp_path / "part.tar.gz", files)), "part.tar.gz", "test_batch")
    files |= {"cifar-10-batches-py/test_batch": python2_pickle({b"data": np.zeros((2, 9)), b"labels": [0, 1]})}
    refused(tmp_path, cifar_source(write_tar(tmp_path / "odd.tar.gz", files)), "test_batch", "float64 [2, 9]")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_cifar10_runs_no_code_from_the_archive(tmp_path):
    victim = tmp_path / "made-by-the-pickle"
    files, _ = cifar_files()
    files["cifar-10-batches-py/data_batch_3"] = pickle.dumps({b"data": Malicious(victim)})
    path = write_tar(tmp_path / "evil.tar.gz", files)
    refused(tmp_path, cifar_source(path), "data_batch_3", "mkdir")
    assert not victim.exists()


# --- images as files -----------------------------------------------------------------------------------------


def test_folder_zip_tar_and_s3_give_the_same_arrays(tmp_path, monkeypatch):
    files = two_classes("photos/")
    paths = {
        "folder": str(write_tree(tmp_path / "tree", files)),
        "zip": str(write_zip(tmp_path / "photos.zip", files, compression=zipfile.ZIP_DEFLATED)),
        "tar": write_tar(tmp_path / "photos.tar", files).as_uri(),
        "tgz": str(write_tar(tmp_path / "photos.tar.gz", files)),
        "prefix": "s3://pictures/all/",
        "object": "s3://pictures/photos.zip",
    }
    results = {}
    with s3_server(monkeypatch, "pictures") as s3:
        s3.upload_file(paths["zip"], "pictures", "photos.zip")
        for name, content in files.items():
            s3.put_object(Bucket="pictures", Key=f"all/{name}", Body=content)
        for kind, path in paths.items():
            dataset, facts = prepared(tmp_path / kind, {"kind": "images", "path": path})
            assert facts["source"] == path
            results[kind] = (dataset.sha256, *map(bytes, (dataset.train_labels, dataset.heldout_labels)))
    assert dataset.class_names == ("cat", "dog")
    assert np.bincount(dataset.train_labels).tolist() == [3, 3]
    assert np.bincount(dataset.heldout_labels).tolist() == [1, 1]
    assert len(set(map(str, results.values()))) == 1, results


def test_order_is_kept_across_workers_and_progress_ends_at_the_total(tmp_path):
    pixels = np.arange(200, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    folder = write_tree(tmp_path / "in", {f"{i:03}.png": encoded(image) for i, image in enumerate(pixels)})
    seen = []
    monitor = Monitor()
    monitor.progress = lambda *report: seen.append(report)
    dataset, _ = prepared(
        tmp_path / "out", {"kind": "images", "path": str(folder)}, monitor=monitor, heldout_fraction=0
    )
    np.testing.assert_array_equal(dataset.train_images[..., 0], pixels)
    assert dataset.num_classes == 0
    assert set(dataset.train_labels) == {-1}
    assert (200, 200, "train images") in seen


def test_other_files_are_ignored_and_counted(tmp_path):
    extra = {"readme.txt": b"", "cat/.hidden.png": b"", "__MACOSX/cat/0.png": b"", "cat/model.bin": b""}
    path = write_zip(tmp_path / "x.zip", two_classes() | extra)
    _, facts = prepared(tmp_path / "out", {"kind": "images", "path": str(path)})
    assert facts["counts"]["ignored_files"] == 4
    assert facts["name"] == "x"


def test_labels_from_a_file_or_none(tmp_path):
    files = two_classes("images/")
    numbers = {name: index for index, name in enumerate(sorted(files))}
    files["dataset.json"] = json.dumps({"labels": list(numbers.items())}).encode()
    source = {"kind": "images", "path": str(write_zip(tmp_path / "edm.zip", files))}
    dataset, facts = prepared(tmp_path / "file", source, heldout_fraction=0)
    assert list(dataset.train_labels) == list(range(8))
    assert dataset.class_names == tuple("01234567")
    assert facts["counts"]["ignored_files"] == 0
    dataset, _ = prepared(tmp_path / "folders", source | {"labels": "folders"}, heldout_fraction=0)
    assert list(dataset.train_labels) == [0] * 4 + [1] * 4
    dataset, _ = prepared(tmp_path / "none", source | {"labels": "none"})
    assert dataset.num_classes == 0
    files["dataset.json"] = b'{"labels": null}'
    write_zip(tmp_path / "edm.zip", files)
    assert prepared(tmp_path / "null", source)[0].num_classes == 0


@pytest.mark.parametrize(
    "text, parts",
    [
        ('{"labels": [["cat/0.png", 0], ["cat/9.png", 1]]}', ["cat/9.png", "not there"]),
        ('{"labels": [["cat/0.png", 0]]}', ["cat/1.png", "no label", "7 such images"]),
        ('{"labels": [["cat/0.png", [0.5, 1.0]]]}', ["cat/0.png", "whole numbers"]),
        ('{"classes": {}}', ["dataset.json", "not of the form"]),
        ("{", ["dataset.json", "not of the form"]),
    ],
)
def test_bad_label_files(tmp_path, text, parts):
    folder = write_tree(tmp_path / "in", two_classes() | {"dataset.json": text.encode()})
    refused(tmp_path, {"kind": "images", "path": str(folder)}, *parts)


def test_missing_labels_and_stray_images(tmp_path):
    folder = write_tree(tmp_path / "in", two_classes() | {"stray.png": encoded(colours(1)[0])})
    refused(tmp_path, {"kind": "images", "path": str(folder)}, "stray.png", "data.source.labels=none")
    refused(tmp_path, {"kind": "images", "path": str(folder), "labels": "file"}, "dataset.json")


def test_train_and_test_folders_are_the_splits(tmp_path):
    files = two_classes("train/") | {"val/dog/9.png": encoded(colours(1, seed=1)[0])}
    folder = write_tree(tmp_path / "in", files)
    dataset, facts = prepared(tmp_path / "out", {"kind": "images", "path": str(folder)})
    assert list(dataset.train_labels) == [0] * 4 + [1] * 4
    assert list(dataset.heldout_labels) == [1]
    np.testing.assert_array_equal(dataset.heldout_images, colours(1, seed=1))
    assert facts["heldout"] == "as in the source"
    write_tree(folder, {"test/fox/1.png": encoded(colours(1)[0])})
    refused(tmp_path, {"kind": "images", "path": str(folder)}, "test/fox/1.png", "class fox")


def test_a_second_archive_is_held_out(tmp_path):
    train = write_zip(tmp_path / "train.zip", two_classes())
    heldout = write_tree(tmp_path / "heldout", two_classes())
    dataset, facts = prepared(
        tmp_path / "out", {"kind": "images", "path": str(train), "heldout_path": str(heldout), "name": "pets"}
    )
    assert dataset.sha256["train"] == dataset.sha256["heldout"]
    assert facts["name"] == "pets"


# --- what images may be --------------------------------------------------------------------------------------


# --- sizes ---------------------------------------------------------------------------------------------------


# --- refused -------------------------------------------------------------------------------------------------


# --- arrays --------------------------------------------------------------------------------------------------


def test_arrays(tmp_path):
    images, labels = colours(40), np.arange(40) % 2
    np.savez(tmp_path / "named.npz", images=images, labels=labels)
    np.savez(tmp_path / "unnamed.npz", images, labels.astype(np.uint8))
    np.save(tmp_path / "alone.npy", images)
    named, facts = prepared(tmp_path / "1", {"kind": "array", "path": str(tmp_path / "named.npz")})
    unnamed, _ = prepared(tmp_path / "2", {"kind": "array", "path": str(tmp_path / "unnamed.npz")})
    assert named.sha256 == unnamed.sha256
    assert np.bincount(named.heldout_labels).tolist() == [5, 5]
    assert facts["name"] == "named"
    source = {"kind": "array", "path": str(tmp_path / "alone.npy"), "heldout_path": str(tmp_path / "alone.npy")}
    alone, _ = prepared(tmp_path / "3", source)
    np.testing.assert_array_equal(alone.train_images, images)
    np.testing.assert_array_equal(alone.heldout_images, images)
    assert alone.num_classes == 0


@pytest.mark.parametrize(
    "arrays, parts",
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, ["float32", "np.rint"]),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, ["[2, 3, 4, 4]", "transpose(0, 2, 3, 1)"]),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, ["[2, 4, 4]", "x[..., None]"]),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, ["C = 1"]),
        ({"images": np.array([{}, {}])}, ["pickles"]),
        ({"pictures": np.zeros(3)}, ["pictures", "images or arr_0"]),
        ({"images": colours(2), "labels": np.zeros((2, 5))}, ["float64 [2, 5]", "argmax"]),
        ({"images": colours(2), "labels": np.array([0, -3])}, ["-3", "0 to"]),
        ({"images": colours(0)}, ["no images"]),
    ],
)
def test_unfit_arrays(tmp_path, arrays, parts):
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path, {"kind": "array", "path": str(tmp_path / "x.npz")}, "x.npz", *parts)


def test_array_checksum(tmp_path):
    np.save(tmp_path / "x.npy", colours(8))
    source = {"kind": "array", "path": str(tmp_path / "x.npy")}
    refused(tmp_path, source | {"sha256": "0" * 64}, "x.npy", "sha256", "expected " + "0" * 64)
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    refused(tmp_path, source, "x.npy", "not a readable")
