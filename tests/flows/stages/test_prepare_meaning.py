"""Data as people bring them: splits, labels, names and damage mean what their owner means, or one line says so."""

import io
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.data.sources.splits import find_splits
from flows.errors import UserError
from image_sources import colours, encoded, prepared, refused, two_classes, write_tar, write_tree, write_zip

# --- splits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folders, train, heldout, unused",
    [
        ({"train", "test"}, "train", "test", ()),
        ({"training", "testing"}, "training", "testing", ()),
        ({"Train", "VAL"}, "Train", "VAL", ()),
        ({"train2017", "val2017"}, "train2017", "val2017", ()),
        ({"Train Set", "Test_Images", "valid"}, "Train Set", "Test_Images", ("valid",)),
        ({"trainset", "validation_set"}, "trainset", "validation_set", ()),
        ({"TRAIN", "held-out", "dev"}, "TRAIN", "held-out", ("dev",)),
    ],
)
def test_folders_that_are_splits(folders, train, heldout, unused):
    assert find_splits("x", folders, ()) == (train, heldout, unused)


@pytest.mark.parametrize(
    "folders, nested",
    [
        ({"test", "cat"}, ()),
        ({"test", "val"}, ()),
        ({"train", "test", "extra"}, ()),
        ({"train", "Training", "test"}, ()),
        ({"train", "unlabelled"}, {"train"}),
        ({"train_cats", "test_cats"}, ()),
        ({"", "test"}, ()),
    ],
)
def test_folders_that_look_like_splits_are_refused(folders, nested):
    with pytest.raises(UserError, match="named like splits of the data.*data.source.splits=none"):
        find_splits("x", folders, nested)


@pytest.mark.parametrize(
    "folders", [{"cat", "dog"}, {"train", "bus"}, {"test tube", "flask"}, {"train station", "pier"}]
)
def test_folders_that_are_classes(folders):
    assert find_splits("x", folders, ()) is None


def test_mnist_png(tmp_path):
    pixels = colours(40)
    files = {f"mnist_png/training/{i % 4}/{i}.png": encoded(pixels[i]) for i in range(24)}
    files |= {f"mnist_png/testing/{i % 4}/{i}.png": encoded(pixels[i]) for i in range(24, 40)}
    source = {"kind": "images", "path": str(write_tree(tmp_path / "in", files))}
    dataset, facts = prepared(tmp_path / "out", source)
    assert dataset.class_names == tuple("0123")
    assert sorted(map(bytes, dataset.train_images)) == sorted(map(bytes, pixels[:24]))
    assert sorted(map(bytes, dataset.heldout_images)) == sorted(map(bytes, pixels[24:]))
    assert facts["heldout"] == "as in the source"
    classes, _ = prepared(tmp_path / "none", source | {"splits": "none"})
    assert classes.class_names == ("testing", "training")
    refused(tmp_path, source | {"heldout_path": str(tmp_path / "in")}, "heldout_path is set")


def test_unused_splits_are_counted_and_splits_below_classes_refused(tmp_path):
    files = two_classes("train/") | two_classes("test/") | {"val/cat/9.png": encoded(colours(1)[0])}
    _, facts = prepared(tmp_path / "a", {"kind": "images", "path": str(write_tree(tmp_path / "in", files))})
    assert facts["unused_splits"] == {"val": 1}
    files = {f"{kind}/{split}/0.png": encoded(colours(1)[0]) for kind in ("cat", "dog") for split in ("Test", "Train")}
    folder = write_tree(tmp_path / "turned", files)
    refused(tmp_path, {"kind": "images", "path": str(folder)}, "cat/Test, cat/Train", "turn the folders round")


# --- names ---------------------------------------------------------------------------------------------------


def test_backslashes_of_windows_are_folders(tmp_path):
    names = {"pets\\" + name.replace("/", "\\"): content for name, content in two_classes().items()}
    wanted, _ = prepared(
        tmp_path / "plain", {"kind": "images", "path": str(write_tree(tmp_path / "in", two_classes()))}
    )
    for path in (write_zip(tmp_path / "x.zip", names), write_tar(tmp_path / "x.tar", names)):
        dataset, _ = prepared(tmp_path / path.suffix, {"kind": "images", "path": str(path)})
        assert dataset.class_names == ("cat", "dog") and dataset.sha256 == wanted.sha256
    for name in ("..\\out.png", "pets\\..\\..\\out.png", "\\out.png"):
        evil = write_zip(tmp_path / "evil.zip", {name: b""})
        refused(tmp_path, {"kind": "images", "path": str(evil)}, "outside the archive")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(tmp_path):
    image = encoded(colours(1)[0])
    composed, separate = (unicodedata.normalize(form, "cat/Käfer.png") for form in ("NFC", "NFD"))
    for other, said in (("cat/0.png", "two entries are named cat/0.png"), ("./cat/0.png", "are one name")):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for name in (*two_classes(), other):
                archive.writestr(name, image)
        refused(tmp_path, {"kind": "images", "path": str(tmp_path / "x.zip")}, said)
    path = write_tar(tmp_path / "x.tar", two_classes() | {composed: image, separate: image})
    refused(tmp_path, {"kind": "images", "path": str(path)}, "are one name", "a\\u0308fer")
    folder = write_tree(tmp_path / "in", two_classes() | {"Cat/9.png": image})
    refused(tmp_path, {"kind": "images", "path": str(folder)}, "differ by upper and lower case alone", "Cat")


def test_a_label_file_and_its_images_agree_whatever_their_unicode_form(tmp_path):
    composed, separate = (unicodedata.normalize(form, "Käfer.png") for form in ("NFC", "NFD"))
    labels = f'{{"labels": [["{composed}", 0], ["b.png", 1]]}}'
    files = {separate: encoded(colours(1)[0]), "b.png": encoded(colours(1)[0]), "dataset.json": labels.encode()}
    dataset, _ = prepared(
        tmp_path / "out",
        {"kind": "images", "path": str(write_zip(tmp_path / "x.zip", files))},
        heldout_fraction=0,
    )
    assert sorted(dataset.train_labels) == [0, 1]


# --- labels --------------------------------------------------------------------------------------------------


def test_gaps_between_labels_are_no_classes(tmp_path):
    labels = np.resize([1, 2, 7], 30)
    np.savez(tmp_path / "x.npz", images=colours(30), labels=labels)
    dataset, facts = prepared(tmp_path / "out", {"kind": "array", "path": str(tmp_path / "x.npz")}, heldout_fraction=0)
    assert dataset.class_names == ("1", "2", "7") and dataset.num_classes == 3
    assert facts["label_gaps"] == [0, 3, 4, 5, 6]
    np.testing.assert_array_equal(np.array([1, 2, 7])[dataset.train_labels], labels)
    np.savez(tmp_path / "held.npz", images=colours(2), labels=[1, 5])
    source = {"kind": "array", "path": str(tmp_path / "x.npz"), "heldout_path": str(tmp_path / "held.npz")}
    refused(tmp_path, source, "held.npz[1]", "no training image is of the class 5")


def test_gaps_of_a_label_file_are_no_classes_either(tmp_path):
    labels = {"labels": [[name, 3 * index] for index, name in enumerate(two_classes())]}
    files = two_classes() | {"dataset.json": json.dumps(labels).encode()}
    dataset, facts = prepared(
        tmp_path / "out",
        {"kind": "images", "path": str(write_tree(tmp_path / "in", files))},
        heldout_fraction=0,
    )
    assert dataset.class_names == tuple(str(3 * i) for i in range(8))
    assert list(dataset.train_labels) == list(range(8)) and len(facts["label_gaps"]) == 14


# --- what cannot be read -------------------------------------------------------------------------------------


READ_AS_NOBODY = """
import os, sys
from pathlib import Path
from PIL import Image
from flows.data.decoding import find_faults
from flows.data.formats import readable
from flows.data.sources.image_files import Images
from flows.errors import UserError
from flows.monitor import Monitor

Image.init(), readable(), find_faults([], Monitor())  # imports that a mere user may not do
if os.geteuid() == 0:  # whom no permissions bind
    os.setgid(65534), os.setuid(65534)
try:
    found = Images(path=sys.argv[1], labels=sys.argv[2]).read(Path("/nowhere"), Monitor())
    print(*find_faults(found.train, Monitor()), sep="\\n")
except UserError as error:
    print(error)
"""


@pytest.fixture
def open_folder():
    """A folder that any user may enter, as pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_folders_and_files_without_permission_are_named(open_folder):
    folder = write_tree(open_folder / "in", two_classes() | {"dataset.json": b'{"labels": null}'})

    def said(labels: str) -> str:
        command = [sys.executable, "-c", READ_AS_NOBODY, str(folder), labels]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (folder / "dog").chmod(0)
    try:
        assert said("none") == f"{folder}/dog: cannot be read (Permission denied); make it readable, or move it\n"
    finally:
        (folder / "dog").chmod(0o755)
    (folder / "cat" / "0.png").chmod(0)
    assert said("none").startswith(f"{folder}/cat/0.png: cannot be opened ([Errno 13] Permission denied")
    assert said("none").count("\n") == 1
    (folder / "dataset.json").chmod(0)
    assert "dataset.json: cannot be read (Permission denied)" in said("file")
    open_folder.chmod(0)
    assert said("none") == f"{folder}: cannot be read (Permission denied)\n"


def test_paths_that_no_file_can_have_are_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300), f"{tmp_path}/a\0b"):
        for kind in ("images", "array"):
            refused(tmp_path, {"kind": kind, "path": str(path)}, "cannot be read")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_broken_links_are_named_instead_of_waited_for(tmp_path):
    folder = write_tree(tmp_path / "in", two_classes())
    os.mkfifo(folder / "cat" / "pipe.png")
    os.mkfifo(folder / "notes")
    (folder / "dog" / "gone.png").symlink_to("nowhere.png")
    source = {"kind": "images", "path": str(folder)}
    refused(
        tmp_path, source, "2 of 10 images", "cat/pipe.png: is a pipe", "dog/gone.png: is a pipe, a device or a broken"
    )
    _, facts = prepared(tmp_path / "out", source, damaged="skip")
    assert facts["counts"]["skipped"] == 2 and facts["counts"]["ignored_files"] == 1


def test_all_faults_are_told_at_once_or_skipped(tmp_path):
    pixels = colours(40, (16, 16))
    files = {f"{'ab'[i % 2]}/{i:02}.png": encoded(image) for i, image in enumerate(pixels)}
    bad = sorted(files)[::3]
    for name in bad[:12]:
        files[name] = files[name][:200]
    for name in bad[12:]:
        files[name] = b"no image"
    source = {"kind": "images", "path": str(write_tree(tmp_path / "in", files))}
    refused(tmp_path, source, "14 of 40 images cannot be used", *bad, "damaged image", "not an image", "damaged=skip")
    refused(tmp_path, source, "14 of 40", resolution=16, resize="pad", channels="rgb")  # where no header is read first
    dataset, facts = prepared(tmp_path / "out", source, damaged="skip", heldout_fraction=0)
    good = [name for name in sorted(files) if name not in bad]
    np.testing.assert_array_equal(dataset.train_images, [pixels[int(name[2:4])] for name in good])
    np.testing.assert_array_equal(dataset.train_labels, ["ab".index(name[0]) for name in good])
    assert facts["counts"]["skipped"] == len(facts["skipped"]) == 14
    assert [one.partition(":")[0].removeprefix(f"{tmp_path}/in/") for one in facts["skipped"]] == bad


def test_more_than_twenty_faults_are_counted(tmp_path):
    files = {f"{i:02}.png": b"no image" for i in range(30)} | {"99.png": encoded(colours(1)[0])}
    source = {"kind": "images", "path": str(write_tree(tmp_path / "in", files))}
    refused(tmp_path, source, "30 of 31 images", "19.png", "and 10 more")
    (tmp_path / "in" / "99.png").write_bytes(b"")
    refused(tmp_path, source, "31 of 31", damaged="skip")


# --- files that are plainly images ---------------------------------------------------------------------------


def test_images_of_other_names_are_not_ignored(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(colours(1)[0]).save(buffer, "PNG")
    files = two_classes() | {"cat/noname": buffer.getvalue(), "cat/photo.nef": b"x", "cat/.hidden.png": b"x"}
    source = {"kind": "images", "path": str(write_zip(tmp_path / "x.zip", files | {"cat/notes.txt": b"PNG"}))}
    refused(tmp_path, source, "cat/noname: is an image by its contents; end its name in .png", "camera's raw format")
    _, facts = prepared(tmp_path / "out", source, damaged="skip")
    assert facts["counts"]["skipped"] == 2 and facts["counts"]["ignored_files"] == 2


def test_deflate64_says_what_it_is_and_how_to_pack_again(tmp_path):
    packed = bytearray(write_zip(tmp_path / "x.zip", two_classes(), compression=zipfile.ZIP_DEFLATED).read_bytes())
    for signature, method in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        at = packed.find(signature)
        while at >= 0:
            packed[at + method] = 9
            at = packed.find(signature, at + 4)
    (tmp_path / "x.zip").write_bytes(packed)
    refused(tmp_path, {"kind": "images", "path": str(tmp_path / "x.zip")}, "Deflate64", "7z a -tzip -mm=Deflate")
    for start, kind in (
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"Rar!\x1a\x07\x01\0", "RAR"),
        (b"\x28\xb5\x2f\xfd", "Zstandard"),
    ):
        (tmp_path / "x.any").write_bytes(start + bytes(600))
        refused(tmp_path, {"kind": "images", "path": str(tmp_path / "x.any")}, f"packed as {kind}", "as zip or tar")
