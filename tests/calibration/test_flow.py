"""Synaptic flow, propagated relevance and sensitivity of outputs, against products of matrices and autograd's Jacobians."""

import numpy as np
import pytest
import torch
from calibration.problems import PROBLEMS, convolutional, cross_entropy, watched
from scipy.stats import rankdata
from torch import nn

from niwaki.calibration import Arguments, collect, flow
from niwaki.errors import InputError
from niwaki.statistics import OutputSensitivity, Relevance, SynapticFlow


def weights_of(model):
    return [name for name, p in model.named_parameters() if p.ndim > 1]


def chain(*, bias=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.ReLU(), nn.Linear(5, 3, bias=bias))


def test_synaptic_flow_of_a_chain_is_the_product_of_absolute_matrices():
    model = chain()
    names = weights_of(model)
    found = collect(model, None, None, watched(model, *names), [SynapticFlow()], example=torch.full((7, 4), -3.0))
    a, b, c = (np.abs(model.get_parameter(name).detach().double().numpy()) for name in names)
    ones = np.ones
    into = [ones(4), a @ ones(4), b @ a @ ones(4)]
    out = [ones(3) @ c @ b, ones(3) @ c, ones(3)]
    for name, i, o in zip(names, into, out, strict=True):
        value = found[name][SynapticFlow()]
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value.numpy(), np.outer(o, i), rtol=1e-12)


def test_synaptic_flow_is_conserved_from_layer_to_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4, bias=False),
    )  # fmt: skip
    names = weights_of(model)
    found = collect(model, [(torch.randn(2, 3, 8, 8), None)], None, watched(model, *names), [SynapticFlow()])
    totals = [
        float((found[name][SynapticFlow()] * model.get_parameter(name).detach().abs().view_as(found[name][SynapticFlow()])).sum())
        for name in names
    ]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-12)
    assert model.training


def test_synaptic_flow_takes_absolute_biases_and_buffers_in_evaluation_mode():
    model, names, data = convolutional()
    with torch.no_grad():
        model.norm.running_mean.neg_()
        model.norm.weight.neg_()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = collect(model, iter(data), cross_entropy, watched(model, *names), [SynapticFlow()])
    absolute = convolutional()[0].eval()
    absolute.load_state_dict({key: value.abs() for key, value in before.items()})
    absolute(torch.ones(1, 2, 5, 5, dtype=torch.float64)).sum().backward()
    for name in names:
        torch.testing.assert_close(found[name][SynapticFlow()].flatten(), absolute.get_parameter(name).grad.flatten(), rtol=1e-12, atol=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_synaptic_flow_is_zero_at_masked_weights_and_where_nothing_gets_through():
    model = chain()
    active = {"0.weight": torch.rand(6, 4) < 0.5, "2.weight": torch.zeros(5, 6, dtype=torch.bool)}
    with torch.no_grad():
        for name, mask in active.items():
            model.get_parameter(name).masked_fill_(~mask, 0.0)
    found = collect(model, None, None, watched(model, "0.weight", "2.weight", active=active), [SynapticFlow()], example=torch.ones(1, 4))
    assert not any(values[SynapticFlow()].any() for values in found.values())


def test_words_and_keywords_of_the_example_stay_what_they_are():
    model, names, data = PROBLEMS["attention"]()
    for inputs in (data[0][0], Arguments(kwargs={"ids": data[0][0]})):
        found = collect(model, None, None, watched(model, *names), [SynapticFlow()], example=inputs)
        assert all(bool(torch.isfinite(values[SynapticFlow()]).all()) for values in found.values())
        assert found["layer.linear1.weight"][SynapticFlow()].any()


def test_a_flow_that_overflows_is_told():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e70)
    with pytest.raises(InputError, match="overflows float64"):
        collect(model, None, None, watched(model, "0.weight"), [SynapticFlow()], example=torch.ones(1, 2))


def ranking_by_hand(responses):
    """Infinite feature selection as its paper has it, with the inverse written out."""
    x = np.asarray(responses)
    deviations = x.std(0) / x.std(0).max()
    correlation = np.corrcoef(rankdata(x, axis=0), rowvar=False)
    graph = 0.5 * np.maximum.outer(deviations, deviations) + 0.5 * (1 - np.abs(correlation))
    r = 0.9 / np.abs(np.linalg.eigvals(graph)).max()
    return (np.linalg.inv(np.eye(len(graph)) - r * graph) - np.eye(len(graph))).sum(1)


@pytest.mark.parametrize("final", ["infinite_ranking", "equal"])
def test_relevance_goes_back_through_absolute_matrices(final):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
    ).double()  # fmt: skip
    for buffer in (model[1].running_mean, model[1].running_var, model[1].weight.data, model[1].bias.data):
        buffer.uniform_(0.5, 2)
    data = [(torch.randn(n, 4, dtype=torch.float64), None) for n in (5, 4)]
    names = ["0.weight", "3.weight", "7.weight"]
    found = collect(model, iter(data), None, watched(model, *names), [Relevance(final)])
    with torch.no_grad():
        responses = torch.cat([model.eval()(x) for x, _ in data])
    s = ranking_by_hand(responses.numpy()) if final == "infinite_ranking" else np.ones(3)
    a, b, c = (np.abs(model.get_parameter(name).detach().numpy()) for name in names)
    scale = (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).detach().numpy()
    s5 = c.T @ s
    s6 = b.T @ s5
    s4 = a.T @ (scale * s6)
    for name, expected in zip(names, (s4, s6, s5), strict=True):
        assert found[name][Relevance(final)].shape == (1, len(expected))
        np.testing.assert_allclose(found[name][Relevance(final)][0].numpy(), expected, rtol=1e-10)


def test_relevance_of_a_map_is_the_sum_over_its_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).double()
    found = collect(
        model, [(torch.randn(3, 2, 3, 3, dtype=torch.float64), None)], None, watched(model, "0.weight", "3.weight"), [Relevance("equal")]
    )
    back = model[3].weight.detach().abs().T @ torch.ones(2, dtype=torch.float64)
    np.testing.assert_allclose(found["3.weight"][Relevance("equal")][0].numpy(), back.numpy(), rtol=1e-12)
    basis = torch.eye(18, dtype=torch.float64).view(18, 2, 3, 3)
    with torch.no_grad():
        matrix = nn.functional.conv2d(basis, model[0].weight.abs(), padding=1, groups=2).flatten(1)
    expected = (matrix @ back).view(2, 9).sum(1)
    np.testing.assert_allclose(found["0.weight"][Relevance("equal")].flatten().numpy(), expected.numpy(), rtol=1e-12)
    assert found["0.weight"][Relevance("equal")].shape == (2, 1, 1, 1, 1)


def test_a_constant_response_and_responses_all_alike_can_be_ranked():
    x = torch.randn(9, 3, dtype=torch.float64)
    x[:, 1] = 2.0
    assert torch.isfinite(flow._infinite_ranking(x)).all()
    assert flow._infinite_ranking(torch.zeros(5, 2, dtype=torch.float64)).isfinite().all()
    ties = torch.tensor([[1.0, 5], [1, 4], [2, 4], [3, 0], [3, 1]], dtype=torch.float64)
    np.testing.assert_allclose(flow._infinite_ranking(ties).numpy(), ranking_by_hand(ties.numpy()), rtol=1e-10)
    with pytest.raises(InputError, match="finite outputs"):
        flow._infinite_ranking(torch.full((2, 2), float("nan")))


def test_sensitivity_is_that_of_the_jacobian():
    torch.manual_seed(0)
    first, second = nn.Conv1d(2, 4, 2, groups=2).double(), nn.Linear(12, 3).double()
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), second, nn.Sigmoid())
    data = [(torch.randn(n, 2, 4, dtype=torch.float64), None) for n in (3, 5)]
    found = collect(model, data, None, watched(model, "0.weight", "3.weight"), [OutputSensitivity()])
    x = torch.cat([x for x, _ in data])
    hidden = torch.tanh(first(x)).flatten(1).detach()
    jacobians = {
        "0.weight": [torch.autograd.functional.jacobian(lambda v: model(v[None])[0], one) for one in x],  # [outputs, channels, positions]
        "3.weight": [torch.autograd.functional.jacobian(lambda v: torch.sigmoid(second(v)), one)[..., None] for one in hidden],
    }
    for name, each in jacobians.items():
        j = torch.stack(each).numpy()
        norms = np.sqrt((j**2).mean(axis=(1, 3)))
        value = found[name][OutputSensitivity()]
        expected = [np.abs(j).mean(axis=(0, 1, 3)), norms.mean(0), norms.var(0)]
        np.testing.assert_allclose(value.flatten(1).numpy(), expected, rtol=1e-10)
    assert found["0.weight"][OutputSensitivity()].shape == (3, 2, 1, 1, 1)


def test_sensitivity_of_frozen_models_and_refusals(monkeypatch):
    model = chain().double().requires_grad_(False)
    data = [(torch.randn(4, 4, dtype=torch.float64), None)]
    assert collect(model, data, None, watched(model, "2.weight"), [OutputSensitivity()])["2.weight"][OutputSensitivity()][0].any()
    words, names, data_of_words = PROBLEMS["attention"]()
    with pytest.raises(InputError, match=r"words\.weight: it reads words, which have no gradient"):
        collect(words, data_of_words, None, watched(words, names[0]), [OutputSensitivity()])
    monkeypatch.setattr(flow, "OUTPUTS", 2)
    with pytest.raises(InputError, match="at most 2 outputs for an example, the model has 3"):
        collect(model, data, None, watched(model, "2.weight"), [OutputSensitivity()])
    with pytest.raises(InputError, match="infinite_ranking takes at most 2 outputs, the model has 3; use final: equal"):
        collect(model, data, None, watched(model, "2.weight"), [Relevance()])
