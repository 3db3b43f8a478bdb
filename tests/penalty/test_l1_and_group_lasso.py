"""L1, group lasso and exploration L2: gradients against autograd, proximal steps against a search for the minimum, in float64."""

import math

import pytest
import torch
from scipy import optimize

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.penalty import L1, ExplorationL2, GroupLasso, Penalized


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(weight):
    """What a group lasso sees of a matrix whose pieces are its rows."""
    norm = weight.square().sum(1, keepdim=True).sqrt()
    return Penalized(weight, norm=norm.expand_as(weight), size=torch.full_like(weight, weight.shape[1]))


def test_the_gradient_of_l1_is_that_of_the_sum_of_sizes():
    weight = normal(5, 4).requires_grad_()
    [expected] = torch.autograd.grad(0.3 * weight.abs().sum(), weight)
    torch.testing.assert_close(L1(strength=0.3).gradient(Penalized(weight.detach())), expected, rtol=1e-15, atol=0)
    assert L1(strength=0.3).gradient(Penalized(torch.zeros(3))).tolist() == [0.0] * 3


@pytest.mark.parametrize("scaled", [True, False])
def test_the_gradient_of_the_group_lasso_is_that_of_the_sum_of_norms(scaled):
    weight = normal(5, 9).requires_grad_()
    factor = math.sqrt(9) if scaled else 1.0
    [expected] = torch.autograd.grad(0.3 * factor * weight.norm(dim=1).sum(), weight)
    found = GroupLasso(strength=0.3, scaled=scaled).gradient(rows(weight.detach()))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_nothing_pulls_where_there_is_nothing_and_where_no_piece_is():
    weight = normal(3, 4)
    weight[1] = 0.0
    seen = rows(weight)
    norm, size = seen.norm.clone(), seen.size.clone()
    norm[2], size[2] = 0.0, 0.0  # elements that belong to no piece
    seen = Penalized(weight, norm=norm, size=size)
    found = GroupLasso(strength=0.3).gradient(seen)
    assert found[1:].eq(0).all()
    assert found[0].ne(0).all()
    stepped = GroupLasso(strength=10.0, apply="proximal").step(seen, 1.0)
    assert stepped[:2].eq(0).all()
    assert torch.equal(stepped[2], weight[2])


@pytest.mark.parametrize("rate", [0.05, 0.8])
def test_block_soft_thresholding_is_at_the_minimum(rate):
    weight = torch.tensor([[0.3, -0.4], [0.05, 0.02], [-2.0, 1.0]], dtype=torch.float64)
    found = GroupLasso(strength=0.5, apply="proximal").step(rows(weight), rate)

    def value(v, row):
        return ((v[0] - row[0]) ** 2 + (v[1] - row[1]) ** 2) / 2 + rate * 0.5 * math.sqrt(2) * math.hypot(*v)

    for row, arrived in zip(weight.tolist(), found.tolist(), strict=True):
        tried = [optimize.minimize(value, start, (row,), "Nelder-Mead", options={"xatol": 1e-10}) for start in (row, [0.0, 0.0])]
        best = min(tried, key=lambda one: one.fun)
        assert value(arrived, row) <= best.fun + 1e-12
        assert arrived == pytest.approx(best.x.tolist(), abs=1e-5)
    gone = weight.norm(dim=1) <= 0.5 * math.sqrt(2) * rate
    assert torch.equal((found == 0).all(1), gone)  # whole rows, or nothing


def test_proximal_zeros_are_positive():
    for penalty, seen in ((L1, Penalized(torch.tensor([-0.1, 0.1]))), (GroupLasso, rows(torch.tensor([[-0.1, 0.1]])))):
        stepped = penalty(strength=9.0, apply="proximal").step(seen, 1.0)
        assert not stepped.view(torch.int32).any()


def test_decoupled_steps_follow_the_gradient():
    weight = normal(4, 3)
    for penalty, seen in (
        (L1(strength=0.2, apply="decoupled"), Penalized(weight)),
        (GroupLasso(strength=0.2, apply="decoupled"), rows(weight)),
    ):
        torch.testing.assert_close(penalty.step(seen, 0.1), weight - 0.1 * penalty.gradient(seen), rtol=1e-15, atol=0)


def test_what_does_not_learn_stays():
    weight = normal(4, 3)
    learns = torch.tensor([True, False, True])
    for penalty in (L1(strength=0.2), GroupLasso(strength=0.2)):
        seen = rows(weight)
        seen = Penalized(weight, learns=learns.expand_as(weight), norm=seen.norm, size=seen.size)
        assert penalty.gradient(seen)[:, 1].eq(0).all()
        for apply in ("proximal", "decoupled"):
            stepped = penalty.model_copy(update={"apply": apply}).step(seen, 0.5)
            assert torch.equal(stepped[:, 1], weight[:, 1])
            assert stepped[:, 0].ne(weight[:, 0]).all()


def test_exploration_l2_decays_the_rest_of_the_superset_faster():
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    seen = Penalized(weight, torch.tensor([True, False, False]), torch.tensor([True, True, False]), density=0.25)
    assert ExplorationL2(strength=0.5).gradient(seen).tolist() == [1.0, 8.0, 0.0]
    assert not ExplorationL2().after_step


def test_a_ratio_says_the_share_of_the_penalty_in_the_sum_with_the_loss():
    weight = normal(5, 9)
    for scaled, factor in ((True, 3.0), (False, 1.0)):
        lasso = GroupLasso(ratio=0.2, scaled=scaled, apply="proximal")
        value = lasso.total(weight.norm(dim=1), torch.full((5,), 9.0))
        assert value == pytest.approx(factor * sum(math.hypot(*row) for row in weight.tolist()), rel=1e-14)
        found = lasso.with_strength(lasso.strength_at(2.5, value))
        assert found.strength * value / (found.strength * value + 2.5) == pytest.approx(0.2, rel=1e-14)
        assert (found.ratio, found.scaled, found.apply, found.needs, lasso.needs) == (None, scaled, "proximal", frozenset(), {"loss"})


@pytest.mark.parametrize(("loss", "value"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_a_ratio_that_no_strength_gives_is_told(loss, value):
    with pytest.raises(InputError, match=r"^penalty\.group_lasso\.ratio: no strength gives it where the loss is "):
        GroupLasso(ratio=0.2).strength_at(loss, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_stay(dtype):
    weight = normal(4, 3).to(dtype)
    seen = Penalized(weight, norm=torch.ones(4, 1, dtype=torch.float64), size=torch.full((4, 1), 3.0, dtype=torch.float64))
    for penalty in (L1(apply="proximal"), GroupLasso(apply="proximal"), L1(apply="decoupled"), GroupLasso(apply="decoupled")):
        assert penalty.gradient(seen).dtype == penalty.step(seen, 0.1).dtype == dtype


def test_recipe():
    assert build("penalty", "l1") == L1(strength=1e-4, of="weight", apply="gradient")
    assert build("penalty", {"l1": {"of": "norm"}}).of == "norm"
    assert [L1(apply=how).after_step for how in ("gradient", "proximal", "decoupled")] == [False, True, True]
    with pytest.raises(InputError, match=r"penalty\.group_lasso: unknown field 'of'"):
        build("penalty", {"group_lasso": {"of": "norm"}})
    with pytest.raises(InputError, match="strength: is what a ratio is turned into; drop one of strength and ratio"):
        build("penalty", {"group_lasso": {"ratio": 0.2, "strength": 1e-4}})
    with pytest.raises(InputError, match=r"penalty\.group_lasso\.ratio"):
        build("penalty", {"group_lasso": {"ratio": 1}})
    with pytest.raises(InputError, match=r"penalty\.l1\.strength"):
        build("penalty", {"l1": {"strength": -1}})
