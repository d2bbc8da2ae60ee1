"""Metrics against closed forms and torch-fidelity's own entry point; the stage from samples to the page."""

import io
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from cm_core.metrics.classifier import ClassifierFeatures, save_classifier, train_classifier
from cm_core.metrics.evaluation import (
    MetricParams,
    Moments,
    Reference,
    Statistics,
    compare,
    evaluate_images,
    frechet_distance,
    random_rows,
)
from cm_core.metrics.features import ImageFeatures, build_extractor, extract_features
from cm_core.model import ModelSpec
from cm_core.networks.mlp import MLPParams
from cm_core.noise import Noise
from evaluation_artifacts import make_artifacts, run_evaluate, write_edits, write_samples
from flows.data.feature_files import load_feature_files
from flows.errors import UserError
from flows.monitor import Monitor
from flows.reports import sections
from flows.reports.evaluation import TEMPLATE, _position, sentence
from flows.reports.metrics_table import four_digits
from flows.reports.page import write_page
from flows.reports.rows import Row
from flows.reports.sections import Picture, Section
from flows.stages.evaluate import Evaluate, evaluate
from flows.stages.models import fixed_labels

CPU = torch.device("cpu")
NO_FEATURES = Reference(Statistics(np.zeros(2), np.eye(2)))
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


def test_moments_of_batches_are_those_of_all_rows_also_far_from_zero():
    rows = gaussian(999).double() + 1e6
    moments = Moments()
    for batch in rows.split(64):
        moments.add(batch)
    found = moments.statistics()
    np.testing.assert_allclose(found.mu, rows.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, np.cov(rows.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_a_reference_of_many_images_keeps_the_features_of_some(monkeypatch):
    monkeypatch.setattr("cm_core.metrics.evaluation.MOST_KEPT", 50)
    rows = gaussian(400)
    found = Reference.collect(iter(rows.split(64)), len(rows))
    assert frechet_distance(gaussian(300, mean=0.2), found) == pytest.approx(
        frechet_distance(gaussian(300, mean=0.2), Reference.of(rows)), rel=1e-9
    )
    assert torch.equal(found.features, rows[random_rows(400, 50)])


def test_statistics_alone_give_fid_and_refuse_what_needs_single_images():
    rows = gaussian(400)
    published = Reference(Reference.of(rows).statistics)
    found = compare(ImageFeatures(gaussian(300), None), published, MetricParams(beside_fid=("is",)))
    assert found["fid"] == pytest.approx(frechet_distance(gaussian(300), Reference.of(rows)))
    with pytest.raises(ValueError, match="published statistics do not have"):
        compare(ImageFeatures(gaussian(300), None), published, MetricParams(beside_fid=("precision_recall",)))


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
    reference = Reference.of(gaussian(400))
    assert compare(features, reference, params.adapted_to(400, reference))["is"] == pytest.approx(4)


def test_metrics_beside_fid_are_computed_where_asked_for():
    reference = Reference.of(gaussian(100))
    without_classes = compare(ImageFeatures(gaussian(100), None), reference, MetricParams(**QUICK))
    assert set(without_classes) == {"fid", "kid", "kid_std", "precision", "recall"}
    assert set(compare(ImageFeatures(gaussian(100), None), reference, MetricParams(beside_fid=()))) == {"fid"}


@pytest.mark.parametrize(
    ("num_images", "splits", "subset"), [(50_000, 10, 1000), (1348, 2, 337), (449, 1, 112), (4, 1, 2)]
)
def test_parts_and_subsets_shrink_with_the_number_of_images(num_images, splits, subset):
    adapted = MetricParams().adapted_to(num_images, NO_FEATURES)
    assert (adapted.isc_splits, adapted.kid_subset_size) == (splits, subset)


def test_too_few_images_are_refused_with_the_number_needed():
    with pytest.raises(ValueError, match="5 images are too few: prc_neighbourhood=7 needs at least 8"):
        MetricParams(prc_neighbourhood=7).adapted_to(5, NO_FEATURES)


def test_a_perfect_conditional_model_keeps_its_recall_in_a_subset():
    """200 classes far apart, 8,000 generated images in order of their labels, 1,600 of them compared."""
    classes, device = 200, torch.device("cpu")
    centres = 5 * torch.randn(classes, 8, generator=torch.Generator().manual_seed(5))
    spec = ModelSpec(form="skip", network=MLPParams(), noise=Noise(), image_shape=(1, 2, 2), num_classes=classes)

    def images(labels, seed):
        return centres[labels] + torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))

    real = images(torch.arange(8000) // 40, 1)  # sorted by class, as a folder is read
    generated = ImageFeatures(images(fixed_labels(spec, range(8000), 0, device), 2), None)
    params = MetricParams(beside_fid=("precision_recall",), prc_images=1600)
    found = compare(generated, Reference.of(real), params)
    assert found["recall"] > 0.65 and found["precision"] > 0.65


def test_a_subset_is_a_random_draw_without_repetition_and_the_same_each_time():
    kept = random_rows(1000, 100)
    assert len(kept.unique()) == 100 and kept.max() < 1000 and torch.equal(kept, kept.sort().values)
    assert len((kept[1:] - kept[:-1]).unique()) > 5, "no regular stride"
    assert torch.equal(kept, random_rows(1000, 100))
    assert random_rows(50, 100).tolist() == list(range(50))


def test_labels_are_balanced_shuffled_and_those_of_the_index_whatever_the_batch():
    spec = ModelSpec(form="skip", network=MLPParams(), noise=Noise(), image_shape=(1, 2, 2), num_classes=10)
    labels = fixed_labels(spec, range(100), 3, CPU)
    assert labels.view(10, 10).sort(1).values.tolist() == [list(range(10))] * 10, "every class once in ten"
    assert len({tuple(row) for row in labels.view(10, 10).tolist()}) == 10, "each time in another order"
    pieces = [fixed_labels(spec, range(start, min(start + 7, 100)), 3, CPU) for start in range(0, 100, 7)]
    assert torch.equal(torch.cat(pieces), labels)
    assert not torch.equal(fixed_labels(spec, range(100), 4, CPU), labels)
    assert torch.equal(fixed_labels(spec, range(100), 3, CPU, [500] * 10), labels)


@pytest.mark.parametrize("classes, count", [(3, 1000), (10, 57), (10, 10_000), (1000, 10_000)])
def test_sampled_labels_are_as_frequent_as_in_the_data_and_of_no_empty_class(classes, count):
    spec = ModelSpec(form="skip", network=MLPParams(), noise=Noise(), image_shape=(1, 2, 2), num_classes=classes)
    data = np.random.default_rng(classes).integers(0, 1300, classes)
    data[1] = 0
    labels = fixed_labels(spec, range(count), 3, CPU, data)
    drawn = np.bincount(labels, minlength=classes)
    assert drawn[1] == 0
    assert np.abs(drawn - count * data / data.sum()).max() < 3  # random ones are off by about sqrt(count / classes)
    pieces = [fixed_labels(spec, range(start, min(start + 7, count)), 3, CPU, data) for start in range(0, count, 7)]
    assert torch.equal(torch.cat(pieces), labels)


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
        self.seen, self.by_step, self.remarks, self.images = {}, [], [], []

    def metrics(self, values, step):
        self.seen |= values
        self.by_step.append((step, values))

    def remark(self, text):
        self.remarks.append(text)

    def image(self, key, path, step):
        self.images.append(key)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return make_artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def evaluated(artifacts, tmp_path_factory):
    out_dir, monitor = tmp_path_factory.mktemp("evaluate"), Recorder()
    run_evaluate(artifacts, out_dir, monitor)
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
    assert monitor.seen["nfe_1/fid"] == fid["nfe_1"] and not [key for key in monitor.seen if key.startswith("real")]
    for row in rows:
        found = json.loads((out_dir / "rows" / f"{row}.json").read_text())
        assert found == {"features": "classifier"} | {
            key.removesuffix("_classifier"): by_row[row] for key, by_row in metrics.items()
        }
    assert "fid_against_nfe" in monitor.images


def test_the_protocol_says_what_decides_the_numbers(evaluated, artifacts):
    protocol = json.loads((evaluated[0] / "protocol.json").read_text())
    facts = json.loads((artifacts / "features" / "features.json").read_text())
    assert protocol["network"]["sha256"] == facts["sha256"]
    assert protocol["reference"] | {"sha256": ""} == {
        "images": "60 training images",
        "sha256": "",
        "features_kept": 60,
    }
    assert protocol["samples"] == {"seed": 7, "rounding": "uint8"}
    assert protocol["rows"]["real"]["num_images"] == 60
    assert protocol["rows"]["nfe_1"]["kid_subset_size"] == 15
    assert protocol["rows"]["teacher_nfe_35"]["sampler"] == {"kind": "some"}
    assert protocol["weights"].startswith("of the last training step")
    assert re.fullmatch(r"\d+\.\d+.*", protocol["torch_fidelity"]) and protocol["torch"] == torch.__version__


def test_plots_for_dvc_and_for_people(evaluated):
    plots = evaluated[0] / "plots"
    curve = (plots / "fid_against_nfe.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in curve] == ["nfe", "1", "2"], "the student's alone"
    losses = [line.split(",") for line in (plots / "loss.csv").read_text().splitlines()]
    assert losses[:2] == [["step", "loss"], ["10", "0.1"]]
    lines = (plots / "fid.csv").read_text().splitlines()
    assert lines[0] == "row,nfe,fid,deviation,images,fid_of_equal_numbers"
    assert [line.split(",")[:2] for line in lines[1:3]] == [["real", ""], ["untrained", "1"]]
    names = {path.name for path in plots.glob("*.png")}
    assert names == {
        "fid_against_nfe.png",
        "loss.png",
        "loss_by_sigma.png",
        "grids_over_training.png",
        "strips.png",
        "real_grid.png",
    }


def test_sets_drawn_during_training_make_a_curve_of_fid(artifacts, evaluated, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(artifacts / "student", student)
    (student / "sets").mkdir()
    for step, noise in ((10, 40), (20, 10)):  # the images of two rows, whose metrics are known
        row = {40: "nfe_1", 10: "nfe_2"}[noise]
        shutil.copy(artifacts / "sample" / f"{row}.npy", student / "sets" / f"step_{step:06d}-nfe_1_ema1.npy")
    monitor = Recorder()
    run_evaluate(artifacts, tmp_path / "out", monitor, student=student)
    fid = json.loads((evaluated[0] / "metrics.json").read_text())["fid_classifier"]
    key = "curves/fid_over_training_nfe_1_ema1"
    assert [step for step, values in monitor.by_step if key in values] == [10, 20]
    found = [values[key] for _, values in monitor.by_step if key in values]
    assert found == pytest.approx([fid["nfe_1"], fid["nfe_2"]], rel=1e-6)
    assert (tmp_path / "out" / "plots" / "fid_over_training.csv").read_text().startswith("row,step,fid\nnfe_1_ema1,10,")
    chart = 'aria-label="FID over training"'
    assert chart in (tmp_path / "out" / "report.html").read_text()
    assert chart not in (evaluated[0] / "report.html").read_text()


def test_images_in_sets_have_the_mean_minimum_and_spread_over_the_sets(artifacts, tmp_path):
    recorder = Recorder()
    run_evaluate(artifacts, tmp_path / "whole", recorder, repeats=3)
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    protocol = json.loads((tmp_path / "whole" / "protocol.json").read_text())
    assert protocol["rows"]["nfe_1"]["sets"] == 3 and protocol["rows"]["nfe_1"]["num_images"] == 20
    assert protocol["rows"]["real"]["sets"] == 1 and "real" not in metrics["fid-min_classifier"]

    files, images = load_feature_files(artifacts / "features"), np.load(artifacts / "sample" / "nfe_1.npy")
    extractor = build_extractor("classifier", files.weights, CPU)
    sets = [extract_features(part, extractor, batch_size=20, device=CPU).features for part in np.split(images, 3)]
    fids = [frechet_distance(features, files.reference) for features in sets]
    found = {key: metrics[f"{key}_classifier"]["nfe_1"] for key in ("fid", "fid-min", "fid-spread")}
    expected = {"fid": np.mean(fids), "fid-min": min(fids), "fid-spread": max(fids) - min(fids)}
    assert found == pytest.approx(expected, rel=1e-4)
    assert protocol["rows"]["nfe_1"]["fid_std"] == pytest.approx(np.std(fids, ddof=1), rel=1e-3)
    assert recorder.seen["nfe_1/fid-min"] == found["fid-min"]
    page = (tmp_path / "whole" / "report.html").read_text()
    row = page[page.index('data-row="nfe_1"') :].partition("</tr>")[0]
    assert "lowest FID" in page and "spread of FID" in page and "3 × 20" in row
    mean, low, spread = (four_digits(found[key]) for key in ("fid", "fid-min", "fid-spread"))
    assert re.search(rf"{mean}<small> ±.*>{low}<.*>{spread}<", row, re.DOTALL)


def test_rows_of_another_number_of_images_are_no_points_of_the_same_curve(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(sections, "save_lines", lambda series, path, **how: drawn.update(series=series, **how))
    counts = {"real": 5, "untrained": 9, "nfe_1": 9, "teacher_nfe_35_of_5": 5, "teacher_nfe_35": 9}
    models = ["real", "untrained", "student", "teacher", "teacher"]
    rows = [
        Row(name, model, 0, 1, (), np.zeros((count, 2, 2, 1), np.uint8), metrics={"fid": 1.0})
        for (name, count), model in zip(counts.items(), models, strict=True)
    ]
    sections._plot_fid(rows, SimpleNamespace(files=SimpleNamespace(short_name="x")), tmp_path)
    assert list(drawn["series"]) == ["student", "teacher (5 images)", "teacher"]
    assert list(drawn["levels"]) == ["held-out images (5 images)"]


def test_the_page_needs_nothing_but_itself(evaluated):
    page = (evaluated[0] / "report.html").read_text()
    sources = re.findall(r"(?:src|href)='?\"?([^'\" >]{0,30})", page)
    links = [source for source in sources if source.startswith("#")]  # within a chart
    pictures = [source for source in sources if source.startswith("data:image/png;base64,")]
    assert len(links) + len(pictures) == len(sources)
    assert len(pictures) == 17  # five grids, two of neighbours, strips, two edits, seven training grids
    assert page.count("<svg") == 3, "FID, losses, losses by noise level"
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    titles = [
        "Held-out images",
        "Student before training",
        "Student, one call",
        "Student, two calls",
        "Teacher, 35 calls",
    ]
    for title in titles:
        assert f"<b>{title}</b>" in page
    assert "<b>nfe_1" not in page, "titles in words"
    assert "off by 12.3 of 255 (given: 56.8)" in page and "Inpaint" in page


def row_of(name, model, nfe, fid, ema=0):
    return Row(name, model, ema, nfe, (), np.zeros((4, 2, 2, 1), np.uint8), metrics={"fid": fid})


def test_the_sentence_is_of_the_fewest_calls_and_the_teacher():
    rows = [row_of("nfe_2", "student", 2, 2.456), row_of("nfe_1", "student", 1, 2.664)]
    assert sentence(rows, "CD") == "CD reaches FID 2.66 in one call."
    rows += [row_of("nfe_1_ema1", "student", 1, 1.0, ema=1), row_of("teacher_nfe_35", "teacher", 35, 2.0)]
    assert sentence(rows, "") == "The student reaches FID 2.66 in one call, the teacher 2.00 in 35."


def test_every_metric_of_a_row_has_a_deviation_and_rows_of_other_sizes_an_equal_number_beside(artifacts, tmp_path):
    digits = np.load(artifacts / "prepare" / "train_images.npy")
    write_samples(tmp_path / "sample", digits[:40], {"nfe_1": 40, "untrained": 200})
    run_evaluate(artifacts, tmp_path / "out", sample=tmp_path / "sample")
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text())
    assert protocol["rows"]["real"]["num_images"] == 60 and protocol["rows"]["nfe_1"]["num_images"] == 40
    expected = {f"{key}_std" for key in ("is", "kid", "precision", "recall")}
    assert expected <= set(protocol["rows"]["nfe_1"])
    assert "fid_std" not in protocol["rows"]["nfe_1"], "40 images have no covariance of 64 features to speak of"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('data-row="real"') == 2 and "40 images of every row" in page
    lines = [line.split(",") for line in (tmp_path / "out" / "plots" / "fid.csv").read_text().splitlines()]
    by_row = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[1:]}
    assert float(by_row["nfe_1"]["fid_of_equal_numbers"]) == float(by_row["nfe_1"]["fid"]), "all of the 40"
    assert float(by_row["real"]["fid_of_equal_numbers"]) > float(by_row["real"]["fid"]), "FID grows as images get fewer"


def test_rows_of_equal_numbers_are_measured_once(evaluated):
    assert (evaluated[0] / "report.html").read_text().count('data-row="real"') == 1


def test_memorised_images_lie_at_distance_zero_beside_themselves(artifacts, tmp_path, monkeypatch):
    digits = np.load(artifacts / "prepare" / "train_images.npy")
    write_samples(tmp_path / "sample", digits, {"nfe_1": 0, "untrained": 200})
    shown = {}
    monkeypatch.setattr(sections, "_beside_neighbours", lambda row, found, training: shown.update({row.model: found}))
    monkeypatch.setattr(sections, "Section", lambda *args, **kwargs: Section("none"))
    run_evaluate(artifacts, tmp_path / "out", sample=tmp_path / "sample")
    copied, real = shown["student"], shown["real"]
    assert len(copied.images) == len(real.images) == 60 and copied.distances.shape == (60, 3)
    assert (copied.distances[:, 0] < 1e-3).all() and (copied.training[:, 0] == copied.images).mean() > 0.9
    assert np.median(real.distances[:, 0]) > 0.01


def test_published_statistics_have_no_neighbours_and_the_page_does_without(artifacts, tmp_path):
    folder = copy_of(artifacts / "features", tmp_path / "features")
    (folder / "reference_features.npy").unlink()
    names = ("prepare", "teacher", "base", "student", "sample", "edit")
    paths = {f"{name}_dir": artifacts / name for name in names}
    settings = Evaluate(beside_fid=("is",))
    evaluate(settings, **paths, features_dir=folder, out_dir=tmp_path / "out", monitor=Monitor())
    assert "Nearest training" not in (tmp_path / "out" / "report.html").read_text()


def test_a_model_of_classes_shows_a_row_of_each_class(artifacts, tmp_path):
    folder = tmp_path / "sample"
    digits = np.load(artifacts / "prepare" / "train_images.npy")
    write_samples(folder, digits, {"nfe_1": 10, "untrained": 200})
    labels = np.load(artifacts / "prepare" / "train_labels.npy")
    np.save(folder / "labels.npy", labels)
    index = json.loads((folder / "samples.json").read_text()) | {"labels_file": "labels.npy"}
    (folder / "samples.json").write_text(json.dumps(index))
    run_evaluate(artifacts, tmp_path / "out", sample=folder)
    page = (tmp_path / "out" / "report.html").read_text()
    names = page[page.index("<h2>Samples</h2>") :].partition('class="names"')[2].partition("</div>")[0]
    assert re.findall("<span>(.*?)</span>", names) == [str(digit) for digit in range(10)]
    images = np.load(folder / "nfe_1.npy")
    grid = sections._grid(images, labels, [str(digit) for digit in range(10)], "x")
    shown = np.asarray(Image.open(io.BytesIO(grid.png)))
    for digit in (0, 3, 9):
        row = shown[2 + digit * 34 : 2 + digit * 34 + 32 : 4]
        np.testing.assert_array_equal(row[:, 2:34:4, 0], images[labels == digit][0][..., 0])
    assert not (labels == 1).any() and not shown[2 + 34 : 2 * 34, :, 3].any(), "no image of a 1: an empty row"


def test_without_edits_there_is_no_such_section(artifacts, tmp_path):
    write_edits(tmp_path / "edit", None, ())
    run_evaluate(artifacts, tmp_path / "out", edit=tmp_path / "edit")
    assert "Editing" not in (tmp_path / "out" / "report.html").read_text()


def test_the_same_inputs_give_the_same_bytes(evaluated, artifacts, tmp_path):
    run_evaluate(artifacts, tmp_path)
    first = {path.relative_to(evaluated[0]): path.read_bytes() for path in evaluated[0].rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert first == again


def test_a_recipe_without_teacher_has_a_page_too(artifacts, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "none.json").write_text("{}")
    digits = np.load(artifacts / "prepare" / "train_images.npy")
    write_samples(tmp_path / "sample", digits, {"nfe_1": 40, "untrained": 200})
    run_evaluate(artifacts, tmp_path / "out", teacher=tmp_path / "teacher", sample=tmp_path / "sample")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<dt>Teacher</dt><dd>none</dd>" in page
    assert "teacher_nfe_35" not in page and "Teacher, 35" not in page
    assert re.search(r"<h1>The student reaches FID [\d.]+ in one call.</h1>", page)


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_features_of_other_images_are_refused(artifacts, tmp_path):
    folder = copy_of(artifacts / "features", tmp_path / "features")
    facts = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps(facts | {"data_sha256": "0" * 64}))
    with pytest.raises(UserError, match="made from other images"):
        run_evaluate(artifacts, tmp_path / "out", features=folder)


def test_missing_inputs_name_the_stage_that_writes_them(artifacts, tmp_path):
    with pytest.raises(UserError, match=r"samples.json: no samples here; the stage sample"):
        run_evaluate(artifacts, tmp_path / "out", sample=tmp_path)
    with pytest.raises(UserError, match=r"features.json: no feature network here; the stage features"):
        run_evaluate(artifacts, tmp_path / "out", features=tmp_path)
    with pytest.raises(UserError, match=r"edit.json: no edited images here; the stage edit makes them"):
        run_evaluate(artifacts, tmp_path / "out", edit=tmp_path)


def test_a_row_of_too_few_or_other_images_is_refused_by_name(artifacts, tmp_path):
    write_samples(tmp_path / "few", np.zeros((3, 8, 8, 1), np.uint8), {"nfe_1": 40})
    with pytest.raises(UserError, match=r"row nfe_1: 3 images are too few.*at least 4; raise sample.num_images"):
        run_evaluate(artifacts, tmp_path / "out", sample=tmp_path / "few")
    write_samples(tmp_path / "large", np.zeros((9, 16, 16, 1), np.uint8), {"nfe_1": 40})
    with pytest.raises(UserError, match=r"row nfe_1: images are \(16, 16, 1\), the data set's \(8, 8, 1\)"):
        run_evaluate(artifacts, tmp_path / "out", sample=tmp_path / "large")


def test_without_held_out_images_there_is_no_floor(artifacts, tmp_path):
    folder, monitor = copy_of(artifacts / "prepare", tmp_path / "prepare"), Recorder()
    for part in ("images", "labels"):
        np.save(folder / f"heldout_{part}.npy", np.load(folder / f"heldout_{part}.npy")[:0])
    run_evaluate(artifacts, tmp_path / "out", monitor, prepare=folder)
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


def test_names_from_outside_cannot_put_markup_into_the_page(tmp_path, monkeypatch):
    evil = "<script>alert(1)</script>"
    rows = [{"name": evil, "title": evil, "note": evil, "cells": [evil], "bar": None, "bound": False}]
    words = dict.fromkeys(("title", "dataset", "sentence", "scale"), evil)
    picture = Picture(b"", caption=evil, note=evil, names=[evil])
    tables = [{"note": evil, "columns": [evil], "rows": rows}]
    monkeypatch.setattr(Picture, "_size", (1, 1))
    shown = [Section("Samples", pictures=[picture]), Section(evil, facts={evil: evil})]
    contents = {"facts": {evil: evil}, "protocol": {evil: evil}, "tables": tables, "sections": shown}
    write_page(tmp_path / "page.html", TEMPLATE, **words, **contents)
    assert "<script" not in (tmp_path / "page.html").read_text()
