"""Synaptic flow on chains, against products of absolute weights; many rounds empty no layer, a single one does."""

import pytest
import torch

from niwaki.component import build
from niwaki.saliency import Observation, SynFlow
from niwaki.statistics import SynapticFlow


def identity(values):
    return values


def chain(widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(widths[1:], widths[:-1], strict=True)
    return [torch.randn(size, generator=generator, dtype=torch.float64) / size[1] ** 0.5 for size in sizes]


def flow(weights):
    """``∂R/∂|W|`` of ``R = 1ᵀ |W_L| … |W_1| 1``: what comes out above times what comes in below."""
    below = [torch.ones(weights[0].shape[1], dtype=torch.float64)]
    for weight in weights:
        below.append(weight.abs() @ below[-1])
    above = [torch.ones(weights[-1].shape[0], dtype=torch.float64)]
    for weight in reversed(weights):
        above.insert(0, weight.abs().T @ above[0])
    return [torch.outer(above[layer + 1], below[layer]) for layer in range(len(weights))]


def scores(weights):
    return [
        SynFlow().score(Observation("w", weight, statistics={SynapticFlow(): gradient}), identity)
        for weight, gradient in zip(weights, flow(weights), strict=True)
    ]


def test_scores_are_the_strength_of_all_paths_through_a_weight():
    weights = chain([3, 4, 2])
    found = scores(weights)
    for layer in range(2):
        for out in range(weights[layer].shape[0]):
            for inp in range(weights[layer].shape[1]):
                without = [w.clone() for w in weights]
                without[layer][out, inp] = 0.0
                total, less = (float((w[1].abs() @ w[0].abs()).sum()) for w in (weights, without))
                assert float(found[layer][out, inp]) == pytest.approx(total - less, rel=1e-12)


def test_every_layer_of_a_chain_has_the_same_total():
    totals = [float(score.sum()) for score in scores(chain([5, 9, 3, 7, 2]))]
    assert totals == pytest.approx([totals[0]] * 4, rel=1e-12)


def pruned(weights, keep, rounds):
    weights = [w.clone() for w in weights]
    total = sum(w.numel() for w in weights)
    for step in range(1, rounds + 1):
        count = round(total * (keep / total) ** (step / rounds))
        flat = torch.cat([s.flatten() for s in scores(weights)])
        mask = torch.zeros(total, dtype=torch.bool)
        mask[flat.argsort(descending=True, stable=True)[:count]] = True
        parts = mask.split([w.numel() for w in weights])
        weights = [w * m.view(w.shape) for w, m in zip(weights, parts, strict=True)]
    return [int((w != 0).sum()) for w in weights]


@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_rounds_empty_no_layer_and_one_does(seed):
    weights = chain([20, 60, 60, 60, 4], seed)
    keep = 24
    assert min(pruned(weights, keep, rounds=100)) > 0
    assert min(pruned(weights, keep, rounds=1)) == 0


def test_recipe():
    assert build("saliency", "synflow") == SynFlow()
    assert SynFlow().statistics == (SynapticFlow(),)
    assert SynFlow().needs == frozenset()
