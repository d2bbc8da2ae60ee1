import pytest

from cm_core.curricula import (
    ct_num_scales,
    ct_target_decay,
    ect_stage,
    ict_num_scales,
    learning_rate_decay,
    linear_ramp,
    pd_halving,
)

CT_TABLE = [  # k, N, mu in the code's form, mu in the paper's form (K = 800k, s0 = 2, s1 = 150, mu0 = 0.9)
    (0, 2, 0.810000, 0.900000),
    (1, 3, 0.900000, 0.932170),
    (1_000, 6, 0.958732, 0.965489),
    (10_000, 17, 0.986916, 0.987681),
    (80_000, 48, 0.995527, 0.995620),
    (200_000, 76, 0.997194, 0.997231),
    (400_000, 107, 0.998014, 0.998033),
    (800_000, 151, 0.998596, 0.998605),
]


@pytest.mark.parametrize(("step", "num_scales", "mu_code", "mu_paper"), CT_TABLE)
def test_ct_curricula_match_the_table(step, num_scales, mu_code, mu_paper):
    assert ct_num_scales(step, num_steps=800_000, s0=2, s1=150) == num_scales
    assert ct_target_decay(num_scales, s0=2, mu0=0.9, per_interval=True) == pytest.approx(mu_code, abs=6e-7)
    assert ct_target_decay(num_scales, s0=2, mu0=0.9, per_interval=False) == pytest.approx(mu_paper, abs=6e-7)


@pytest.mark.parametrize(
    ("step", "num_scales", "mu"), [(1_000, 8, 0.985452), (400_000, 143, 0.999278), (800_000, 201, 0.999487)]
)
def test_ct_curricula_on_imagenet_64(step, num_scales, mu):
    assert ct_num_scales(step, num_steps=800_000, s0=2, s1=200) == num_scales
    assert ct_target_decay(num_scales, s0=2, mu0=0.95, per_interval=True) == pytest.approx(mu, abs=6e-7)


def test_ct_num_scales_stays_after_the_end():
    assert ct_num_scales(10**9, num_steps=1000, s0=2, s1=150) == 151


def test_ict_num_scales_doubles_every_50k_of_400k_steps():
    seen = [ict_num_scales(50_000 * i, num_steps=400_000, s0=10, s1=1280) for i in range(8)]
    assert seen == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert ict_num_scales(49_999, num_steps=400_000, s0=10, s1=1280) == 11
    assert ict_num_scales(400_000, num_steps=400_000, s0=10, s1=1280) == 1281


def test_ict_num_scales_reaches_the_end_in_runs_shorter_than_its_levels():
    assert [ict_num_scales(k, num_steps=4, s0=10, s1=1280) for k in range(4)] == [11, 41, 161, 641]


def test_ect_stages_are_of_equal_length():
    assert [ect_stage(k, num_steps=8, num_stages=4) for k in (0, 1, 2, 7, 8, 99)] == [0, 0, 1, 3, 3, 3]


def test_linear_ramp():
    assert [linear_ramp(k, ramp_steps=4) for k in (0, 1, 3, 4)] == [0.25, 0.5, 1, 1]
    assert linear_ramp(0, ramp_steps=0) == 1


def test_ict_num_scales_of_other_ends():
    assert [ict_num_scales(k, num_steps=6, s0=3, s1=12) for k in range(8)] == [4, 4, 7, 7, 13, 13, 13, 13]
    assert {ict_num_scales(k, num_steps=4, s0=10, s1=10) for k in range(5)} == {11}
    # no power of two: log2(7) + 1 = 3.8 levels, of which the last ends at s1, as by the paper's formula
    assert [ict_num_scales(k, num_steps=38, s0=10, s1=70) for k in (0, 9, 10, 19, 20, 29, 30, 37)] == [
        *(11, 11, 21, 21, 41, 41, 71, 71)
    ]


def test_pd_rounds_halve_to_the_asked_end_and_the_last_two_are_twice_as_long():
    def rounds(num_steps, start, end):
        found = [pd_halving(k, num_steps=num_steps, start_steps=start, end_steps=end) for k in range(num_steps)]
        return [tuple(one) for one in sorted(set(found), key=lambda one: one.first)]

    assert rounds(12, 8, 1) == [(8, 0, 2), (4, 2, 4), (2, 4, 8), (1, 8, 12)]
    assert rounds(12, 12, 3) == [(12, 0, 4), (6, 4, 8), (3, 8, 12)]
    assert rounds(8, 4, 2) == [(4, 0, 2), (2, 2, 8)] and rounds(5, 4, 4) == [(4, 0, 5)]
    assert pd_halving(99, num_steps=12, start_steps=8, end_steps=1) == (1, 8, 12)


def test_pd_of_the_papers_length_halves_every_50_000_steps():
    steps = [k * 50_000 for k in range(15)]
    found = [pd_halving(k, num_steps=750_000, start_steps=4096, end_steps=1).num_intervals for k in steps]
    assert found == [4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 1, 0.75, 0.5, 0]),
        ("cosine", [1, 1, 0.8535534, 0.5, 0]),
        ("inverse_sqrt", [1, 1, (4 / 6) ** 0.5, 0.5**0.5, (4 / 12) ** 0.5]),
    ],
)
def test_learning_rate_decays_from_its_start_to_the_end(schedule, factors):
    found = [learning_rate_decay(schedule, k, num_steps=12, start=4) for k in (0, 4, 6, 8, 12)]
    assert found == pytest.approx(factors, abs=1e-7)


def test_ct_num_scales_from_a_start_of_its_own():
    found = [ct_num_scales(k, num_steps=100, s0=10, s1=50) for k in (0, 50, 100, 200)]
    assert found == [10, 37, 51, 51]  # at half the steps ceil(sqrt((51^2 - 10^2) / 2 + 10^2) - 1) + 1
