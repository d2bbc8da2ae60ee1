"""Metrics against their formulas, written out; the stage that computes them is tested in flows/stages."""

import numpy as np
import pytest
import torch

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
from cm_core.metrics.features import ImageFeatures

CPU = torch.device("cpu")


def rows(count, *, mean=0.0, scale=1.0, seed=0, dim=3):
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + mean


def metrics(generated, real, logits=None, **params):
    return compare(ImageFeatures(generated, logits), Reference.of(real), MetricParams(**params))


def test_moments_of_unequal_batches():
    moments = Moments()
    assert moments.count == 0
    for batch in ([[1.0, 0.0]], [[2.0, 4.0], [6.0, -1.0]], [[3.0, 1.0]] * 3):
        moments.add(torch.tensor(batch))
    every = np.array([[1, 0], [2, 4], [6, -1], [3, 1], [3, 1], [3, 1]], dtype=np.float64)
    assert moments.count == 6
    found = moments.statistics()
    np.testing.assert_allclose(found.mu, every.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, np.cov(every, rowvar=False, ddof=1), rtol=1e-14)
    assert found.mu.dtype == found.sigma.dtype == np.float64


def test_fid_of_known_gaussians():
    generated = torch.tensor([[0.0], [2.0], [4.0]])  # mean 2, variance 4
    assert frechet_distance(generated, Reference(Statistics(np.array([5.0]), np.array([[9.0]])))) == pytest.approx(
        (5 - 2) ** 2 + 4 + 9 - 2 * 6
    )


def test_a_reference_keeps_all_features_of_few_images_in_their_order():
    features = rows(10).double()
    found = Reference.collect(iter(features.split(4)), 10)
    assert torch.equal(found.features, features.float()) and found.features.dtype == torch.float32
    assert torch.equal(Reference.of(features).features, features.float())
    np.testing.assert_allclose(found.statistics.mu, features.numpy().mean(0), rtol=1e-12)


def test_a_subset_is_always_the_same_draw():
    """These very rows: metrics of a version compare with those of the version before."""
    assert random_rows(1000, 6).tolist() == KEPT
    assert random_rows(5, 5).tolist() == random_rows(5, 9).tolist() == [0, 1, 2, 3, 4]


KEPT = [3, 120, 530, 647, 843, 853]


@pytest.mark.parametrize(
    ("needs", "beside"),
    [(False, ()), (False, ("is",)), (True, ("kid",)), (True, ("precision_recall",)), (True, ("is", "kid"))],
)
def test_which_metrics_compare_single_images(needs, beside):
    assert MetricParams(beside_fid=beside).needs_features is needs


@pytest.mark.parametrize(
    ("images", "kept", "splits", "subset"),
    [(4000, None, 8, 1000), (4000, 2000, 4, 500), (3999, 9999, 7, 999), (7, 9, 1, 2), (8, 4, 1, 2), (12, 12, 1, 3)],
)
def test_parts_and_subsets_fit_the_smaller_set(images, kept, splits, subset):
    reference = Reference(Statistics(np.zeros(1), np.eye(1)), None if kept is None else torch.zeros(kept, 1))
    adapted = MetricParams().adapted_to(images, reference)
    assert (adapted.isc_splits, adapted.kid_subset_size) == (splits, subset)
    with pytest.raises(ValueError, match="3 images are too few: prc_neighbourhood=3 needs at least 4"):
        MetricParams().adapted_to(3, reference)
    small = Reference(reference.statistics, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="3 images are too few"):
        MetricParams().adapted_to(images, small)


def test_settings_that_fit_are_kept():
    asked = MetricParams(isc_splits=3, isc_min_images=10, kid_subset_size=20, kid_subsets=7)
    assert asked.adapted_to(100, Reference(Statistics(np.zeros(1), np.eye(1)))) == asked


def test_kid_is_the_unbiased_mmd_of_a_cubic_kernel():
    x, y = rows(40, mean=0.5), rows(40, seed=1)

    def kernel(a, b):
        return (a.double() @ b.double().T / 3 + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - k.trace()) / (40 * 39)

    expected = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    found = metrics(x, y, beside_fid=("kid",), kid_subset_size=40, kid_subsets=3)  # a subset of all
    assert found == {
        **{"fid": pytest.approx(frechet_distance(x, Reference.of(y))), "kid": pytest.approx(expected.item(), rel=1e-4)},
        "kid_std": pytest.approx(0, abs=1e-6),
    }


def test_kid_depends_on_its_subsets():
    x, y = rows(40, mean=0.5), rows(40, seed=1)
    found = [metrics(x, y, beside_fid=("kid",), kid_subset_size=10, kid_subsets=n) for n in (1, 5)]
    assert found[0]["kid_std"] == 0 and found[1]["kid_std"] > 0 and found[0]["kid"] != found[1]["kid"]


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("images", [30, 60])
def test_precision_and_recall_count_who_lies_within_the_others_balls(neighbours, images):
    x, y = rows(60, scale=0.7), rows(50, seed=1)
    found = metrics(x, y, beside_fid=("precision_recall",), prc_neighbourhood=neighbours, prc_images=images)
    x, y = x[random_rows(60, images)], y[random_rows(50, images)]

    def covered(points, balls):
        radii = torch.cdist(balls, balls).sort(1).values[:, neighbours]
        return (torch.cdist(points, balls) <= radii).any(1).float().mean().item()

    assert found["precision"] == pytest.approx(covered(x, y)) and found["recall"] == pytest.approx(covered(y, x))
    assert found["precision"] != found["recall"]


def test_the_inception_score_is_the_exponential_of_the_mean_divergence():
    logits, features = 2 * rows(60, dim=5, seed=3), rows(60)
    p = logits.double().softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    found = metrics(features, features, logits, beside_fid=("is",), isc_splits=1)
    assert found["is"] == pytest.approx(expected) and found["is_std"] == 0
    in_parts = metrics(features, features, logits, beside_fid=("is",), isc_splits=6)
    assert in_parts["is"] < expected and in_parts["is_std"] > 0, "small parts are biased downwards"
    assert set(found) == {"fid", "is", "is_std"}
    assert set(metrics(features, features, logits, beside_fid=())) == {"fid"}
    assert set(metrics(features, features, None, beside_fid=("is",))) == {"fid"}


@pytest.mark.parametrize("metric", ["kid", "precision_recall"])
def test_metrics_of_single_images_need_their_features(metric):
    published = Reference(Reference.of(rows(20)).statistics)
    with pytest.raises(ValueError, match="kid and precision_recall need features of single reference images"):
        compare(ImageFeatures(rows(20), None), published, MetricParams(beside_fid=(metric,)))


def test_images_are_read_in_batches_and_compared_with_settings_that_fit(monkeypatch):
    asked = {}

    def extracted(images, extractor, **options):
        asked.update(images=images, extractor=extractor, **options)
        return ImageFeatures(rows(len(images)), None)

    monkeypatch.setattr("cm_core.metrics.evaluation.extract_features", extracted)
    generated, extractor, on_batch = np.zeros((40, 2, 2, 1), np.uint8), torch.nn.Identity(), print
    reference = Reference.of(rows(44, seed=1))
    options = {"batch_size": 7, "device": CPU, "on_batch": on_batch}
    found = evaluate_images(generated, reference, extractor, params=MetricParams(kid_subsets=4), **options)
    assert asked == {"images": generated, "extractor": extractor, **options}
    fitting = MetricParams(kid_subsets=4, isc_splits=1, kid_subset_size=10)
    assert found == compare(ImageFeatures(rows(40), None), reference, fitting)
    del options["on_batch"]
    assert evaluate_images(generated, reference, extractor, params=MetricParams(kid_subsets=4), **options) == found
    asked["on_batch"](1, 2)
    with pytest.raises(ValueError, match="3 images are too few"):
        evaluate_images(generated[:3], reference, extractor, params=MetricParams(), **options)


def test_metrics_print_nothing(capfd):
    metrics(rows(60), rows(50, seed=1), rows(60, dim=5), kid_subset_size=10, kid_subsets=2, isc_splits=1)
    assert tuple(capfd.readouterr()) == ("", "")
