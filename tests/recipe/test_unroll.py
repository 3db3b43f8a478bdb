"""Unrolled stages: their order, what each says and does, and their times inside a run."""

import pytest

from niwaki.clock import Clock, Time
from niwaki.errors import InputError
from niwaki.objective import Distillation
from niwaki.recipe import Recipe
from niwaki.recipe.stages import StageRecipe, fit, once, sparsity_after, unroll
from niwaki.selection import kept

TICKET = """
stages:
- {for: 1000 steps, save: ticket}
- repeat: 3
  stages:
  - {for: 1 run}
  - {prune: {fraction: 0.2, saliency: magnitude, allocation: global}, restore: {weights: ticket, optimizer: fresh, learning_rate: ticket}}
- {for: 1 run}
"""


def test_a_lottery_ticket_is_unrolled_in_order():
    leaves = unroll(Recipe.from_yaml(TICKET))
    assert [leaf.number for leaf in leaves] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [leaf.length and str(leaf.length) for leaf in leaves] == ["1000 steps", "1 run", None, "1 run", None, "1 run", None, "1 run"]
    assert [leaf.save for leaf in leaves] == ["ticket"] + [None] * 7
    assert [leaf.prune is not None for leaf in leaves] == [i in (2, 4, 6) for i in range(8)]
    assert leaves[2].prune.fraction == 0.2
    assert leaves[2].restore.optimizer == "fresh"
    assert not any(leaf.acts for leaf in leaves)
    assert all(leaf.recipe == StageRecipe() for leaf in leaves)
    assert leaves[4].says == (
        "stage 2.2, round 2 of 3: prune 20 % of what is active (saliency magnitude, allocation global); restore weights ticket,"
        " optimizer fresh, learning_rate ticket"
    )
    assert (leaves[0].says, leaves[7].says) == ("stage 1: train for 1000 steps; save ticket", "stage 3: train for 1 run")


def test_repeats_within_repeats_say_both_rounds():
    leaves = unroll(
        Recipe.from_yaml(
            "stages: [{repeat: 2, stages: [{repeat: 3, stages: [{for: 1 epochs}]}, {for: 2 epochs}]}, {stages: [{for: 3 epochs}]}]"
        )
    )
    assert [leaf.length.value for leaf in leaves] == [1, 1, 1, 2, 1, 1, 1, 2, 3]
    assert leaves[5].says == "stage 1.1.1, round 2 of 2, round 2 of 3: train for 1 epochs"
    assert leaves[8].says == "stage 2.1: train for 3 epochs"
    assert leaves[5].where == "stages[0].stages[0].stages[0]"


def test_a_recipe_without_stages_is_one_stage_of_the_length_of_the_run():
    recipe = Recipe.from_yaml("{sparsity: 0.9, schedule: {cubic: {end: 0.5 run}}, objective: distillation}")
    [leaf] = unroll(recipe)
    assert (leaf.number, leaf.length, leaf.recipe, leaf.says) == (1, Time(1.0, "run"), recipe, "train for 1 run")
    assert leaf.acts
    assert leaf.objective == Distillation()
    assert leaf.clock(Clock(100, 10)) == Clock(100, 10)


def test_slots_of_the_recipe_fill_those_of_its_stages_and_a_stage_says_otherwise():
    leaves = unroll(
        Recipe.from_yaml(
            """
saliency: random
allocation: global
growth: random
objective: {distillation: {weight: 0.5}}
stages:
- {for: 1 run, sparsity: 0.5, schedule: constant}
- {for: 1 run, sparsity: 0.8, saliency: magnitude, growth: none, schedule: cubic}
- {for: 1 run}
- {for: 1 run, objective: {distillation: {weight: 0.1}}}
- {prune: {fraction: 0.5}}
- {prune: {fraction: 0.5, allocation: uniform}, saliency: snip}
"""
        )
    )
    chosen = [(leaf.recipe.saliency.name, leaf.recipe.allocation.name, leaf.recipe.growth.name) for leaf in leaves[:2]]
    assert chosen == [("random", "global", "random"), ("magnitude", "global", "none")]
    assert [leaf.acts for leaf in leaves] == [True, True, False, False, False, False]
    assert [leaf.objective.weight for leaf in leaves[:4]] == [0.5, 0.5, 0.5, 0.1]
    assert leaves[2].recipe.to_data() == {"objective": {"distillation": {"weight": 0.5}}}  # nothing that has no effect
    prunes = [(leaf.prune.saliency.name, leaf.prune.allocation.name) for leaf in leaves[4:]]
    assert prunes == [("random", "global"), ("snip", "uniform")]


def test_what_decides_by_itself_acts_and_takes_no_ranking():
    recipe = Recipe.from_yaml("{saliency: random, stages: [{for: 1 run, relaxation: soft_threshold}, {for: 1 run}]}")
    first, second = unroll(recipe)
    assert first.acts
    assert first.recipe.to_data() == {"relaxation": "soft_threshold"}
    assert not second.acts


def test_every_recipe_of_a_stage_is_a_recipe_that_says_itself():
    for leaf in unroll(Recipe.from_yaml("{granularity: 2:4, stages: [{for: 1 run, sparsity: 0.5, saliency: random}, {for: 1 epochs}]}")):
        assert isinstance(leaf.recipe, Recipe)
        assert StageRecipe.from_yaml(leaf.recipe.to_yaml()) == leaf.recipe
        assert leaf.recipe.stages is None


def test_times_inside_a_stage_count_from_its_begin_and_its_run_is_the_stage():
    leaves = unroll(
        Recipe.from_yaml("stages: [{for: 0.5 run}, {for: 3 epochs}, {for: 70 steps}, {for: 640 tokens}, {prune: {fraction: 0.1}}]")
    )
    run = Clock(total_steps=200, steps_per_epoch=20, tokens_per_step=32)
    assert [leaf.clock(run).total_steps for leaf in leaves] == [100, 60, 70, 20, None]
    assert leaves[0].clock(run) == Clock(100, 20, 32)


STAGED = "stages: [{{for: 1 run}}, {{stages: [{{for: {length}, sparsity: 0.5, schedule: {{cubic: {{end: {end}}}}}}}]}}]"


def test_a_recipe_with_stages_fits_a_run_when_each_of_its_stages_does():
    clock = Clock(total_steps=1000, steps_per_epoch=100)
    good = Recipe.from_yaml(STAGED.format(length="2 epochs", end="200 steps"))
    good.require_complete()
    assert good.fit(clock) == fit(good, clock) == []
    with pytest.raises(InputError, match=r"^stages\[1\]\.stages\[0\]\.schedule\.cubic: it ends at step 201, after the run's 200 steps"):
        Recipe.from_yaml(STAGED.format(length="2 epochs", end="201 steps")).fit(clock)
    with pytest.raises(InputError, match=r"^stages\[1\]\.stages\[0\]\.for: 0\.001 epochs is less than one step of this run"):
        Recipe.from_yaml(STAGED.format(length="0.001 epochs", end="200 steps")).fit(clock)
    with pytest.raises(InputError, match=r"^stages\[0\]\.for: the time '1 run' cannot be resolved: pass total_steps="):
        good.fit(Clock(steps_per_epoch=100))


def test_a_note_of_a_stage_is_told_once_with_its_place():
    yaml = "stages: [{repeat: 2, stages: [{for: 50 steps, sparsity: 0.5, growth: random, schedule: {constant: {every: 100 steps}}}]}]"
    [note] = Recipe.from_yaml(yaml).fit(Clock(total_steps=1000))
    assert note.startswith("stages[0].stages[0]: growth 'random' never acts")


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.1, 0.37, 1e-3])
@pytest.mark.parametrize("pieces", [1000, 7, 266_200, 10**8 + 7])
def test_rounds_of_a_fraction_keep_exact_numbers(fraction, pieces):
    active = pieces
    for _ in range(20):
        expected = max(round((1.0 - fraction) * active), 1)
        sparsity = sparsity_after(fraction, active, pieces)
        active = kept(sparsity, pieces)
        assert active == expected
        assert 0.0 <= sparsity < 1.0


def test_what_a_recipe_masks_can_be_masked_at_once():
    gradual = Recipe(sparsity=0.9, allocation="global", schedule={"cubic": {"every": "10 steps", "end": "1 run"}}, growth="all")
    assert once(gradual) == Recipe(sparsity=0.9, allocation="global", schedule="one_shot")
    staged = Recipe.from_yaml("{stages: [{for: 1 run}, {repeat: 2, stages: [{sparsity: 0.5, granularity: channel, finish: shrink}]}]}")
    assert once(staged) == Recipe(sparsity=0.5, granularity="channel", schedule="one_shot")
    assert once(Recipe(granularity="2:4")).final_sparsity == 0.5


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe.from_yaml(TICKET), "none of them say a sparsity"),
        (Recipe(stages=[{"sparsity": 0.5}, {"sparsity": 0.75}]), "2 of them say a sparsity"),
        (Recipe(relaxation="soft_threshold"), "sparsity: missing"),
    ],
)
def test_what_says_no_single_sparsity_cannot(recipe, said):
    with pytest.raises(InputError, match=said):
        once(recipe)
