"""Every row of the catalogue trains a small network from the start, and leaves what its recipe says."""

import pytest
import torch
from catalogue.small import ELEMENTS, TASK, WEIGHTS, Network, flops, kept, shorter
from support import pruned_are_zero
from training.small import plane, trainer

import niwaki
from niwaki.catalogue import METHODS
from niwaki.recipe import Recipe
from niwaki.recipe.stages import unroll
from niwaki.schedule import Constant, Iterative, Listed, OneShot, Phases, Ramp
from niwaki.selection import kept as share_kept

COPIES = ("eigendamage",)
"""Rows that return another model: `niwaki.prune` alone runs them, in test_runs."""

STRONGER = {
    "str": {"relaxation": {"soft_threshold": {"initial": -3.0}}},
    "gate_pruning_steps": {"relaxation": {"step_gate": {"learning_rate": 1.0}}, "penalty": {"l1": {"of": "gate", "strength": 0.1}}},
}
"""What acts in so short a run where the published strength does not."""

PLANNED = (OneShot, Iterative, Constant, Ramp, Listed, Phases)
"""Schedules that say beforehand which sparsity the last update has."""


def trained(recipe, **settings):
    """Return the model that a run leaves, and what else is left of it."""
    run = trainer(recipe and recipe.to_yaml(), **({"task": TASK} | settings))
    left = run.run()
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    assert left.masks is None or pruned_are_zero(run.model, left.masks)
    return run.model, left


def chosen(name):
    """Return the recipe of a row, at half of what it can be asked for, with less work; and the settings of a run that suits it."""
    recipe = shorter(niwaki.method(name, sparsity=0.5 if METHODS[name].takes_sparsity else None, **STRONGER.get(name, {})))
    kinds = {
        kind for leaf in unroll(recipe) for said in (leaf.recipe, leaf.prune) if said for kind in getattr(said.granularity, "kinds", ())
    }
    if kinds & {"head", "layer"}:
        return recipe, {"task": plane(), "model": "attention", "learning_rate": 0.01}
    if any(leaf.recipe.saliency.name == "connection_correlation" for leaf in unroll(recipe)):  # is about linear layers
        return recipe, {"task": plane(), "model": "norms"}
    return recipe, {}


def without(recipe, *slots):
    """Return a recipe without some slots, in all of its stages; None where nothing is left that masks or trains."""

    def stripped(data):
        kept = {key: value for key, value in data.items() if key not in slots}
        if "stages" in kept:
            kept["stages"] = [stage for stage in map(stripped, kept["stages"]) if stage]
        return kept

    try:
        return Recipe.from_data(stripped(recipe.to_data()))
    except niwaki.InputError:
        return None


def pieces(mask, granularity):
    """Return for each piece of a mask how many of its elements are active, and how many it has."""
    if granularity.name == "kernel" and mask.dim() > 2:
        mask = mask.flatten(2).flatten(0, 1)
    elif granularity.name == "output_channel":
        mask = mask.flatten(1)
    elif granularity.name == "input_channel":
        mask = mask.movedim(1, 0).flatten(1)
    elif granularity.name in ("element", "kernel"):
        mask = mask.reshape(-1, 1)
    else:
        return None
    return mask.sum(dim=1), mask.shape[1]


def last_sparsity(leaf, run):
    """Return the sparsity of the last update that a stage makes, None where its schedule cannot say beforehand."""
    if leaf.recipe.sparsity is None or not isinstance(leaf.recipe.schedule, PLANNED) or leaf.recipe.allocation.budget is not None:
        return None
    clock = leaf.clock(run) if leaf.length is not None else run
    total = clock.total_steps if leaf.length is not None else 0
    said = [leaf.recipe.schedule.at(step, leaf.recipe.sparsity, clock) for step in range((total or 0) + 1)]
    return next((sparsity for sparsity in reversed(said) if sparsity is not None), None)


@pytest.mark.filterwarnings("ignore::UserWarning")  # so small a task has fewer gradients, and worse Hessians, than some ask for
@pytest.mark.parametrize("name", [name for name in METHODS if name not in COPIES and METHODS[name].of is None])
def test_every_row_trains_and_leaves_what_it_says(name):
    recipe, settings = chosen(name)
    model, left = trained(recipe, **settings)
    leaves = unroll(recipe)
    assert len(left.stages) == len(leaves)
    masking = [leaf for leaf in leaves if leaf.recipe.selects or leaf.prune is not None]
    if METHODS[name].takes_sparsity and {leaf.finish for leaf in leaves} - {None} == {"shrink"}:
        dense = trainer(None, **({"task": TASK} | settings)).model
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    if len(masking) == 1 and masking[0].recipe.selects:
        check_pieces(masking[0], left.masks, trainer(None, **({"task": TASK} | settings)).clock)
    acting = {slot for leaf in leaves for slot in ("penalty", "relaxation") if slot in leaf.recipe.given}
    if acting:
        plain, _ = trained(without(recipe, *acting), **settings)
        assert any(not torch.equal(value, plain.state_dict().get(key, torch.empty(0))) for key, value in model.state_dict().items())


def check_pieces(leaf, masks, run):
    """Assert that the one stage which masks has left the pieces that its recipe says: whole ones, and exactly as many."""
    counted = {key: pieces(mask, leaf.recipe.granularity) for key, mask in masks.items()}
    if None in counted.values():
        return
    assert all(((active == 0) | (active == size)).all() for active, size in counted.values())
    sparsity = last_sparsity(leaf, run)
    if sparsity is not None:
        active = sum(int((active > 0).sum()) for active, _ in counted.values())
        assert active == share_kept(sparsity, sum(len(active) for active, _ in counted.values()))


def test_aliases_are_what_they_name():
    for row in METHODS.values():
        if row.of is not None:
            assert niwaki.method(row.name) == niwaki.method(row.of)


@pytest.mark.parametrize("name", ["two_four", "adaprune"])
def test_patterns_hold_in_the_end(name):
    _, left = trained(niwaki.method(name))
    assert left.masks["conv.weight"].movedim(1, -1).reshape(-1, 4).sum(dim=1).tolist() == [2] * 72


def test_a_share_of_the_flops_is_left_in_the_end():
    _, left = trained(niwaki.method("flops_magnitude"))
    dense = flops({weight: torch.ones(shape) for weight, shape in WEIGHTS.items()})
    assert 0.24 * dense < flops(left.masks) <= 0.25 * dense


def test_what_is_below_a_standard_deviation_goes():
    [pruning] = [leaf for leaf in unroll(niwaki.method("magnitude_threshold")) if leaf.recipe.acts]
    model = Network()
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = niwaki.Sparsifier(model, pruning.recipe, total_steps=1).finalize().masks
    for name in WEIGHTS:
        assert torch.equal(masks[name], dense[name].abs() >= dense[name].double().std(correction=0))
    _, left = trained(niwaki.method("magnitude_threshold"))
    assert 0 < sum(kept(left.masks).values()) < ELEMENTS


def test_models_are_as_narrow_as_asked_in_the_end():
    model, left = trained(niwaki.method("filter_l1", sparsity=0.5))
    assert (model.conv.out_channels, model.linear.out_features) == (4, 4)
    assert (model.conv_norm.num_features, model.linear.in_features) == (4, 4)
    assert model(torch.zeros(2, 1, 6, 6)).shape == (2, 3)
    assert left.removed
