"""Every method that came with the chapters on removal prunes a trained network at once, with exact counts and sound masks."""

import copy

import pytest
import torch
from support import pruned_are_zero
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.errors import InputError

WEIGHTS = {"conv.weight": (8, 4, 3, 3), "linear.weight": (8, 8)}
"""The targets of the network: all but the first convolution and the last layer."""
ELEMENTS = 8 * 4 * 9 + 8 * 8
UNITS = {"conv.weight": 8, "linear.weight": 8}


class Network(nn.Module):
    """Every target has a normalization behind it, and no residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.conv_norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear, self.linear_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first_norm(self.first(x)).relu()
        x = self.conv_norm(self.conv(x)).relu().mean((2, 3))
        return self.last(self.linear_norm(self.linear(x)).relu())


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return images, (images.square().mean((1, 2, 3)) * 4).long().clamp(3, 5) - 3


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Network()
        model(examples(64, 5)[0])  # running statistics that fit the data
    return model.eval()


DATA = [examples(24, seed) for seed in range(2)]

ELEMENTWISE = {
    "iterative_snip": "global",
    "force": "global",
    "grasp": "global",
    "synflow": "global",
    "random_tickets": "smart_ratio",
    "obd": "global",
    "obs": "global",
    "woodfisher": "global",
    "woodtaylor": "global",
    "mfac": "global",
    "kfac_obs": "global",
    "l_obs": "error_bound",
    "obc": "uniform",
    "sparsegpt": "uniform",
    "wanda": "uniform",
    "data_dependent_coreset": "uniform",
    "lamp": "global",
    "amc": "amc",
    "evolutionary": "evolutionary",
    "owl": "outlier_weighted",
}
"""Rows that mask single weights -> what shares them out."""

OF_UNITS = {
    "kfac_obd": "global",
    "skeletonization": "uniform",
    "constant_units": "uniform",
    "duplicate_units": "uniform",
    "subset_selection": "uniform",
    "goodness_factor": "uniform",
    "output_sensitivity": "uniform",
    "variance_nullity": "uniform",
    "iterative_least_squares": "uniform",
    "linear_dependence": "uniform",
    "data_free_merging": "uniform",
    "inbound": "uniform",
    "apoz": "uniform",
    "thinet": "uniform",
    "lasso_channels": "uniform",
    "activation_entropy": "uniform",
    "diversity_networks": "uniform",
    "nisp": "uniform",
    "fisher_pruning": "global",
    "importance_estimation": "global",
    "gate_decorator": "global",
    "pfa": "pfa",
    "provable_filter_pruning": "uniform",
    "coreset": "uniform",
    "sensitivity_filters": "sensitivity",
}
"""Rows that mask units, likewise."""

PATTERNS = ("two_four", "adaprune")
BUDGETS = ("energy_aware", "spdy")
LOOK_BACK = ("supermask", "karnin", "accumulated_movement", "weight_change")
"""Rows that look at the training."""
OTHERS = ("optimal_cell_damage", "connection_correlation", "eigendamage", "gmp_uniform_plus", "magnitude_threshold", "flops_magnitude")
"""Rows with a test of their own, below or in a training."""
# fmt: off
OLD = (
    "iterative_magnitude", "train_prune_retrain", "gmp", "dsd", "acdc", "static_erk", "static_uniform", "lottery_ticket",
    "learning_rate_rewinding", "snip", "magnitude", "random", "movement", "str", "set", "rigl", "top_kast", "filter_l1", "filter_l2",
    "fpgm", "taylor_filters", "head_importance", "ssl", "network_slimming", "dropnet", "prunetrain", "early_bird_channels", "layerdrop",
)
# fmt: on
"""Rows whose tests are with what they are about: schedules, stages, growth, groups, relaxations."""

SHORTER = {
    "amc": {"allocation": {"amc": {"episodes": 4, "explore": 2}}},
    "evolutionary": {"allocation": {"evolutionary": {"population": 4, "generations": 2}}},
    "obs": {"schedule": {"one_shot": {"rounds": 2}}},
    "synflow": {"schedule": {"one_shot": {"rounds": 10}}},
    "iterative_snip": {"schedule": {"one_shot": {"rounds": 6}}},
    "force": {"schedule": {"one_shot": {"rounds": 6, "revive": True}}},
}
"""What makes them quick."""


def pruned(name, sparsity=0.5, **fields):
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = niwaki.prune(model, name, sparsity=sparsity, data=DATA, loss=functional.cross_entropy, **fields)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert pruned_are_zero(model, found.masks)
    assert found.model is model
    assert {name: tuple(mask.shape) for name, mask in found.masks.items()}.items() >= WEIGHTS.items()
    assert torch.equal(before["first_norm.running_mean"], model.state_dict()["first_norm.running_mean"])
    return found, before


def kept(masks):
    return {name: int(masks[name].sum()) for name in WEIGHTS}


def test_every_method_is_run_somewhere():
    run = [*ELEMENTWISE, *OF_UNITS, *PATTERNS, *BUDGETS, *LOOK_BACK, *OTHERS, *OLD]
    assert sorted(run) == sorted(niwaki.METHODS)


@pytest.mark.parametrize(("name", "allocation"), ELEMENTWISE.items())
def test_single_weights_are_pruned_at_once(name, allocation):
    found, before = pruned(name, **SHORTER.get(name, {}))
    counts = kept(found.masks)
    assert sum(counts.values()) == ELEMENTS // 2
    assert all(count > 0 for count in counts.values())
    assert found.recipe.allocation.name == allocation
    if allocation == "uniform":
        assert counts == {"conv.weight": 144, "linear.weight": 32}
    if name == "wanda":
        assert found.masks["conv.weight"].flatten(1).sum(dim=1).tolist() == [18] * 8
    changed = {name for name, value in found.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(WEIGHTS)
    survivors_move = any(not torch.equal(found.model.state_dict()[n][found.masks[n]], before[n][found.masks[n]]) for n in WEIGHTS)
    compensates = found.recipe.compensation is not None or name in ("obc", "sparsegpt")
    assert survivors_move == compensates
    again, _ = pruned(name, **SHORTER.get(name, {}))
    assert again.masks == found.masks


@pytest.mark.parametrize(("name", "allocation"), OF_UNITS.items())
def test_units_are_pruned_at_once(name, allocation):
    found, _ = pruned(name)
    units = {weight: found.masks[weight].flatten(1).any(dim=1) for weight in UNITS}
    assert torch.equal(found.masks["conv.weight"], units["conv.weight"].view(8, 1, 1, 1).expand(8, 4, 3, 3))
    assert torch.equal(found.masks["linear.weight"], units["linear.weight"][:, None] & units["conv.weight"])  # it reads those channels
    assert torch.equal(found.masks["conv_norm.weight"], units["conv.weight"])
    stay = {weight: int(mask.sum()) for weight, mask in units.items()}
    assert sum(stay.values()) == 8
    if allocation == "uniform":
        assert stay == {"conv.weight": 4, "linear.weight": 4}
    assert found.recipe.allocation.name == allocation
    again, _ = pruned(name)
    assert again.masks == found.masks


@pytest.mark.parametrize("name", PATTERNS)
def test_two_of_four_stay(name):
    found, before = pruned(name, sparsity=None)
    assert found.masks["conv.weight"].movedim(1, -1).reshape(-1, 4).sum(dim=1).tolist() == [2] * 72
    assert found.masks["linear.weight"].reshape(-1, 4).sum(dim=1).tolist() == [2] * 16
    moved = not torch.equal(
        found.model.state_dict()["conv.weight"][found.masks["conv.weight"]], before["conv.weight"][found.masks["conv.weight"]]
    )
    assert moved == (name == "adaprune")


def flops(masks):
    """Of a forward pass of one example; a multiply-add is two."""
    first, last = 4 * 9 * 36, 8 * 3
    return 2 * (first + 36 * int(masks["conv.weight"].sum()) + int(masks["linear.weight"].sum()) + last)


def energy(masks):
    """Of the targets, in picojoules: 4.6 + 5 for each multiply-add, 640 for each weight."""
    conv, linear = int(masks["conv.weight"].sum()), int(masks["linear.weight"].sum())
    return 9.6 * (36 * conv + linear) + 640 * (conv + linear)


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_of_cost_are_met(name):
    cost = {"spdy": flops, "energy_aware": energy}[name]
    found, before = pruned(name, sparsity=None)
    dense = cost({weight: torch.ones(shape) for weight, shape in WEIGHTS.items()})
    assert 0.47 * dense < cost(found.masks) <= 0.5 * dense
    assert any(not torch.equal(found.model.state_dict()[w][found.masks[w]], before[w][found.masks[w]]) for w in WEIGHTS)


def test_inputs_of_every_layer_go():
    found, _ = pruned("optimal_cell_damage")
    inputs = [found.masks["conv.weight"].movedim(1, 0).flatten(1), found.masks["linear.weight"].T]
    assert all(bool((rows.any(dim=1) == rows.all(dim=1)).all()) for rows in inputs)
    assert sum(int(rows.any(dim=1).sum()) for rows in inputs) == 6  # of 4 + 8


def test_connections_of_linear_layers_go():
    with pytest.raises(InputError, match=r"conv\.weight is a convolution"):
        pruned("connection_correlation")
    model = network()
    found = niwaki.prune(model, "connection_correlation", sparsity=0.5, data=DATA, target={"weights": {"exclude": ["conv.weight"]}})
    assert found.masks["linear.weight"].sum() == 32
    assert list(found.masks) == ["linear.weight"]


def test_every_weight_is_a_target_of_the_state_of_sparsity():
    found, _ = pruned("gmp_uniform_plus", sparsity=0.8)
    counts = {name: int(mask.sum()) for name, mask in found.masks.items()}
    elements = {"first.weight": 36, "conv.weight": 288, "linear.weight": 64, "last.weight": 24}
    assert sum(counts.values()) == round(0.2 * sum(elements.values()))
    assert counts["first.weight"] == 36
    assert counts["last.weight"] >= 0.2 * 24 - 1
    assert abs(counts["conv.weight"] / 288 - counts["linear.weight"] / 64) < 0.03


def test_rotated_units_leave_a_smaller_copy():
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = niwaki.prune(model, "eigendamage", sparsity=0.5, data=DATA, loss=functional.cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in found.model.parameters()) < count
    assert not found.masks
    assert found.model(DATA[0][0]).isfinite().all()


@pytest.mark.parametrize("name", LOOK_BACK)
def test_what_looks_at_the_training_needs_one(name):
    with pytest.raises(InputError, match=f"prune: {name} ranks by what it has seen of the training"):
        pruned(name)
