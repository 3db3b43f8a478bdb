"""Wider models against the ones they come from, in float64, on inputs that are not the example; values against formulas by hand."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from structured.test_random_graphs import Graph, steps
from structured.whole import Dense, Inverted, Recurrent, Tokens, outputs, randomized
from torch import nn

import niwaki
from niwaki.dependency import find_groups
from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.metrics.flops import forward_flops
from niwaki.removed import Removed
from niwaki.structured import compose, replay, shrink, uniform, widen
from niwaki.structured.insertion import with_copies
from niwaki.tasks import networks


def images(batch, channels=3, size=8, seed=9):
    return torch.randn(batch, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(batch, width, seed=9):
    return torch.randn(batch, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def words(seed):
    return torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(seed))


class Stream(nn.Module):
    """Two residual blocks of convolutions with batch normalization, without padding of channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.first, self.first_norm, self.second = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.avg_pool2d(x + self.second(F.relu(self.first_norm(self.first(x)))), 2)
        return self.head(x.flatten(1))


MODELS = {
    "mlp": (lambda: networks.Perceptron(12, 4, (10, 8)), lambda seed: features(3, 12, seed), {"1", "3"}),
    "convnet with batch normalization": (
        lambda: networks.Convnet(3, 8, 4, 4),
        lambda seed: images(2, seed=seed),
        {"conv1", "conv2", "conv3"},
    ),
    "residual sums": (Stream, lambda seed: images(2, seed=seed), {"stem", "first"}),
    "resnet": (
        lambda: networks.ResNet(1, 4, 4),
        lambda seed: images(2, seed=seed),
        {"conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"},
    ),
    "depthwise": (Inverted, lambda seed: images(2, seed=seed), {"stem", "expand", "squeeze"}),
    "concatenated, grouped, transposed": (Dense, lambda seed: images(2, 2, seed=seed), {"grouped", "up"}),
    "transformer": (
        lambda: networks.Transformer(11, 8, 16, 2, 4),
        words,
        {"blocks.0.query:head", "blocks.0.up", "blocks.1.query:head", "blocks.1.up"},
    ),
    "grouped queries, gated": (
        lambda: Tokens(2),
        words,
        {"blocks.0.attn.qkv:head", "blocks.0.up", "blocks.1.attn.qkv:head", "blocks.1.up"},
    ),
    "lstm": (Recurrent, words, {"embedding", "cells.weight_ih_l0"}),
}


def check(model, wider, other, tolerance=1e-12):
    """Equal outputs on another input; a replayed fresh model with the wider one's tensors is it, to the bit."""
    got = outputs(wider.model.eval(), (other,))
    torch.testing.assert_close(got, outputs(model.eval(), (other,)), rtol=0.0, atol=tolerance)
    removed = Removed.of(json.loads(wider.removed.model_dump_json()))
    fresh = replay(randomized(copy.deepcopy(model), seed=5), removed)
    assert repr(fresh) == repr(wider.model)
    fresh.load_state_dict(wider.model.state_dict())
    assert torch.equal(outputs(fresh.eval(), (other,)), got)


def two_layers():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


# ---------------------------------------------------------------- the function stays


@pytest.mark.parametrize("by", ["copy", "new", {"split": {"perturbation": 0.0}}])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(name, by):
    build, data, expected = MODELS[name]
    torch.manual_seed(0)
    model = randomized(build())
    before = copy.deepcopy(model.state_dict())
    example = data(1)
    gradients = {"data": [(example, None)], "loss": lambda out, _: out.square().sum()} if not isinstance(by, str) else {}
    wider = uniform(model, (example,), factor=1.5, by=by, **gradients)
    assert set(wider.widths) == expected
    sizes = {group.name: group.size for group in find_groups(model, (example,))}
    assert wider.widths == {one: int(1.5 * sizes[one] + 0.5) for one in expected}
    assert wider.notes == []
    check(model, wider, data(2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {group.name: group.size for group in find_groups(wider.model, (example,)) if group.name in expected} == wider.widths


@pytest.mark.parametrize("by", ["copy", "new"])
def test_all_kinds_of_groups_at_once(by):
    """Channels and whole groups of a grouped convolution in one dimension, heads and what is inside them."""
    for build, data in ((Dense, lambda seed: images(2, 2, seed=seed)), (lambda: networks.Transformer(11, 8, 16, 2, 4), words)):
        torch.manual_seed(0)
        model = randomized(build())
        every = {g.name: 2 for g in find_groups(model, (data(1),)) if g.removable and g.read_by()}
        wider = widen(model, (data(1),), every, by=by, groups=find_groups(model, (data(1),)))
        check(model, wider, data(2))


@settings(max_examples=15, deadline=None)
@given(steps, st.booleans(), st.sampled_from(["copy", "new"]), st.integers(0, 1000))
def test_random_networks(drawn, flatten, by, seed):
    model = randomized(Graph(drawn, flatten, tied=bool(seed % 2)), seed)
    example, other = images(1, 2, 10), images(3, 2, 10, seed=3)
    wider = uniform(model, (example,), factor=1.3, by=by, seed=seed, kinds=("channel", "channel_group"))
    assert wider.widths["hidden"] == 7
    assert not wider.notes
    check(model, wider, other, tolerance=1e-9)


def test_wider_smaller_and_wider_again_is_one_record():
    """Of a network with a grouped, a depthwise and a normalized convolution, whose numbers of groups no shape tells."""
    for build, channels in ((Inverted, 3), (Dense, 2)):
        model = randomized(build())
        x = images(2, channels)
        first = uniform(model, (x,), factor=1.4, by="new", kinds=("channel", "channel_group"))
        model_wide = randomized(first.model, seed=3)
        groups = find_groups(model_wide, (x,))
        gone = {group.name: torch.arange(group.size) % 3 != 1 for group in groups if group.removable}
        masks = niwaki.structured.costs.unit_masks(model_wide, groups, gone)
        second = shrink(model_wide, masks, (x,))
        assert second.removed
        third = uniform(second.model, (x,), factor=2.0, by="copy")
        record = compose(compose(first.removed, second.removed), third.removed)
        fresh = replay(randomized(build(), seed=8), json.loads(record.model_dump_json()))
        assert repr(fresh) == repr(third.model)
        fresh.load_state_dict(third.model.state_dict())
        assert torch.equal(fresh.eval()(x), third.model.eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_shrinking_what_was_added_gives_back_the_model(name):
    build, data, _ = MODELS[name]
    torch.manual_seed(0)
    model = randomized(build())
    wider = uniform(model, (data(1),), factor=1.5, by="new")
    groups = find_groups(wider.model, (data(1),))
    masks = {}
    for group in groups:
        for member in group.read_by() if group.name in wider.widths else ():
            added = torch.tensor(wider.removed.tensors[member.name][str(member.dim)]) == -1
            mine = added & (member.units >= 0)
            parameter = wider.model.get_parameter(member.name)
            mask = masks.setdefault(member.name, torch.ones(parameter.shape, dtype=torch.bool))
            mask.movedim(member.dim, 0)[mine] = False
    again = shrink(wider.model, masks, (data(1),), groups=groups)
    assert {name: tuple(p.shape) for name, p in again.model.named_parameters()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    for key, value in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key
    assert repr(again.model) == repr(model)


def test_where_entries_of_a_unit_stand_apart_each_is_copied_behind_itself():
    index, nth = with_copies(torch.tensor([-1, 0, 0, 1, 1, 0, 0, 1, 1]), torch.tensor([2, 0]))
    assert index.tolist() == [0, 1, 2, 1, 2, 1, 2, 3, 4, 5, 6, 5, 6, 5, 6, 7, 8]
    assert nth.tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 1, 1, 2, 2, 0, 0]


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("budget", [1.3, 2.0, 3.7])
@pytest.mark.parametrize(
    ("model", "example"),
    [
        (lambda: networks.ResNet(3, 10, 16), images(1, size=32).float()),
        (lambda: networks.Convnet(1, 8, 10, 32), images(1, 1).float()),
        (lambda: networks.Perceptron(64, 10), features(1, 64).float()),
    ],
)
def test_a_budget_of_flops_is_met(model, example, budget):
    model = model()
    wider = uniform(model, (example,), flops=budget, by="new")
    ratio = forward_flops(wider.model, (example,)).dense / forward_flops(model, (example,)).dense
    assert budget * 0.99 <= ratio <= budget
    sizes = {group.name: group.size for group in find_groups(model, (example,))}
    factors = [width / sizes[name] for name, width in wider.widths.items()]
    assert max(factors) - min(factors) <= 1.5 / min(sizes[name] for name in wider.widths)


def test_no_room_for_a_unit_is_told():
    wider = uniform(two_layers(), features(1, 3), flops=1.01, by="new")
    assert wider.widths == {}
    assert not wider.removed
    assert wider.notes == ["no group is wider: there is no room for another unit of each"]


# ---------------------------------------------------------------- optimizer, masks, files


@pytest.mark.parametrize("in_place", [True, False])
def test_the_optimizer_goes_on(in_place):
    model, x, y = two_layers(), features(20, 3), features(20, 2, seed=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def train(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    before = train(model, optimizer, 5)
    slots = {name: {key: slot.clone() for key, slot in optimizer.state[p].items()} for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    expected, alone = model(x).detach(), widen(model, x[:1], {"0": [1]}, by="copy").model.state_dict()
    wider = widen(model, x[:1], {"0": [1]}, by="copy", optimizer=optimizer, in_place=in_place)
    assert all(torch.equal(value, alone[name]) for name, value in wider.model.state_dict().items())
    torch.testing.assert_close(wider.model(x).detach(), expected, rtol=1e-12, atol=1e-12)
    assert (wider.model is model) is in_place
    assert (wider.optimizer is optimizer) is in_place
    if in_place:
        assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    new = dict(wider.model.named_parameters())
    for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        for key, slot in wider.optimizer.state[new[name]].items():
            expected = slots[name][key]
            if slot.ndim:
                expected = expected.index_select(dim, torch.tensor([0, 1, 1, 2, 3])).index_fill(dim, torch.tensor([2]), 0.0)
                assert slot.shape == new[name].shape
            assert torch.equal(slot, expected), (name, key)
    assert train(wider.model, wider.optimizer, 30) < before


def test_what_is_fresh_is_what_the_optimizer_says():
    model = two_layers()
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.125)
    model(features(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.step()
    widen(model, features(1, 3), {"0": 2}, by="new", optimizer=optimizer, in_place=True)
    sizes = optimizer.state[model[0].weight]["step_size"]
    assert sizes.shape == (6, 3)
    assert (sizes[4:] == 0.125).all()
    assert (sizes[:4] != 0.125).any()


def test_masks_are_extended():
    model = two_layers()
    masks = Masks({"0.weight": torch.rand(4, 3) > 0.5, "2.weight": torch.rand(2, 4) > 0.5})
    masks.apply_(model)
    wider = widen(model, features(1, 3), {"0": [1, 3]}, by={"copy": 0.1}, masks=masks)
    source = [0, 1, 1, 2, 3, 3]
    assert torch.equal(wider.masks["0.weight"], masks["0.weight"][source])
    assert torch.equal(wider.masks["2.weight"], masks["2.weight"][:, source])
    for name, mask in wider.masks.items():
        assert (wider.model.get_parameter(name)[~mask] == 0).all(), "perturbations bring nothing masked to life"
    wider = widen(model, features(1, 3), {"0": 2}, by="new", masks=masks)
    assert wider.masks["0.weight"][4:].all()
    assert wider.masks["2.weight"][:, 4:].all()
    assert torch.equal(wider.masks["0.weight"][:4], masks["0.weight"])


def test_a_wider_model_comes_back_from_a_file(tmp_path):
    model = randomized(Inverted())
    wider = uniform(model, (images(1),), factor=1.5, by="copy")
    path = tmp_path / "wider.safetensors"
    niwaki.save(wider.model, path, masks=wider.masks, removed=wider.removed)
    fresh = randomized(Inverted(), seed=4)
    niwaki.load(path, fresh)
    assert torch.equal(fresh.eval()(images(2)), wider.model.eval()(images(2)))


# ---------------------------------------------------------------- what cannot be


def test_numbers_that_cannot_be_found_out_are_told():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.antlers = nn.Linear(3, 6), nn.Linear(6, 2), (6,)

        def forward(self, x):
            return self.second(self.first(x).relu().view(-1, *self.antlers))

    model = Fixed().double()
    with pytest.raises(InputError, match="first: with 2 more units the model computes something else"):
        widen(model, features(1, 3), {"first": 2}, by="new")
    with pytest.raises(InputError, match="uniform: first is not wider: with 3 more units"):
        uniform(model, features(1, 3), factor=1.5, by="new")
    assert model.first.out_features == 6

    class Number(Fixed):
        def __init__(self):
            super().__init__()
            self.deer = 12

        def forward(self, x):
            return self.second(self.first(x).relu().view(-1, self.deer // 2))

    model = Number().double()
    wider = widen(model, features(1, 3), {"first": 2}, by="new", attributes={"deer": 16})
    assert wider.removed.attributes == {"deer": 16}
    check(model, wider, features(4, 3))


def test_one_group_that_cannot_grow_does_not_keep_the_others_from_it():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third, self.antlers = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2), (6,)

        def forward(self, x):
            return self.third(self.second(self.first(x).relu().view(-1, *self.antlers)).relu())

    model = Half().double()
    wider = uniform(model, features(1, 3), factor=1.5, by="new")
    assert wider.widths == {"second": 6}
    assert [note.split(":")[0] for note in wider.notes] == ["first is not wider"]
    check(model, wider, features(4, 3))


@pytest.mark.parametrize(
    ("added", "options", "message"),
    [
        ({"9": 1}, {}, "added: no group is called '9'"),
        ({"2": 1}, {}, "added: 2 cannot have more units: it is part of the model's output"),
        ({"0": 0}, {}, "added: 0: 0 is no number of units"),
        ({"0": [4]}, {}, "added: 0: give how many units to add, or .* which of 0 to 3"),
        ({"0": []}, {}, "added: 0: give how many"),
        ({"0": [1]}, {"by": "new"}, "added: 0: give how many"),
        ({"0": 1}, {"by": "halve"}, "addition: unknown component 'halve'"),
        ({"0": 1}, {"by": "split"}, "by: 'split' looks at gradients for the scores of 0; give data= and loss="),
        ({"0": 1}, {"by": "bridging"}, "by: 'bridging' looks at gradients; give data= and loss="),
        ({"0": 1}, {"by": "split", "scores": {"0": torch.ones(3)}}, r"scores: 0 has 4 units, and scores of shape \[3\]"),
        ({"0": 1}, {"masks": {"0.weight": torch.ones(3, 3, dtype=torch.bool)}}, "masks: '0.weight'"),
        ({"0": 1}, {"attributes": {"antlers": 3}}, "attributes: this Sequential has no 'antlers'"),
    ],
)
def test_wrong_input(added, options, message):
    model = two_layers()
    with pytest.raises(InputError, match=message):
        widen(model, features(1, 3), added, **{"by": "copy"} | options)
    assert model[0].out_features == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "uniform: give a factor of the widths, or a budget of flops"),
        ({"factor": 2.0, "flops": 2.0}, "uniform: give a factor"),
        ({"factor": 0.5}, "factor: must be at least 1"),
        ({"flops": float("nan")}, "flops: must be at least 1"),
        ({"factor": 2.0, "kinds": ("head",)}, "uniform: the model has no group of kind head"),
        ({"factor": 2.0, "exclude": "nobody"}, "exclude: 'nobody' matches no group"),
        ({"factor": 2.0, "exclude": "*"}, "uniform: the model has no group"),
    ],
)
def test_wrong_factors(options, message):
    with pytest.raises(InputError, match=message):
        uniform(two_layers(), features(1, 3), by="new", **options)


def test_bridges_are_for_linear_layers():
    model = networks.Convnet(3, 8, 4, 4).double()
    data = [(images(2), torch.tensor([0, 1]))]
    with pytest.raises(InputError, match=r"'bridging' connects what one linear layer reads .*; conv1 is not so; choose new"):
        widen(model, images(1), {"conv1": 2}, by="bridging", data=data, loss=F.cross_entropy)


class Sum(nn.Module):
    """Units that are read, and summed besides; or multiplied with each other alone."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4 if read else 3, 2 if read else 4)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.second(y) + y.sum(dim=1, keepdim=True) if self.read else (y * self.second(x)).sum(dim=1)


@pytest.mark.parametrize("read", [True, False])
def test_units_that_are_summed_without_weights_can_be_taken_out_but_not_added(read):
    """Whether or not they are active on the example."""
    model = Sum(read).double()
    [group] = [group for group in find_groups(model, features(1, 3)) if group.removable]
    for by in ("copy", "new"):
        with pytest.raises(InputError, match="added: first cannot have more units: something that is no weight sums over its units"):
            widen(model, features(1, 3), {group.name: 1}, by=by)


def test_tied_weights_that_make_and_read_the_same_units_cannot_be_copied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x):
            y = torch.sigmoid(self.first(x)) @ self.first.weight
            return self.head(torch.sigmoid(self.first(y)))

    model = Tied().double()
    with pytest.raises(InputError, match="first: its units cannot be added by 'copy' without a change of what the model computes"):
        widen(model, features(1, 3), {"first": [0]}, by="copy")
    assert model.first.out_features == 4
