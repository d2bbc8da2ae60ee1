import pytest

from cm_core.curricula import ct_num_scales, ct_target_decay, ect_stage, ict_num_scales, linear_ramp

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
