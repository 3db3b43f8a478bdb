"""Statistics of a training's own steps, against numpy on the recorded trajectory."""

import numpy as np
import pytest
import torch

from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.statistics import (
    GradientBank,
    Hessian,
    InitialWeight,
    InputCovariance,
    InputGram,
    InputResponses,
    InputSize,
    KroneckerFactors,
    Momentum,
    Movement,
    PathSensitivity,
    StepGradients,
    WeightChange,
    accumulator,
)

STEPS = 11


def trajectory(dtype=torch.float64):
    """Weights w_0 ... w_T and gradients g_0 ... g_(T-1)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(STEPS + 1, 2, 3, generator=generator, dtype=dtype)
    return weights, torch.randn(STEPS, 2, 3, generator=generator, dtype=dtype)


def expected(request, w, g):
    w, g = w.numpy().astype(np.float64), g.numpy().astype(np.float64)
    steps = np.diff(w, axis=0)
    return {
        InitialWeight: lambda: w[0],
        Movement: lambda: -(g * w[: len(g)]).sum(0) if request.decay is None else averaged(-g * w[: len(g)], request.decay),
        Momentum: lambda: averaged(g, request.decay),
        WeightChange: lambda: np.abs(steps).sum(0),
        PathSensitivity: lambda: (g * steps).sum(0),
        StepGradients: lambda: g[-4:],
    }[type(request)]()


def averaged(values, decay):
    """``Σ_t (1 - d) d^(T-1-t) v_t``, written out."""
    return sum((1 - decay) * decay ** (len(values) - 1 - t) * values[t] for t in range(len(values)))


REQUESTS = [InitialWeight(), Movement(), Movement(0.8), Momentum(0.9), WeightChange(), PathSensitivity(), StepGradients(window=4)]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("resumed_at", [None, 2, 4, 7])
def test_a_statistic_of_steps_is_that_of_the_trajectory(request_, dtype, resumed_at):
    weights, gradients = trajectory(dtype)
    live = torch.empty_like(weights[0])  # the trainer writes in place
    live.copy_(weights[0])
    watched = accumulator(request_, live)
    for t in range(STEPS):
        if t == resumed_at:
            state = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in watched.state_dict().items()}
            watched.update(weights[0], gradients[0])  # the state that was taken does not move
            watched = accumulator(request_, torch.zeros_like(live))
            watched.load_state_dict(state)
        if t % 3 == 0:
            watched.value(live)  # looking changes nothing
        watched.update(live, gradients[t])
        live.copy_(weights[t + 1])
    found = watched.value(live)
    np.testing.assert_allclose(found.numpy(), expected(request_, weights, gradients), rtol=1e-12, atol=1e-12)
    if not isinstance(request_, StepGradients):
        assert found.dtype == torch.float64


def test_a_window_that_is_not_full_has_what_there_was():
    weights, gradients = trajectory()
    watched = accumulator(StepGradients(window=8), weights[0])
    assert watched.value(weights[0]).shape == (0, 2, 3)
    for t in range(3):
        watched.update(weights[t], gradients[t])
    assert torch.equal(watched.value(weights[3]), gradients[:3])


def test_requests_that_are_not_of_steps_are_refused():
    with pytest.raises(InputError, match="InputSize is not collected over the steps"):
        accumulator(InputSize(), torch.zeros(2))


def test_what_fits_into_a_budget_is_said():
    layout = Layout(("output", "input"), (10, 100))
    assert StepGradients(window=512).memory(layout) == 512 * 4000
    assert StepGradients().within(8 * 4000, [layout]) == "window: 8"
    assert StepGradients().within(100, [layout]) == ""


def test_what_a_request_takes_is_said_by_its_layout():
    layout = Layout(("group", "output", "input", "kernel"), (2, 3, 4, 5))
    assert GradientBank(10).memory(layout) == 10 * 120 * 4
    assert GradientBank(10).within(5000, [layout, layout]) == "gradients: 5"
    assert InputResponses(10).memory(layout) == 10 * 8 * 8
    assert InputResponses(10).within(200, [layout]) == "examples: 3"
    assert InputResponses(10).within(10, [layout]) == ""
    assert InputGram().memory(layout) == 2 * 2 * 20 * 20 * 8
    assert InputCovariance().memory(layout) == 2 * 8 * 8 * 8
    assert Hessian().memory(layout) == 2 * 120 * 120 * 8
    assert KroneckerFactors().memory(layout) == 3 * 2 * (20 * 20 + 3 * 3) * 8
    assert InputSize().memory(layout) == 8 * 8
    assert InputSize().within(0, [layout]) == ""
