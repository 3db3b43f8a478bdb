"""Proximal steps against a search for the minimum: a dense grid that is refined, in float64."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from niwaki import penalty as p
from niwaki.layout import Layout
from niwaki.penalty import Penalized

RATE = 0.7
SIZES = torch.tensor([0.0, 1e-4, 0.05, 0.2, 0.35, 0.5, 0.8, 1.1, 1.7, 3.0], dtype=torch.float64)
WEIGHTS = torch.cat([SIZES, -SIZES])


def least(function, low, high):
    """The minimum of a function of one number, wherever it is: grid, then grids around the best point."""
    for _ in range(12):
        grid = np.linspace(low, high, 2001)
        best = grid[np.argmin(function(grid))]
        width = (high - low) / 200
        low, high = best - width, best + width
    return best if function(np.array([0.0]))[0] > function(np.array([best]))[0] + 1e-14 else 0.0


PENALTIES = [
    (p.L1(strength=0.5), lambda v: 0.5 * np.abs(v)),
    (p.L2(strength=0.5), lambda v: 0.25 * v**2),
    (p.Lp(strength=0.5, p=0.5), lambda v: 0.5 * np.abs(v) ** 0.5),
    (p.Lp(strength=0.3, p=2 / 3), lambda v: 0.3 * np.abs(v) ** (2 / 3)),
    (p.Lp(strength=0.4, p=0.1), lambda v: 0.4 * np.abs(v) ** 0.1),
    (p.Lp(strength=0.4, p=0.9), lambda v: 0.4 * np.abs(v) ** 0.9),
    (p.Log(strength=0.5, scale=0.1), lambda v: 0.5 * np.log1p(np.abs(v) / 0.1)),
    (p.Log(strength=0.05, scale=1.0), lambda v: 0.05 * np.log1p(np.abs(v) / 1.0)),
    (p.Log(strength=2.0, scale=0.7), lambda v: 2.0 * np.log1p(np.abs(v) / 0.7)),
]


@pytest.mark.parametrize(("penalty", "value"), PENALTIES, ids=[f"{one.name}{i}" for i, (one, _) in enumerate(PENALTIES)])
def test_the_proximal_step_is_at_the_minimum(penalty, value):
    proximal = penalty.model_copy(update={"apply": "proximal"})
    found = proximal.step(Penalized(WEIGHTS), RATE)
    for weight, arrived in zip(WEIGHTS.tolist(), found.tolist(), strict=True):
        expected = least(lambda v, w=weight: (v - w) ** 2 / 2 + RATE * value(v), -4.0, 4.0)
        assert arrived == pytest.approx(expected, abs=2e-8), weight
    assert not found[found == 0].view(torch.int64).any()  # never -0.0
    assert torch.equal(proximal.step(Penalized(WEIGHTS, ramp=0.5), 2 * RATE), found)


def test_half_and_two_third_powers_have_closed_forms():
    """Xu, Chang, Xu, Zhang 2012 and Cao, Sun, Xu 2013, as trigonometric and radical formulas."""
    weight = torch.linspace(0.01, 3, 300, dtype=torch.float64)
    lam = 0.5 * RATE
    found = p.Lp(strength=0.5, p=0.5, apply="proximal").step(Penalized(weight), RATE)
    # min (v - w)^2 + mu |v|^(1/2) with mu = 2 lam
    mu = 2 * lam
    angle = torch.arccos((mu / 8 * (weight / 3) ** -1.5).clamp(max=1.0))
    half = 2 / 3 * weight * (1 + torch.cos(2 * math.pi / 3 - 2 / 3 * angle))
    half = half.where(weight > 54 ** (1 / 3) / 4 * mu ** (2 / 3), 0.0)
    torch.testing.assert_close(found, half, rtol=1e-12, atol=1e-14)
    found = p.Lp(strength=0.5, p=2 / 3, apply="proximal").step(Penalized(weight), RATE)
    phi = 2 / math.sqrt(3) * mu**0.25 * torch.cosh(torch.arccosh((27 * weight**2 / 16 * mu**-1.5).clamp(min=1.0)) / 3).sqrt()
    thirds = ((phi + (2 * weight / phi - phi**2).clamp(min=0.0).sqrt()) / 2) ** 3
    thirds = thirds.where(weight > 2 / 3 * (3 * mu**3) ** 0.25, 0.0)
    torch.testing.assert_close(found, thirds, rtol=1e-11, atol=1e-13)


def test_lp_at_no_strength_and_at_ties():
    assert torch.equal(p.Lp(strength=0.0, apply="proximal").step(Penalized(WEIGHTS), 1.0), WEIGHTS)
    threshold = 1.5 * RATE ** (2 / 3)  # of p = 1/2 at strength 1, where zero and the root are equally good: zero is taken
    below, above = (torch.tensor([threshold * factor], dtype=torch.float64) for factor in (1 - 1e-12, 1 + 1e-12))
    half = p.Lp(strength=1.0, apply="proximal")
    assert half.step(Penalized(below), RATE).item() == 0.0
    assert half.step(Penalized(above), RATE).item() == pytest.approx(RATE ** (2 / 3), rel=1e-6)


def test_the_sparse_group_lasso_in_two_numbers():
    penalty = p.SparseGroupLasso(strength=0.6, share=0.4, scaled=True, apply="proximal")
    weight = torch.tensor([[0.9, -0.15], [0.2, 0.1], [0.5, 0.5], [-1.5, 0.0], [0.0, 0.0], [0.3, 0.27]], dtype=torch.float64)
    before = Penalized(weight, size=torch.full_like(weight, 2.0))
    norm = penalty.inner(before, RATE).norm(dim=1, keepdim=True).expand_as(weight)
    found = penalty.step(Penalized(weight, norm=norm, size=before.size), RATE)
    for row, arrived in zip(weight.tolist(), found.tolist(), strict=True):

        def value(v, row=row):
            inside = 0.6 * (0.6 * math.sqrt(2) * math.hypot(*v) + 0.4 * (abs(v[0]) + abs(v[1])))
            return ((v[0] - row[0]) ** 2 + (v[1] - row[1]) ** 2) / 2 + RATE * inside

        starts = [row, [0.0, 0.0], [row[0], 0.0], [0.0, row[1]]]
        tried = [optimize.minimize(value, s, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-16}) for s in starts]
        assert value(arrived) <= min(one.fun for one in tried) + 1e-12
        best = min(tried, key=lambda one: one.fun)
        assert arrived == pytest.approx(best.x.tolist(), abs=1e-5)
    assert (found == 0).all(1).tolist() == [False, True, False, False, True, True]
    assert found[0, 1] == 0.0  # a single weight within a piece that stays


@pytest.mark.parametrize("shape", [(5, 4), (3, 7)])
def test_the_nuclear_norm_shrinks_singular_values(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, sigma, v = np.linalg.svd(weight.numpy(), full_matrices=False)
    expected = u @ np.diag(np.maximum(sigma - RATE * 2.5, 0)) @ v
    found = p.NuclearNorm(strength=2.5, apply="proximal").step(Penalized(weight, layout=Layout(("output", "input"), shape)), RATE)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11, atol=1e-13)
    assert np.linalg.matrix_rank(found.numpy()) < len(sigma)


def test_the_nuclear_norm_of_groups_is_of_each_group():
    layout = Layout(("group", "output", "input", "kernel"), (2, 3, 2, 2))
    weight = torch.randn(6, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).view(layout.shape)
    found = p.NuclearNorm(strength=1.0, apply="proximal").step(Penalized(weight, layout=layout), 0.5)
    for group, before in zip(found, weight, strict=True):
        u, sigma, v = np.linalg.svd(before.reshape(3, 4).numpy(), full_matrices=False)
        np.testing.assert_allclose(group.reshape(3, 4).numpy(), u @ np.diag(np.maximum(sigma - 0.5, 0)) @ v, atol=1e-13)


def test_reweighted_l1_is_soft_thresholding_with_a_threshold_for_each():
    penalty = p.ReweightedL1(strength=0.1, epsilon=0.05)
    states, _ = penalty.refresh([Penalized(WEIGHTS)])
    found = penalty.step(Penalized(WEIGHTS, state=states[0]), RATE)
    for weight, arrived in zip(WEIGHTS.tolist(), found.tolist(), strict=True):
        assert arrived == pytest.approx(math.copysign(max(abs(weight) - RATE * 0.1 / (abs(weight) + 0.05), 0), weight), abs=1e-15)


def test_what_does_not_learn_stays_and_dtypes_do():
    weight = torch.tensor([0.01, -2.0, 0.3, -0.02], dtype=torch.bfloat16)
    learns = torch.tensor([True, True, False, False])
    for penalty in (p.L2, p.Lp, p.Log, p.ReweightedL1):
        one = penalty(strength=0.5, apply="proximal")
        [state], _ = one.refresh([Penalized(weight)])
        found = one.step(Penalized(weight, learns=learns, state=state), 0.5)
        assert found.dtype == weight.dtype
        assert torch.equal(found[2:], weight[2:])
        assert found[0].abs() < weight[0].abs()
