"""Metrics against closed forms and torch-fidelity's own entry point; the stage from samples to the page."""

import json
import math
import re

import numpy as np
import pytest
import scipy.linalg
import torch

from cm_core.metrics.evaluation import MetricParams, Reference, compare, evaluate_images, frechet_distance, spread
from cm_core.metrics.features import (
    ClassifierFeatures,
    ImageFeatures,
    build_extractor,
    extract_features,
    save_classifier,
    train_classifier,
)
from flows.errors import UserError
from flows.monitor import Monitor
from flows.reports.evaluation import _position
from flows.reports.figures import save_grid, save_rows
from flows.reports.html import Report, TableRow, write_report
from flows.stages.evaluate import Evaluate, evaluate
from flows.stages.features import features
from flows.stages.prepare import Data, prepare

CPU = torch.device("cpu")
QUICK = {"kid_subsets": 5, "kid_subset_size": 50}


def gaussian(count, *, mean=0.0, scale=1.0, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    return (scale * torch.randn(count, dim, generator=generator) + mean) @ mixing


def test_fid_equals_the_closed_formula():
    generated, real = gaussian(500, mean=0.3, scale=1.4), gaussian(700, seed=1)
    mean1, mean2 = (x.double().numpy().mean(0) for x in (generated, real))
    cov1, cov2 = (np.cov(x.double().numpy(), rowvar=False) for x in (generated, real))
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(generated, Reference.of(real)) == pytest.approx(expected, rel=1e-6)


def test_a_set_compared_with_itself_is_perfect():
    features = gaussian(300)
    found = compare(ImageFeatures(features, None), Reference.of(features), MetricParams(**QUICK))
    assert abs(found["fid"]) < 1e-6
    assert (found["precision"], found["recall"]) == (1, 1)


def test_a_collapsed_generator_is_precise_and_recalls_nothing():
    """The order matters: with generated and real exchanged the two numbers would be, too."""
    real = gaussian(400, dim=8)
    collapsed = ImageFeatures(0.01 * gaussian(400, dim=8, seed=1), None)
    found = compare(collapsed, Reference.of(real), MetricParams(**QUICK))
    assert found["precision"] > 0.9
    assert found["recall"] < 0.1


def test_the_inception_score_counts_equally_frequent_certain_classes():
    logits = 50 * torch.nn.functional.one_hot(torch.arange(400) % 4, 4).float()
    features = ImageFeatures(gaussian(400), logits)
    params = MetricParams(**QUICK, isc_min_images=400)
    assert compare(features, Reference.of(gaussian(400)), params.adapted_to(400))["is"] == pytest.approx(4)


def test_metrics_beside_fid_are_computed_where_asked_for():
    reference = Reference.of(gaussian(100))
    without_classes = compare(ImageFeatures(gaussian(100), None), reference, MetricParams(**QUICK))
    assert set(without_classes) == {"fid", "kid", "kid_std", "precision", "recall"}
    assert set(compare(ImageFeatures(gaussian(100), None), reference, MetricParams(beside_fid=()))) == {"fid"}


@pytest.mark.parametrize(
    ("num_images", "splits", "subset"), [(50_000, 10, 1000), (1348, 2, 337), (449, 1, 112), (4, 1, 2)]
)
def test_parts_and_subsets_shrink_with_the_number_of_images(num_images, splits, subset):
    adapted = MetricParams().adapted_to(num_images)
    assert (adapted.isc_splits, adapted.kid_subset_size) == (splits, subset)


def test_too_few_images_are_refused_with_the_number_needed():
    with pytest.raises(ValueError, match="5 images are too few: prc_neighbourhood=7 needs at least 8"):
        MetricParams(prc_neighbourhood=7).adapted_to(5)


def test_a_sorted_set_is_thinned_out_evenly():
    kept = spread(torch.arange(1000)[:, None], 10)
    assert kept[:, 0].tolist() == list(range(0, 1000, 100))


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images[:400] * 15.9375).round().astype(np.uint8)[..., None], found.target[:400].astype(np.int64)


@pytest.fixture(scope="module")
def weights(digits, tmp_path_factory):
    params = ClassifierFeatures(width=8, num_steps=40)
    net = train_classifier(*digits, num_classes=10, params=params, seed=0, device=CPU)
    path = tmp_path_factory.mktemp("classifier") / "weights.safetensors"
    save_classifier(net, path)
    return path


def test_metrics_equal_those_of_torch_fidelitys_own_entry_point(digits, weights):
    real, generated = digits[0][:200], digits[0][200:]
    extractor = build_extractor("classifier", weights, CPU)
    reference = Reference.of(extract_features(real, extractor, batch_size=64, device=CPU).features)
    params = MetricParams(**QUICK, isc_splits=2, isc_min_images=1)
    found = evaluate_images(generated, reference, extractor, params=params, batch_size=64, device=CPU)

    import torch_fidelity

    class Pixels(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    expected = torch_fidelity.calculate_metrics(
        input1=Pixels(generated),
        input2=Pixels(real),
        feature_extractor="classifier",
        feature_extractor_weights_path=str(weights),
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        isc_splits=2,
        kid_subsets=5,
        kid_subset_size=50,
        cuda=False,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert found["is"] == pytest.approx(expected["inception_score_mean"])
    assert found["kid"] == pytest.approx(expected["kernel_inception_distance_mean"])
    assert found["kid_std"] == pytest.approx(expected["kernel_inception_distance_std"])
    assert (found["precision"], found["recall"]) == (expected["precision"], expected["recall"])


def test_fid_grows_with_the_noise_on_the_images(digits, weights):
    extractor = build_extractor("classifier", weights, CPU)
    reference = Reference.of(extract_features(digits[0], extractor, batch_size=100, device=CPU).features)
    noise = np.random.default_rng(0).normal(size=digits[0].shape)
    fids = []
    for spread_of_noise in (0, 20, 60, 120):
        noisy = np.clip(digits[0] + spread_of_noise * noise, 0, 255).astype(np.uint8)
        fids.append(
            frechet_distance(extract_features(noisy, extractor, batch_size=100, device=CPU).features, reference)
        )
    assert fids == sorted(fids)
    assert fids[-1] > 10 * fids[1]


class Recorder(Monitor):
    """Keeps what a stage says."""

    def __init__(self):
        self.seen, self.remarks, self.images = {}, [], []

    def metrics(self, values, step):
        self.seen |= values

    def remark(self, text):
        self.remarks.append(text)

    def image(self, key, path, step):
        self.images.append(key)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Folders as the earlier stages leave them: 60 digits, samples that are digits with more or less noise."""
    root = tmp_path_factory.mktemp("artifacts")
    prepare(Data(max_images=60), root / "prepare", Monitor())
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
        rows.append({"name": name, "model": model, "nfe": nfe, "sigmas": [80.0], "file": f"{name}.npy"})
    save_rows({"held-out": digits[:4]}, folder / "strips.png")
    grids = {name: f"{name}_grid.png" for name in noises}
    index = {"rows": rows, "seed": 7, "rounding": "uint8", "grids": grids, "strips": "strips.png"}
    (folder / "samples.json").write_text(json.dumps(index))


def write_training(folder, digits, steps):
    (folder / "grids").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(10, steps + 1, 10)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step in range(10, steps + 1, 10):
        save_grid(digits[:4], folder / "grids" / f"step_{step:06d}.png")
    noise = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    (folder / "model.json").write_text(json.dumps({"network": {"kind": "song_unet"}, "noise": noise}))


def run(artifacts, out_dir, monitor=None, **folders):
    names = ("prepare", "features", "teacher", "student", "sample", "edit")
    paths = {f"{name}_dir": folders.get(name, artifacts / name) for name in names}
    evaluate(Evaluate(kid_subsets=5), **paths, out_dir=out_dir, monitor=monitor or Monitor())


@pytest.fixture(scope="module")
def evaluated(artifacts, tmp_path_factory):
    out_dir, monitor = tmp_path_factory.mktemp("evaluate"), Recorder()
    run(artifacts, out_dir, monitor)
    return out_dir, monitor


def test_every_row_has_every_metric_under_the_name_of_the_network(evaluated):
    out_dir, monitor = evaluated
    metrics = json.loads((out_dir / "metrics.json").read_text())
    rows = ["real", "untrained", "nfe_2", "nfe_1", "teacher_nfe_35"]
    assert list(metrics) == [f"{name}_classifier" for name in ("fid", "is", "kid", "precision", "recall")]
    for by_row in metrics.values():
        assert list(by_row) == rows
        assert all(math.isfinite(value) for value in by_row.values())
    fid = metrics["fid_classifier"]
    assert fid["teacher_nfe_35"] < fid["nfe_2"] < fid["nfe_1"] < fid["untrained"]
    assert monitor.seen["fid_classifier/nfe_1"] == fid["nfe_1"]
    assert "fid_against_nfe" in monitor.images


def test_the_protocol_says_what_decides_the_numbers(evaluated, artifacts):
    protocol = json.loads((evaluated[0] / "protocol.json").read_text())
    facts = json.loads((artifacts / "features" / "features.json").read_text())
    assert protocol["network"]["sha256"] == facts["sha256"]
    assert protocol["samples"] == {"seed": 7, "rounding": "uint8"}
    assert protocol["rows"]["real"]["num_images"] == 60
    assert protocol["rows"]["nfe_1"]["kid_subset_size"] == 15
    assert re.fullmatch(r"\d+\.\d+.*", protocol["torch_fidelity"])


def test_plots_for_dvc_and_for_people(evaluated):
    plots = evaluated[0] / "plots"
    lines = (plots / "fid.csv").read_text().splitlines()
    assert lines[0] == "row,nfe,fid"
    assert [line.split(",")[:2] for line in lines[1:3]] == [["real", ""], ["untrained", "1"]]
    names = {path.name for path in plots.glob("*.png")}
    assert names == {"fid_against_nfe.png", "loss.png", "grids_over_training.png", "strips.png", "real_grid.png"}


def test_the_page_needs_nothing_but_itself(evaluated):
    page = (evaluated[0] / "report.html").read_text()
    sources = re.findall(r"(?:src|href)='?\"?([^'\" >]{0,30})", page)
    assert len(sources) == 11  # FID, five grids, strips, two edits, training grids, losses
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(", page)
    for row in ("real", "untrained", "nfe_1", "nfe_2", "teacher_nfe_35"):
        assert f"<b>{row}</b>" in page
    assert "inpaint, 2 network calls; off by 12.3 of 255 (given: 56.8)" in page


def test_without_edits_there_is_no_such_section(artifacts, tmp_path):
    write_edits(tmp_path / "edit", None, ())
    run(artifacts, tmp_path / "out", edit=tmp_path / "edit")
    assert "Editing" not in (tmp_path / "out" / "report.html").read_text()


def test_the_same_inputs_give_the_same_bytes(evaluated, artifacts, tmp_path):
    run(artifacts, tmp_path)
    first = {path.relative_to(evaluated[0]): path.read_bytes() for path in evaluated[0].rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert first == again


def test_a_recipe_without_teacher_has_a_page_too(artifacts, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "none.json").write_text("{}")
    digits = np.load(artifacts / "prepare" / "train_images.npy")
    write_samples(tmp_path / "sample", digits, {"nfe_1": 40, "untrained": 200})
    run(artifacts, tmp_path / "out", teacher=tmp_path / "teacher", sample=tmp_path / "sample")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<dt>Teacher</dt><dd>none</dd>" in page
    assert "teacher_nfe_35" not in page


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_features_of_other_images_are_refused(artifacts, tmp_path):
    folder = copy_of(artifacts / "features", tmp_path / "features")
    facts = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps(facts | {"reference_sha256": "0" * 64}))
    with pytest.raises(UserError, match="made from other images"):
        run(artifacts, tmp_path / "out", features=folder)


def test_missing_inputs_name_the_stage_that_writes_them(artifacts, tmp_path):
    with pytest.raises(UserError, match=r"samples.json: no samples here; the stage sample"):
        run(artifacts, tmp_path / "out", sample=tmp_path)
    with pytest.raises(UserError, match=r"features.json: no feature network here; the stage features"):
        run(artifacts, tmp_path / "out", features=tmp_path)
    with pytest.raises(UserError, match=r"edit.json: no edited images here; the stage edit makes them"):
        run(artifacts, tmp_path / "out", edit=tmp_path)


def test_a_row_of_too_few_or_other_images_is_refused_by_name(artifacts, tmp_path):
    write_samples(tmp_path / "few", np.zeros((3, 8, 8, 1), np.uint8), {"nfe_1": 40})
    with pytest.raises(UserError, match=r"row nfe_1: 3 images are too few.*at least 4; raise sample.num_images"):
        run(artifacts, tmp_path / "out", sample=tmp_path / "few")
    write_samples(tmp_path / "large", np.zeros((9, 16, 16, 1), np.uint8), {"nfe_1": 40})
    with pytest.raises(UserError, match=r"row nfe_1: images are \(16, 16, 1\), the data set's \(8, 8, 1\)"):
        run(artifacts, tmp_path / "out", sample=tmp_path / "large")


def test_without_held_out_images_there_is_no_floor(artifacts, tmp_path):
    folder, monitor = copy_of(artifacts / "prepare", tmp_path / "prepare"), Recorder()
    for part in ("images", "labels"):
        np.save(folder / f"heldout_{part}.npy", np.load(folder / f"heldout_{part}.npy")[:0])
    run(artifacts, tmp_path / "out", monitor, prepare=folder)
    assert "real" not in json.loads((tmp_path / "out" / "metrics.json").read_text())["fid_classifier"]
    assert monitor.remarks == ["no row `real`: only 0 images are held out"]


@pytest.mark.parametrize(
    ("fid", "floor", "ceiling", "place"),
    [(1, 1, 100, 0), (100, 1, 100, 1), (10, 1, 100, 0.5), (0.5, 1, 100, 0), (200, 1, 100, 1)],
)
def test_bars_grow_with_the_logarithm_from_floor_to_ceiling(fid, floor, ceiling, place):
    assert _position(fid, floor, ceiling) == pytest.approx(place)


@pytest.mark.parametrize("bounds", [(None, 1.0), (1.0, None), (0.0, 1.0), (2.0, 1.0)])
def test_there_is_no_bar_without_sensible_bounds(bounds):
    assert _position(1.0, *bounds) is None


def test_names_from_outside_cannot_put_markup_into_the_page(tmp_path):
    evil = "<script>alert(1)</script>"
    row = TableRow(evil, evil, [evil])
    write_report(Report(evil, {evil: evil}, [evil], [row], [], {evil: evil}), tmp_path / "page.html")
    assert "<script" not in (tmp_path / "page.html").read_text()
