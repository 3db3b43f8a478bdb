"""Scores that compare a weight with how much the examples disagree about it, against the published statistic example by example."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.saliency import Observation, TStatistic
from niwaki.statistics import GradientMean, GradientSquare


def problem():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, labels = torch.randn(12, 5, dtype=torch.float64), torch.randint(0, 3, (12,))
    return model, inputs, labels


def published(model, inputs, labels, name, rate):
    """``T(w) = log(|Σ_p (w - η g_p)| / (η √Σ_p (g_p - mean)²))``, term by term."""
    weight = model.get_parameter(name)
    steps = []
    for x, y in zip(inputs, labels, strict=True):
        [gradient] = torch.autograd.grad(functional.cross_entropy(model(x[None]), y[None]), [weight])
        steps.append(gradient)
    mean = sum(steps) / len(steps)
    moved = sum(weight.detach() - rate * g for g in steps).abs()
    spread = sum((g - mean) ** 2 for g in steps).sqrt()
    return (moved / (rate * spread)).log()


@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_weights_are_ranked_by_the_published_statistic(rate):
    model, inputs, labels = problem()
    expected = {name: published(model, inputs, labels, name, rate) for name in ("0.weight", "2.weight")}
    before = {name: model.get_parameter(name).detach().clone() for name in expected}
    found = niwaki.prune(
        model,
        niwaki.Recipe(sparsity=0.4, saliency={"t_statistic": {"learning_rate": rate}}, target={"weights": {"include": ["*.weight"]}}),
        data=[(inputs[:5], labels[:5]), (inputs[5:], labels[5:])],
        loss=functional.cross_entropy,
    )
    for name, statistic in expected.items():
        kept = found.masks[name]
        assert int(kept.sum()) == round(0.6 * kept.numel())
        assert statistic[kept].min() > statistic[~kept].max()
        assert not torch.equal(kept, before[name].abs() >= before[name].abs().flatten().sort().values[round(0.4 * kept.numel())])


def test_the_score_is_the_statistic_without_its_logarithm():
    """To a factor, the root of the number of examples, which no ranking sees."""
    model, inputs, labels = problem()
    weight = model.get_parameter("2.weight")
    steps = [
        torch.autograd.grad(functional.cross_entropy(model(x[None]), y[None]), [weight])[0] for x, y in zip(inputs, labels, strict=True)
    ]
    known = {GradientMean(): torch.stack(steps).mean(0), GradientSquare(): torch.stack(steps).square().mean(0)}
    score = TStatistic(learning_rate=0.1).score(Observation("2.weight", weight.detach(), statistics=known), lambda values: values)
    expected = published(model, inputs, labels, "2.weight", 0.1).exp() / 12**0.5
    torch.testing.assert_close(score, expected, rtol=1e-9, atol=0)


def test_nothing_and_no_disagreement():
    known = {GradientMean(): torch.tensor([0.0, 1.0, 1.0]), GradientSquare(): torch.tensor([0.0, 1.0, 1.0])}
    seen = Observation("w", torch.tensor([0.0, 0.5, 0.0]), statistics=known)
    assert TStatistic().score(seen, lambda values: values).tolist() == [0.0, torch.inf, torch.inf]
