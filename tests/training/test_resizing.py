"""Stages that make the model wider: what they train then, what the record says, and what comes back from the file."""

import pytest
import torch
from training import small
from training.small import trainer

import niwaki
from niwaki.errors import InputError
from niwaki.metrics.flops import forward_flops
from niwaki.recipe.stages import unroll
from niwaki.structured import replay
from niwaki.training import run
from niwaki.training.record import read

WIDTHS = (24, 16)
"""Of the small network's hidden layers."""


def widths(model):
    return tuple(layer.out_features for layer in model if isinstance(layer, torch.nn.Linear))[:2]


@pytest.mark.parametrize("settings", [{}, {"ema": 0.8}, {"optimizer": "adamw", "learning_rate": 0.01}])
def test_a_wider_model_goes_on_from_what_it_has_learned(settings):
    plain = trainer("stages: [{for: 1 epochs}]", epochs=1, **settings)
    plain.run()
    made = trainer("stages: [{for: 1 epochs, finish: {widen: {factor: 1.5, by: copy}}}]", epochs=1, **settings)
    done = made.run()
    assert widths(made.model) == (36, 24)
    inputs = made.data.test.tensors[0]
    torch.testing.assert_close(made.model.eval()(inputs), plain.model.eval()(inputs), rtol=1e-4, atol=1e-6)
    assert done.stages[0].says == "stage 1: train for 1 epochs; finish widen factor 1.5, by copy"
    assert any(note.startswith("finish: widen made the model larger, from 650 parameters to") for note in done.notes)


def test_it_trains_with_all_its_units():
    made = trainer("stages: [{for: 1 epochs, finish: {widen: {factor: 2, by: new}}}, {for: 1 epochs}]", epochs=2)
    begun = trainer("stages: [{for: 1 epochs, finish: {widen: {factor: 2, by: new}}}]", epochs=2)
    done = made.run()
    begun.run()
    assert widths(made.model) == widths(begun.model) == (48, 32)
    for (name, new), (_, old) in zip(made.model.named_parameters(), begun.model.named_parameters(), strict=True):
        assert (new != old).any(), name
    assert (made.model[5].weight[:, 16:] != 0).any()
    assert [len(group["params"]) for group in made.optimizer.param_groups] == [8]
    assert all(p.shape == made.optimizer.state[p]["momentum_buffer"].shape for p in made.model.parameters())
    small_flops, large_flops = 2 * (24 * 6 + 24 * 16 + 32), 2 * (48 * 6 + 48 * 32 + 64)
    assert done.flops_multiplier == pytest.approx((small_flops + large_flops) / (2 * small_flops), rel=1e-12)


MORPHNET = """
stages:
- {for: 1 epochs, granularity: channel, penalty: {group_lasso: {strength: 1e-3}}}
- {sparsity: 0.5, granularity: channel, allocation: global, target: {weights: {exclude: []}}, schedule: one_shot, finish: shrink}
- {finish: {widen: {flops: 1.0, by: new}}}
- {for: 1 epochs}
"""


def test_morphnet_shrinks_and_expands_to_the_budget_of_the_first_model(tmp_path):
    made = trainer(MORPHNET, epochs=2)
    dense = forward_flops(made.model, made.example).dense
    done = made.run()
    assert 0.9 * dense < forward_flops(made.model, made.example).dense <= dense
    assert widths(made.model) != WIDTHS
    fresh = replay(trainer(MORPHNET, epochs=2).model, done.removed)
    fresh.load_state_dict(made.model.state_dict())
    assert repr(fresh) == repr(made.model)


def test_a_run_says_what_was_added_and_its_file_loads_again(tmp_path):
    recipe = small.recipe(MORPHNET)
    run(small.job(small.plane(), recipe, method="morphnet", training={"epochs": 2}), tmp_path / "run")
    results = read(tmp_path / "run").results
    kept = results.removed.tensors["0.weight"]["0"]
    assert -1 in kept
    loaded = niwaki.load(tmp_path / "run" / "model.safetensors")
    assert list(loaded.tensors["0.weight"].shape) == [len(kept), 6]
    assert loaded.removed == results.removed
    assert {layer.name: layer.shape for layer in results.layers}["0.weight"] == [len(kept), 6]


def test_what_cannot_be_done_is_told_and_the_run_goes_on():
    made = trainer("stages: [{for: 1 epochs, finish: {widen: {flops: 0.5}}}]", epochs=1)
    done = made.run()
    assert widths(made.model) == WIDTHS
    assert not done.removed
    assert any(note.startswith("finish: widen added nothing: flops: must be at least 1") for note in done.notes)


# ---------------------------------------------------------------- in recipes


def test_a_recipe_with_it_comes_back():
    for text in (
        "stages: [{for: 1 run, finish: {widen: {factor: 1.5}}}]",
        "stages: [{finish: {widen: {flops: 1, by: {split: {perturbation: 0.1}}}}}, {for: 1 run}]",
    ):
        recipe = niwaki.Recipe.from_yaml(text)
        again = niwaki.Recipe.from_yaml(recipe.to_yaml())
        assert again == recipe
        assert niwaki.Recipe.from_data(recipe.to_data()) == recipe
        assert [leaf.finish for leaf in unroll(again)] == [leaf.finish for leaf in unroll(recipe)]


@pytest.mark.parametrize(
    ("finish", "message"),
    [
        ("grow", r"finish: must be shrink, or \{widen: \{factor: 1.5\}\}, got 'grow'"),
        ("{widen: {}}", "finish.*widen: needs a factor of the widths, or flops"),
        ("{widen: {factor: 2, flops: 1}}", "needs a factor"),
        ("{widen: {factor: 0.5}}", "finish.*factor.*greater than or equal to 1"),
        ("{widen: {factor: 2, by: splat}}", "addition: unknown component 'splat'; did you mean 'split'"),
        ("{widen: {factors: 2}}", "factor"),
        ("{narrow: {factor: 2}}", "widen"),
    ],
)
def test_wrong_recipes(finish, message):
    with pytest.raises(InputError, match=message) as error:
        niwaki.Recipe.from_yaml(f"stages: [{{for: 1 run, finish: {finish}}}]")
    assert "\n" not in str(error.value)


def test_snapshots_of_the_narrower_model_cannot_be_restored():
    with pytest.raises(InputError, match="restore: no earlier stage saves 'a'"):
        niwaki.Recipe.from_yaml("stages: [{for: 1 run, save: a, finish: {widen: {factor: 2}}}, {restore: {weights: a}}]")
