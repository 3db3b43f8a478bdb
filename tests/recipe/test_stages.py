"""Stages: parsed, checked one by one with what the recipe around them says, and kept as written."""

import pytest
from ruamel.yaml import YAML

from niwaki.clock import Time
from niwaki.errors import InputError
from niwaki.recipe import Recipe

FULL = """
target:
  weights: {exclude: [head]}
stages:
- {for: 3 epochs, sparsity: 0.5, schedule: cubic, save: early}
- repeat: 2
  stages:
  - {for: 0.5 run, save: inner}
  - prune:
      fraction: 0.25
      target:
        weights: {include: [body]}
      granularity: kernel
      saliency:
        magnitude: {norm: l2}
      normalization: lamp
      allocation: global
      selection: top_k
    restore: {weights: early, optimizer: inner, learning_rate: early}
  - restore: {optimizer: fresh}
- {sparsity: 0.75, granularity: input_channel, finish: shrink}
"""


def test_every_field_of_a_stage_is_read_and_written():
    recipe = Recipe.from_yaml(FULL)
    first, loop, last = recipe.stages
    assert first.for_ == Time(3.0, "epochs")
    assert (first.sparsity, first.schedule.name, first.save) == (0.5, "cubic", "early")
    assert loop.repeat == 2
    prune = loop.stages[1].prune
    assert (prune.fraction, prune.granularity.name, prune.saliency.norm, prune.normalization.name) == (0.25, "kernel", "l2", "lamp")
    assert (prune.target.include, prune.allocation.name, prune.selection.name) == (("body",), "global", "top_k")
    assert loop.stages[1].restore.snapshots() == ["early", "inner", "early"]
    assert loop.stages[2].restore.snapshots() == []
    assert (last.finish, last.repeat, last.stages) == ("shrink", 1, None)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert YAML(typ="safe").load(recipe.to_yaml()) == YAML(typ="safe").load(FULL)
    assert recipe.missing == []
    assert recipe.to_data(defaults=True) == recipe.to_data()
    assert recipe.final_sparsity is None


def test_what_is_said_of_signs_and_stable_masks_is_written_as_it_was_read():
    text = """
    stages:
    - {save: initial}
    - {for: 1 run, until: masks_stable, sparsity: 0.5, schedule: mask_stability}
    - restore: {weights: initial, as: signs}
    - restore: {weights: fresh, optimizer: fresh}
    """
    recipe = Recipe.from_yaml(text)
    assert [stage.until for stage in recipe.stages] == [None, "masks_stable", None, None]
    assert (recipe.stages[2].restore.as_, recipe.stages[3].restore.as_) == ("signs", "values")
    assert recipe.stages[3].restore.snapshots() == []
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert YAML(typ="safe").load(recipe.to_yaml()) == YAML(typ="safe").load(text)


def test_components_to_come_are_found_in_every_stage():
    recipe = Recipe.from_yaml(
        "stages: [{stages: [{prune: {fraction: 0.1, selection: sampled_top_k}}, {for: 1 run, objective: adversarial}]},"
        " {for: 1 run, target: heads}]"
    )
    assert recipe.missing == ["selection 'sampled_top_k'", "objective 'adversarial'", "target 'heads'"]
    with pytest.raises(InputError, match="cannot run yet: selection 'sampled_top_k', "):
        recipe.require_complete()


def test_stages_take_slots_of_the_recipe_around_them():
    Recipe.from_yaml("{relaxation: latent, stages: [{for: 1 run, sparsity: 0.5, gradient: dense}]}")
    with pytest.raises(InputError, match=r"^stages\[0\]\.gradient: 'dense' needs a relaxation that keeps dense weights, not 'hard'"):
        Recipe.from_yaml("{relaxation: latent, stages: [{for: 1 run, sparsity: 0.5, gradient: dense, relaxation: hard}]}")
    with pytest.raises(InputError, match=r"^stages\[1\]\.sparsity: 0\.9 contradicts granularity\.n_m"):
        Recipe.from_yaml("{granularity: 2:4, stages: [{for: 1 run}, {sparsity: 0.9}]}")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[]", "stages: needs at least one stage"),
        ("[{}]", "stages[0]: does nothing; say what it is for, such as {for: 1 run}"),
        ("[5]", "stages[0]: "),
        ("{for: 1 run}", "stages: "),
        ("[{fro: 1 run}]", "stages[0]: unknown field 'fro'; did you mean 'for'? choices: "),
        ("[{for: 1 run}, {1: 2}]", "the key 1 is not text; write it in quotes"),
        ("[{for: 1}]", "stages[0].for: a time is a number with a unit"),
        ("[{for: 0 steps}]", "stages[0].for: a stage must last longer than nothing"),
        ("[{for: 1 run, saliency: magnitud}]", "stages[0].saliency: unknown component 'magnitud'; did you mean 'magnitude'?"),
        ("[{for: 1 run, sparsity: 2}]", "stages[0].sparsity: must be in [0, 1), got 2"),
        (
            "[{for: 1 run, saliency: random}]",
            "stages[0].sparsity: missing; say what share of the target is to be masked for the saliency to act on",
        ),
        ("[{for: 1 run}, {for: 1 run, sparsity: 0.5, growth: all}]", "stages[1].growth: 'all' needs a schedule that updates again"),
        ("[{stages: [{for: 1 run}, {for: 1 run, sparsity: 0.5, growth: all}]}]", "stages[0].stages[1].growth: 'all' needs a schedule"),
        ("[{repeat: 2, for: 1 run}]", "stages[0].repeat: needs stages to repeat"),
        ("[{repeat: 0, stages: [{for: 1 run}]}]", "stages[0].repeat: "),
        ("[{repeat: 1.5, stages: [{for: 1 run}]}]", "stages[0].repeat: "),
        ("[{stages: []}]", "stages[0].stages: needs at least one stage"),
        ("[{for: 1 run, stages: [{for: 1 run}]}]", "stages[0].for: a stage with stages says only repeat; put for into one of its stages"),
        ("[{save: a, stages: [{for: 1 run}]}]", "stages[0].save: a stage with stages says only repeat"),
        ("[{prune: {}}]", "stages[0].prune.fraction: this field is required"),
        ("[{prune: {fraction: 1}}]", "stages[0].prune.fraction: Input should be less than 1, got 1"),
        ("[{prune: {fraction: 0}}]", "stages[0].prune.fraction: Input should be greater than 0, got 0"),
        (
            "[{prune: {fraction: 0.2, salience: x}}]",
            "stages[0].prune: unknown field 'salience'; did you mean 'saliency'? choices: allocation, compensation, fraction, ",
        ),
        ("[{prune: {fraction: 0.2, saliency: x}}]", "stages[0].prune.saliency: unknown component 'x'; choices: "),
        (
            "[{prune: {fraction: 0.2}, sparsity: 0.5}]",
            "stages[0].prune: masks a fraction of what is left, so it cannot stand beside a sparsity",
        ),
        ("[{prune: {fraction: 0.2, granularity: 2:4}}]", "stages[0].prune.granularity: 'n_m' fixes the sparsity"),
        ("[{prune: {fraction: 0.2, saliency: score}}]", "stages[0].prune.saliency: 'score' is learned while training"),
        ("[{prune: {fraction: 0.2, saliency: karnin}}]", "stages[0].prune.saliency: 'karnin' is learned while training"),
        (
            "[{prune: {fraction: 0.2, allocation: {flops_budget: {flops: 0.5}}}}]",
            "stages[0].prune.allocation: 'flops_budget' decides how many pieces go, so a fraction has no meaning; drop prune",
        ),
        (
            "[{prune: {fraction: 0.2, compensation: obs}}]",
            "stages[0].prune.compensation: 'obs' needs a saliency with a curvature, not 'mag",
        ),
        (
            "[{prune: {fraction: 0.2, saliency: obc, allocation: global}}]",
            "stages[0].prune.allocation: saliency 'obc' solves layer by layer",
        ),
        (
            "[{prune: {fraction: 0.2, allocation: redistribution}}]",
            "stages[0].prune.allocation: 'redistribution' shares out what grows back",
        ),
        ("[{penalty: l1}]", "stages[0].for: missing; penalty acts while a stage trains, so say how long, such as for: 1 run"),
        ("[{sparsity: 0.5, relaxation: latent}]", "stages[0].for: missing; relaxation acts while a stage trains"),
        ("[{objective: distillation}]", "stages[0].for: missing; objective acts while a stage trains"),
        ("[{sparsity: 0.5, schedule: cubic}]", "stages[0].for: missing; the schedule 'cubic' takes time"),
        ("[{sparsity: 0.5, schedule: {one_shot: {at: 5 steps}}}]", "stages[0].for: missing; the schedule 'one_shot' takes time"),
        ("[{for: 1 run, save: keep}]", "stages[0].save: 'keep' cannot name a snapshot"),
        ("[{for: 1 run, save: ''}]", "stages[0].save: "),
        ("[{restore: {}}]", "stages[0].restore: restores nothing; name a snapshot for weights, optimizer or learning_rate"),
        ("[{restore: {learning_rate: fresh}}]", "stages[0].restore.learning_rate: 'fresh' is for weights and optimizer; name a snapshot"),
        (
            "[{restore: {optimizer: fresh, as: signs}}]",
            "stages[0].restore.as: 'signs' are those of a snapshot's weights; name it in weights",
        ),
        ("[{restore: {weights: fresh, as: signs}}]", "stages[0].restore.as: 'signs' are those of a snapshot's weights"),
        ("[{save: a}, {restore: {weights: a, as: sign}}]", "stages[1].restore.as: Input should be 'values' or 'signs', got 'sign'"),
        ("[{restore: {weights: a, as: signs}}]", "stages[0].restore: no earlier stage saves 'a'"),
        (
            "[{until: masks_stable, sparsity: 0.5, schedule: mask_stability}]",
            "stages[0].until: ends a stage early, so say how long it lasts",
        ),
        ("[{for: 1 run, until: later}]", "stages[0].until: Input should be 'masks_stable', got 'later'"),
        (
            "[{for: 1 run, until: masks_stable}]",
            "stages[0].until: 'masks_stable' needs a sparsity and a schedule that waits for stable masks",
        ),
        (
            "[{for: 1 run, until: masks_stable, sparsity: 0.5, schedule: cubic}]",
            "stages[0].until: 'masks_stable' needs a sparsity and a schedule that waits for stable masks; choices: mask_stability",
        ),
        ("[{until: masks_stable, stages: [{for: 1 run}]}]", "stages[0].until: a stage with stages says only repeat"),
        ("[{restore: {weight: a}}]", "stages[0].restore: unknown field 'weight'; did you mean 'weights'?"),
        ("[{restore: {weights: ticket}}]", "stages[0].restore: no earlier stage saves 'ticket'; choices: fresh, keep"),
        (
            "[{for: 1 run, save: ticket}, {restore: {weights: tiket}}]",
            "stages[1].restore: no earlier stage saves 'tiket'; did you mean 'ticket'?",
        ),
        ("[{restore: {weights: late}}, {for: 1 run, save: late}]", "stages[0].restore: no earlier stage saves 'late'"),
        ("[{finish: cut}]", "stages[0].finish: must be shrink, or {widen: {factor: 1.5}}, got 'cut'"),
        (
            "[{sparsity: 0.5, finish: shrink}]",
            "stages[0].finish: 'shrink' removes whole channels, not pieces of 'element'; choices: granularity channel, ",
        ),
        ("[{prune: {fraction: 0.5}, finish: shrink}]", "stages[0].finish: 'shrink' removes whole channels, not pieces of 'element'"),
    ],
)
def test_errors_name_the_stage_and_the_field_in_one_line(stages, said):
    with pytest.raises(InputError) as error:
        Recipe.from_yaml(f"stages: {stages}")
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_prune_takes_slots_of_the_stage_and_of_the_recipe_around_it():
    yaml = "{{{around} stages: [{{{stage} prune: {{fraction: 0.2{own}}}{end}}}]}}"
    Recipe.from_yaml(yaml.format(around="granularity: input_channel,", stage="", own="", end=", finish: shrink"))
    Recipe.from_yaml(yaml.format(around="", stage="granularity: output_channel, saliency: random,", own="", end=", finish: shrink"))
    for around, stage, own in (
        ("granularity: input_channel,", "", ", granularity: element"),
        ("granularity: input_channel,", "granularity: element,", ""),
    ):
        with pytest.raises(InputError, match=r"^stages\[0\]\.finish: 'shrink' removes whole channels, not pieces of 'element'"):
            Recipe.from_yaml(yaml.format(around=around, stage=stage, own=own, end=", finish: shrink"))
    with pytest.raises(InputError, match=r"^stages\[0\]\.prune\.granularity: 'n_m' fixes the sparsity"):
        Recipe.from_yaml(yaml.format(around="granularity: 2:4,", stage="", own="", end=""))


def test_a_sparsity_belongs_into_a_stage():
    with pytest.raises(InputError, match=r"^sparsity: with stages, say it in the stage that prunes$"):
        Recipe.from_yaml("{sparsity: 0.9, stages: [{for: 1 run}]}")
