"""Deviations estimated from one set of images against those over many sets of the same generator."""

import numpy as np
import pytest
import torch

from cm_core.metrics.evaluation import MetricParams, Reference, compare
from cm_core.metrics.features import ImageFeatures
from cm_core.metrics.neighbours import nearest
from cm_core.metrics.uncertainty import deviations

PARAMS = MetricParams(kid_subsets=20, isc_splits=1)
DIM, COUNT, SETS = 6, 300, 40


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def drawn(generator, count=COUNT):
    features = 0.8 * torch.randn(count, DIM, generator=generator) + 0.2
    return ImageFeatures(features, features @ torch.randn(DIM, 5, generator=generator_of(9)))


@pytest.fixture(scope="module")
def many():
    """The metrics of many sets, and the estimates of some of them."""
    reference, generator = Reference.of(torch.randn(400, DIM, generator=generator_of(1))), generator_of(2)
    params = PARAMS.adapted_to(COUNT, reference)
    sets = [drawn(generator) for _ in range(SETS)]
    metrics = [compare(one, reference, params) for one in sets]
    pairs = list(zip(sets, metrics, strict=True))[:8]
    return metrics, [deviations(one, reference, params, found) for one, found in pairs]


@pytest.mark.parametrize("key", ["fid", "is", "kid", "precision", "recall"])
def test_an_estimate_from_one_set_is_the_deviation_over_many(many, key):
    metrics, estimates = many
    observed = np.std([found[key] for found in metrics], ddof=1)
    estimated = np.mean([found[f"{key}_std"] for found in estimates])
    assert 0.65 < estimated / observed < 1.5, "40 sets leave an uncertainty of 11 %; recall's estimate is a rough one"


def test_the_deviation_of_fid_is_that_of_gaussians_in_closed_form():
    """In one dimension FID is (m - m_r)^2 + (s - s_r)^2; with s = s_r its variance is 4 (m - m_r)^2 s^2 / N."""
    features = torch.randn(20_000, 1, generator=generator_of(3))
    reference = Reference.of(features - 2)
    found = deviations(ImageFeatures(features, None), reference, PARAMS, {"fid": 4.0})
    assert found["fid_std"] == pytest.approx(2 * 2 * float(features.std()) / np.sqrt(20_000), rel=0.03)


def test_deviations_shrink_with_the_root_of_the_number_of_images():
    reference = Reference.of(torch.randn(400, DIM, generator=generator_of(1)))
    found = [
        deviations(drawn(generator_of(4), count), reference, PARAMS, {"fid": 1.0, "is": 2.0}) for count in (1000, 4000)
    ]
    for key in ("fid_std", "is_std"):
        assert found[0][key] / found[1][key] == pytest.approx(2, rel=0.1)


def test_as_few_images_as_features_have_no_deviation_of_fid():
    reference = Reference.of(torch.randn(400, DIM, generator=generator_of(1)))
    assert "fid_std" not in deviations(drawn(generator_of(5), DIM), reference, PARAMS, {"fid": 1.0})
    assert "fid_std" in deviations(drawn(generator_of(5), 10 * DIM), reference, PARAMS, {"fid": 1.0})


def test_features_that_never_vary_do_not_matter():
    generated, real = drawn(generator_of(6)).features, torch.randn(400, DIM, generator=generator_of(1))
    found = deviations(ImageFeatures(generated, None), Reference.of(real), PARAMS, {})
    padded = [torch.cat([rows, torch.ones(len(rows), 2)], 1) for rows in (generated, real)]
    again = deviations(ImageFeatures(padded[0], None), Reference.of(padded[1]), PARAMS, {})
    assert again["fid_std"] == pytest.approx(found["fid_std"], rel=1e-3)


def test_neighbours_are_the_nearest_and_a_copy_lies_at_zero():
    rows = torch.randn(500, DIM, generator=generator_of(7))
    queries = torch.cat([rows[[3]], torch.randn(200, DIM, generator=generator_of(8))])
    distances, indices = nearest(queries, rows, 3)
    squares = ((queries[:, None].double() - rows[None].double()) ** 2).sum(2)
    expected = squares.sqrt().sort(1)
    assert distances[0, 0] == 0 and indices[0, 0] == 3
    assert torch.equal(indices, expected.indices[:, :3])
    torch.testing.assert_close(distances.double(), expected.values[:, :3], rtol=1e-5, atol=1e-6)
    assert nearest(queries, rows[:2], 3)[0].shape == (201, 2)
