"""Every method that came with the chapters on removal, in a short training from the start: stages, counts, and what is left in the end."""

import pytest
import torch
from catalogue.test_runs import ELEMENTS, ELEMENTWISE, LOOK_BACK, OF_UNITS, PATTERNS, SHORTER, WEIGHTS, Network, examples, flops, kept
from support import pruned_are_zero
from torch.nn import functional
from torch.utils.data import TensorDataset
from training.small import ACCURACY, trainer

import niwaki
from niwaki.recipe import Recipe
from niwaki.recipe.stages import unroll
from niwaki.tasks import Data, Model, Task, Training

TASK = Task(
    name="images",
    models={"network": Model(lambda data: Network(), Training(epochs=3, batch_size=8, learning_rate=0.05, threads=1))},
    data=lambda folder: Data(TensorDataset(*examples(64, 0)), TensorDataset(*examples(32, 1))),
    loss=functional.cross_entropy,
    metrics={"accuracy": ACCURACY},
)


def trained(recipe):
    run = trainer(recipe.to_yaml(), task=TASK)
    left = run.run()
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    assert pruned_are_zero(run.model, left.masks)
    return run.model, left


def shorter(recipe, name):
    """Return a recipe with fewer trials or rounds, in the stage that prunes."""
    if name not in SHORTER:
        return recipe
    if recipe.stages is None:
        return recipe.replace(**SHORTER[name])
    data = recipe.to_data()
    for stage in data["stages"]:
        if "sparsity" in stage:
            stage.update(SHORTER[name])
    return Recipe.from_data(data)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *LOOK_BACK])
def test_single_weights_are_masked_in_the_end(name):
    _, left = trained(shorter(niwaki.method(name, sparsity=0.5), name))
    assert sum(kept(left.masks).values()) == ELEMENTS // 2
    assert len(left.stages) == len(unroll(niwaki.method(name)))


@pytest.mark.parametrize("name", OF_UNITS)
def test_models_are_smaller_in_the_end(name):
    model, left = trained(niwaki.method(name, sparsity=0.5))
    widths = model.conv.out_channels + model.linear.out_features
    assert widths <= 8  # less where what is left is dead
    assert (model.conv_norm.num_features, model.linear.in_features) == (model.conv.out_channels, model.conv.out_channels)
    assert model(torch.zeros(2, 1, 6, 6)).shape == (2, 3)
    assert left.removed


@pytest.mark.parametrize("name", PATTERNS)
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


def test_inputs_and_connections_are_gone_in_the_end():
    _, left = trained(niwaki.method("optimal_cell_damage", sparsity=0.5))
    inputs = [left.masks["conv.weight"].movedim(1, 0).flatten(1), left.masks["linear.weight"].T]
    assert sum(int(rows.any(dim=1).sum()) for rows in inputs) == 6
    recipe = niwaki.method("connection_correlation", sparsity=0.5, target={"weights": {"exclude": ["conv.weight"]}})
    _, left = trained(recipe)
    assert int(left.masks["linear.weight"].sum()) == 32
