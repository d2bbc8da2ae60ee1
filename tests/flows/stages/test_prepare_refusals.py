"""Damaged, hostile and incomplete data: prepare refuses them by name, or reads them safely."""

import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from flows.data.dataset import load_dataset
from flows.errors import UserError
from flows.monitor import Monitor
from flows.stages.prepare import Data, prepare
from image_sources import (
    colours,
    encoded,
    png16,
    prepared,
    refused,
    two_classes,
    write_tar,
    write_tree,
    write_zip,
)


@pytest.mark.parametrize(
    "content, part",
    [
        (encoded(colours(1, (32, 32))[0])[:1500], "damaged image"),
        (encoded(colours(1, (64, 64))[0], "JPEG")[:700], "damaged image"),
        (b"no picture at all", "not an image"),
        (b"", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_damaged_images_are_named(tmp_path, content, part):
    size = (64, 64) if content[:2] == b"\xff\xd8" else (32, 32)
    files = {"a/good.png": encoded(colours(1, size)[0]), "a/bad.png": content}
    for path in (write_tree(tmp_path / "in", files), write_zip(tmp_path / "in.zip", files)):
        refused(tmp_path, {"kind": "images", "path": str(path)}, f"{path.name}/a/bad.png", part)


def test_32_bit_pixels_are_refused(tmp_path):
    folder = write_tree(tmp_path / "in", {"x.tif": encoded(np.zeros((4, 4), np.float32), "TIFF")})
    refused(tmp_path, {"kind": "images", "path": str(folder)}, "x.tif", "mode F")


def test_nothing_to_prepare(tmp_path):
    folder = write_tree(tmp_path / "in", {"notes.txt": b""})
    refused(tmp_path, {"kind": "images", "path": str(folder)}, "no images among 1 files", ".png")
    refused(tmp_path, {"kind": "images", "path": str(tmp_path / "gone")}, "gone", "no such file")
    refused(tmp_path, {"kind": "images", "path": str(folder / "notes.txt")}, "neither a zip nor a tar")
    refused(tmp_path, {"kind": "images", "path": str(folder), "sha256": "0" * 64}, "folder has no SHA-256")


def huge_png(side: int) -> bytes:
    """A PNG that says it has side x side pixels."""
    good = png16([[0, 0]], 0)
    header = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    return good[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + good[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_pixel_bombs(tmp_path, side):
    folder = write_tree(tmp_path / "in", {"bomb.png": huge_png(side)})
    refused(tmp_path, {"kind": "images", "path": str(folder)}, "bomb.png", "decompression bomb")


def test_archive_bombs(tmp_path):
    files = {"zeros.bin": bytes(80 << 20)}
    for path in (
        write_zip(tmp_path / "bomb.zip", files, compression=zipfile.ZIP_DEFLATED, compresslevel=1),
        write_tar(tmp_path / "bomb.tar.gz", files),
    ):
        refused(tmp_path, {"kind": "images", "path": str(path)}, path.name, "decompression bomb", "83886080")


def test_array_bombs(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, images=np.zeros((80 << 10, 32, 32, 1), np.uint8))
    refused(tmp_path, {"kind": "array", "path": str(path)}, path.name, "decompression bomb", "83886")


def test_names_with_line_breaks_and_escape_codes_stay_on_their_line(tmp_path):
    name = "cat/\x1b]0;owned\x07\x1b[2J\ncm: all is well\r\u202e.png"
    path = write_zip(tmp_path / "x.zip", {name: b"no image"})
    with pytest.raises(UserError) as caught:
        prepare(Data.model_validate({"source": {"kind": "images", "path": str(path)}}), tmp_path / "out", Monitor())
    said = str(caught.value)
    assert said.isprintable() and r"cat/\x1b]0;owned\x07\x1b[2J\ncm: all is well\r\u202e.png" in said


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png"])
def test_members_that_point_outside(tmp_path, name):
    for path in (write_zip(tmp_path / "x.zip", {name: b""}), write_tar(tmp_path / "x.tar", {name: b""})):
        refused(tmp_path, {"kind": "images", "path": str(path)}, path.name, name, "outside the archive")


@pytest.mark.parametrize("target", ["../../secret.png", "/etc/passwd"])
def test_links_that_point_outside(tmp_path, target):
    (tmp_path / "secret.png").write_bytes(encoded(colours(1)[0]))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        path = write_tar(tmp_path / "x.tar", two_classes(), {"cat/link.png": (kind, target)})
        refused(tmp_path, {"kind": "images", "path": str(path)}, "cat/link.png", "outside the archive")
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, target)
    refused(tmp_path, {"kind": "images", "path": str(tmp_path / "x.zip")}, "cat/link.png", "outside the archive")


def test_links_inside_an_archive_are_followed(tmp_path):
    links = {"dog/soft.png": (tarfile.SYMTYPE, "../cat/0.png"), "dog/hard.png": (tarfile.LNKTYPE, "cat/1.png")}
    path = write_tar(tmp_path / "x.tar", two_classes(), links)
    dataset, _ = prepared(tmp_path / "out", {"kind": "images", "path": str(path)}, heldout_fraction=0)
    assert list(dataset.train_labels) == [0] * 4 + [1] * 6
    np.testing.assert_array_equal(dataset.train_images[[8, 9]], colours(8)[[1, 0]])
    path = write_tar(tmp_path / "y.tar", two_classes(), {"dog/x.png": (tarfile.SYMTYPE, "y.png")})
    refused(tmp_path, {"kind": "images", "path": str(path)}, "dog/x.png", "dog/y.png")
    path = write_tar(tmp_path / "z.tar", two_classes(), {"dog/pipe.png": (tarfile.FIFOTYPE, "")})
    refused(tmp_path, {"kind": "images", "path": str(path)}, "dog/pipe.png", "pipe")


def test_linked_folders_are_read_once(tmp_path):
    folder = write_tree(tmp_path / "in", two_classes())
    (folder / "cat" / "up").symlink_to(folder, target_is_directory=True)
    dataset, _ = prepared(tmp_path / "out", {"kind": "images", "path": str(folder)}, heldout_fraction=0)
    assert len(dataset.train_images) == 8


def test_damaged_archives(tmp_path):
    whole_zip = write_zip(tmp_path / "x.zip", two_classes()).read_bytes()
    whole_tar = write_tar(tmp_path / "x.tar", two_classes()).read_bytes()
    whole_tgz = write_tar(tmp_path / "x.tar.gz", two_classes()).read_bytes()
    flipped = bytearray(whole_zip)
    flipped[60] ^= 255
    encrypted = whole_zip.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
    for name, content, part in [
        ("cut.tar", whole_tar[:2048], "damaged archive"),  # between two members: tarfile itself does not notice
        ("cut.tar.gz", whole_tgz[:-200], "damaged archive"),
        ("cut.zip", whole_zip[:-10], "or cut off"),
        ("flipped.zip", bytes(flipped), "cat/0.png"),
        ("encrypted.zip", encrypted, "is encrypted"),
    ]:
        (tmp_path / name).write_bytes(content)
        refused(tmp_path, {"kind": "images", "path": str(tmp_path / name)}, name, part)


def test_a_failed_run_does_not_leave_an_older_result_complete(tmp_path):
    folder = write_tree(tmp_path / "in", two_classes())
    prepared(tmp_path / "refused", {"kind": "images", "path": str(folder)})
    (folder / "cat" / "0.png").write_bytes(b"")
    refused(tmp_path, {"kind": "images", "path": str(folder)}, "cat/0.png")
    with pytest.raises(UserError, match="no prepared data here"):
        load_dataset(tmp_path / "refused")


def test_incomplete_prepared_data_are_refused(tmp_path):
    prepare(Data(max_images=20), tmp_path, Monitor())
    (tmp_path / "heldout_labels.npy").write_bytes(b"")
    with pytest.raises(UserError, match="heldout_labels.npy: cannot read"):
        load_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match="dataset.json: lacks class_names, image_shape"):
        load_dataset(tmp_path)
