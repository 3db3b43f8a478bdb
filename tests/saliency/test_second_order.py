"""Second-order scores against the true change of quadratic losses, minimised by numpy, and against autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.granularity import Block, InputChannel, OutputChannel
from niwaki.layout import Layout
from niwaki.pieces import Grid, Slices
from niwaki.saliency import (
    KroneckerDamage,
    KroneckerSurgeon,
    LayerwiseSurgeon,
    MatrixFreeFisher,
    Observation,
    OptimalBrainDamage,
    OptimalBrainSurgeon,
    WoodFisher,
    WoodTaylor,
)
from niwaki.statistics import (
    GradientBank,
    GradientSquare,
    Hessian,
    HessianDiagonal,
    InputGram,
    JointMatrix,
    KroneckerFactors,
    StepGradients,
)

LAYOUTS = {"a.weight": Layout(("output", "input"), (4, 6)), "b.weight": Layout(("output", "input", "kernel"), (2, 4, 3))}
SIZES = {name: layout.elements for name, layout in LAYOUTS.items()}


def identity(values):
    return values


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def joined(vectors):
    return np.concatenate([vectors[name].numpy().ravel() for name in LAYOUTS])


def place(name, flat):
    """Where weights of a tensor are among all of them."""
    return flat + (0 if name == "a.weight" else SIZES["a.weight"])


def smallest(hessian, gradient, weight, gone):
    """The smallest change of a quadratic loss that has some weights at zero, by its normal equations."""
    rest = np.setdiff1d(np.arange(len(weight)), gone)
    change = np.zeros(len(weight))
    change[gone] = -weight[gone]
    change[rest] = np.linalg.solve(hessian[np.ix_(rest, rest)], -gradient[rest] - hessian[np.ix_(rest, gone)] @ change[gone])
    return gradient @ change + 0.5 * change @ hessian @ change


def observed(saliency, statistics, *, gradients=None, active=None):
    """What the saliency sees of both tensors, with its curvature."""
    weights = {name: random(*layout.shape, seed=20 + i) for i, (name, layout) in enumerate(LAYOUTS.items())}
    if active is not None:
        weights = {name: weight * active[name] for name, weight in weights.items()}
    fields = {
        name: {
            "weight": weights[name],
            "layout": layout,
            "statistics": statistics[name],
            "gradient": None if gradients is None else gradients[name],
            "active": None if active is None else active[name],
        }
        for name, layout in LAYOUTS.items()
    }
    curvature = saliency.curvature([Observation(name, **one) for name, one in fields.items()])
    return {name: Observation(name, **one, curvature=curvature) for name, one in fields.items()}, weights


def hessian_of(model_seed=0):
    """The Hessian, by autograd, of a quadratic loss of both tensors together."""
    design = random(90, sum(SIZES.values()), seed=model_seed)

    def loss(weights):
        return ((design @ weights) ** 2).mean()

    return torch.autograd.functional.hessian(loss, torch.zeros(design.shape[1], dtype=torch.float64))


PIECES = {
    "element": lambda layout: None,
    "block": lambda layout: Grid(Block(rows=2, columns=2), layout),
    "output_channel": lambda layout: Grid(OutputChannel(), layout),
    "input_channel": lambda layout: Grid(InputChannel(), layout),
}


@pytest.mark.parametrize("pieces", PIECES)
def test_obs_is_the_true_change_of_a_quadratic_loss(pieces):
    hessian = hessian_of()
    statistics = {Hessian(): JointMatrix(tuple(LAYOUTS), tuple(SIZES.values()), hessian)}
    seen, weights = observed(OptimalBrainSurgeon(), dict.fromkeys(LAYOUTS, statistics))
    flat, zero = joined(weights), np.zeros(len(hessian))
    for name, layout in LAYOUTS.items():
        cut = PIECES[pieces](layout)
        index = torch.arange(layout.elements)[:, None] if cut is None else cut.rows(torch.arange(layout.elements).view(layout.shape))
        scores = OptimalBrainSurgeon().score(seen[name], identity if cut is None else cut)
        assert scores.shape == (layout.shape if cut is None else cut(torch.zeros(layout.shape)).shape)
        assert scores.dtype == torch.float64
        expected = [smallest(hessian.numpy(), zero, flat, place(name, one)) for one in index.numpy()]
        np.testing.assert_allclose(scores.flatten().numpy(), expected, rtol=1e-10)


def test_obs_follows_the_tensors_wherever_they_are_in_the_hessian():
    hessian = hessian_of()
    swapped = torch.arange(len(hessian)).roll(-SIZES["a.weight"])
    turned = JointMatrix(tuple(LAYOUTS)[::-1], tuple(SIZES.values())[::-1], hessian[swapped[:, None], swapped])
    straight = JointMatrix(tuple(LAYOUTS), tuple(SIZES.values()), hessian)
    scores = []
    for joint in (straight, turned):
        seen, _ = observed(OptimalBrainSurgeon(), {name: {Hessian(): joint} for name in LAYOUTS})
        scores.append([OptimalBrainSurgeon().score(one, identity) for one in seen.values()])
    for one, other in zip(*scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


def test_obs_leaves_masked_weights_out():
    hessian = hessian_of().numpy()
    active = {name: random(*layout.shape, seed=3) > -0.5 for name, layout in LAYOUTS.items()}
    statistics = {Hessian(): JointMatrix(tuple(LAYOUTS), tuple(SIZES.values()), torch.tensor(hessian))}
    seen, weights = observed(OptimalBrainSurgeon(), dict.fromkeys(LAYOUTS, statistics), active=active)
    kept = np.flatnonzero(joined(active))
    part, flat = hessian[np.ix_(kept, kept)], joined(weights)[kept]
    scores = joined({name: OptimalBrainSurgeon().score(one, identity) for name, one in seen.items()})
    expected = [smallest(part, np.zeros(len(kept)), flat, np.array([i])) for i in range(len(kept))]
    np.testing.assert_allclose(scores[kept], expected, rtol=1e-10)
    assert not scores[~joined(active)].any()


def fisher_of(banks, damping, block=None):
    rows = np.concatenate([bank.flatten(1).numpy() for bank in banks.values()], 1)
    whole = rows.T @ rows / len(rows)
    if block:
        label = np.concatenate([1000 * i + np.arange(n) // block for i, n in enumerate(SIZES.values())])
        whole = whole * (label[:, None] == label)
    return whole + damping * np.eye(len(whole))


@pytest.mark.parametrize("saliency", [WoodFisher(block=7, damping=0.1), WoodFisher(block=None, damping=0.1), MatrixFreeFisher(damping=0.1)])
@pytest.mark.parametrize("pieces", PIECES)
def test_fisher_scores_are_the_true_change_of_their_model(saliency, pieces):
    banks = {name: random(5, *layout.shape, seed=i) for i, (name, layout) in enumerate(LAYOUTS.items())}
    seen, weights = observed(saliency, {name: {saliency.statistics[0]: bank} for name, bank in banks.items()})
    block = None if isinstance(saliency, MatrixFreeFisher) else saliency.block or 1000
    fisher, flat = fisher_of(banks, 0.1, block), joined(weights)
    for name, layout in LAYOUTS.items():
        cut = PIECES[pieces](layout)
        index = torch.arange(layout.elements)[:, None] if cut is None else cut.rows(torch.arange(layout.elements).view(layout.shape))
        scores = saliency.score(seen[name], identity if cut is None else cut)
        expected = [smallest(fisher, np.zeros(len(flat)), flat, place(name, one)) for one in index.numpy()]
        np.testing.assert_allclose(scores.flatten().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("pieces", PIECES)
def test_woodtaylor_adds_what_the_gradient_does_and_compares_tensors_rightly(pieces):
    saliency = WoodTaylor(block=9, damping=0.1)
    banks = {name: random(5, *layout.shape, seed=i) for i, (name, layout) in enumerate(LAYOUTS.items())}
    gradients = {name: random(*layout.shape, seed=7 + i) * 10 ** (i - 1) for i, (name, layout) in enumerate(LAYOUTS.items())}
    seen, weights = observed(saliency, {name: {saliency.statistics[0]: bank} for name, bank in banks.items()}, gradients=gradients)
    fisher, flat, gradient = fisher_of(banks, 0.1, 9), joined(weights), joined(gradients)
    constant = 0.5 * gradient @ np.linalg.solve(fisher, gradient)  # of the whole network: the same for all pieces
    for name, layout in LAYOUTS.items():
        cut = PIECES[pieces](layout)
        index = torch.arange(layout.elements)[:, None] if cut is None else cut.rows(torch.arange(layout.elements).view(layout.shape))
        scores = saliency.score(seen[name], identity if cut is None else cut)
        expected = [smallest(fisher, gradient, flat, place(name, one)) for one in index.numpy()]
        np.testing.assert_allclose(scores.flatten().numpy() - constant, expected, rtol=1e-10, atol=1e-10 * constant)


def test_units_that_a_tensor_reads_are_scored_by_all_weights_that_read_them():
    hessian = hessian_of()
    statistics = {Hessian(): JointMatrix(tuple(LAYOUTS), tuple(SIZES.values()), hessian)}
    seen, weights = observed(OptimalBrainSurgeon(), dict.fromkeys(LAYOUTS, statistics))
    units = Slices("a.weight", (4, 6), (4, 6), 1, torch.tensor([0, 2]), torch.tensor([[0, 5], [1, 3]]))  # two inputs each
    scores = OptimalBrainSurgeon().score(seen["a.weight"], units)
    for score, columns in zip(scores.tolist(), ([0, 5], [1, 3]), strict=True):
        gone = np.arange(24).reshape(4, 6)[:, columns].ravel()
        assert score == pytest.approx(smallest(hessian.numpy(), np.zeros(48), joined(weights), gone), rel=1e-10)


def test_l_obs_is_the_error_of_the_outputs_after_least_squares():
    saliency, inputs = LayerwiseSurgeon(damping=0.0), {"a.weight": random(40, 6, seed=1), "b.weight": random(40, 12, seed=2)}
    statistics = {name: {InputGram(): (x.T @ x / 40)[None]} for name, x in inputs.items()}
    seen, weights = observed(saliency, statistics)
    for name, x in inputs.items():
        rows, x = weights[name].flatten(1).numpy(), x.numpy()
        scores = saliency.score(seen[name], identity).flatten(1).numpy()
        for row, found in zip(rows, scores, strict=True):
            for i in range(len(row)):
                rest = np.delete(np.arange(len(row)), i)
                best = np.linalg.lstsq(x[:, rest], x @ row, rcond=None)[0]
                assert found[i] == pytest.approx(np.mean((x[:, rest] @ best - x @ row) ** 2), rel=1e-9)
        units = Grid(InputChannel(), LAYOUTS[name])
        width = LAYOUTS[name].size("kernel")
        found = saliency.score(seen[name], units).flatten().tolist()
        for i, score in enumerate(found):
            rest = np.delete(np.arange(x.shape[1]), np.arange(i * width, (i + 1) * width))
            best = np.linalg.lstsq(x[:, rest], x @ rows.T, rcond=None)[0]
            assert score == pytest.approx(np.mean(np.sum((x[:, rest] @ best - x @ rows.T) ** 2, 1)), rel=1e-9)


def test_kfac_scores_are_those_of_the_kronecker_product():
    a, g, weight, layout = random(9, 6, seed=1), random(9, 4, seed=2), random(4, 6, seed=3), LAYOUTS["a.weight"]
    factors = (a.T @ a / 9)[None], (g.T @ g / 9)[None]
    fisher = np.kron(factors[1][0].numpy(), factors[0][0].numpy())
    surgeon, damage = KroneckerSurgeon(damping=0.0), KroneckerDamage()
    seen = Observation("a.weight", weight, layout=layout, statistics={KroneckerFactors(labels="sampled"): factors})
    ready = Observation("a.weight", weight, layout=layout, curvature=surgeon.curvature([seen]))
    expected = weight.numpy().ravel() ** 2 / (2 * np.linalg.inv(fisher).diagonal())
    np.testing.assert_allclose(surgeon.score(ready, identity).numpy().ravel(), expected, rtol=1e-10)
    np.testing.assert_allclose(
        damage.score(seen, identity).numpy().ravel(), fisher.diagonal() * weight.numpy().ravel() ** 2 / 2, rtol=1e-12
    )
    rows = [smallest(fisher, np.zeros(24), weight.numpy().ravel(), np.arange(6 * i, 6 * i + 6)) for i in range(4)]
    np.testing.assert_allclose(surgeon.score(ready, Grid(OutputChannel(), layout)).numpy().ravel(), rows, rtol=1e-10)


@pytest.mark.parametrize("estimate", ["exact", "hutchinson", "gauss_newton", "fisher"])
def test_obd_is_half_the_diagonal_times_the_squared_weight(estimate):
    saliency, weight = OptimalBrainDamage(estimate=estimate, probes=7), random(4, 6, seed=5)
    request = GradientSquare() if estimate == "fisher" else HessianDiagonal(estimate=estimate, probes=7)
    assert saliency.statistics == (request,)

    def loss(flat):
        inputs, targets = random(30, 6, seed=6), torch.arange(30) % 4
        return F.cross_entropy(inputs @ flat.view(4, 6).T, targets)

    diagonal = torch.autograd.functional.hessian(loss, weight.flatten()).diagonal()
    seen = Observation("a.weight", weight, statistics={request: diagonal.view(4, 6)})
    for i in range(24):  # the second-order term of the loss along the way to zero
        step = torch.zeros(24, dtype=torch.float64)
        step[i] = -1e-3 * weight.flatten()[i]
        second = (loss(weight.flatten() + step) + loss(weight.flatten() - step) - 2 * loss(weight.flatten())) / 2
        assert float(saliency.score(seen, identity).flatten()[i]) == pytest.approx(float(second) * 1e6, rel=1e-3, abs=1e-8)
    columns = saliency.score(seen, Grid(InputChannel(), LAYOUTS["a.weight"])).flatten()
    torch.testing.assert_close(columns, (diagonal.view(4, 6) * weight**2).sum(0) / 2, rtol=1e-12, atol=0)


def test_what_they_ask_for():
    assert WoodFisher().statistics == (GradientBank(gradients=400, samples_per_gradient=1),)
    assert MatrixFreeFisher().statistics == (GradientBank(gradients=512, samples_per_gradient=1),)
    assert MatrixFreeFisher(dynamic=True, gradients=64).statistics == (StepGradients(window=64),)
    assert WoodTaylor().needs == {"gradient"}
    named = {"obs", "l_obs", "woodfisher", "woodtaylor", "mfac", "kfac_obs", "obd", "kfac_obd"}
    assert {build("saliency", name).name for name in named} == named
    assert build("saliency", {"woodfisher": {"block": None, "labels": "sampled"}}).block is None
    assert build("saliency", {"obd": "exact"}).estimate == "exact"
    with pytest.raises(InputError, match="damping"):
        WoodFisher(damping=0.0)


def test_mfac_dynamic_reads_the_window():
    saliency = MatrixFreeFisher(dynamic=True, gradients=8, damping=0.1)
    banks = {name: random(5, *layout.shape, seed=i) for i, (name, layout) in enumerate(LAYOUTS.items())}  # the window is not full yet
    seen, weights = observed(saliency, {name: {StepGradients(window=8): bank} for name, bank in banks.items()})
    expected = joined(weights) ** 2 / (2 * np.linalg.inv(fisher_of(banks, 0.1)).diagonal())
    np.testing.assert_allclose(joined({name: saliency.score(one, identity) for name, one in seen.items()}), expected, rtol=1e-10)


def test_what_is_missing_is_told():
    weight = random(4, 6)
    with pytest.raises(InputError, match="w: its Hessian was not collected"):
        OptimalBrainSurgeon().curvature([Observation("w", weight)])
    with pytest.raises(InputError, match="'w' has no curvature"):
        OptimalBrainSurgeon().score(Observation("w", weight), identity)
    with pytest.raises(InputError, match="layout"):
        LayerwiseSurgeon().curvature([Observation("w", weight, statistics={InputGram(): torch.eye(6)[None]})])
    with pytest.raises(InputError, match="gradient"):
        WoodTaylor().curvature([Observation("w", weight, statistics={WoodTaylor().statistics[0]: weight[None]})])
    layout, fisher = LAYOUTS["a.weight"], WoodFisher()
    seen = Observation("w", weight, statistics={fisher.statistics[0]: weight[None]})
    seen = Observation("w", weight, curvature=fisher.curvature([seen]))
    with pytest.raises(InputError, match="pieces of"):
        fisher.score(seen, Grid(Block(rows=3, columns=2, remainder="pad"), layout))
