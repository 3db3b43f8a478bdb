"""What added units are made of, against formulas by hand and autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from structured.test_widening import check, features, images, two_layers
from structured.whole import randomized
from torch import nn

from niwaki.dependency import find_groups
from niwaki.structured import widen
from niwaki.structured.newcomers import bridging_gradients


def test_a_copy_stands_behind_its_unit_and_shares_what_reads_it():
    model = two_layers()
    wider = widen(model, features(1, 3), {"0": [2, 0, 2]}, by="copy")
    source = [0, 0, 1, 2, 2, 2, 3]
    assert wider.removed.tensors["0.weight"]["0"] == [0, -1, 1, 2, -1, -1, 3]
    assert wider.widths == {"0": 7}
    assert torch.equal(wider.model[0].weight, model[0].weight[source])
    assert torch.equal(wider.model[0].bias, model[0].bias[source])
    expected = model[2].weight[:, source] / torch.tensor([2, 2, 1, 3, 3, 3, 1]).double()
    torch.testing.assert_close(wider.model[2].weight, expected, rtol=1e-15, atol=0.0)


def test_splits_are_symmetric_and_change_the_function_by_the_square_of_the_perturbation():
    model, x = two_layers(), features(64, 3)
    changes = []
    for size in (0.2, 0.1, 0.05):
        wider = widen(model, x[:1], {"0": [1, 3]}, by={"split": {"perturbation": size}})
        weight = wider.model[0].weight
        pairs = [(1, 2), (4, 5)]
        for unit, (a, b) in zip((1, 3), pairs, strict=True):
            torch.testing.assert_close((weight[a] + weight[b]) / 2, model[0].weight[unit], rtol=1e-12, atol=1e-12)
            assert (weight[a] != weight[b]).all()
        assert torch.equal(weight[[0, 3]], model[0].weight[[0, 2]])
        apart = torch.stack([weight[b] - weight[a] for a, b in pairs]) / 2
        changes.append((float((wider.model(x) - model(x)).abs().max().detach()), apart / size))
    assert changes[0][0] / changes[1][0] == pytest.approx(4.0, rel=0.1)
    assert changes[1][0] / changes[2][0] == pytest.approx(4.0, rel=0.05)
    torch.testing.assert_close(changes[0][1], changes[2][1], rtol=1e-9, atol=1e-12)


def test_perturbations_have_the_size_of_the_layers_weights():
    model = nn.Sequential(nn.Linear(100, 200), nn.Tanh(), nn.Linear(200, 2)).double()
    wider = widen(model, features(1, 100), {"0": list(range(200))}, by={"split": {"perturbation": 0.1}})
    step = (wider.model[0].weight[1::2] - wider.model[0].weight[::2]).detach() / 2
    spread = float(model[0].weight.detach().square().mean().sqrt())
    assert float(step.std()) == pytest.approx(0.1 * spread, rel=0.03)
    kurtosis = float((step / step.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3.0, abs=0.2), "normal"


def test_the_unit_that_the_loss_pulls_at_hardest_is_split():
    model, x = two_layers(), features(20, 3)
    signs = set()
    for seed in range(6):
        y = features(20, 2, seed=seed)
        F.mse_loss(model(x), y).backward()
        pull = (model[0].weight * model[0].weight.grad).sum(dim=1)
        unit = int(pull.square().argmax())
        signs.add(bool(pull[unit] > 0))
        model.zero_grad()
        batches = [(x[:10], y[:10]), (x[10:], y[10:])]
        wider = widen(model, x[:1], {"0": 1}, data=batches, loss=F.mse_loss)
        assert wider.removed.tensors["0.bias"]["0"].index(-1) == unit + 1
        assert all(parameter.grad is None for parameter in model.parameters())
    assert signs == {True, False}
    wider = widen(model, x[:1], {"0": 1}, scores={"0": torch.tensor([0.0, 0.0, 0.0, 1.0])})
    assert wider.removed.tensors["0.bias"]["0"] == [0, 1, 2, 3, -1]


def test_new_units_are_initialized_as_their_layers_are_and_read_with_zero():
    model = nn.Sequential(nn.Conv2d(2, 300, 3), nn.BatchNorm2d(300), nn.PReLU(300), nn.Conv2d(300, 2, 1)).double()
    randomized(model)
    state = copy.deepcopy(model.state_dict())
    wider = widen(model, images(1, 2), {"0": 500}, by="new").model
    for name, value in wider.state_dict().items():
        if value.ndim:
            old = value[:300] if name != "3.weight" else value[:, :300]
            assert torch.equal(old, state[name]) if name != "3.bias" else torch.equal(value, state[name])
    weight, bound = wider[0].weight[300:].detach(), (1 / 18) ** 0.5
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.03), "uniform, as Kaiming's for a slope of √5"
    assert (wider[1].weight[300:] == 1).all()
    assert (wider[1].bias[300:] == 0).all()
    assert (wider[1].running_mean[300:] == 0).all()
    assert (wider[1].running_var[300:] == 1).all()
    assert (wider[2].weight[300:] == 0.25).all()
    assert (wider[3].weight[:, 300:] == 0).all()
    wider(images(4, 2)).square().sum().backward()
    assert (wider[3].weight.grad[:, 300:] != 0).any(dim=0).all(), "what reads them learns at once"


def test_modules_that_cannot_be_initialized_are_told():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.randn(6, 3).double()), nn.Parameter(torch.randn(6).double())
            self.head = nn.Linear(6, 2).double()

        def forward(self, x):
            return self.head(torch.relu(x @ self.weight.T) * self.gain)

    model = Scaled()
    [group] = [g for g in find_groups(model, features(1, 3)) if g.removable]
    wider = widen(model, features(1, 3), {group.name: 2}, by="new")
    assert len(wider.notes) == 2
    assert any(note.startswith("weight: its module has no reset_parameters") for note in wider.notes)
    torch.testing.assert_close(wider.model.gain[6:], model.gain.mean().expand(2))
    assert (wider.model.weight[6:] != 0).all()
    check(model, wider, features(4, 3, seed=3))


def test_the_same_seed_draws_the_same():
    model = two_layers()
    for by in ("copy", "new", {"copy": {"perturbation": 0.1}}):
        one, same, other = (widen(model, features(1, 3), {"0": 3}, by=by, seed=seed).model.state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(value, same[name]) for name, value in one.items())
        assert not all(torch.equal(value, other[name]) for name, value in one.items())


# ---------------------------------------------------------------- bridges


def test_bridging_gradients_are_sums_of_outer_products():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = features(6, 3), features(6, 2, seed=4)
    found = bridging_gradients(model, [(model[0], model[2]), (model[2], model[4])], [(x[:3], y[:3]), (x[3:], y[3:])], F.mse_loss)
    expected = [torch.zeros(5, 3).double(), torch.zeros(2, 4).double()]
    for a, b in ((x[:3], y[:3]), (x[3:], y[3:])):
        hidden = torch.tanh(model[0](a))
        u = model[2](hidden)
        out = model[4](torch.tanh(u))
        slopes = torch.autograd.grad(F.mse_loss(out, b), (u, out))
        for row in range(3):
            expected[0] += torch.outer(slopes[0][row], a[row])
            expected[1] += torch.outer(slopes[1][row], hidden[row].detach())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_bridges_lower_the_loss_as_their_gradients_say():
    """In a network of identities the loss changes by Σ out_m in_n G_mn, to first order of that."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 4), nn.Identity(), nn.Linear(4, 3)).double()
    x, y = features(40, 5), features(40, 3, seed=4)
    loss = float(F.mse_loss(model(x), y).detach())
    [gradient] = bridging_gradients(model, [(model[0], model[2])], [(x, y)], F.mse_loss)
    wider = widen(model, x[:1], {"0": 3}, by={"bridging": {"strength": 0.01, "share": 0.5}}, data=[(x, y)], loss=F.mse_loss).model
    into, out = wider[0].weight[4:].detach(), wider[2].weight[:, 4:].detach()
    assert (wider[0].bias[4:] == 0).all()
    expected = float(((out @ into) * gradient).sum())
    assert expected < 0
    assert float(F.mse_loss(wider(x), y).detach()) - loss == pytest.approx(expected, rel=0.02)
