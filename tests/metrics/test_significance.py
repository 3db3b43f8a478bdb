import itertools

import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from niwaki.metrics.significance import holm, incomplete_beta, paired_interval, student_two_sided, welch

groups = st.lists(st.floats(0, 1).map(lambda x: round(x, 3)), min_size=2, max_size=8)


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
@given(groups, groups)
def test_p_values_equal_scipys(first, second):
    if len(set(first)) == len(set(second)) == 1:
        assert welch(first, second) is None
        return
    expected = scipy.stats.ttest_ind(first, second, equal_var=False).pvalue
    assert welch(first, second) == pytest.approx(expected, rel=1e-7, abs=1e-12)
    assert welch(second, first) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [([0.5], [0.1, 0.2]), ([], [0.1, 0.2]), ([0.5, 0.5], [0.5, 0.5]), ([0.5, 0.5], [0.7, 0.7])])
def test_there_is_no_p_value_without_anything_to_test(first, second):
    assert welch(first, second) is None


def test_rounding_is_no_spread():
    assert 0.8 - 0.7 != 0.9 - 0.8
    assert welch([0.9 - 0.8, 0.8 - 0.7], [0.3 - 0.2, 0.4 - 0.3]) is None


@given(st.floats(0.05, 2000), st.floats(0.05, 2000), st.floats(0, 1))
def test_the_incomplete_beta_function_equals_scipys(a, b, x):
    assert incomplete_beta(a, b, x) == pytest.approx(float(scipy.special.betainc(a, b, x)), rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("freedom", [1.0, 1.7, 4.0, 30.0, 5000.0])
@pytest.mark.parametrize("t", [0.0, 1e-6, -0.5, 2.0, 40.0])
def test_the_t_distribution_equals_scipys(t, freedom):
    assert student_two_sided(t, freedom) == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom), rel=1e-8, abs=1e-300)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=6))
def test_holm_is_the_closed_test_of_all_intersections(p_values):
    known = [i for i, p in enumerate(p_values) if p is not None]
    subsets = [s for size in range(1, len(known) + 1) for s in itertools.combinations(known, size)]
    bonferroni = {s: min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets}
    expected = [max((p for s, p in bonferroni.items() if i in s), default=None) for i in range(len(p_values))]
    assert holm(p_values) == expected


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8), st.floats(0.1, 0.999))
def test_the_interval_of_paired_differences_equals_scipys(pairs, level):
    first, second = map(list, zip(*pairs, strict=True))
    mean, half = paired_interval(first, second, level)
    expected = scipy.stats.ttest_rel(first, second)
    if expected.statistic != expected.statistic or abs(expected.statistic) > 1e6:  # no spread but that of rounding
        return
    low, high = expected.confidence_interval(level)
    assert mean - half == pytest.approx(low, rel=1e-6, abs=1e-9)
    assert mean + half == pytest.approx(high, rel=1e-6, abs=1e-9)


def test_one_pair_has_a_difference_and_no_interval():
    assert paired_interval([0.75], [0.5]) == (0.25, None)
