"""Search: the FLOPs of widths against really smaller models, the choice against all choices, the latency against a model of a machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from niwaki.dependency import find_groups
from niwaki.errors import InputError, NiwakiError
from niwaki.metrics.flops import forward_flops
from niwaki.recipe import Recipe
from niwaki.structured import search as module
from niwaki.structured import shrink
from niwaki.structured.costs import FlopCost, LatencyCost, choices, thinned, unit_masks
from niwaki.structured.search import best, cheapest, search, unit_scores


class Attention(nn.Module):
    """Grouped queries: each key head serves ``queries`` query heads."""

    def __init__(self, width: int = 12, heads: int = 3, queries: int = 1, head_dim: int = 4) -> None:
        super().__init__()
        self.heads, self.queries, self.head_dim = heads, queries, head_dim
        self.query = nn.Linear(width, heads * queries * head_dim)
        self.key = nn.Linear(width, heads * head_dim)
        self.value = nn.Linear(width, heads * head_dim)
        self.out = nn.Linear(heads * queries * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.query(x).view(batch, tokens, self.heads, self.queries, self.head_dim).permute(0, 2, 3, 1, 4)
        k = self.key(x).view(batch, tokens, self.heads, 1, self.head_dim).permute(0, 2, 3, 1, 4)
        v = self.value(x).view(batch, tokens, self.heads, 1, self.head_dim).permute(0, 2, 3, 1, 4)
        y = (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        return self.out(y.permute(0, 3, 1, 2, 4).reshape(batch, tokens, -1))


class Block(nn.Module):
    def __init__(self, queries: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, 12)
        self.attention = Attention(queries=queries)
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + self.attention(x)
        return self.head(x + self.down(torch.relu(self.up(x))))


class Branches(nn.Module):
    """Concatenated branches, one of them depthwise, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.b = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(9)
        self.join = nn.Conv2d(9, 7, 3)
        self.residual = nn.Conv2d(7, 7, 3, padding=1)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(torch.cat([self.depthwise(self.a(x)), self.b(x)], dim=1)))
        x = self.join(x)
        return self.head((x + torch.relu(self.residual(x))).mean(dim=(2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Products(nn.Module):
    """All products of two units, and the units twice."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read, self.join = nn.Linear(3, 4), nn.Linear(16, 5), nn.Linear(13, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.make(x))
        products = self.read((x[:, :, None] * x[:, None, :]).flatten(1))
        return self.join(torch.cat([x, torch.relu(products), x.tanh()], dim=1))


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: perceptron(5, 7, 6, 3), (2, 5)),
    "branches": (Branches, (2, 3, 11, 9)),
    "products": (Products, (2, 3)),
    "recurrent": (Recurrent, (2, 7, 5)),
    "heads": (Block, (2, 8, 6)),
    "grouped queries": (lambda: Block(queries=2), (2, 8, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_flops_of_widths_are_those_of_a_model_that_really_is_so_small(name: str) -> None:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, example = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    groups = find_groups(model, example)
    chosen = [group for group in groups.removable if group.kind in ("channel", "head", "query_head")]
    assert chosen
    cost = FlopCost.of(model, chosen, example)
    assert cost.dense == pytest.approx(forward_flops(model, (example,), examples=1).dense, rel=1e-12)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        widths = [int(torch.randint(1, group.size + 1, (), generator=generator)) for group in chosen]
        kept = {group.name: best(torch.rand(group.size, generator=generator), width) for group, width in zip(chosen, widths, strict=True)}
        smaller = shrink(model, unit_masks(model, groups, kept), example, groups=groups).model
        [found] = cost(np.array([widths]))
        assert found * cost.dense == pytest.approx(forward_flops(smaller, (example,), examples=1).dense, rel=1e-9)


def test_of_equal_scores_the_first_units_stay() -> None:
    assert torch.equal(best(torch.ones(1000), 400), torch.arange(1000) < 400)


def test_flops_with_named_arguments() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.b(torch.relu(self.a(x * scale)))

    example = {"x": torch.ones(3, 4), "scale": 2.0}
    model = Named()
    assert FlopCost.of(model, find_groups(model, example).removable, example).dense == 3 * 2 * (24 + 12)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_the_choice_is_the_best_of_all_widths(budget: float) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        a, b, c = (int(n) for n in torch.randint(2, 7, (3,)))
        model = perceptron(5, a, b, c, 3)
        groups = find_groups(model, torch.ones(1, 5))
        scores = {g.name: torch.rand(g.size, dtype=torch.float64) ** 2 for g in groups.removable}
        lowest = float("inf")
        for widths in itertools.product(range(1, a + 1), range(1, b + 1), range(1, c + 1)):
            x, y, z = widths
            if 5 * x + x * y + y * z + 3 * z <= budget * (5 * a + a * b + b * c + 3 * c):
                lost = sum(sum(sorted(score.tolist())[: len(score) - width]) for score, width in zip(scores.values(), widths, strict=True))
                lowest = min(lowest, lost)
        if lowest == float("inf"):
            with pytest.raises(InputError, match="the lowest that the widths allow is"):
                search(model, scores, torch.ones(1, 5), flops=budget, groups=groups)
            continue
        found = search(model, scores, torch.ones(1, 5), flops=budget, groups=groups)
        assert found.cost <= budget
        assert found.lost == pytest.approx(lowest)
        for name, kept in found.kept.items():  # the units with the highest scores
            assert not (~kept).any() or scores[name][kept].min() >= scores[name][~kept].max()


def test_a_larger_model_meets_its_budget_within_one_per_cent() -> None:
    torch.manual_seed(0)
    model = perceptron(40, 60, 50, 60, 10)
    groups = find_groups(model, torch.ones(1, 40))
    scores = {g.name: torch.rand(g.size) for g in groups.removable}
    for budget in (0.25, 0.5, 0.9):
        found = search(model, scores, torch.ones(1, 40), flops=budget, groups=groups)
        assert budget - 0.01 <= found.cost <= budget
        smaller = shrink(model, found.masks, torch.ones(1, 40), groups=groups).model
        flops = [forward_flops(one, (torch.ones(1, 40),)).dense for one in (smaller, model)]
        assert flops[0] / flops[1] == pytest.approx(found.cost)


def test_widths_are_multiples_and_not_below_the_minimum() -> None:
    torch.manual_seed(0)
    model = perceptron(5, 10, 12, 3)
    scores = {"0": torch.rand(10), "2": torch.rand(12)}
    found = search(model, scores, torch.ones(1, 5), flops=0.5, round_to=4, minimum=4)
    assert set(found.widths.values()) <= {4, 8, 10, 12}
    assert choices(12, 4, 5) == [12, 8]
    assert thinned(range(16, 0, -1), 4) == [16, 11, 6, 1]


class ThreeHeads(nn.Module):
    """Attention whose number of heads stands in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        value = self.value(x).view(*x.shape[:2], 3, 4).transpose(1, 2)
        return self.out((value @ value.transpose(-1, -2) @ value).transpose(1, 2).reshape(*x.shape[:2], -1))


def test_what_cannot_be_taken_out_is_no_saving() -> None:
    model = ThreeHeads().eval()
    [heads] = [group for group in find_groups(model, torch.ones(1, 4, 12)) if group.kind == "head"]
    with pytest.raises(NiwakiError, match=r"has 1 of the FLOPs, not 0\.\d+: .*not removed"):
        search(model, {heads.name: torch.ones(3)}, torch.ones(1, 4, 12), flops=0.9)


def test_a_table_may_save_nothing_at_first() -> None:
    """Steps of a staircase: one unit less saves nothing, four less do."""
    lost = [np.arange(9.0), np.arange(9.0)]

    def cost(widths: np.ndarray) -> np.ndarray:
        return np.asarray(np.ceil(widths / 4).sum(axis=1) / 4)

    assert sorted(cheapest(lost, [list(range(8, 0, -1))] * 2, cost, 0.75)) == [4, 8]


# -- latency -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A machine whose time for a linear layer is a constant and its multiply-adds; returns how to set the constant."""
    overhead = 0.0

    def timed(models: dict[object, nn.Module], example: Tensor, rounds: int) -> dict[object, float]:
        return {name: overhead + forward_flops(model, (example,)).dense for name, model in models.items()}

    def set_overhead(value: float) -> None:
        nonlocal overhead
        overhead = value

    monkeypatch.setattr(module, "timed", timed)
    monkeypatch.setattr("niwaki.structured.costs.timed", timed)
    return set_overhead


@pytest.mark.parametrize("goal", [0.4, 0.7, 0.9])
def test_the_budget_by_the_table_is_corrected_until_the_measured_latency_is_met(machine: Callable[[float], None], goal: float) -> None:
    machine(100.0)
    torch.manual_seed(0)
    model, example = perceptron(40, 60, 50, 60, 10), torch.ones(1, 40)
    groups = find_groups(model, example)
    table = LatencyCost.measure(model, groups.removable, example, points=12, rounds=1)
    scores = {g.name: torch.rand(g.size) for g in groups.removable}
    found = search(model, scores, example, latency=goal, groups=groups, table=table, tolerance=0.05)
    smaller = shrink(model, found.masks, example, groups=groups).model
    dense = forward_flops(model, (example,)).dense
    assert found.cost == pytest.approx((100 + forward_flops(smaller, (example,)).dense) / (100 + dense))
    assert goal - 0.05 <= found.cost <= goal
    assert all(found.widths[name] in table.shares[name] for name in found.widths)


def test_a_latency_that_cannot_be_met_names_the_lowest(machine: Callable[[float], None]) -> None:
    model, example = perceptron(40, 60, 50, 10), torch.ones(1, 40)
    dense = forward_flops(model, (example,)).dense
    machine(3 * dense)
    scores = {"0": torch.rand(60), "2": torch.rand(50)}
    with pytest.raises(InputError, match=r"the budget is 0.5 of the whole model's cost.* the lowest that the widths allow is 0\.\d+"):
        search(model, scores, example, latency=0.5)
    machine(0.0)
    table = LatencyCost.measure(model, find_groups(model, example).removable, example, points=4, rounds=1)
    machine(3 * dense)  # slower than when the table was made
    with pytest.raises(NiwakiError, match=r"the budget is 0.5 of the whole model's latency, and the lowest that was measured is 0\.\d+"):
        search(model, scores, example, latency=0.5, table=table)


def test_a_table_is_really_measured_and_survives_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, example = perceptron(4, 6, 5, 2), torch.ones(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    chosen = find_groups(model, example).removable
    calls: list[tuple[int, int]] = []
    table = LatencyCost.measure(model, chosen, example, points=3, rounds=2, progress=lambda done, all_: calls.append((done, all_)))
    assert calls[-1] == (2, 2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: sorted(shares) for name, shares in table.shares.items()} == {"0": [1, 4, 6], "2": [1, 3, 5]}
    assert table.seconds > 0
    assert all(share > 0 for shares in table.shares.values() for share in shares.values())
    table.save(tmp_path / "table.json")
    assert LatencyCost.load(tmp_path / "table.json") == table
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="is no table of latencies"):
        LatencyCost.load(tmp_path / "other.json")
    with pytest.raises(InputError, match="cannot be read"):
        LatencyCost.load(tmp_path / "missing.json")
    with pytest.raises(InputError, match="no latencies of 0 with 7 units"):
        search(perceptron(4, 7, 2), {"0": torch.ones(7)}, torch.ones(1, 4), latency=0.9, table=table)


# -- scores --------------------------------------------------------------------------------------------------------------------


def test_scores_of_units_by_weights_and_by_gradients() -> None:
    torch.manual_seed(0)
    model = perceptron(4, 6, 5, 2).double()
    inputs, targets = torch.randn(8, 4, dtype=torch.float64), torch.randint(2, (8,))
    groups = find_groups(model, inputs)
    target = {"weights": {"include": ["*"]}}
    sizes = unit_scores(model, Recipe(granularity="channel", sparsity=0.5, target=target), groups)
    for name in ("0", "2"):
        assert torch.allclose(sizes[name], model.get_parameter(f"{name}.weight").detach().abs().sum(dim=1))
    weight = model.get_parameter("4.weight")
    [gradient] = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), [weight])
    recipe = Recipe(granularity="channel", sparsity=0.5, saliency="taylor", target=target)
    taylor = unit_scores(model, recipe, groups, data=[(inputs, targets)], loss=nn.functional.cross_entropy)
    assert torch.allclose(taylor["2"], (weight * gradient).sum(dim=0).square())  # Taylor looks at what reads the units
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(InputError, match="needs data= and loss="):
        unit_scores(model, recipe, groups)
    with pytest.raises(InputError, match="ranks tensors, not units"):
        unit_scores(model, Recipe(sparsity=0.5), groups)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"0": torch.ones(6)}, {}, "give one budget"),
        ({"0": torch.ones(6)}, {"flops": 0.5, "latency": 0.5}, "give one budget"),
        ({"0": torch.ones(6)}, {"flops": 1.5}, "a budget is in"),
        ({"0": torch.ones(6)}, {"flops": 0.5, "round_to": 0}, "round_to and minimum are at least 1"),
        ({"O": torch.ones(6)}, {"flops": 0.5}, "no group is called 'O'"),
        ({"2": torch.ones(2)}, {"flops": 0.5}, "no unit of 2 can be removed: it is part of the model's output"),
        ({"0": torch.ones(5)}, {"flops": 0.5}, "0 has 6 units, and scores of shape"),
        ({"0": torch.full((6,), torch.nan)}, {"flops": 0.5}, "not finite"),
        ({}, {"flops": 0.5}, "none were given"),
        ({"0": torch.ones(6)}, {"flops": 0.1}, "lowest that the widths allow is 0.1667"),
    ],
)
def test_bad_input_is_told(scores: dict[str, Tensor], options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(perceptron(4, 6, 2), scores, torch.ones(1, 4), **options)  # type: ignore[arg-type]
