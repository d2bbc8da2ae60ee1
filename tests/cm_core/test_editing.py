"""Editing: orthogonal maps, known coefficients that stay, and exact behaviour on Gaussian data."""

import math

import pytest
import torch
from torch.testing import assert_close

from cm_core import editing
from cm_core.editing import InterpolatedNoise, SharedNoise, falling_sigmas, filling_sigmas, slerp
from cm_core.noise import Noise
from cm_core.sampling import ImageNoise, multistep
from cm_core.tensors import from_pixels, to_pixels
from oracles import GaussianConsistency

CPU = torch.device("cpu")
SMALL = Noise(sigma_data=0.1)  # keeps images inside -1..1, where clipping changes nothing
MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:6, 3:7] = True
OPERATORS = {
    "inpaint": editing.inpaint(MASK),
    "colorize": editing.colorize(),
    "superres 2": editing.superres(2),
    "superres 4": editing.superres(4),
}


def images(count=5, *, seed=0, scale=0.1):
    return scale * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(count, shape=(3, 8, 8), seed=0):
    return ImageNoise(seed, range(count), shape, CPU)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_operators_are_orthogonal(operator):
    a, b = images(seed=1), images(seed=2)
    assert_close(operator.inverse(operator.forward(a)), a)
    assert_close(operator.forward(operator.inverse(operator.forward(a))), operator.forward(a))
    assert_close((operator.forward(a) * operator.forward(b)).sum(), (a * b).sum())


@pytest.mark.parametrize("direction", [editing.LUMINANCE, (1.0,) * 4, (1.0,) * 64, (3.0, 1.0)])
def test_matrices_are_orthogonal_with_the_given_first_column(direction):
    q = editing.orthogonal(direction)
    assert_close(q @ q.T, torch.eye(len(direction), dtype=torch.float64))
    column = torch.tensor(direction, dtype=torch.float64)
    assert_close(q[:, 0], column / column.norm())


def test_the_colour_matrix_is_the_printed_one():
    q = editing.orthogonal(editing.LUMINANCE)
    printed = [[0.447113, -0.8204, 0.3564], [0.878072, 0.4785, 0.0], [0.170528, -0.3129, -0.9343]]
    assert_close(q, torch.tensor(printed, dtype=torch.float64), atol=5e-5, rtol=0)
    assert_close(q[:, 0], torch.tensor([0.447113, 0.878072, 0.170528], dtype=torch.float64), atol=5e-7, rtol=0)


def test_what_a_colouriser_sees_has_the_luminance_of_the_image():
    x = images()
    grey, operator = editing.to_grey(x), OPERATORS["colorize"]
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 1], grey[:, 2])
    assert_close(operator.forward(grey)[:, 0], operator.forward(x)[:, 0])


def test_what_super_resolution_is_given_are_the_means_of_the_patches():
    x = images()
    means = torch.nn.functional.avg_pool2d(x, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert_close(OPERATORS["superres 4"].given(x), means)


def test_a_factor_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="factor 3 does not divide images of 8x8 pixels"):
        editing.superres(3).given(images())


@pytest.mark.parametrize("sigmas", [[80.0], [80.0, 2.0, 0.3], filling_sigmas(Noise(), 5)])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_known_coefficients_come_back(operator, sigmas):
    y = images().float()
    x = editing.fill_in(GaussianConsistency(SMALL), noise(5), y, operator, sigmas, sigma_min=0.002)
    before, after = operator.forward(y), operator.forward(x)
    known = ~operator.unknown.expand(before.shape)
    assert_close(after[known], before[known], atol=1e-6, rtol=0)
    assert (after - before)[~known].abs().min() > 0, "what is unknown is invented"


def test_known_pixels_come_back_to_the_bit():
    pixels = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sigmas = filling_sigmas(Noise(), 7)
    f = GaussianConsistency(Noise())
    x = editing.fill_in(f, noise(4), from_pixels(pixels), OPERATORS["inpaint"], sigmas, sigma_min=0.002)
    edited = to_pixels(x)
    assert torch.equal(edited[:, ~MASK], pixels[:, ~MASK])
    assert not torch.equal(edited[:, MASK], pixels[:, MASK])


def test_unknown_coefficients_of_the_input_have_no_influence():
    y = images().float()
    for operator in OPERATORS.values():
        other = operator.combine(y, images(seed=9).float())
        results = [
            editing.fill_in(GaussianConsistency(SMALL), noise(5), given, operator, [80.0, 1.0], sigma_min=0.002)
            for given in (y, other)
        ]
        assert_close(*results, atol=1e-6, rtol=0)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("num_steps", [2, 10])
def test_invented_coefficients_have_the_variance_of_the_data(operator, num_steps):
    """The pixels of Gaussian data are independent, and so are the coefficients of any orthogonal map."""
    f = GaussianConsistency(SMALL)
    y = images(400).float()
    sigmas = filling_sigmas(SMALL, num_steps)
    x = editing.fill_in(f, noise(400), y, operator, sigmas, sigma_min=SMALL.sigma_min)
    coefficients = operator.forward(x)
    invented = coefficients[operator.unknown.expand(coefficients.shape)]
    assert invented.var().item() == pytest.approx(0.1**2, rel=0.03)
    assert invented.mean().abs() < 0.002


def test_filling_everything_in_is_multistep_sampling():
    f, sigmas = GaussianConsistency(SMALL), [80.0, 3.0, 0.5]
    everything = editing.inpaint(torch.ones(8, 8, dtype=torch.bool))
    x = editing.fill_in(f, noise(3), torch.ones(3, 3, 8, 8), everything, sigmas, sigma_min=0.002)
    assert torch.equal(x, multistep(f, noise(3), sigmas, sigma_min=0.002))


def test_an_edit_does_not_depend_on_its_batch():
    f, y = GaussianConsistency(SMALL), images(1).float()

    def edit(indices):
        draws = ImageNoise(4, indices, (3, 8, 8), CPU)
        return editing.fill_in(
            f, draws, y.expand(len(indices), -1, -1, -1), OPERATORS["colorize"], [80, 1], sigma_min=0.002
        )

    assert torch.equal(edit(range(5))[3:], torch.cat([edit([3]), edit([4])]))


def test_the_grid_to_fill_in_leaves_out_its_last_point():
    assert_close(torch.tensor(filling_sigmas(Noise(), 39)), Noise().grid(40)[:-1].float())


@pytest.mark.parametrize("edit", ["fill_in", "repaint", "denoise"])
def test_levels_out_of_order_are_refused(edit):
    operator = [OPERATORS["colorize"]] if edit == "fill_in" else []
    with pytest.raises(ValueError, match="must decrease and stay above sigma_min"):
        getattr(editing, edit)(GaussianConsistency(SMALL), noise(5), images(), *operator, [1, 2], sigma_min=0.002)


def test_strokes_fall_in_the_papers_ratio():
    assert falling_sigmas(Noise(), 5.38, 2) == pytest.approx([5.38, 2.24])
    assert falling_sigmas(Noise(), 1.0, 3) == pytest.approx([1, 0.41636, 0.17336], abs=1e-5)


@pytest.mark.parametrize("sigma", [80.1, 0.002, 0.004, -1.0, float("nan")])
def test_levels_outside_of_the_models_range_are_refused(sigma):
    with pytest.raises(ValueError, match=r"must lie above sigma_min=0\.002 and up to sigma_max=80"):
        falling_sigmas(Noise(), sigma, 2)


def test_repainting_keeps_what_survives_the_first_level():
    """The exact f contracts both image and noise: E x = y c, with c the contraction from the level."""
    f, sigma = GaussianConsistency(SMALL), 0.2
    y = images(1).float().expand(2000, -1, -1, -1)
    x = editing.repaint(f, noise(2000), y, [sigma], sigma_min=SMALL.sigma_min)
    contraction = math.sqrt((0.002**2 + 0.1**2) / (sigma**2 + 0.1**2))
    assert_close(x.mean(0), contraction * y[0], atol=6 * contraction * sigma / math.sqrt(2000), rtol=0)
    assert (x - contraction * y).std().item() == pytest.approx(contraction * sigma, rel=0.01)


def test_denoising_is_one_call_at_the_level_of_the_noise():
    f, x = GaussianConsistency(SMALL), images(scale=0.2)
    (level,) = sigmas = [0.3]
    expected = f(x, torch.full((5,), level))
    assert_close(editing.denoise(f, noise(5), x, sigmas, sigma_min=0.002), expected.clamp(-1, 1))


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 1.0])
def test_slerp_keeps_the_norm_and_divides_the_angle(weight):
    a, b = (torch.nn.functional.normalize(images(seed=seed).flatten(1)) for seed in (1, 2))
    c = slerp(a, b, torch.full((5,), weight))
    whole, part = ((x * a).sum(1).clamp(-1, 1).acos() for x in (b, c))
    assert_close(c.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert_close(part, weight * whole, atol=1e-7, rtol=1e-6)


def test_slerp_reaches_its_ends_and_is_symmetric():
    a, b, weight = images(seed=1), images(seed=2), torch.tensor([0.0, 1.0, 0.3, 0.5, 0.9])
    c = slerp(a, b, weight)
    assert_close(c[0], a[0])
    assert_close(c[1], b[1])
    assert_close(c, slerp(b, a, 1 - weight), atol=1e-6, rtol=1e-5)


def test_slerp_of_parallel_samples_is_the_straight_line():
    a = images(3)
    scaled = a * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    assert_close(slerp(a, scaled, torch.full((3,), 0.5)), (a + scaled) / 2)


def test_each_sample_of_slerp_goes_its_own_way():
    a, b, weight = images(seed=1), images(seed=2), torch.linspace(0, 1, 5)
    alone = torch.cat([slerp(a[i : i + 1], b[i : i + 1], weight[i : i + 1]) for i in range(5)])
    assert_close(slerp(a, b, weight), alone)


def test_interpolated_noise_ends_at_both_images_at_every_draw():
    ends = [noise(1, seed=seed) for seed in (1, 2)]
    frames = InterpolatedNoise(noise(1, seed=1), noise(1, seed=2), torch.linspace(0, 1, 4))
    for _ in range(2):
        drawn = frames.draw()
        assert drawn.shape == (4, 3, 8, 8)
        assert_close(drawn[0], ends[0].draw()[0])
        assert_close(drawn[-1], ends[1].draw()[0])
        assert drawn.var().item() == pytest.approx(1, abs=0.25), "it is noise in between, too"


def test_shared_noise_is_fresh_at_every_draw_and_the_same_for_every_frame():
    shared = SharedNoise(noise(1), 3)
    first, second = shared.draw(), shared.draw()
    assert torch.equal(first[0], first[2]) and not torch.equal(first, second)
