"""The model in the repository: the README's picture is what its command draws."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from miniature import REPOSITORY

FOLDER = REPOSITORY / "models" / "cifar10-speedrun"
COMMAND = "cm sample --model models/cifar10-speedrun --steps 2 --n 100 --out"


def test_it_is_small_and_described():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 18e6
    card, readme = (path.read_text() for path in (FOLDER / "README.md", REPOSITORY / "README.md"))
    assert COMMAND in card and COMMAND in readme
    assert json.loads((FOLDER / "origin.json").read_text())["method"] == "ect"


@pytest.mark.slow
def test_its_command_draws_the_first_picture_of_the_readme(tmp_path):
    picture = tmp_path / "cifar10.png"
    command = [sys.executable, "-m", "flows.cli", *shlex.split(COMMAND)[1:], str(picture)]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "100 of 100 images, 2 network calls at sigma 80, 1.6" in said
    drawn, shown = (
        np.asarray(Image.open(path).convert("RGB"), dtype=float)
        for path in (picture, REPOSITORY / "docs" / "images" / "cifar10.png")
    )
    assert drawn.shape == shown.shape
    assert abs(drawn - shown).mean() < 1, "grey levels; processors round differently"
    assert shown.std() > 40, "a picture of pictures"
