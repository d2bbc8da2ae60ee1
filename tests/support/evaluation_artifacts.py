"""Folders as the stages before `evaluate` leave them: 60 digits, samples that are digits with more or less noise."""

import json

import numpy as np

from cm_core.metrics.classifier import ClassifierFeatures
from flows.monitor import Monitor
from flows.reports.figures import save_grid, save_rows
from flows.stages.evaluate import Evaluate, evaluate
from flows.stages.features import features
from flows.stages.prepare import Data, prepare


def make_artifacts(root):
    prepare(Data(max_images=60, resolution=8, resize="center-crop"), root / "prepare", Monitor())
    features(0, ClassifierFeatures(num_steps=10, batch_size=20), root / "prepare", root / "features", Monitor())
    digits = np.load(root / "prepare" / "train_images.npy")
    write_samples(root / "sample", digits, {"nfe_2": 10, "nfe_1": 40, "untrained": 200, "teacher_nfe_35": 5})
    for name, steps in (("teacher", 40), ("student", 30)):
        write_training(root / name, digits, steps)
    write_edits(root / "edit", digits, ("inpaint", "interpolate"))
    return root


def write_edits(folder, digits, names):
    folder.mkdir()
    for name in names:
        save_rows({"held-out": digits[:4], "result 1": digits[:4]}, folder / f"{name}.png")
    tasks = {name: {"picture": f"{name}.png", "nfe": 2, "sigmas": [80.0, 1.0]} for name in names}
    if "inpaint" in names:
        tasks["inpaint"] |= {"rmse": 12.34, "rmse_given": 56.78}
    (folder / "edit.json").write_text(json.dumps({"tasks": tasks}))


def write_samples(folder, digits, noises):
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for name, noise in noises.items():
        images = np.clip(digits + rng.normal(0, noise, digits.shape), 0, 255).astype(np.uint8)
        np.save(folder / f"{name}.npy", images)
        save_grid(images[:9], folder / f"{name}_grid.png")
        model = {"nfe": "student"}.get(name[:3], name.partition("_")[0])
        nfe = 1 if name == "untrained" else int(name.rpartition("_")[2])
        rows.append(
            {
                "name": name,
                "model": model,
                "ema": 0,
                "nfe": nfe,
                "sigmas": [80.0],
                "sampler": {"kind": "some"},
                "file": f"{name}.npy",
            }
        )
    save_rows({"held-out": digits[:4]}, folder / "strips.png")
    grids = {name: f"{name}_grid.png" for name in noises}
    index = {"rows": rows, "seed": 7, "rounding": "uint8", "grids": grids, "strips": "strips.png"}
    (folder / "samples.json").write_text(json.dumps(index))


def write_training(folder, digits, steps):
    (folder / "grids").mkdir(parents=True)
    lines = [
        json.dumps({"step": step, "loss": 1 / step, "loss_at_sigma/0.354": 0.2, "loss_at_sigma/22.6": 0.1})
        for step in range(10, steps + 1, 10)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step in range(10, steps + 1, 10):
        save_grid(digits[:4], folder / "grids" / f"step_{step:06d}.png")
    noise = {"sigma_min": 0.002, "sigma_max": 70.0, "rho": 6.0, "sigma_data": 0.5}
    (folder / "model.json").write_text(json.dumps({"network": {"kind": "song_unet"}, "noise": noise}))
    rules = [{"kind": "constant", "decay": 0.99 + steps / 10_000}, {"kind": "half_life", "half_life_images": steps}]
    (folder / "emas.json").write_text(json.dumps(rules))


def run_evaluate(artifacts, out_dir, monitor=None, repeats=1, **folders):
    names = ("prepare", "features", "teacher", "base", "student", "sample", "edit")
    paths = {f"{name}_dir": folders.get(name, artifacts / name) for name in names}
    evaluate(Evaluate(kid_subsets=5, repeats=repeats), **paths, out_dir=out_dir, monitor=monitor or Monitor())
