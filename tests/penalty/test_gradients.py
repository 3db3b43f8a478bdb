"""Gradients of penalties against autograd of their formulas, written anew, and against finite differences, in float64."""

import math

import pytest
import torch

from niwaki import penalty as p
from niwaki.layout import Layout
from niwaki.penalty import Penalized

CONV = Layout(("output", "input", "kernel", "kernel"), (3, 2, 2, 2))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(weight, **others):
    return Penalized(weight, layout=Layout(("output", "input"), tuple(weight.shape)) if weight.ndim == 2 else None, **others)


c = 0.3

# penalty -> what the loss gains, as its paper writes it
FORMULAS = [
    (p.L1(strength=c), lambda w: c * w.abs().sum()),
    (p.L2(strength=c), lambda w: c / 2 * (w * w).sum()),
    (p.Lp(strength=c, p=0.5, epsilon=0.1), lambda w: c * ((w.abs() + 0.1).sqrt() - 0.1**0.5).sum()),
    (p.Lp(strength=c, p=2 / 3, epsilon=0.02), lambda w: c * ((w.abs() + 0.02) ** (2 / 3) - 0.02 ** (2 / 3)).sum()),
    (p.Hyperbolic(strength=c, scale=0.4), lambda w: c * (w.abs() / 0.4 / (1 + w.abs() / 0.4)).sum()),
    (p.Exponential(strength=c, scale=0.4), lambda w: c * (1 - (-w.abs() / 0.4).exp()).sum()),
    (p.WeightElimination(strength=c, scale=0.4), lambda w: c * ((w / 0.4) ** 2 / (1 + (w / 0.4) ** 2)).sum()),
    (p.Energy(strength=c, exponent=0, scale=0.5), lambda w: c * (w / 0.5).square().sum()),
    (p.Energy(strength=c, exponent=1, scale=0.5), lambda w: c * (1 + (w / 0.5).square()).log().sum()),
    (p.Energy(strength=c, exponent=2), lambda w: c * (w.square() / (1 + w.square())).sum()),
    (p.Energy(strength=c, exponent=3), lambda w: c * ((1 - (1 + w.square()) ** -2) / 2).sum()),
    (p.Log(strength=c, scale=0.2), lambda w: c * (1 + w.abs() / 0.2).log().sum()),
    (p.Bimodal(strength=c), lambda w: c * torch.where(w.abs() < 1, w.abs() * (1 - w.abs()), w.abs() * (w.abs() - 1)).sum()),
    (p.HoyerSquare(strength=c), lambda w: c * w.abs().sum() ** 2 / (w**2).sum()),
    (p.Hoyer(strength=c), lambda w: c * w.norm(1) / w.norm(2)),
    (p.NuclearNorm(strength=c), lambda w: c * torch.linalg.matrix_norm(w, "nuc")),
    (p.Polarization(strength=c, t=1.2), lambda w: c * (1.2 * w.norm(1) - (w - w.mean()).norm(1))),
]
IDS = [f"{one.name}{i}" for i, (one, _) in enumerate(FORMULAS)]


def ready(penalty, *weights):
    """What a penalty sees of some tensors, once it has looked at all of them."""
    everyone = [seen(weight) for weight in weights]
    states, shared = penalty.refresh(everyone)
    return [seen(weight, state=state, shared=shared) for weight, state in zip(weights, states, strict=True)]


@pytest.mark.parametrize(("penalty", "formula"), FORMULAS, ids=IDS)
def test_the_gradient_is_that_of_the_formula(penalty, formula):
    weight = normal(5, 4)
    [at] = ready(penalty, weight)
    [expected] = torch.autograd.grad(formula(leaf := weight.clone().requires_grad_()), leaf)
    torch.testing.assert_close(penalty.gradient(at), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(penalty.value(at), formula(weight), rtol=1e-12, atol=1e-14)
    step = 1e-6
    for index in ((0, 0), (3, 2), (4, 3)):
        moved = torch.zeros_like(weight)
        moved[index] = step
        difference = (formula(weight + moved) - formula(weight - moved)) / (2 * step)
        assert float(penalty.gradient(at)[index]) == pytest.approx(float(difference), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("penalty", "formula"), FORMULAS, ids=IDS)
def test_nothing_is_pulled_at_zero(penalty, formula):
    [at] = ready(penalty, torch.zeros(3, 4, dtype=torch.float64))
    assert torch.equal(penalty.gradient(at), torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize(("penalty", "formula"), FORMULAS, ids=IDS)
def test_ramps_and_costs_multiply_the_strength(penalty, formula):
    weight = normal(5, 4)
    [at] = ready(penalty, weight)
    whole = penalty.gradient(at)
    torch.testing.assert_close(penalty.gradient(Penalized(**vars(at) | {"ramp": 0.25})), 0.25 * whole, rtol=1e-12, atol=0)
    if isinstance(penalty, p.Elementwise) and not isinstance(penalty, p.Polarization):
        cost = torch.linspace(0.5, 2, 5, dtype=torch.float64)[:, None]
        torch.testing.assert_close(penalty.gradient(Penalized(**vars(at) | {"cost": cost})), cost * whole, rtol=1e-12, atol=0)


def test_costs_of_polarization_count_in_the_mean_of_signs_too():
    weight, cost = normal(6).abs(), torch.linspace(0.5, 2, 6, dtype=torch.float64)
    penalty = p.Polarization(strength=c, t=0.7)
    _, shared = penalty.refresh([Penalized(weight, cost=cost)])
    leaf = weight.clone().requires_grad_()
    [expected] = torch.autograd.grad(c * (cost * (0.7 * leaf.abs() - (leaf - leaf.mean()).abs())).sum(), leaf)
    torch.testing.assert_close(penalty.gradient(Penalized(weight, cost=cost, shared=shared)), expected, rtol=1e-12, atol=1e-14)


def test_polarization_is_of_all_tensors_together():
    first, second = normal(6).abs(), normal(4, seed=1).abs()
    penalty = p.Polarization(strength=c, t=1.1)
    leaf = torch.cat([first, second]).requires_grad_()
    [expected] = torch.autograd.grad(c * (1.1 * leaf.norm(1) - (leaf - leaf.mean()).norm(1)), leaf)
    found = [penalty.gradient(one) for one in ready(penalty, first, second)]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-12, atol=1e-14)


def test_polarization_is_least_where_some_are_at_zero_and_the_others_at_the_bound():
    """Brute force over a grid of four scales; the second term alone is least half and half, as its paper says, and t sends more to zero."""
    grid = torch.linspace(0, 1, 21, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid, grid, grid)

    def ones_at(t):
        values = t * points.abs().sum(1) - (points - points.mean(1, keepdim=True)).abs().sum(1)
        least = points[values <= values.min() + 1e-9]
        assert ((least == 0) | (least == 1)).all()
        return {int(point.sum()) for point in least}

    assert [ones_at(t) for t in (0.0, 0.3, 1.2, 2.1)] == [{2}, {2}, {1}, {0}]
    penalty = p.Polarization(strength=1.0, t=0.5)
    scales = torch.tensor([0.3, 0.4, 0.6, 0.7], dtype=torch.float64)
    for _ in range(200):
        [one] = ready(penalty, scales)
        scales = penalty.step(Penalized(scales - 0.01 * penalty.gradient(one)), 0.01)
    assert scales.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_hoyer_does_not_see_scales():
    weight = normal(5, 4)
    for penalty in (p.Hoyer(), p.HoyerSquare()):
        assert float(penalty.value(seen(7.0 * weight))) == pytest.approx(float(penalty.value(seen(weight))), rel=1e-14)
        assert abs(float((penalty.gradient(seen(weight)) * weight).sum())) < 1e-15  # Euler: of degree zero
    one = torch.zeros(4, 4, dtype=torch.float64)
    one[1, 2] = -3.0
    assert float(p.HoyerSquare(strength=1.0).value(seen(one))) == 1.0
    assert float(p.HoyerSquare(strength=1.0).value(seen(torch.full((4, 4), 0.3, dtype=torch.float64)))) == pytest.approx(16.0)


def pieces(weight, **others):
    """What a penalty of pieces sees of a matrix whose pieces are its rows."""
    norm = weight.square().sum(1, keepdim=True).sqrt()
    return Penalized(weight, norm=norm.expand_as(weight), size=torch.full_like(weight, weight.shape[1]), norms=norm[:, 0], **others)


def test_hoyer_square_of_pieces():
    weight = normal(5, 4).requires_grad_()
    norms = weight.norm(dim=1)
    [expected] = torch.autograd.grad(c * norms.sum() ** 2 / norms.square().sum(), weight)
    penalty = p.HoyerSquare(strength=c, per="piece")
    assert penalty.grouped
    torch.testing.assert_close(penalty.gradient(pieces(weight.detach())), expected, rtol=1e-12, atol=1e-14)
    assert not p.HoyerSquare().grouped


@pytest.mark.parametrize("scaled", [True, False])
def test_the_sparse_group_lasso(scaled):
    weight = normal(5, 4).requires_grad_()
    factor = 2.0 if scaled else 1.0
    [expected] = torch.autograd.grad(c * (0.7 * factor * weight.norm(dim=1).sum() + 0.3 * weight.abs().sum()), weight)
    penalty = p.SparseGroupLasso(strength=c, share=0.3, scaled=scaled)
    torch.testing.assert_close(penalty.gradient(pieces(weight.detach())), expected, rtol=1e-12, atol=1e-14)
    nothing = Penalized(weight.detach(), norm=torch.zeros(5, 1), size=torch.zeros(5, 1))  # elements of no piece
    assert not penalty.gradient(nothing).any()
    assert torch.equal(penalty.model_copy(update={"apply": "proximal"}).step(nothing, 1.0), weight.detach())


def test_the_nuclear_norm_of_a_convolution_is_that_of_its_filters_as_rows():
    weight = normal(3, 2, 2, 2).requires_grad_()
    [expected] = torch.autograd.grad(c * torch.linalg.svdvals(weight.flatten(1)).sum(), weight)
    found = p.NuclearNorm(strength=c).gradient(Penalized(weight.detach(), layout=CONV))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_nuclear_norm_leaves_directions_alone_that_are_not_there():
    weight = torch.outer(normal(4), normal(3, seed=1))  # rank one
    found = p.NuclearNorm(strength=1.0).gradient(seen(weight))
    torch.testing.assert_close(found, weight / weight.norm(), rtol=1e-9, atol=1e-12)


def test_decay_of_pruned_latent_weights_and_nothing_else():
    weight, active = normal(4, 3), torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    leaf = weight.clone().requires_grad_()
    [expected] = torch.autograd.grad(c / 2 * (leaf * ~active).square().sum(), leaf)
    assert torch.equal(p.SrSte(strength=c).gradient(Penalized(weight, active)), expected)
    assert not p.SrSte(strength=c).gradient(Penalized(weight)).any()
    torch.testing.assert_close(
        p.SrSte(strength=c, apply="proximal").step(Penalized(weight, active), 0.5),
        torch.where(active, weight, weight / (1 + 0.5 * c)),
        rtol=1e-15,
        atol=0,
    )


def test_exploration_l2_has_the_value_of_its_gradient():
    weight, active = normal(6), torch.tensor([True, False, True, False, False, True])
    learns = torch.tensor([True, True, True, False, True, True])
    at = Penalized(weight, active, learns, density=0.25)
    leaf = weight.clone().requires_grad_()
    [expected] = torch.autograd.grad(c * sum(leaf[i] ** 2 * (1 if active[i] else 4) for i in range(6) if learns[i]), leaf)
    torch.testing.assert_close(p.ExplorationL2(strength=c).gradient(at), expected, rtol=1e-14, atol=0)
    [again] = torch.autograd.grad(p.ExplorationL2(strength=c).value(Penalized(**vars(at) | {"weight": leaf})), leaf)
    torch.testing.assert_close(again, expected, rtol=1e-14, atol=0)


def test_weights_decay_where_the_loss_does_not_feel_them():
    weight, gradient = torch.tensor([1.0, 1.0, -2.0, 3.0]), torch.tensor([0.0, 0.5, -0.25, 9.0])
    found = p.Sensitivity(strength=0.1).gradient(Penalized(weight, gradient=gradient))
    torch.testing.assert_close(found, torch.tensor([0.1, 0.05, -0.15, 0.0]))
    half = p.Sensitivity(strength=0.1, bound=0.5).gradient(Penalized(weight, gradient=gradient))
    torch.testing.assert_close(half, torch.tensor([0.1, 0.0, -0.1, 0.0]))


def test_what_relaxations_say():
    probabilities = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for penalty, reads in ((p.ExpectedL0(strength=c), "active"), (p.KL(strength=c), "divergence")):
        assert penalty.reads == reads
        assert torch.equal(penalty.gradient(Penalized(probabilities)), torch.full_like(probabilities, c))
        assert float(penalty.value(Penalized(probabilities))) == pytest.approx(c * math.fsum(probabilities.flatten().tolist()))
    found = p.LowThreshold(strength=c).gradient(Penalized(probabilities))
    torch.testing.assert_close(found, torch.tensor([[-c * math.exp(-t) for t in row] for row in probabilities.tolist()]).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_stay_and_are_computed_in_more(dtype):
    weight = normal(4, 3).to(dtype)
    for penalty, _ in FORMULAS:
        [at] = ready(penalty, weight)
        found = penalty.gradient(at)
        assert found.dtype == dtype
        [exact] = ready(penalty, weight.double())
        torch.testing.assert_close(found.double(), penalty.gradient(exact), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
