"""The augmentation does what its labels say, and nothing where they are zero."""

import math

import pytest
import torch

from cm_core.augment import LABEL_DIM, SYM6, Augment, Draws, warp
from cm_core.randomness import make_generator

SIZE = 32
AFFINE = ("scale", "rotate", "aniso", "translate")


@pytest.fixture
def generator():
    return make_generator("cpu", "augment")


def smooth_images(batch=4, channels=2, size=SIZE):
    """Random images without the highest frequencies, which no resampling keeps."""
    noise = torch.randn(batch, channels, size, size, generator=make_generator("cpu", "images"))
    spectrum = torch.fft.fft2(noise)
    frequency = torch.fft.fftfreq(size).abs()
    return torch.fft.ifft2(spectrum * ((frequency[:, None] < 0.1) & (frequency < 0.1))).real


def coordinate_images(batch):
    """Images [B, 2, H, W] whose pixel values are their own (x, y), counted from the centre."""
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(batch, 2, SIZE, SIZE)


def draws(**values):
    return Draws(**{name: torch.tensor([values.get(name, 0.0)]) for name in Draws._fields})


def map_in_the_middle(x):
    """Read off an output of coordinate images where its middle pixels [B, 4, 2] come from."""
    middle = slice(SIZE // 2 - 1, SIZE // 2 + 1)
    return x[..., middle, middle].flatten(2).mT


def test_filter_is_the_wavelet_it_claims_to_be():
    taps = torch.tensor(SYM6, dtype=torch.float64)
    for shift in range(0, 12, 2):  # orthonormal to its even shifts, so that halving undoes doubling
        assert (taps[shift:] @ taps[: 12 - shift]).item() == pytest.approx(float(shift == 0), abs=1e-9)
    signs, places = torch.tensor([1.0, -1.0] * 6), torch.arange(12.0)
    for power in range(6):  # six vanishing moments
        assert (taps * signs * (places - 5) ** power).sum().item() == pytest.approx(0, abs=1e-7)


def test_probability_zero_changes_nothing(generator):
    x = smooth_images()
    out, labels = Augment(probability=0)(x, generator)
    torch.testing.assert_close(out, x)
    assert labels.shape == (4, LABEL_DIM) and not labels.any()


def test_images_that_drew_nothing_pass_the_warp_unchanged(generator):
    x = torch.randn(64, 1, 8, 8, generator=generator)  # the highest frequencies included
    out, labels = Augment(probability=0.1, transforms=AFFINE)(x, generator)
    untouched = ~labels.any(dim=1)
    assert 0 < untouched.sum() < 64
    torch.testing.assert_close(out[untouched], x[untouched], atol=1e-4, rtol=0)
    assert ((out - x)[~untouched].flatten(1).abs().amax(1) > 1e-3).all()


def test_flips_follow_their_labels(generator):
    x = smooth_images(32)
    out, labels = Augment(probability=1, transforms=("xflip", "yflip"))(x, generator)
    assert {tuple(row) for row in labels[:, :2].tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert not labels[:, 2:].any()
    for before, after, (flip_x, flip_y) in zip(x, out, labels[:, :2].bool(), strict=True):
        axes = [axis for axis, on in [(2, flip_x), (1, flip_y)] if on]
        assert torch.equal(after, before.flip(axes))


def test_half_of_the_images_are_flipped_whatever_the_probability(generator):
    labels = Augment(probability=0.01).draw(4000, generator).labels()
    assert labels[:, 0].mean() == pytest.approx(0.5, abs=0.05)
    assert labels[:, 1].mean() == pytest.approx(0.005, abs=0.005)


@pytest.mark.parametrize(
    "transform, columns", [("scale", [2]), ("rotate", [3, 4]), ("aniso", [5, 6]), ("translate", [7, 8])]
)
def test_each_transform_is_drawn_as_often_as_asked_and_has_its_own_labels(transform, columns, generator):
    labels = Augment(probability=0.3, transforms=(transform,)).draw(4000, generator).labels()
    assert labels[:, columns].any(dim=1).float().mean() == pytest.approx(0.3, abs=0.03)
    others = [i for i in range(LABEL_DIM) if i not in columns]
    assert not labels[:, others].any()


def test_a_transform_does_not_change_the_draws_of_the_others():
    alone = Augment(probability=0.5, transforms=("rotate",)).draw(16, make_generator("cpu", 1))
    among_others = Augment(probability=0.5).draw(16, make_generator("cpu", 1))
    assert torch.equal(alone.rotate, among_others.rotate)


def test_the_generator_decides(generator):
    x, augment = smooth_images(), Augment(probability=0.5)
    first = augment(x, make_generator("cpu", 1))
    assert all(torch.equal(a, b) for a, b in zip(first, augment(x, make_generator("cpu", 1)), strict=True))
    assert not torch.equal(first[0], augment(x, make_generator("cpu", 2))[0])


# The filter is not symmetric: a warped image lies up to a tenth of a pixel beside its place.
NEAR = {"atol": 0.15, "rtol": 0}


def test_translation_moves_the_content_by_an_eighth_of_the_image(generator):
    x, labels = Augment(probability=1, transforms=("translate",))(coordinate_images(16), generator)
    shift = labels[:, None, 7:] * SIZE / 8
    near = (shift.abs() < 8).all(dim=2).squeeze()  # further, the border is in the middle
    expected = map_in_the_middle(coordinate_images(16)) - shift
    torch.testing.assert_close(map_in_the_middle(x)[near], expected[near], **NEAR)
    assert near.sum() > 8 and shift.abs().max() > 4


def test_translation_by_whole_pixels_is_exact():
    x = smooth_images()
    out = warp(x, torch.eye(2).expand(4, 2, 2), torch.tensor([3.0, -2.0]).expand(4, 2))
    torch.testing.assert_close(out[..., :-2, 3:], x[..., 2:, :-3], atol=1e-4, rtol=0)
    torch.testing.assert_close(out[..., :-2, 0], x[..., 2:, 3], atol=1e-4, rtol=0)  # mirrored: -3 shows what 3 shows


def test_translation_keeps_constants(generator):
    x = torch.full((64, 1, 8, 8), 0.7)
    out, labels = Augment(probability=1)(x, generator)
    torch.testing.assert_close(out, x, atol=1e-5, rtol=0)
    assert (labels[:, 7:].abs() > 1).any()  # far enough that an image without mirrors would show


@pytest.mark.parametrize("w", [-1.5, 2.0])
def test_scale_grows_by_two_to_a_fifth(w):
    drawn = draws(scale=w)
    x = warp(coordinate_images(1), *drawn.inverse_map(SIZE, SIZE))
    torch.testing.assert_close(map_in_the_middle(x), map_in_the_middle(coordinate_images(1)) / 2 ** (0.2 * w), **NEAR)
    assert drawn.labels()[0].tolist() == [0, 0, w, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("quarters", [-1, 1, 2])
def test_rotation_by_quarters(quarters):
    drawn = draws(rotate=quarters * math.pi / 2)
    x = smooth_images()
    linear, shift = drawn.inverse_map(SIZE, SIZE)
    out = warp(x, linear.expand(4, 2, 2), shift.expand(4, 2))
    torch.testing.assert_close(out, torch.rot90(x, quarters, dims=(2, 3)), atol=0.2 * x.std().item(), rtol=0)
    cos, sin = math.cos(drawn.rotate.item()), math.sin(drawn.rotate.item())
    assert drawn.labels()[0].tolist() == pytest.approx([0, 0, 0, cos - 1, sin, 0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("w, axis", [(2.0, 0.0), (-2.0, 0.0), (1.5, 0.8)])
def test_anisotropic_scale_stretches_one_axis_and_shrinks_the_other(w, axis):
    drawn = draws(aniso=w, aniso_axis=axis)
    linear, _ = drawn.inverse_map(SIZE, SIZE)
    along = torch.tensor([math.cos(axis), -math.sin(axis)])
    across = torch.tensor([math.sin(axis), math.cos(axis)])
    torch.testing.assert_close(linear[0] @ along, along / 2 ** (0.2 * w))
    torch.testing.assert_close(linear[0] @ across, across * 2 ** (0.2 * w))
    expected = [0, 0, 0, 0, 0, w * math.cos(axis), w * math.sin(axis), 0, 0]
    assert drawn.labels()[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_transforms_are_composed_in_order():
    """Scale, rotation, anisotropic scale, translation: the first drawn is the last on the way back to the input."""
    one = {"scale": 1.0, "rotate": 0.5, "aniso": 2.0, "aniso_axis": 0.3, "shift_x": 0.4, "shift_y": -0.7}
    linear, shift = draws(**one).inverse_map(24, SIZE)
    scale, rotation = draws(scale=1.0).inverse_map(24, SIZE)[0], draws(rotate=0.5).inverse_map(24, SIZE)[0]
    aniso = draws(aniso=2.0, aniso_axis=0.3).inverse_map(24, SIZE)[0]
    torch.testing.assert_close(linear, scale @ rotation @ aniso)
    torch.testing.assert_close(shift, torch.tensor([[0.4 * SIZE / 8, -0.7 * 24 / 8]]))


def test_oblong_images_are_moved_by_their_own_sides():
    x = smooth_images(size=32)[..., :16, :]
    drawn = draws(shift_x=1.0, shift_y=1.0)  # 4 pixels right, 2 down
    linear, shift = drawn.inverse_map(16, 32)
    out = warp(x, linear.expand(4, 2, 2), shift.expand(4, 2))
    torch.testing.assert_close(out[..., 2:, 4:], x[..., :-2, :-4], atol=1e-4, rtol=0)


def test_too_small_images_are_refused(generator):
    with pytest.raises(ValueError, match="images are 8x3; allowed: at least 4x4"):
        Augment()(torch.zeros(2, 1, 8, 3), generator)


def test_every_field_is_described():
    assert [name for name, field in Augment.model_fields.items() if not field.description] == []
