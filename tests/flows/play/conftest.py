"""A workspace with untrained models whose images all differ, and pictures to edit."""

import numpy as np
import pytest
from PIL import Image

from flows.recipes.recipe import Recipe, write_active
from miniature import save_untrained

MODELS = {
    "student": {"form": "skip", "image_shape": (3, 8, 8)},
    "grey": {"form": "skip", "image_shape": (1, 8, 8)},
    "classes": {"form": "piecewise", "image_shape": (3, 8, 8), "num_classes": 3},
    "weights": {
        **{"form": "skip", "image_shape": (3, 8, 8), "num_classes": 3},
        **{"guidance_range": (1.0, 8.0), "guidance": 2.0},
    },
    "odd": {"form": "unshifted", "image_shape": (1, 5, 7)},
    "teacher": {"form": "denoiser", "image_shape": (3, 8, 8)},
    "halved": {"form": "euler", "image_shape": (3, 8, 8), "euler_steps": 2},
    "flow_map": {"form": "average_velocity", "image_shape": (3, 8, 8)},
}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("play")
    (root / "params").mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    write_active(Recipe(), root)
    for name, what in MODELS.items():
        save_untrained(root / "out" / name, **what)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(60, 200, (8, 8, 3), dtype=np.uint8)).save(root / "a.png")
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(root / "my photo.jpg")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:] = 255
    Image.fromarray(mask).save(root / "mask.png")
    return root
