import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from niwaki.errors import InputError
from niwaki.metrics.subgroups import class_changes, exemplars, modal_classes


@st.composite
def experiments(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    examples, classes = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    true = rng.integers(0, classes, examples)
    sides = []
    for right in (0.9, 0.6):
        models = draw(st.integers(1, 4))
        sides.append(np.where(rng.random((models, examples)) < right, true, rng.integers(0, classes, (models, examples))))
    return true, *sides


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
@given(experiments())
def test_class_changes_equal_counting(experiment):
    true, dense, sparse = experiment
    found = {one.number: one for one in class_changes(true, dense, sparse)}
    assert list(found) == sorted(set(true.tolist()))
    p_values = {}
    for number, one in found.items():
        members = [i for i, label in enumerate(true) if label == number]
        recalls, relative = [], []
        for side in (dense, sparse):
            recall = [sum(row[i] == number for i in members) / len(members) for row in side]
            accuracy = [sum(row[i] == label for i, label in enumerate(true)) / len(true) for row in side]
            recalls.append(recall)
            relative.append([r - a for r, a in zip(recall, accuracy, strict=True)])
        assert one.examples == len(members)
        assert one.dense_recall == pytest.approx(np.mean(recalls[0]))
        assert one.sparse_recall == pytest.approx(np.mean(recalls[1]))
        assert one.change == pytest.approx(np.mean(recalls[1]) - np.mean(recalls[0]))
        assert one.relative_change == pytest.approx(np.mean(relative[1]) - np.mean(relative[0]), abs=1e-12)
        spread = max(np.std(side) for side in relative) > 1e-12
        if min(len(dense), len(sparse)) < 2 or not spread:
            assert one.p_value is one.adjusted_p_value is None
        else:
            expected = scipy.stats.ttest_ind(*relative, equal_var=False).pvalue
            assert one.p_value == pytest.approx(expected, rel=1e-6, abs=1e-12)
            p_values[number] = one.p_value
    for rank, number in enumerate(sorted(p_values, key=p_values.__getitem__)):
        assert found[number].adjusted_p_value >= min(1, (len(p_values) - rank) * p_values[number]) - 1e-12


def test_the_class_that_pays_is_found_and_the_others_are_not():
    rng = np.random.default_rng(0)
    true = np.repeat(np.arange(5), 200)
    miss = {"dense": [0.1] * 5, "sparse": [0.12, 0.12, 0.12, 0.12, 0.4]}

    def predict(shares):
        wrong = rng.random((5, 1000)) < np.repeat(shares, 200)
        return np.where(wrong, (true + 1) % 5, true)

    found = class_changes(true, predict(miss["dense"]), predict(miss["sparse"]))
    assert found[4].relative_change < -0.15
    assert found[4].adjusted_p_value < 0.001
    # The others gained on the average example: that is what relative means, and plain recall would not show it.
    assert all(one.relative_change > 0.02 and one.change < 0.02 for one in found[:4])


@given(experiments())
def test_exemplars_equal_scipys_modes(experiment):
    true, dense, sparse = experiment
    before, after = (scipy.stats.mode(side, axis=0).mode for side in (dense, sparse))  # of equally frequent ones, the smallest
    assert modal_classes(dense).tolist() == before.tolist()
    expected = [(i, true[i], before[i], after[i]) for i in range(len(true)) if before[i] != after[i]]
    found = exemplars(true, dense, sparse)
    assert [(one.index, one.true_class, one.dense_class, one.sparse_class) for one in found] == expected
    assert exemplars(true, dense, dense) == ()


@pytest.mark.parametrize(
    ("true", "dense", "sparse", "says"),
    [
        ([], [[]], [[]], "at least one example"),
        ([0, 1], [0, 1], [[0, 1]], r"dense predictions must have shape \[models, 2\]"),
        ([0, 1], [[0, 1]], [[0, 1, 1]], r"sparse predictions must have shape \[models, 2\]"),
        ([0, 1], [[0, 1]], np.zeros((0, 2), dtype=int), r"sparse predictions must have shape"),
        ([0, 1], [[0.0, 1.0]], [[0, 1]], "dense predictions must be class numbers"),
        ([0, -1], [[0, 1]], [[0, 1]], "true classes must be class numbers"),
    ],
)
def test_bad_input_is_said(true, dense, sparse, says):
    for function in (class_changes, exemplars):
        with pytest.raises(InputError, match=says):
            function(np.array(true), np.array(dense), np.array(sparse))
