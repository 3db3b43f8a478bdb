"""Scores of the training's path, against sums over a recorded run."""

import pytest
import torch

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.saliency import AccumulatedMovement, FromInit, Karnin, Observation, TotalChange
from niwaki.statistics import InitialWeight, Movement, PathSensitivity, WeightChange


def rows(values):
    return values.sum(1, dtype=torch.float64)


def identity(values):
    return values


@pytest.fixture
def run():
    """Weights and gradients of gradient descent on a quadratic loss."""
    generator = torch.Generator().manual_seed(0)
    hessian = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian = hessian @ hessian.T / 6
    target, w = torch.randn(6, generator=generator, dtype=torch.float64), torch.randn(6, generator=generator, dtype=torch.float64)
    weights, gradients = [w], []
    for _ in range(50):
        gradients.append(hessian @ (weights[-1] - target))
        weights.append(weights[-1] - 0.05 * gradients[-1])
    return torch.stack(weights), torch.stack(gradients), hessian, target


def test_movement_is_the_score_that_movement_pruning_learns(run):
    weights, gradients, *_ = run
    score = torch.zeros(6, dtype=torch.float64)
    for w, g in zip(weights, gradients, strict=False):  # dL/dS by the straight-through estimator: g w
        score -= g * w
    seen = Observation("w", weights[-1], statistics={Movement(): -(gradients * weights[:-1]).sum(0)})
    torch.testing.assert_close(AccumulatedMovement().score(seen, identity), score, rtol=1e-12, atol=1e-15)
    matrix = Observation("w", weights[-1].view(2, 3), statistics={Movement(): score.view(2, 3)})
    torch.testing.assert_close(AccumulatedMovement().score(matrix, rows), score.view(2, 3).sum(1), rtol=1e-12, atol=1e-15)


def test_total_change_is_the_length_of_the_path(run):
    weights, *_ = run
    steps = weights.diff(dim=0).abs().sum(0)
    seen = Observation("w", weights[-1], statistics={WeightChange(): steps})
    assert TotalChange().score(seen, identity).tolist() == steps.tolist()
    assert build("saliency", "weight_change") == TotalChange()


def test_karnin_extrapolates_the_path_to_zero(run):
    weights, gradients, *_ = run
    known = {PathSensitivity(): (gradients * weights.diff(dim=0)).sum(0), InitialWeight(): weights[0]}
    found = Karnin().score(Observation("w", weights[-1], statistics=known), identity)
    for i, score in enumerate(found.tolist()):
        gain = sum(float(gradients[t, i] * (weights[t + 1, i] - weights[t, i])) for t in range(50))
        assert score == pytest.approx(-gain * float(weights[-1, i] / (weights[-1, i] - weights[0, i])), rel=1e-10)


def test_karnin_equals_the_rise_of_the_loss_where_the_path_began_at_zero():
    curvature, target = 3.0, 2.0  # one weight, loss ½ c (w - t)², from w = 0 in tiny steps
    w, path = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for _ in range(20000):
        gradient = curvature * (w - target)
        path += gradient * (-1e-4 * gradient)
        w = w - 1e-4 * gradient
    known = {PathSensitivity(): path, InitialWeight(): torch.zeros(1)}
    rise = 0.5 * curvature * target**2 - 0.5 * curvature * float(w - target) ** 2
    assert float(Karnin().score(Observation("w", w, statistics=known), identity)) == pytest.approx(rise, rel=1e-3)


def test_weights_that_are_back_or_zero_score_zero():
    known = {PathSensitivity(): torch.tensor([-1.0, -1.0, 0.0]), InitialWeight(): torch.tensor([2.0, 5.0, 0.0])}
    found = Karnin().score(Observation("w", torch.tensor([2.0, 0.0, 0.0]), statistics=known), identity)
    assert found.tolist() == [0.0, 0.0, 0.0]


def test_movement_from_the_beginning():
    now, first = torch.tensor([[3.0, -1.0], [0.5, 2.0]]), torch.tensor([[-1.0, -2.0], [0.5, 0.0]])
    seen = Observation("w", now, statistics={InitialWeight(): first})
    expected = {
        "magnitude_increase": [[2.0, -1.0], [0.0, 2.0]],
        "movement": [[4.0, 1.0], [0.0, 2.0]],
        "large_final_same_sign": [[-3.0, 1.0], [0.5, 0.0]],
        "large_init": [[1.0, 2.0], [0.5, 0.0]],
        "small_init": [[-1.0, -2.0], [-0.5, 0.0]],
        "small_final": [[-3.0, -1.0], [-0.5, -2.0]],
    }
    for criterion, scores in expected.items():
        component = build("saliency", {"from_init": criterion})
        assert component.score(seen, identity).tolist() == scores
        assert component.score(seen, rows).tolist() == [sum(row) for row in scores]
    assert FromInit().criterion == "magnitude_increase"


@pytest.mark.parametrize("component", [AccumulatedMovement(), TotalChange(), Karnin(), FromInit()], ids=str)
def test_what_was_not_watched_is_told(component):
    with pytest.raises(InputError, match=r"^fc\.weight: its \w+ was not collected at step 7$"):
        component.score(Observation("fc.weight", torch.ones(2), step=7), identity)
    assert all(request.source == "steps" for request in component.statistics)
