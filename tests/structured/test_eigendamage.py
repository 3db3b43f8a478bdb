"""EigenDamage against explicit Kronecker products, projectors, and true losses of quadratic problems, in float64."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from support import batch, net
from torch import Tensor, nn
from torch.nn import functional as F

from niwaki import Recipe, Sparsifier
from niwaki.errors import InputError
from niwaki.granularity import Eigenbasis
from niwaki.layout import Layout
from niwaki.structured.eigendamage import _bottleneck, basis_of, chosen, decomposed, eigendamage
from niwaki.target import Weights, select_targets

EVERYTHING = Weights(include=("*",))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(size: int, seed: int) -> Tensor:
    rows = random(3 * size, size, seed=seed)
    return rows.T @ rows / len(rows)


# -- scores --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "inputs", "positions"), [(4, 5, 1), (3, 4, 6)])
def test_the_score_of_a_unit_is_what_the_explicit_kronecker_product_says_of_its_removal(outputs: int, inputs: int, positions: int) -> None:
    weight, a, g = random(outputs, inputs, positions), moments(inputs * positions, 1), moments(outputs, 2)
    basis = basis_of(weight, a, g)
    fisher = torch.kron(g, a)

    def cost(change: Tensor) -> float:
        return 0.5 * float(change.flatten() @ fisher @ change.flatten())

    for scores, vectors, equation in (
        (basis.output_scores, basis.outputs, "oz,pz,pik->oik"),
        (basis.input_scores, basis.inputs, "iz,jz,ojk->oik"),
    ):
        assert torch.allclose(vectors.T @ vectors, torch.eye(len(vectors), dtype=torch.float64), atol=1e-12)
        for unit, score in enumerate(scores):
            direction = vectors[:, unit : unit + 1]
            assert cost(torch.einsum(equation, direction, direction, weight)) == pytest.approx(float(score), rel=1e-10)


def test_of_a_linear_layer_the_scores_are_the_published_sums() -> None:
    weight, a, g = random(4, 6), moments(6, 1), moments(4, 2)
    basis = basis_of(weight[..., None], a, g)
    (of_inputs, inputs), (of_outputs, outputs) = torch.linalg.eigh(a), torch.linalg.eigh(g)
    importance = 0.5 * (outputs.T @ weight @ inputs).square() * of_outputs[:, None] * of_inputs
    assert torch.allclose(basis.output_scores, importance.sum(1), rtol=1e-10)
    assert torch.allclose(basis.input_scores, importance.sum(0), rtol=1e-10)


def test_directions_without_curvature_cost_nothing() -> None:
    basis = basis_of(random(3, 4, 1), torch.zeros(4, 4, dtype=torch.float64), moments(3, 1))
    assert not basis.input_scores.any()
    assert not basis.output_scores.any()


# -- which units ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.37, 0.45])
def test_the_number_of_units_is_exact_and_each_side_keeps_its_share(sparsity: float, cap: float) -> None:
    scores = [random(size, seed=size).abs() * scale for size, scale in ((8, 1.0), (20, 1e-6), (4, 1e-6), (1, 0.0))]
    masks = chosen(scores, sparsity, cap)
    assert sum(int(mask.sum()) for mask in masks) == round((1 - sparsity) * 33)
    for mask, one in zip(masks, scores, strict=True):
        assert mask.any()
        assert int((~mask).sum()) <= cap * len(one)
        assert not mask.any() or not (~mask).any() or one[mask].min() >= one[~mask].max()
    free = [one for one, mask in zip(scores, masks, strict=True) if int((~mask).sum()) < min(cap * len(one), len(one) - 1)]
    limit = max((float(one[~mask].max()) for one, mask in zip(scores, masks, strict=True) if (~mask).any()), default=0.0)
    for one in free:  # whatever could still have gone is no worse than what went
        mask = masks[next(i for i, other in enumerate(scores) if other is one)]
        assert float(one[mask].min()) >= min(limit, float(one[mask].min()))


def test_units_go_from_all_layers_by_one_threshold() -> None:
    masks = chosen([torch.tensor([5.0, 1.0, 3.0]), torch.tensor([2.0, 6.0, 4.0])], 0.5, 1.0)
    assert [mask.tolist() for mask in masks] == [[True, False, False], [False, True, True]]


def test_equal_scores_keep_the_first() -> None:
    masks = chosen([torch.ones(4), torch.ones(4)], 0.5, 0.75)
    assert [mask.tolist() for mask in masks] == [[True, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize(
    ("sparsity", "cap", "message"),
    [
        (0.9, 0.5, r"sparsity: 0.9 leaves 1 of 8 rotated units, and 4 must stay .* at most 0.5000 is possible"),
        (1.0, 0.5, r"sparsity: 1.0 is not in \[0, 1\)"),
        (0.5, 1.5, r"cap: 1.5 is not in \[0, 1\]"),
    ],
)
def test_impossible_numbers_are_refused(sparsity: float, cap: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen([torch.ones(4), torch.ones(4)], sparsity, cap)


# -- bottlenecks ---------------------------------------------------------------------------------------------------------------

MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 5), (3, 7, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 6, 6)),
    (nn.Conv3d(3, 4, 2, padding=1), (2, 3, 4, 4, 4)),
]


@pytest.mark.parametrize("form", ["projected", "inputs", "outputs", "both"])
@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "")
def test_every_form_computes_what_the_projected_weight_does(module: nn.Module, shape: tuple[int, ...], form: str) -> None:
    module = copy.deepcopy(module).double()
    weight = module.weight.detach().reshape(*module.weight.shape[:2], -1)
    inputs, outputs = (torch.linalg.qr(random(size, size, seed=size)).Q for size in (weight.shape[1], weight.shape[0]))
    x = random(*shape, seed=5)
    for kept_inputs, kept_outputs in ((weight.shape[1], weight.shape[0]), (2, 3)):
        sides = (inputs[:, :kept_inputs], outputs[:, :kept_outputs])
        core = torch.einsum("ob,oik,ia->bak", sides[1], weight, sides[0])
        expected = copy.deepcopy(module)
        projected = torch.einsum("po,oik,ij->pjk", sides[1] @ sides[1].T, weight, sides[0] @ sides[0].T)
        expected.weight.data = projected.reshape(module.weight.shape)
        made = _bottleneck(copy.deepcopy(module), core, sides, form)
        assert torch.allclose(made(x), expected(x), rtol=0, atol=1e-12)
        if kept_inputs == weight.shape[1]:  # nothing removed: the same function
            assert torch.allclose(made(x), module(x), rtol=0, atol=1e-10)
    made(x).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


class Shapes(nn.Module):
    """Layers for which each of the forms is the smallest."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(16, 4, 3, padding=1)
        self.tall = nn.Conv2d(4, 16, 3, stride=2, padding=1, bias=False)
        self.square = nn.Conv2d(16, 16, 3, padding=1)
        self.small = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.square(self.tall(self.wide(x).relu()).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize(("sparsity", "forms"), [(0.5, {"inputs", "outputs", "both"}), (0.15, {"untouched", "projected"})])
def test_layers_become_the_smallest_form_and_the_model_stays(sparsity: float, forms: set[str]) -> None:
    torch.manual_seed(0)
    model = Shapes().double()
    layers, _ = select_targets(model, EVERYTHING)
    weights = {one.name: one.parameter.detach().clone() for one in layers}
    factors = {one.name: (moments(one.parameter[0].numel(), 2 * i), moments(len(one.parameter), 2 * i + 1)) for i, one in enumerate(layers)}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows, smaller = decomposed(model, layers, factors, sparsity, 0.95)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {row.form for row in rows} >= forms
    assert sum(row.kept_inputs + row.kept_outputs for row in rows) == round((1 - sparsity) * sum(row.inputs + row.outputs for row in rows))

    expected = copy.deepcopy(model)
    for row, one in zip(rows, layers, strict=True):
        weight = weights[one.name].reshape(row.outputs, row.inputs, -1)
        basis = basis_of(weight, *factors[one.name])
        q_in = basis.inputs[:, basis.input_scores >= basis.input_scores.sort().values[-row.kept_inputs]]
        q_out = basis.outputs[:, basis.output_scores >= basis.output_scores.sort().values[-row.kept_outputs]]
        projected = torch.einsum("po,oik,ij->pjk", q_out @ q_out.T, weight, q_in @ q_in.T)
        expected.get_submodule(row.name).weight.data = projected.reshape(weights[one.name].shape)
        change = (projected - weight).flatten()
        a, g = factors[one.name]
        assert row.loss_change == pytest.approx(0.5 * float(change @ torch.kron(g, a) @ change), rel=1e-10)
        # The parameters are what the closed form says, the smallest of the four.
        positions, i, o, ki, ko = weight.shape[2], row.inputs, row.outputs, row.kept_inputs, row.kept_outputs
        sizes = {
            "projected": i * o * positions,
            "inputs": i * ki + ki * o * positions,
            "outputs": i * ko * positions + ko * o,
            "both": i * ki + ki * ko * positions + ko * o,
        }
        assert row.parameters_after == min(sizes.values()) == sizes["projected" if row.form == "untouched" else row.form]
        module = smaller.get_submodule(row.name)
        assert sum(p.numel() for p in module.parameters() if p.dim() > 1) == row.parameters_after
        assert isinstance(module, nn.Sequential) == (row.form in ("inputs", "outputs", "both"))
    x = random(3, 16, 8, 8, seed=9)
    assert torch.allclose(smaller(x), expected(x), rtol=0, atol=1e-11)


def test_nothing_removed_is_the_same_model() -> None:
    model = net(dtype=torch.float64)
    data = [batch(step, dtype=torch.float64) for step in range(2)]
    found = eigendamage(model, 0.0, data, F.cross_entropy)
    assert {row.form for row in found.layers} == {"untouched"}
    assert torch.equal(found.model(data[0][0]), model(data[0][0]))


# -- quadratic problems --------------------------------------------------------------------------------------------------------


def test_on_a_linear_model_with_squared_error_the_predicted_loss_is_the_true_one() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).double()
    x, root = random(50, 8) @ random(8, 8, seed=1), random(6, 6, seed=2)
    target = model(x).detach()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * ((outputs - targets) @ root).square().sum(1).mean()

    layers, _ = select_targets(model, EVERYTHING)
    factors = {"0.weight": (x.T @ x / len(x), root @ root.T)}
    for sparsity in (0.3, 0.5, 0.7):
        rows, smaller = decomposed(model, layers, factors, sparsity, 0.95)
        assert float(loss(smaller(x).detach(), target)) == pytest.approx(rows[0].loss_change, rel=1e-10)


def test_on_a_convolution_with_squared_error_the_predicted_loss_is_the_true_one() -> None:
    model = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1)).double()
    x, root = random(20, 5, 6, 6), random(6, 6, seed=2)
    target = model(x).detach()
    columns = F.unfold(x, 3, padding=1).permute(0, 2, 1).flatten(0, 1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * torch.einsum("nohw,op->nphw", outputs - targets, root).square().sum((1, 2, 3)).mean()

    layers, _ = select_targets(model, EVERYTHING)
    factors = {"0.weight": (columns.T @ columns / len(x), root @ root.T)}
    rows, smaller = decomposed(model, layers, factors, 0.5, 0.6)
    assert rows[0].kept_inputs < 5
    assert rows[0].kept_outputs < 6
    assert float(loss(smaller(x).detach(), target)) == pytest.approx(rows[0].loss_change, rel=1e-10)


def test_correlated_inputs_go_together_without_any_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x = random(40, 8)
    x = torch.cat([x, 2 * x], 1)  # no single one of the 16 inputs could go
    data = [(x, torch.arange(40) % 3)]
    found = eigendamage(model, 8 / 28, data, F.cross_entropy, target=Weights(include=("0.weight",)))
    assert found.layers[0].kept_inputs == 8
    assert found.layers[0].loss_change == pytest.approx(0, abs=1e-12)
    assert torch.allclose(found.model(x), model(x), rtol=0, atol=1e-8)


def test_the_factors_of_the_empirical_fisher_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    x, labels = random(30, 6), torch.arange(30) % 5
    errors = (model(x).softmax(1) - F.one_hot(labels, 5)).detach()
    layers, _ = select_targets(model, EVERYTHING)
    expected, _ = decomposed(model, layers, {"0.weight": (x.T @ x / 30, errors.T @ errors / 30)}, 0.5, 0.9)
    data = [(x[:10], labels[:10]), (x[10:], labels[10:])]
    found = eigendamage(model, 0.5, iter(data), F.cross_entropy, cap=0.9, target=EVERYTHING, labels="given")
    assert found.layers[0].loss_change == pytest.approx(expected[0].loss_change, rel=1e-8)
    assert (found.layers[0].kept_inputs, found.layers[0].kept_outputs) == (expected[0].kept_inputs, expected[0].kept_outputs)


# -- whole models --------------------------------------------------------------------------------------------------------------


def test_a_network_gets_smaller_and_says_how() -> None:
    model = net()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    data = [batch(step) for step in range(4)]
    state = torch.get_rng_state()
    found = eigendamage(model, 0.6, data, F.cross_entropy, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [row.name for row in found.layers] == ["conv2", "fc1", "fc2"]
    assert found.sparsity == pytest.approx(0.6, abs=0.5 / sum(row.inputs + row.outputs for row in found.layers))
    gone = sum(row.parameters - row.parameters_after for row in found.layers)
    assert gone > 0
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in found.model.parameters()) == gone
    assert not any(module.training for module in found.model.modules())
    assert "fc1" in str(found)
    assert str(found).count("\n") >= 5
    data_of = json.loads(json.dumps(found.to_data()))
    assert data_of["layers"][1]["parameters"] == 24 * 128
    again = eigendamage(model, 0.6, data, F.cross_entropy, seed=3)
    assert again.layers == found.layers
    other = eigendamage(model, 0.6, data, F.cross_entropy, seed=4)
    assert other.layers != found.layers  # other labels were sampled
    for name in ("fc1", "fc2"):
        row = next(row for row in found.layers if row.name == name)
        assert any(name in note for note in found.notes) == (row.form == "projected")
    found.model.train()
    F.cross_entropy(found.model(data[0][0]), data[0][1]).backward()
    assert all(parameter.grad is not None for parameter in found.model.parameters())


def test_a_model_that_is_one_layer_becomes_the_bottleneck() -> None:
    model = nn.Linear(12, 12).double()
    found = eigendamage(model, 0.7, [(random(30, 12), torch.arange(30) % 12)], F.cross_entropy, target=EVERYTHING)
    assert isinstance(found.model, nn.Sequential)
    assert found.model(random(3, 12)).shape == (3, 12)


class Odd(nn.Module):
    """Layers that a rotation must leave alone, and one that it need not."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads
        self.grouped = nn.Conv1d(4, 8, 3, groups=2)
        self.fine = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.same = nn.Linear(8, 8)
        self.same.weight = self.tied.weight
        self.up = nn.ConvTranspose1d(8, 8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(x).relu().mean(2)
        y = F.linear(y, self.fine.weight) if self.reads and not torch.is_grad_enabled() else self.fine(y)
        y = self.same(self.tied(y.relu()).relu())
        return self.head(self.up(y[..., None]).mean(2))


def odd_data() -> list[tuple[Tensor, Tensor]]:
    return [(random(12, 4, 9).float(), torch.arange(12) % 3)]


def test_what_cannot_be_rotated_is_told() -> None:
    target = Weights(include=("grouped", "fine", "tied", "up"))
    found = eigendamage(Odd(), 0.5, odd_data(), F.cross_entropy, target=target)
    assert [row.name for row in found.layers] == ["fine"]
    told = "\n".join(found.notes)
    assert "grouped.weight stays as it is: it is a grouped convolution" in told
    assert "tied.weight stays as it is: its weight is that of same.weight too" in told
    assert "up.weight stays as it is: ConvTranspose1d is neither" in told
    with pytest.raises(InputError, match=r"no layer can be rotated \(up.weight stays"):
        eigendamage(Odd(), 0.5, odd_data(), F.cross_entropy, target=Weights(include=("up",)))


def test_a_model_that_reads_a_weight_past_its_layer_is_refused() -> None:
    with pytest.raises(InputError, match="reads the weight of a layer without calling the layer"):
        eigendamage(Odd(reads=True), 0.5, odd_data(), F.cross_entropy, target=Weights(include=("fine",)))


def test_a_memory_that_is_too_small_says_what_would_fit() -> None:
    data = [batch(0)]
    with pytest.raises(InputError, match=r"factors need .* for fc1.weight, .* 60.0 kB .* would fit for fc2.weight, conv2.weight: exclude"):
        eigendamage(net(), 0.5, data, F.cross_entropy, memory=60_000)
    with pytest.raises(InputError, match="no layer would fit"):
        eigendamage(net(), 0.5, data, F.cross_entropy, memory=1000)
    eigendamage(net(), 0.5, data, F.cross_entropy, memory=10_000_000)


def test_factors_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    layers, _ = select_targets(model, EVERYTHING)
    with pytest.raises(InputError, match=r"0.weight: its input factor is not finite"):
        decomposed(model, layers, {"0.weight": (torch.full((3, 3), torch.nan), torch.eye(3))}, 0.5, 0.9)


@pytest.mark.parametrize("call", [lambda g, layout: g.grid(layout), lambda g, layout: g.check(layout, "x")], ids=["grid", "check"])
def test_the_granularity_refuses_to_mask(call: Any) -> None:
    with pytest.raises(InputError, match=r"use niwaki.prune\(model, \"eigendamage\""):
        call(Eigenbasis(), Layout(("output", "input"), (3, 4)))


def test_a_sparsifier_refuses_the_granularity() -> None:
    with pytest.raises(InputError, match=r"niwaki\.prune"):
        Sparsifier(net(), Recipe(sparsity=0.5, granularity="eigenbasis"), total_steps=10)
    with pytest.raises(InputError, match=r"cap.* less than or equal to 1"):
        Eigenbasis(cap=1.5)
