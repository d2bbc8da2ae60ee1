"""Top-level folders that name splits: `train/`, `Testing/`, `val2017/`, ..."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from flows.errors import UserError

TRAIN = ("train", "training", "trn")
HELDOUT = ("test", "testing", "tst", "val", "valid", "validation", "heldout", "holdout", "eval", "evaluation", "dev")
FILLERS = {"set", "data", "dataset", "images", "image", "imgs", "img", "split", "folder"}  # train_images, Test Set
WORD = re.compile(r"[a-z]+")
HYPHENS = re.compile(r"(held|hold)[-_ ]out")
WAY_OUT = "name them train and test, or set data.source.splits=none if they are classes"


class Splits(NamedTuple):
    """The folders of training and of held-out images, and held-out folders of which no use is made."""

    train: str
    heldout: str
    unused: tuple[str, ...]


def split_words(folder: str) -> tuple[str, ...]:
    """Return the words of a folder's name, less case, digits and fillers, if one of them names a split; else none."""
    words = [word.removesuffix("set") or word for word in WORD.findall(HYPHENS.sub(r"\1out", folder.casefold()))]
    words = [word for word in words if word not in FILLERS]
    return tuple(words) if any(word in TRAIN + HELDOUT for word in words) else ()


def find_splits(where: str, folders: Iterable[str], nested: Iterable[str]) -> Splits | None:
    """Return the splits that top-level folders are, or None; "" stands for images outside of every folder.

    Raises UserError where the names look like splits and are no clear pair. `nested` are the folders with subfolders: a
    `train` without any, beside folders of other names, is a class of vehicles.
    """
    words = {folder: split_words(folder) for folder in sorted(folders)}
    train = [folder for folder, found in words.items() if set(found) & set(TRAIN)]
    heldout = [folder for folder, found in words.items() if set(found) & set(HELDOUT)]
    others = [folder or "images outside of folders" for folder, found in words.items() if not found]
    unclear = [folder for folder, found in words.items() if len(found) > 1]
    if not (train and heldout):
        alone = [folder for folder in train + heldout if folder not in unclear]
        if not alone or (others and not heldout and not set(nested) & set(alone)):
            return None
    if others or unclear or len(train) != 1 or not heldout:
        beside = f", beside {', '.join(others[:3])}" if others else ""
        raise UserError(f"{where}: named like splits of the data: {', '.join(train + heldout)}{beside}; {WAY_OUT}")
    heldout.sort(key=lambda folder: HELDOUT.index(words[folder][0]))
    return Splits(train[0], heldout[0], tuple(heldout[1:]))


def refuse_splits_below_classes(where: str, names: Iterable[str]) -> None:
    """Raise UserError if every class folder holds folders that are splits, as `cat/train` and `cat/test`."""
    below: dict[str, set[str]] = {}
    for name in names:
        parts = name.split("/")
        below.setdefault(parts[0], set()).add(parts[1] if len(parts) > 2 else "")
    if below and all(all(map(split_words, folders)) and len(folders) > 1 for folders in below.values()):
        first = min(below)
        named = ", ".join(f"{first}/{folder}" for folder in sorted(below[first]))
        raise UserError(
            f"{where}: {named}: splits lie below the classes"
            " and would all be trained on; turn the folders round (train/CLASS, test/CLASS)"
        )
