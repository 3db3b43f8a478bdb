"""Merging: exact where units are exactly alike, better than plain removal where they are not."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from niwaki.dependency import find_groups
from niwaki.errors import InputError
from niwaki.structured import shrink
from niwaki.structured.costs import unit_masks
from niwaki.structured.merge import merge


def perceptron(activation: type[nn.Module], widths: tuple[int, ...] = (5, 8, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class Convolutions(nn.Module):
    """A convolution with batch normalization and ReLU, read by two padded ones."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(6, 3, 1, bias=False)
        self.activation = activation
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.normal_(self.norm.bias)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.activation(self.norm(self.first(x))), 2)
        return self.a(x) + self.b(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.query, self.key, self.value = (nn.Linear(4, 6) for _ in range(3))
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def duplicate(model: nn.Module, name: str, example: Tensor, source: int, copy: int) -> None:
    """Make one unit of a group like another one in everything that makes it; what reads them stays different."""
    group = find_groups(model, example)[name]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for member in group.members:
            if member.role != "input":
                rows = tensors[member.name].movedim(member.dim, 0)
                rows[member.units == copy] = rows[member.units == source]


def check(model: nn.Module, example: Tensor, name: str, width: int, others: Tensor) -> nn.Module:
    """Merge and shrink; the smaller model's outputs are those of the model, which is left as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = merge(model, {name: width}, example)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    smaller = shrink(merged.model, merged.masks, example).model
    with torch.no_grad():
        for inputs in (example, others):
            assert (smaller(inputs) - model(inputs)).abs().max() < 1e-12
            assert (merged.model(inputs) - model(inputs)).abs().max() < 1e-12
    return smaller


@pytest.mark.parametrize(
    ("build", "shape", "name"),
    [
        (lambda: perceptron(nn.Tanh), (4, 5), "0"),
        (lambda: perceptron(nn.GELU), (4, 5), "0"),
        (lambda: Convolutions(torch.sigmoid), (2, 2, 6, 6), "first"),
        (Recurrent, (3, 2, 3), "lstm.weight_ih_l0"),
        (Heads, (2, 5, 4), "query:head"),
    ],
)
def test_duplicates_are_merged_exactly(build: Callable[[], nn.Module], shape: tuple[int, ...], name: str) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    example, others = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    names = [group.name for group in find_groups(model, example)]
    name = name if name in names else next(n for n in names if n.startswith(name.split(".")[0].split(":")[0]))
    duplicate(model, name, example, 1, 2)
    duplicate(model, name, example, 1, 0)
    size = find_groups(model, example)[name].size
    check(model, example, name, size - 2, others)
    merges = merge(model, {name: size - 2}, example).merges[name]
    assert {m.unit for m in merges} <= {0, 1, 2}
    assert all(m.saliency < 1e-25 for m in merges)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Identity])
def test_multiples_are_merged_where_the_activation_allows_it(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = perceptron(activation).double()
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[5] = 3.0 * parameter[2]
    example = torch.randn(4, 5, dtype=torch.float64)
    check(model, example, "0", 7, torch.randn(9, 5, dtype=torch.float64))
    [only] = merge(model, {"0": 7}, example).merges["0"]
    assert (only.unit, only.into, pytest.approx(only.scale)) in [(5, 2, 3.0), (2, 5, 1 / 3)]


def test_a_unit_of_opposite_sign_is_no_multiple_and_is_only_removed() -> None:
    torch.manual_seed(0)
    model = perceptron(nn.ReLU, (5, 2, 3)).double()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = -0.1 * model[0].weight[0], -0.1 * model[0].bias[0]
    merged = merge(model, {"0": 1}, torch.randn(4, 5, dtype=torch.float64))
    [only] = merged.merges["0"]
    assert (only.unit, only.scale) == (1, 0.0)
    makes, reads = torch.cat([model[0].weight[1], model[0].bias[1:]]), model[2].weight[:, 1]
    assert only.saliency == pytest.approx(float((makes.square().sum() * reads.square().sum()).detach()))
    assert torch.equal(merged.model.get_parameter("2.weight")[:, 0], model[2].weight[:, 0])


def test_multiples_are_no_duplicates_where_it_does_not() -> None:
    torch.manual_seed(0)
    model = perceptron(nn.Tanh).double()
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[5] = 3.0 * parameter[2]
    [only] = merge(model, {"0": 7}, torch.randn(4, 5, dtype=torch.float64)).merges["0"]
    assert only.scale == 1.0
    assert only.saliency > 1e-6


def test_multiples_behind_a_batch_normalization() -> None:
    """Equal only once the normalization is folded in: the convolution's own weights differ by another factor."""
    torch.manual_seed(0)
    model = Convolutions().double().eval()
    with torch.no_grad():
        first, norm = model.first, model.norm
        first.weight[4] = -2.0 * first.weight[1]
        first.bias[4] = 0.3
        norm.running_mean[4], norm.running_var[4] = 0.3 + 2.0 * (first.bias[1] - norm.running_mean[1]), 7.0
        slope = norm.weight[1] * (norm.running_var[1] + norm.eps).rsqrt()
        norm.weight[4] = 0.5 * slope / -2.0 * (norm.running_var[4] + norm.eps).sqrt()
        norm.bias[4] = 0.5 * norm.bias[1]
    example = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    check(model, example, "first", 5, torch.randn(3, 2, 8, 8, dtype=torch.float64))
    [only] = merge(model, {"first": 5}, example).merges["first"]
    assert (only.unit, only.into, pytest.approx(only.scale)) in [(4, 1, 0.5), (1, 4, 2.0)]


def test_saliency_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    model = perceptron(nn.Tanh).double()
    makes = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach()
    lowest = min(
        (float(model[2].weight[:, j].detach().square().sum() * (makes[i] - makes[j]).square().sum()), j, i)
        for i in range(8)
        for j in range(8)
        if i != j
    )
    merged = merge(model, {"0": 7}, torch.zeros(1, 5, dtype=torch.float64))
    [only] = merged.merges["0"]
    assert (only.unit, only.into) == lowest[1:]
    assert only.saliency == pytest.approx(lowest[0])
    expected = (model[2].weight[:, only.into] + model[2].weight[:, only.unit]).detach()
    assert torch.equal(merged.model.get_parameter("2.weight")[:, only.into], expected)


def test_merging_several_groups_and_down_to_one_unit() -> None:
    torch.manual_seed(0)
    model = perceptron(nn.ReLU, (5, 8, 6, 3)).double()
    example = torch.randn(4, 5, dtype=torch.float64)
    merged = merge(model, {"0": 1, "2": 3}, example)
    smaller = shrink(merged.model, merged.masks, example).model
    assert [layer.out_features for layer in smaller if isinstance(layer, nn.Linear)] == [1, 3, 3]
    assert len(merged.merges["0"]) == 7
    into = {m.unit: m.into for m in merged.merges["0"]}
    assert len({*range(8)} - into.keys()) == 1


def test_what_went_is_not_merged_into_and_nothing_is_lost_on_the_way() -> None:
    torch.manual_seed(0)
    model = perceptron(nn.Tanh, (2, 20, 3)).double()
    merged = merge(model, {"0": 2}, torch.randn(4, 2, dtype=torch.float64))
    gone: set[int] = set()
    for one in merged.merges["0"]:
        assert one.into not in gone | {one.unit}
        gone.add(one.unit)
    assert len(gone) == 18
    before, after = model.get_parameter("2.weight"), merged.model.get_parameter("2.weight")
    assert torch.allclose(after.sum(dim=1), before.sum(dim=1))
    assert int((after != 0).any(dim=0).sum()) == 2


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_merging_is_better_than_plain_removal_on_a_trained_network(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(512, 6)
    targets = torch.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2].abs() - inputs[:, 3]], dim=1)
    model = perceptron(activation, (6, 48, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    tests = torch.randn(512, 6)
    expected = model(tests)
    groups = find_groups(model, inputs)

    def error(other: nn.Module) -> float:
        return float(F.mse_loss(other(tests), expected).detach())

    for width in (44, 36, 24):
        merged = merge(model, {"0": width}, inputs, groups=groups)
        same = unit_masks(model, groups, {"0": merged.masks["0.bias"]})
        smallest = unit_masks(model, groups, {"0": model[0].weight.norm(dim=1).argsort().argsort() >= 48 - width})
        plain = [error(shrink(model, masks, inputs, groups=groups).model) for masks in (same, smallest)]
        assert error(merged.model) < min(plain)


def test_units_that_cannot_be_merged() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(3, 4), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.make(x)
            return self.read((x[:, :, None] * x[:, None, :]).flatten(1))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(self.embedding(x)), self.embedding.weight)

    with pytest.raises(InputError, match="multiplied with each other"):
        merge(Products(), {"make": 3}, torch.ones(1, 3))
    [name] = [group.name for group in find_groups(Tied(), torch.tensor([1, 2])).removable]
    with pytest.raises(InputError, match="tied weights"):
        merge(Tied(), {name: 3}, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"O": 4}, "no group is called 'O'"),
        ({"2": 2}, "no unit of 2 can be removed: it is part of the model's output"),
        ({"0": 0}, "0 has 8 units, so 0 of them cannot stay"),
        ({"0": 9}, "0 has 8 units, so 9 of them cannot stay"),
    ],
)
def test_bad_input_is_told(widths: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge(perceptron(nn.ReLU), widths, torch.ones(1, 5))
