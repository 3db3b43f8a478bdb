from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.records import record

from niwaki.errors import InputError
from niwaki.report.groups import families, pareto_front
from niwaki.tasks import Training


def test_runs_that_differ_only_in_their_seed_are_one_setting():
    runs = [(f"{method}{seed}", record(method, seed=seed, epochs=1)) for seed in (2, 0, 1) for method in ("rigl", "gmp")]
    (family,) = families(runs)
    assert [setting.name for setting in family.settings] == ["gmp", "rigl"]
    assert [[label for label, _ in setting.runs] for setting in family.settings] == [["gmp0", "gmp1", "gmp2"], ["rigl0", "rigl1", "rigl2"]]
    assert [one.choices.seed for _, one in family.dense.runs] == [0, 1, 2]
    dense = [one.headline.dense for _, one in family.dense.runs]
    assert family.dense.values("accuracy") == dense
    assert family.dense.mean("accuracy") == fmean(dense)
    assert family.dense.sparsity == 0
    assert family.settings[0].changes("accuracy") == [one.headline.sparse - one.headline.dense for _, one in family.settings[0].runs]


def test_another_task_training_or_model_is_another_family():
    runs = [
        ("a", record()),
        ("b", record(task="cifar10")),
        ("c", record(training=Training(epochs=12, batch_size=32))),
        ("d", record(model="large")),
        ("e", record(seed=1)),
    ]
    assert [[label for label, _ in family.runs] for family in families(runs)] == [["a", "e"], ["b"], ["c"], ["d"]]


def test_the_same_run_twice_counts_once():
    (family,) = families([("first", record()), ("copy", record()), ("other", record(seed=1))])
    assert [label for label, _ in family.runs] == ["first", "other"]


def test_variants_of_a_method_at_one_sparsity_are_told_apart():
    recipes = [{"sparsity": s, "saliency": "magnitude", "allocation": a} for a in ("global", "uniform") for s in (0.8, 0.9)]
    (family,) = families([(str(i), record("gmp", one["sparsity"], recipe=one)) for i, one in enumerate(recipes)])
    assert [(setting.name, setting.sparsity) for setting in family.settings] == [
        ("gmp (1)", 0.8),
        ("gmp (1)", 0.9),
        ("gmp (2)", 0.8),
        ("gmp (2)", 0.9),
    ]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="at least one"):
        families([])
    with pytest.raises(InputError, match="runs/b: this run has not finished"):
        families([("runs/a", record()), ("runs/b", record(seed=1).model_copy(update={"results": None}))])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_the_pareto_front_is_what_nothing_beats(points):
    def beats(one, other):
        return one[0] <= other[0] and one[1] >= other[1] and (one[0] < other[0] or one[1] > other[1])

    found = pareto_front(points)
    assert found == [not any(beats(other, point) for other in points) for point in points]
    assert any(found) or not points
