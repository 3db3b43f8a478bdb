import math
import random

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from niwaki.errors import InputError
from niwaki.metrics.efficiency import EPSILONS, EQUATIONS, HARDNESS, accuracy_density, parameter_efficiency, regions, slack

shares = st.floats(0, 1)


def test_accuracy_density_is_per_cent_for_a_million():
    assert accuracy_density(0.5, 2_000_000) == 25.0


@pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.5, 0.75, 0.999])
def test_hardness_has_its_closed_form(accuracy):
    wrong = 1 - accuracy
    expected = {"odds": accuracy / wrong, "bits": math.log(1 / wrong, 2), "identity": accuracy}
    assert set(expected) == set(HARDNESS) == set(EQUATIONS)
    for name, value in expected.items():
        assert parameter_efficiency(accuracy, 500_000, name) == pytest.approx(2 * value, abs=1e-12)
    assert parameter_efficiency(accuracy, 500_000, lambda a: a**2) == 2 * accuracy**2


def test_being_always_right_is_infinitely_hard():
    assert parameter_efficiency(1.0, 10, "odds") == parameter_efficiency(1.0, 10, "bits") == math.inf
    assert parameter_efficiency(1.0, 1_000_000, "identity") == 1.0


@given(st.lists(st.tuples(shares, shares), max_size=8), shares, st.sampled_from([*EPSILONS, 0.3]))
def test_slack_removes_as_much_as_the_loss_allows(runs, dense, epsilon):
    n = 10**6
    least_active = min((n * (1 - sparsity) for sparsity, accuracy in runs if accuracy >= dense - epsilon - 1e-9), default=n)
    assert slack(runs, dense, epsilon) == pytest.approx(1 - least_active / n, abs=1e-9)


def test_slack_at_the_very_edge_counts():
    assert slack([(0.5, 0.85), (0.6, 0.84)], 0.9, 0.05) == 0.5
    assert 0.52 - 0.05 > 0.47
    assert slack([(0.9, 0.47)], 0.52, 0.05) == 0.9  # what rounding took is given back


@given(st.lists(shares, min_size=1, max_size=20))
def test_the_fit_is_the_least_squares_one(means):
    sparsities = [i / len(means) for i in range(len(means))]
    expected = scipy.optimize.isotonic_regression(means, increasing=False).x
    assert regions(sparsities, means).fitted == pytest.approx(expected.tolist(), abs=1e-12)


def test_the_regions_of_a_textbook_hill():
    sparsities = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]
    means = [0.90, 0.91, 0.92, 0.905, 0.898, 0.893, 0.890, 0.80, 0.30]
    found = regions(sparsities, means)
    assert "".join(found.letters) == "AAAABBBCC"
    assert found.a_ends == pytest.approx((0.7 + 0.8) / 2)
    assert found.c_begins == pytest.approx((0.95 + 0.98) / 2)
    backwards = regions(sparsities[::-1], means[::-1])
    assert backwards.letters == found.letters[::-1]
    assert (backwards.a_ends, backwards.c_begins, backwards.fitted) == (found.a_ends, found.c_begins, found.fitted[::-1])


def test_a_region_may_be_missing():
    assert regions([0, 0.5, 0.9], [0.9, 0.9, 0.5]).letters == ("A", "A", "C")
    assert regions([0, 0.5, 0.9], [0.9, 0.9, 0.5]).a_ends == regions([0, 0.5, 0.9], [0.9, 0.9, 0.5]).c_begins == 0.7
    only_a = regions([0, 0.5, 0.9], [0.9, 0.91, 0.92])
    assert (only_a.letters, only_a.a_ends, only_a.c_begins) == (("A", "A", "A"), None, None)
    no_c = regions([0, 0.5, 0.9], [0.9, 0.895, 0.892])
    assert (no_c.letters, no_c.a_ends, no_c.c_begins) == (("A", "B", "B"), 0.25, None)


def test_noise_delays_the_end_of_a_but_never_hides_a_collapse():
    sparsities, means = [0, 0.5, 0.8, 0.9], [0.9, 0.896, 0.893, 0.88]
    assert "".join(regions(sparsities, means).letters) == "ABBC"
    errors = [0.001, 0.002, 0.002, 0.05]
    # 2 sqrt(0.001² + 0.002²) = 0.0045: the loss of 0.004 may be chance, that of 0.007 not; errors of 0.05 do not hide one of 0.02
    assert "".join(regions(sparsities, means, errors).letters) == "AABC"
    assert "".join(regions(sparsities, means, [0.02] * 4).letters) == "AAAC"
    assert "".join(regions(sparsities, means, errors, tolerance=0.03).letters) == "AABB"


def test_noisy_seeds_do_not_cut_regions_in_two():
    truth = {0.0: 0.90, 0.3: 0.91, 0.5: 0.915, 0.7: 0.91, 0.8: 0.90, 0.9: 0.894, 0.95: 0.8935, 0.97: 0.86, 0.98: 0.8, 0.99: 0.5}
    right = 0
    for seed in range(200):
        draw = random.Random(seed)
        seeds = {sparsity: [draw.gauss(mean, 0.002) for _ in range(5)] for sparsity, mean in truth.items()}
        means = [float(np.mean(values)) for values in seeds.values()]
        errors = [float(np.std(values, ddof=1)) / math.sqrt(5) for values in seeds.values()]
        letters = "".join(regions(list(truth), means, errors).letters)
        assert letters == "".join(sorted(letters))  # A, then B, then C, each in one piece
        right += letters == "AAAAABBCCC"
    assert right > 160


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: accuracy_density(76.0, 100), r"share in \[0, 1\], got 76"),
        (lambda: accuracy_density(0.5, 0), "active parameter"),
        (lambda: parameter_efficiency(0.5, 10, "odd"), "did you mean 'odds'"),
        (lambda: parameter_efficiency(1.5, 10, abs), "share"),
        (lambda: slack([(0.5, 0.9)], 0.9, -0.1), "epsilon"),
        (lambda: slack([(50, 0.9)], 0.9, 0.1), "sparsity: must be a share"),
        (lambda: regions([0.5], [0.9]), "dense model is missing"),
        (lambda: regions([0, 0.5], [0.9]), "2 sparsities need as many"),
        (lambda: regions([0, 0.5, 0.5], [0.9, 0.9, 0.8]), "given twice"),
        (lambda: regions([0], [0.9], [math.nan]), "finite"),
        (lambda: regions([0], [math.nan]), "share"),
    ],
)
def test_bad_input_is_said(call, says):
    with pytest.raises(InputError, match=says):
        call()
