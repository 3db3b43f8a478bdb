"""Which units are added, and bridges, against counting and formulas written out by hand."""

import math

import pytest
import torch

from niwaki.addition import Bridging, Copy, New, Split
from niwaki.component import build
from niwaki.counter import key
from niwaki.errors import InputError


def test_splits_take_the_highest_scores_first_and_go_round():
    scores = torch.tensor([1.0, 5.0, 3.0, 5.0])
    assert Split().sources(4, 3, scores, 0).tolist() == [1, 3, 2]
    assert Split().sources(4, 6, scores, 0).tolist() == [1, 3, 2, 0, 1, 3]


def test_copies_are_of_units_drawn_alike_often_and_anew_for_each_stream():
    drawn = Copy().sources(5, 5000, None, key(0, 0, "a"))
    counts = torch.bincount(drawn, minlength=5)
    assert counts.sum() == 5000
    assert ((counts - 1000).abs() < 5 * math.sqrt(800)).all()  # five standard deviations
    assert torch.equal(drawn, Copy().sources(5, 5000, None, key(0, 0, "a")))
    assert not torch.equal(drawn, Copy().sources(5, 5000, None, key(0, 0, "b")))


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 7])
def test_perturbations_of_copies_sum_to_zero(copies):
    offsets = Copy.offsets(copies)
    assert len(offsets) == copies
    assert offsets.sum().abs() < 1e-15
    assert len(offsets.unique()) == copies
    assert offsets.abs().max() <= 1.0


def test_bridges_connect_the_pairs_with_the_largest_gradients():
    gradient = torch.tensor([[4.0, 0.1, -1.0], [0.2, -9.0, 0.3]])
    how = Bridging(strength=1.0, share=0.5)  # three pairs: (1, 1), (0, 0), (0, 2), dealt out to two units
    into, out = how.weights(gradient, 2, (1.0, 1.0), key(0, 0, ""))
    assert (into != 0).tolist() == [[False, True, True], [True, False, False]]
    assert (out != 0).tolist() == [[True, True], [True, False]]
    assert into[0, 2].abs() / into[0, 1].abs() == pytest.approx(1 / 3)  # roots of 1 and 9
    assert out[0, 0].abs() / out[1, 0].abs() == pytest.approx(1 / 3)
    for pair, unit in (((1, 1), 0), ((0, 0), 1), ((0, 2), 0)):
        m, n = pair
        assert into[unit, n] * out[m, unit] * gradient[m, n] < 0, "through it goes a step against the gradient"


def test_bridges_have_the_strength_of_their_layers():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(7, 5, generator=generator)
    into, out = Bridging(strength=0.3, share=0.6).weights(gradient, 3, (2.0, 0.5), key(0, 0, ""))
    for values, mean in ((into, 0.6), (out.T, 0.15)):
        for unit in values:
            assert unit[unit != 0].abs().mean() == pytest.approx(mean)


def test_more_units_than_pairs_leave_some_without_connections():
    into, out = Bridging(share=0.1).weights(torch.ones(1, 2), 3, (1.0, 1.0), 0)
    assert (into != 0).sum(dim=1).tolist() == [1, 1, 0]
    assert (out != 0).sum(dim=0).tolist() == [1, 1, 0]
    assert into.isfinite().all()


def test_they_are_built_from_recipe_data():
    assert build("addition", "new") == New()
    assert build("addition", {"copy": 0.5}) == Copy(perturbation=0.5)
    assert build("addition", {"split": {"perturbation": 0.1}}).to_data() == {"split": {"perturbation": 0.1}}
    for wrong in ("splits", {"split": -1.0}, {"bridging": {"share": 0.0}}, {"bridging": {"strength": 0}}, {"new": {"perturbation": 1}}):
        with pytest.raises(InputError, match=r"^addition"):
            build("addition", wrong)
