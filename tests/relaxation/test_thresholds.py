"""Learned thresholds: what they publish, in training and in the end, and the derivatives that they put in the place of a step's."""

import math

import pytest
import torch

from niwaki.layout import Layout
from niwaki.relaxation import DynamicThreshold, Moment, SigmoidThreshold, SmoothThreshold

WEIGHT = torch.tensor([[-1.7, -0.6, -0.21, 0.0], [0.05, 0.4, 0.9, 1.5]], dtype=torch.float64)
NOW, END = Moment("w"), Moment("w", evaluating=True)


def long_tailed(x: float) -> float:
    size = abs(x)
    return 2.0 - 4.0 * size if size <= 0.4 else 0.4 if size <= 1.0 else 0.0


def test_dynamic_thresholds_mask_by_row_and_pull_back_as_published():
    t = torch.tensor([[0.5], [0.3]], dtype=torch.float64)
    relaxation = DynamicThreshold()
    published = relaxation.relax(WEIGHT, {"threshold": t}, NOW)
    assert published.tolist() == [[-1.7, -0.6, 0.0, 0.0], [0.0, 0.4, 0.9, 1.5]]
    gradient = torch.linspace(-1.0, 2.0, 8, dtype=torch.float64).view(2, 4)
    for_weight, for_own = relaxation.pull_back(WEIGHT, {"threshold": t}, gradient, NOW)
    for row in range(2):
        expected = 0.0
        for column in range(4):
            w, g, threshold = (float(x) for x in (WEIGHT[row, column], gradient[row, column], t[row, 0]))
            slope = long_tailed(abs(w) - threshold)
            step = 1.0 if abs(w) > threshold else 0.0
            assert float(for_weight[row, column]) == pytest.approx(g * (step + w * slope * math.copysign(1.0, w) * (w != 0)))
            expected -= g * w * slope
        assert float(for_own["threshold"][row, 0]) == pytest.approx(expected)


def test_thresholds_have_the_shape_of_outputs_or_one_for_the_tensor():
    layout = Layout(("output", "input"), (2, 4))
    assert DynamicThreshold().parameters(WEIGHT, layout, "w", 0)["threshold"].shape == (2, 1)
    assert SigmoidThreshold(initial=0.25).parameters(WEIGHT, layout, "w", 0)["threshold"].item() == 0.25
    assert SmoothThreshold(per="output_channel").parameters(WEIGHT.half(), layout, "w", 0)["threshold"].dtype == torch.float32


def test_sigmoid_thresholds_count_softly_and_end_as_steps_of_the_square():
    relaxation, own = SigmoidThreshold(temperature=0.05), {"threshold": torch.tensor(0.3, dtype=torch.float64)}
    width = 0.05 * float(((WEIGHT - WEIGHT.mean()) ** 2).mean())
    soft = [[1.0 / (1.0 + math.exp(-(w * w - 0.3) / width)) for w in row] for row in WEIGHT.tolist()]
    expected = [[w * s for w, s in zip(weights, row, strict=True)] for weights, row in zip(WEIGHT.tolist(), soft, strict=True)]
    assert torch.allclose(relaxation.relax(WEIGHT, own, NOW), torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(relaxation.expected_active(WEIGHT, own), torch.tensor(soft, dtype=torch.float64))
    assert relaxation.relax(WEIGHT, own, END).tolist() == [[-1.7, -0.6, -0.0, 0.0], [0.0, 0.0, 0.9, 1.5]]
    kept = relaxation.relax(WEIGHT, own, END) != 0
    assert torch.equal(relaxation.score(WEIGHT, own) > 0, kept)


def test_smooth_thresholds_are_odd_smooth_and_end_as_steps():
    relaxation, own = SmoothThreshold(sharpness=40.0), {"threshold": torch.tensor(0.5, dtype=torch.float64)}

    def by_hand(x: float) -> float:
        def half(y: float) -> float:
            return max(y - 0.5, 0.0) + 0.5 / (1.0 + math.exp(-40.0 * (y - 0.5)))

        return half(x) - half(-x)

    expected = [[by_hand(w) for w in row] for row in WEIGHT.tolist()]
    assert torch.allclose(relaxation.relax(WEIGHT, own, NOW), torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(relaxation.relax(-WEIGHT, own, NOW), -relaxation.relax(WEIGHT, own, NOW))
    assert relaxation.relax(WEIGHT, own, END).abs().tolist() == [[1.7, 0.6, 0.0, 0.0], [0.0, 0.0, 0.9, 1.5]]


@pytest.mark.parametrize("relaxation", [SigmoidThreshold(temperature=0.1), SmoothThreshold(sharpness=5.0)])
def test_smooth_derivatives_agree_with_finite_differences(relaxation):
    t = torch.tensor(0.3, dtype=torch.float64)
    gradient = torch.linspace(-1.0, 2.0, 8, dtype=torch.float64).view(2, 4)
    for_weight, for_own = relaxation.pull_back(WEIGHT, {"threshold": t}, gradient, NOW)
    h = 1e-6

    def value(weight: torch.Tensor, threshold: torch.Tensor) -> float:
        return float((relaxation.relax(weight, {"threshold": threshold}, NOW) * gradient).sum())

    difference = (value(WEIGHT, t + h) - value(WEIGHT, t - h)) / (2 * h)
    assert float(for_own["threshold"]) == pytest.approx(difference, rel=1e-6)
    if isinstance(relaxation, SigmoidThreshold):
        return  # its width follows the weights' variance, and is taken as constant in the gradient
    for i in range(8):
        step = torch.zeros(8, dtype=torch.float64)
        step[i] = h
        there, back = WEIGHT + step.view(2, 4), WEIGHT - step.view(2, 4)
        assert float(for_weight.flatten()[i]) == pytest.approx((value(there, t) - value(back, t)) / (2 * h), rel=1e-5, abs=1e-8)
