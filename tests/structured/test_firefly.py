"""The units that lower the loss most, against what really adding each of them by itself does to it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from structured.test_widening import Stream, features, images, two_layers
from structured.whole import Inverted, randomized
from torch import nn

from niwaki.dependency import find_groups
from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.structured import firefly, grow_best, replay
from niwaki.structured.widening import copied, prepared

SIZE = 1e-3


def problem():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = features(60, 5), features(60, 3, seed=4)
    return model, x, [(x[:30], y[:30]), (x[30:], y[30:])]


def mean_loss(model, data):
    with torch.no_grad():
        return sum(float(F.mse_loss(model(x), y)) for x, y in data) / len(data)


def candidates(model, x, new=3):
    groups = prepared(model, x[:1], None)
    with torch.no_grad():
        return firefly._Candidates(copied(model, x[:1], groups, Masks(), None, None), ["0", "2"], new, SIZE, seed=0)


def test_scores_are_what_each_candidate_alone_does_to_the_loss():
    """Each is really made, by itself; a split's gain is of second order and a new unit's of first."""
    model, x, data = problem()
    found = candidates(model, x)
    with torch.no_grad():
        slopes = firefly.newcomers.gradients(found.work.model, data, F.mse_loss)
        scores = {name: torch.cat([found._by_splitting(name, slopes), found._by_reading(name, slopes)]) for name in ("0", "2")}
    loss = mean_loss(model, data)
    wide = found.work.model
    for name, place in (("0", 0), ("2", 2)):
        size = model[place].out_features
        for unit, score in enumerate(scores[name].tolist()):
            hidden, reader = wide[place], wide[place + 2]
            weight, bias = model[place].weight.detach(), model[place].bias.detach()
            rows = [2 * unit, 2 * unit + 1] if unit < size else [size + unit]
            made = nn.Linear(weight.shape[1], len(rows) + size).double()
            read = nn.Linear(len(rows) + size, model[place + 2].out_features).double()
            with torch.no_grad():
                new_rows = hidden.weight[rows]
                if place == 2:  # in the wider copy they read both halves of each unit of the first layer
                    new_rows = new_rows[:, 0:12:2] + new_rows[:, 1:12:2]
                made.weight.copy_(torch.cat([weight, new_rows]))
                made.bias.copy_(torch.cat([bias, hidden.bias[rows]]))
                outgoing = model[place + 2].weight.detach().clone()
                if unit < size:
                    extra = outgoing[:, [unit, unit]] / 2
                    outgoing[:, unit] = 0.0
                elif place == 0:
                    extra = reader.weight[0:8:2, rows]
                else:
                    extra = reader.weight[:, rows]
                    spread = float(outgoing.square().mean().sqrt())
                    assert float(extra.square().mean().sqrt()) == pytest.approx(SIZE * spread, rel=1e-9)
                read.weight.copy_(torch.cat([outgoing, extra], dim=1))
                read.bias.copy_(model[place + 2].bias)
            grown = copy.deepcopy(model)
            grown[place], grown[place + 2] = made, read
            gain = loss - mean_loss(grown, data)
            tolerance = 0.05 if unit < size else 0.02
            assert gain == pytest.approx(score, rel=tolerance, abs=1e-12), (name, unit)


def test_the_best_are_kept_and_the_others_leave_no_trace():
    model, x, data = problem()
    loss = mean_loss(model, data)
    gains = []
    for keep in (1, 3, 6):
        wider = grow_best(model, x[:1], data, F.mse_loss, keep, new=4, perturbation=0.02)
        assert sum(wider.widths.values()) - sum({"0": 6, "2": 4}[name] for name in wider.widths) == keep
        gains.append(loss - mean_loss(wider.model, data))
        fresh = replay(copy.deepcopy(model), wider.removed)
        fresh.load_state_dict(wider.model.state_dict())
        assert torch.equal(fresh(x), wider.model(x))
        for place in (0, 2, 4):  # what was there and was not split is as it was, to the bit
            kept = wider.removed.tensors.get(f"{place}.weight", {})
            rows = kept.get("0", list(range(model[place].out_features)))
            columns = kept.get("1", list(range(model[place].in_features)))
            split_rows = {rows[i - 1] for i, r in enumerate(rows) if r == -1 and i < len(rows) - 1}
            split_columns = {columns[i - 1] for i, c in enumerate(columns) if c == -1}
            for i, row in enumerate(rows):
                for j, column in enumerate(columns):
                    if row >= 0 and column >= 0 and row not in split_rows | {rows[-1]} and column not in split_columns | {columns[-1]}:
                        assert wider.model[place].weight[i, j] == model[place].weight[row, column]
    assert 0 < gains[0] < gains[1] < gains[2]


def test_of_splits_alone_those_that_lower_the_loss_are_kept():
    model, x, data = problem()
    wider = grow_best(model, x[:1], data, F.mse_loss, 100, new=0)
    added = sum(wider.widths.values()) - sum({"0": 6, "2": 4}[name] for name in wider.widths)
    assert 0 < added < 10
    assert wider.notes == [f"{added} candidates lower the loss, and 100 were asked for"]
    assert mean_loss(wider.model, data) < mean_loss(model, data)


@pytest.mark.parametrize("build", [Stream, Inverted])
def test_convolutions_normalizations_masks_and_the_optimizer_follow(build):
    torch.manual_seed(0)
    model = randomized(build()).eval()
    x = images(8)
    y = torch.arange(8) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    masks = Masks({name: torch.rand(p.shape) > 0.2 for name, p in model.named_parameters() if p.ndim == 4})
    masks.apply_(model)
    before, parameters = float(F.cross_entropy(model(x), y).detach()), list(model.parameters())
    wider = grow_best(model, x[:1], [(x, y)], F.cross_entropy, 4, masks=masks, optimizer=optimizer, in_place=True, perturbation=0.02)
    assert wider.model is model
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert float(F.cross_entropy(model(x), y).detach()) < before
    for name, mask in wider.masks.items():
        assert mask.shape == model.get_parameter(name).shape
        assert (model.get_parameter(name)[~mask] == 0).all()
    assert {g.name: g.size for g in find_groups(model, x[:1]) if g.name in wider.widths} == wider.widths
    for parameter, slots in optimizer.state.items():
        assert slots["momentum_buffer"].shape == parameter.shape
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "grow_best: keep=0"),
        ({"new": -1}, "new=-1"),
        ({"perturbation": 0.0}, "perturbation=0.0"),
        ({"names": ["9"]}, "names: no group is called '9'"),
        ({"names": ["2"]}, "names: 2 cannot have more units: it is part of the model's output"),
        ({"names": []}, "names: the model has no group"),
    ],
)
def test_wrong_input(options, message):
    given = {"keep": 1} | options
    with pytest.raises(InputError, match=message):
        grow_best(two_layers(), features(1, 3), [(features(4, 3), features(4, 2))], F.mse_loss, given.pop("keep"), **given)


def test_where_nothing_lowers_the_loss_nothing_is_added():
    model = two_layers()
    x = features(10, 3)
    with pytest.raises(InputError, match="no candidate lowers the loss"):
        grow_best(model, x[:1], [(x, model(x).detach())], F.mse_loss, 1, new=0)
