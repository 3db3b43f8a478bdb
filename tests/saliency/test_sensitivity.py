"""Scores that follow units to the outputs, against explicit propagation and autograd's Jacobians."""

import pytest
import torch
from scipy import stats

from niwaki.component import build
from niwaki.granularity import InputChannel
from niwaki.layout import Layout
from niwaki.pieces import Grid, Slices
from niwaki.saliency import Nisp, Observation, Sensitivity, VarianceNullity
from niwaki.statistics import OutputSensitivity, Relevance

LAYOUT = Layout(("output", "input"), (5, 4))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nisp_of_a_unit_is_what_flows_back_through_all_its_entries():
    weight, final = normal(5, 4), normal(5, seed=1).abs()
    entry = weight.abs().T @ final
    known = {Relevance(): entry.view(1, 4)}
    cut = Slices("w", (5, 4), (5, 4), 1, torch.arange(2), torch.tensor([[0, 3], [1, 2]]))
    found = Nisp().score(Observation("w", weight, statistics=known, layout=LAYOUT), cut)
    assert found.tolist() == pytest.approx([float(entry[0] + entry[3]), float(entry[1] + entry[2])])
    single = Nisp().score(Observation("w", weight, statistics=known, layout=LAYOUT), Grid(InputChannel(), LAYOUT))
    torch.testing.assert_close(single.flatten(), entry, rtol=1e-13, atol=0)


def test_nisp_asks_for_the_ranking_of_the_last_responses():
    assert Nisp().statistics == (Relevance(final="infinite_ranking"),)
    assert build("saliency", {"nisp": "equal"}).statistics == (Relevance(final="equal"),)


def jacobians():
    """Of a network of two layers, at 30 examples: ``[examples, outputs, hidden units]``."""
    read, last = normal(5, 4), normal(3, 5, seed=2)
    hidden = normal(30, 4, seed=3)
    return torch.stack([torch.autograd.functional.jacobian(lambda h: last @ torch.tanh(read @ h), h) for h in hidden])


def known():
    found = jacobians()
    root = found.square().mean(dim=1).sqrt()
    return {OutputSensitivity(): torch.stack([found.abs().mean(dim=(0, 1)), root.mean(dim=0), root.var(dim=0)]).view(3, 1, 4)}


def test_output_sensitivity_is_the_mean_size_of_the_jacobian():
    found = Sensitivity().score(Observation("w", normal(5, 4), statistics=known(), layout=LAYOUT), Grid(InputChannel(), LAYOUT)).flatten()
    expected = [sum(abs(float(j[o, u])) for j in jacobians() for o in range(3)) / 90 for u in range(4)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_variance_nullity_makes_engelbrechts_test():
    seen = Observation("w", normal(5, 4), statistics=known(), layout=LAYOUT)
    small = 0.01
    found = VarianceNullity(null_variance=small).score(seen, Grid(InputChannel(), LAYOUT)).flatten()
    per_example = jacobians().square().mean(dim=1).sqrt()
    gamma = torch.stack([29 * per_example[:, u].var() / small for u in range(4)])
    torch.testing.assert_close(29 * found, gamma, rtol=1e-12, atol=0)
    critical = stats.chi2.ppf(0.05, 29)
    assert ((found >= critical / 29) == (gamma >= critical)).all()
    assert build("saliency", {"variance_nullity": 0.5}) == VarianceNullity(null_variance=0.5)
