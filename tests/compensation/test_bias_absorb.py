"""Absorbing what removed inputs gave on average: means stay, constants are kept exactly."""

import pytest
import torch
from compensation.networks import change, outputs, perceptron, without
from torch import nn

from niwaki.compensation import BiasAbsorb, Removal
from niwaki.component import build
from niwaki.errors import InputError
from niwaki.statistics import InputMean


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_constant_units_go_without_a_trace():
    model = perceptron(nn.Tanh)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0.0  # their biases make them constants
    data = normal(50, 4)
    removal = without(model, [1, 4], data)
    found = BiasAbsorb().compensate(removal)
    assert set(found) == {"2.bias"}
    torch.testing.assert_close(
        outputs(model, removal, found, normal(9, 4, seed=1)), model(normal(9, 4, seed=1)).detach(), rtol=1e-12, atol=1e-13
    )
    assert (outputs(model, removal, {}, data) - model(data)).abs().max() > 1e-3
    assert removal.notes == []


def test_means_of_all_outputs_stay():
    model, data = perceptron(), normal(80, 4)
    removal = without(model, [0, 2, 3], data)
    found = BiasAbsorb().compensate(removal)
    torch.testing.assert_close(outputs(model, removal, found, data).mean(0), model(data).mean(0).detach(), rtol=1e-12, atol=1e-14)


def test_single_weights_too():
    layer, data = nn.Linear(5, 4, dtype=torch.float64), normal(60, 5, seed=3) + 1
    keep = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.4
    active = keep | (torch.rand(4, 5, generator=torch.Generator().manual_seed(5)) < 0.5)
    one = change("0", layer, keep, data, active)
    found = BiasAbsorb().compensate(Removal({one.name: one}))
    before = data @ one.weight.T + layer.bias
    after = data @ (one.weight * keep).T + found["0.bias"]
    torch.testing.assert_close(after.mean(0), before.mean(0).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, dtype=torch.float64),
        nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64),
        nn.ConvTranspose2d(4, 6, 1, groups=2, dtype=torch.float64),
    ],
    ids=["plain", "grouped", "transposed"],
)
def test_convolutions(module):
    data = torch.linspace(-1, 2, 4, dtype=torch.float64).view(1, 4, 1, 1).expand(5, 4, 7, 7)  # constant maps: exact
    keep = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    one = change("0", module, keep, data.movedim(1, -1).flatten(0, -2))
    found = BiasAbsorb().compensate(Removal({one.name: one}))
    tensors = {"weight": module.weight.detach() * keep, "bias": found["0.bias"]}
    torch.testing.assert_close(torch.func.functional_call(module, tensors, (data,)), module(data).detach(), rtol=1e-12, atol=1e-13)


def test_outputs_that_go_with_their_units_absorb_nothing():
    model, data = perceptron(), normal(40, 4)
    removal = without(model, [1], data)
    first = removal.changes["0.weight"]
    removal.changes["0.weight"].statistics[InputMean()] = data.mean(0).view(1, 4)
    assert set(BiasAbsorb().compensate(removal)) == {"2.bias"}
    alone = Removal({first.name: first})  # as a row of weights: the output stays, as a constant
    found = BiasAbsorb().compensate(alone)["0.bias"]
    assert float(found[1]) == pytest.approx(float((model[0](data)[:, 1]).mean().detach()))


def test_a_layer_without_bias_is_told():
    model = perceptron(bias=False)
    removal = without(model, [1], normal(20, 4))
    assert BiasAbsorb().compensate(removal) == {}
    [note] = removal.notes
    assert "2.weight has no bias" in note


def test_means_that_were_not_collected_are_told():
    one = change("0", nn.Linear(2, 2), torch.tensor([[True, False], [True, True]]))
    with pytest.raises(InputError, match=r"0\.weight reads were not collected"):
        BiasAbsorb().compensate(Removal({one.name: one}))
    assert build("compensation", "bias_absorb").statistics == (InputMean(),)
