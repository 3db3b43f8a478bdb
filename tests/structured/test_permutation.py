"""Channels in another order: the same function, and an N:M pattern that keeps more."""

import copy

import pytest
import torch
import torch.nn.functional as F
from structured.whole import randomized
from torch import nn

from niwaki.dependency import find_groups
from niwaki.errors import InputError
from niwaki.structured.permutation import permute


class Convolutions(nn.Module):
    """A residual network with batch normalization, a depthwise convolution, a concatenation and a flattened map."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.depthwise = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.b, self.c = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)
        self.joined, self.head = nn.Conv2d(24, 4, 1), nn.Linear(4 * 2 * 2, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.b(torch.relu(self.depthwise(self.a(x))))
        x = self.joined(torch.cat([x, self.c(x)], dim=1))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Transformer(nn.Module):
    """A block with attention of two heads and a gated perceptron."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 11)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def perceptron():
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 2))


CASES = {
    "perceptron": (perceptron, lambda: torch.randn(3, 5)),
    "convolutions": (Convolutions, lambda: torch.randn(2, 3, 6, 6)),
    "transformer": (Transformer, lambda: torch.randint(0, 11, (2, 7))),
    "recurrent": (Recurrent, lambda: torch.randn(4, 2, 5)),
}


def kept(weight, n, m):
    """What a pattern along the inputs keeps, over all other dimensions."""
    rows = weight.detach().abs().movedim(1, -1).flatten(0, -2)
    return sum(float(part.topk(min(n, part.shape[1]), dim=1).values.sum()) for part in rows.split(m, dim=1))


@pytest.mark.parametrize("pattern", ["2:4", "1:3"])
@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_and_the_pattern_keeps_more(name, pattern):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    model = randomized(make()).eval()
    example, other = (x.double() if x.is_floating_point() else x for x in (inputs(), inputs()))
    before = copy.deepcopy(model.state_dict())
    found = permute(model, pattern, example)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(found.model(other), model(other), rtol=1e-10, atol=1e-10)
    assert found.orders
    n, m = map(int, pattern.split(":"))
    old, new = dict(model.named_parameters()), dict(found.model.named_parameters())
    total = {"old": 0.0, "new": 0.0}
    for key, (was, now) in found.kept.items():
        whole = float(old[key].detach().abs().sum())
        assert was == pytest.approx(kept(old[key], n, m) / whole, rel=1e-12)
        assert now == pytest.approx(kept(new[key], n, m) / whole, rel=1e-12)
        total["old"] += was * whole
        total["new"] += now * whole
    assert total["new"] > 1.005 * total["old"]
    assert {key for key, value in new.items() if not torch.equal(value, old[key])}


def test_every_tensor_of_a_group_moves_alike():
    torch.manual_seed(0)
    model = randomized(CASES["convolutions"][0]()).eval()
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    found = permute(model, "2:4", example)
    order = torch.tensor(found.orders["stem"])
    assert sorted(order.tolist()) == list(range(16))
    assert torch.equal(found.model.stem.weight, model.stem.weight[order])
    assert torch.equal(found.model.norm.running_var, model.norm.running_var[order])
    assert torch.equal(found.model.norm.weight, model.norm.weight[order])
    inner = torch.tensor(found.orders["a"])
    assert torch.equal(found.model.depthwise.weight, model.depthwise.weight[inner])
    assert torch.equal(found.model.a.weight, model.a.weight[inner][:, order])
    assert torch.equal(found.model.b.weight, model.b.weight[order][:, inner])


def test_only_some_readers_and_other_scores():
    torch.manual_seed(0)
    model = randomized(CASES["transformer"][0]()).eval()
    example = torch.randint(0, 11, (2, 7))
    found = permute(model, "2:4", example, readers=["down.*"])
    assert list(found.kept) == ["down.weight"]
    assert len(found.orders) == 1
    scores = {"down.weight": torch.zeros(16, 24)}
    assert permute(model, "2:4", example, readers=["down.*"], scores=scores).orders == {}
    scores["down.weight"][:, :4] = 1.0  # four good columns in one group, of which two would go
    spread = permute(model, "2:4", example, readers=["down.*"], scores=scores)
    assert spread.kept["down.weight"] == (0.5, 1.0)


def test_some_groups_only():
    torch.manual_seed(0)
    model = randomized(CASES["perceptron"][0]()).eval()
    example = torch.randn(3, 5, dtype=torch.float64)
    groups = [group for group in find_groups(model, example) if group.name == "2"]
    found = permute(model, "2:4", example, groups=groups)
    assert list(found.orders) == ["2"]
    assert torch.equal(found.model[0].weight, model[0].weight)


class Ordered(nn.Module):
    """Sums up its hidden units one after the other."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.down(torch.cumsum(torch.relu(self.up(x)), dim=1))


def test_groups_whose_order_means_something_stay():
    torch.manual_seed(0)
    model = randomized(Ordered()).eval()
    example = torch.randn(3, 4, dtype=torch.float64)
    groups = find_groups(model, example, rules={"aten::cumsum": "pointwise"})  # which is wrong
    found = permute(model, "2:4", example, groups=groups)
    assert torch.equal(found.model(example), model(example))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.model.state_dict().items())
    assert found.orders == {}
    assert any("up stays in its order" in note for note in found.notes)
    assert found.kept["down.weight"][0] == found.kept["down.weight"][1]


def test_bad_input():
    model, example = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 3)
    with pytest.raises(InputError, match="2:4"):
        permute(model, "4x1", example)
    with pytest.raises(InputError, match="readers: 'nothing"):
        permute(model, "2:4", example, readers=["nothing.*"])
    with pytest.raises(InputError, match=r"scores.*2\.weight"):
        permute(model, "2:4", example, scores={"2.weight": torch.ones(4, 2)})
