"""Merging units: exact for duplicates, opposites and constants; least squares in between."""

import pytest
import torch
from compensation.networks import outputs, perceptron, without
from torch import nn

from niwaki.compensation import BatchNormRecalibration, Merge, Removal
from niwaki.component import build
from niwaki.errors import InputError


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_exact(model, removal, compensation, shape=(9, 4)):
    found = compensation.compensate(removal)
    others = normal(*shape, seed=7)
    torch.testing.assert_close(outputs(model, removal, found, others), model(others).detach(), rtol=1e-9, atol=1e-9)
    assert (outputs(model, removal, {}, others) - model(others)).abs().max() > 1e-3
    return found


@pytest.mark.parametrize("by", ["weights", "responses"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_duplicates_go_without_a_trace(by, activation):
    model = perceptron(activation)
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[[2, 5]] = parameter[0].clone()
    removal = without(model, [2, 5], normal(60, 4))
    found = check_exact(model, removal, Merge(by=by))
    assert "2.weight" in found
    torch.testing.assert_close(found["2.weight"][:, 0], model[2].weight.detach()[:, [0, 2, 5]].sum(1), rtol=1e-9, atol=1e-9)


def test_opposites_and_constants_go_without_a_trace():
    model = perceptron(nn.Sigmoid)
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[3] = -parameter[1]  # sigmoid(-z) = 1 - sigmoid(z)
        model[0].weight[4] = 0.0
    removal = without(model, [3, 4], normal(60, 4))
    found = check_exact(model, removal, Merge(by="responses"))
    read, bias = model[2].weight.detach(), model[2].bias.detach()
    torch.testing.assert_close(found["2.weight"][:, 1], read[:, 1] - read[:, 3], rtol=1e-8, atol=1e-8)
    constant = torch.sigmoid(model[0].bias.detach()[4])
    torch.testing.assert_close(found["2.bias"], bias + read[:, 3] + constant * read[:, 4], rtol=1e-8, atol=1e-8)
    assert removal.notes == []


def test_multiples_go_without_a_trace_where_they_count_as_alike():
    model = perceptron(nn.ReLU)
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[5] = 3.0 * parameter[2]
    removal = without(model, [5], normal(60, 4))
    check_exact(model, removal, Merge(scale=True))
    check_exact(model, removal, Merge(by="responses"))


def test_a_unit_goes_into_its_nearest_one_that_stays():
    model = perceptron(nn.Tanh, units=8)
    removal = without(model, [1, 4, 6], normal(30, 4))
    found = Merge().compensate(removal)
    made = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach()
    expected = model[2].weight.detach().clone()
    for j in (1, 4, 6):
        i = min((0, 2, 3, 5, 7), key=lambda u: float((made[u] - made[j]).norm()))
        expected[:, i] += model[2].weight.detach()[:, j]
    torch.testing.assert_close(found["2.weight"][:, [0, 2, 3, 5, 7]], expected[:, [0, 2, 3, 5, 7]], rtol=1e-12, atol=0)


def test_by_responses_is_the_best_regression_on_one_unit():
    model, data = perceptron(nn.Tanh, units=8), normal(40, 4)
    removal = without(model, [3], data)
    found = Merge(by="responses").compensate(removal)
    x = model[:2](data).detach()
    fits = {}
    for i in (u for u in range(8) if u != 3):
        columns = torch.stack([x[:, i], torch.ones(40, dtype=torch.float64)], dim=1)
        fits[i] = torch.linalg.lstsq(columns, x[:, 3:4]).solution.flatten(), columns
    best = min(fits, key=lambda i: float((fits[i][1] @ fits[i][0] - x[:, 3]).square().sum()))
    (factor, offset), read = fits[best][0], model[2].weight.detach()
    torch.testing.assert_close(found["2.weight"][:, best], read[:, best] + factor * read[:, 3], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found["2.bias"], model[2].bias.detach() + offset * read[:, 3], rtol=1e-9, atol=1e-11)


def test_without_a_bias_the_best_factor_alone():
    model, data = perceptron(nn.ReLU, units=3, bias=False), normal(40, 4)
    removal = without(model, [2], data)
    found = Merge(by="responses").compensate(removal)
    assert set(found) == {"2.weight"}
    assert "2.weight has no bias" in removal.notes[0]
    x = model[:2](data).detach()
    fits = {i: torch.linalg.lstsq(x[:, [i]], x[:, 2:]).solution for i in (0, 1)}
    best = min(fits, key=lambda i: float((x[:, [i]] @ fits[i] - x[:, 2:]).square().sum()))
    read = model[2].weight.detach()
    torch.testing.assert_close(found["2.weight"][:, best], read[:, best] + float(fits[best]) * read[:, 2], rtol=1e-9, atol=1e-11)


def flattened(positions=4):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv1d(2, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * positions, 3)).double()


@pytest.mark.parametrize("by", ["weights", "responses"])
def test_channels_of_several_positions(by):
    model = flattened()
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[3] = parameter[1].clone()
    removal = without(model, [3], normal(50, 2, 4), reader=3, positions=4)
    check_exact(model, removal, Merge(by=by), shape=(9, 2, 4))


@pytest.mark.parametrize("by", ["weights", "responses"])
def test_channels_of_convolutions(by):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 3)).double()
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[4] = parameter[0].clone()
    removal = without(model, [4], normal(20, 2, 8, 8))
    check_exact(model, removal, Merge(by=by), shape=(3, 2, 8, 8))


def test_several_updates_leave_masked_units_alone():
    model = perceptron(nn.Tanh)
    removal = without(model, [2, 5], normal(20, 4))
    [units] = removal.units
    units.active[5] = False  # it has gone before
    removal.changes["2.weight"].weight[:, 5] = 0.0
    before = removal.changes["2.weight"].weight.clone()
    found = Merge().compensate(removal)["2.weight"]
    assert torch.equal(found[:, 5], before[:, 5])
    assert int(((found - before).abs().sum(0) > 0).sum()) == 1


def test_what_cannot_be_merged_is_told():
    model = perceptron()
    removal = without(model, [2], normal(20, 4))
    [units] = removal.units
    tied = Removal(removal.changes, [type(units)(units.name, units.active, units.keep, units.makers, units.makers)])
    with pytest.raises(InputError, match="reads them too"):
        Merge().compensate(tied)
    twice = Removal(removal.changes, [type(units)(units.name, units.active, units.keep, units.makers, [*units.readers] * 2)])
    with pytest.raises(InputError, match="multiplied with each other"):
        Merge().compensate(twice)
    removal.changes["2.weight"].statistics.clear()
    with pytest.raises(InputError, match=r"InputCovariance of 2\.weight was not collected"):
        Merge(by="responses").compensate(removal)
    with pytest.raises(InputError, match="responses are scaled as they need"):
        build("compensation", {"merge": {"by": "responses", "scale": True}})
    assert build("compensation", {"merge": "responses"}) == Merge(by="responses")
    assert Merge().needs_units


def test_recalibration_changes_no_weight_and_says_that_it_is_needed():
    component = build("compensation", "batchnorm_recalibration")
    assert component == BatchNormRecalibration()
    assert component.compensate(Removal({})) == {}
    assert component.recalibrates
