"""Rows that choose what to remove from a trained network prune one at once, with exact counts and sound masks."""

import copy

import pytest
import torch
from catalogue.small import ELEMENTS, WEIGHTS, Network, examples, flops, kept, shorter
from support import pruned_are_zero
from torch.nn import functional

import niwaki
from niwaki.errors import InputError

UNITS = {"conv.weight": 8, "linear.weight": 8}


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
    "memory_bounded": "sensitivity",
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
    "snap_it": "global",
    "redundant_units": "pfa",
    "quantified_sensitivity": "uniform",
}
"""Rows that mask units, likewise."""

PATTERNS = ("two_four", "adaprune")
BUDGETS = ("energy_aware", "spdy")
LOOK_BACK = ("supermask", "karnin", "accumulated_movement", "weight_change")
"""Rows that look at the training."""


def pruned(name, sparsity=0.5, **fields):
    model = network()
    before = copy.deepcopy(model.state_dict())
    recipe = shorter(niwaki.method(name, sparsity=sparsity))
    found = niwaki.prune(model, recipe, data=DATA, loss=functional.cross_entropy, **fields)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert pruned_are_zero(model, found.masks)
    assert found.model is model
    assert {name: tuple(mask.shape) for name, mask in found.masks.items()}.items() >= WEIGHTS.items()
    assert torch.equal(before["first_norm.running_mean"], model.state_dict()["first_norm.running_mean"])
    return found, before


@pytest.mark.parametrize(("name", "allocation"), ELEMENTWISE.items())
def test_single_weights_are_pruned_at_once(name, allocation):
    found, before = pruned(name)
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
    again, _ = pruned(name)
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
        niwaki.prune(network(), name, data=DATA, loss=functional.cross_entropy)
