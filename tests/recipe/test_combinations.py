"""Combinations that cannot work are refused with the field and the choices; their neighbours that can are taken."""

import pytest

from niwaki.errors import InputError
from niwaki.recipe import Recipe

STR = "relaxation: soft_threshold"
MOVEMENT = "relaxation: straight_through, saliency: score"
UPDATES = "schedule: {constant: {every: 10 steps}}"
ALWAYS = "schedule: {constant: {every: 1 steps, end: 1 run}}"
PHASES = "schedule: {phases: {dense: [0, 20], sparse: [10, 30], unit: steps}}"

REFUSED = [
    # no count to select by
    ("{}", "sparsity: missing; say what share of the target is to be masked, in [0, 1)"),
    ("{granularity: filter}", "sparsity: missing; say what share of the target is to be masked, in [0, 1)"),
    ("{saliency: random}", "sparsity: missing; say what share of the target is to be masked for the saliency to act on, in [0, 1)"),
    (
        "{penalty: {l1: {}}, allocation: global}",
        "sparsity: missing; say what share of the target is to be masked for the allocation to act on",
    ),
    ("{relaxation: latent}", "sparsity: missing; "),
    ("{target: {weights: {include: [a]}}}", "sparsity: missing; "),
    # two sparsities
    ("{sparsity: 0.9, granularity: 2:4}", "sparsity: 0.9 contradicts granularity.n_m, which ends at 0.5; drop it or say 0.5"),
    (
        "{sparsity: 0.9, schedule: {list: {sparsity: [0.5, 0.8], every: 1 steps}}}",
        "sparsity: 0.9 contradicts schedule.list, which ends at 0.8",
    ),
    (
        "{granularity: 2:4, schedule: {list: {sparsity: [0.25, 0.75], every: 1 steps}}}",
        "schedule.list: its last sparsity 0.75 contradicts granularity.n_m, which fixes 0.5",
    ),
    (
        "{granularity: 2:4, allocation: erdos_renyi}",
        "allocation: 'erdos_renyi' differs between layers, and granularity 'n_m' fixes all of them; choices: uniform, global",
    ),
    # strength decides
    (
        f"{{sparsity: 0.9, {STR}}}",
        "sparsity: the strength of relaxation 'soft_threshold' decides it; drop it, or make a final exact cut with saliency: score",
    ),
    (f"{{sparsity: 0.9, {STR}, saliency: score, schedule: cubic}}", "sparsity: the strength of relaxation 'soft_threshold' decides it"),
    (f"{{sparsity: 0.9, {STR}, saliency: score}}", "sparsity: the strength of relaxation 'soft_threshold' decides it"),
    (
        f"{{sparsity: 0.9, {STR}, schedule: {{one_shot: {{at: 1 run}}}}}}",
        "sparsity: the strength of relaxation 'soft_threshold' decides it",
    ),
    (f"{{granularity: 2:4, {STR}}}", "sparsity: the strength of relaxation 'soft_threshold' decides it"),
    (
        f"{{{STR}, allocation: global}}",
        "allocation: has no effect, as the strength of relaxation 'soft_threshold' decides; drop it, or add sparsity for a final cut",
    ),
    (f"{{{STR}, schedule: cubic}}", "schedule: has no effect, as the strength"),
    # a threshold decides
    ("{sparsity: 0.9, selection: {threshold: 1}}", "sparsity: how many pieces go is decided by the value of selection 'threshold'"),
    ("{granularity: 2:4, selection: {threshold: 1}}", "granularity: how many pieces go is decided by the value of selection 'threshold'"),
    (
        "{schedule: {list: {sparsity: [0.5], every: 1 steps}}, selection: {threshold: 1}}",
        "schedule: how many pieces go is decided by the value of selection 'threshold'",
    ),
    ("{selection: {threshold: 1}, allocation: global}", "allocation: has no effect, as selection 'threshold' compares every score"),
    (
        "{selection: {threshold: 1}, schedule: cubic}",
        "schedule: 'cubic' says how sparse, and selection 'threshold' decides that; choices: constant, one_shot",
    ),
    (
        f"{{selection: {{threshold: 1}}, growth: gradient, {UPDATES}}}",
        "growth: 'gradient' needs a count of pieces, which selection 'threshold' has not; choices: none",
    ),
    # one mask that is waited for
    (
        "{sparsity: 0.9, schedule: mask_stability, growth: gradient}",
        "growth: 'gradient' needs a schedule that updates again, and 'mask_stability' lets one mask act; choices: none",
    ),
    (
        "{sparsity: 0.9, schedule: mask_stability, relaxation: latent, gradient: {superset: {sparsity: 0.5}}}",
        "gradient: 'superset' is drawn anew with each mask, and schedule 'mask_stability' lets one act; choices: active, dense",
    ),
    # what is read must be there
    (
        "{sparsity: 0.9, saliency: norm_scale}",
        "saliency: 'norm_scale' reads the scales of normalizations, and granularity 'element' has none; choices: granularity channel",
    ),
    (
        "{sparsity: 0.9, saliency: activity, granularity: output_channel}",
        "granularity: 'output_channel' has no activity of its own, which saliency 'activity' reads; choices: channel, group, head, ",
    ),
    ("{penalty: group_lasso}", "penalty: 'group_lasso' is about pieces of several weights, and granularity 'element' has single ones"),
    (
        "{granularity: layer, relaxation: {dropout: {rescale: true}}}",
        "relaxation.dropout.rescale: pieces of granularity 'layer' span several tensors, which would all be scaled; choices: ",
    ),
    # learned scores
    (
        "{sparsity: 0.9, saliency: score}",
        "saliency: 'score' needs a relaxation that learns scores, not 'hard'; choices: dynamic_threshold, factor, ",
    ),
    ("{sparsity: 0.9, saliency: score, relaxation: latent}", "saliency: 'score' needs a relaxation that learns scores, not 'latent'"),
    (
        "{sparsity: 0.9, relaxation: straight_through, schedule: cubic}",
        "saliency: 'magnitude' does not rank by the scores that relaxation 'straight_through' learns; choices: score",
    ),
    (
        f"{{sparsity: 0.9, {MOVEMENT}}}",
        "schedule: 'one_shot' at the start ranks by the scores of relaxation 'straight_through' before they have learned; choices: ",
    ),
    # growth
    (
        "{sparsity: 0.9, growth: gradient}",
        "growth: 'gradient' needs a schedule that updates again, and 'one_shot' does not; choices: constant, cosine, cubic, ",
    ),
    ("{sparsity: 0.9, growth: random, schedule: one_shot}", "growth: 'random' needs a schedule that updates again"),
    ("{sparsity: 0.9, growth: all}", "growth: 'all' needs a schedule that updates again"),
    (
        f"{{granularity: 2:4, growth: gradient, {UPDATES}}}",
        "growth: 'gradient' grows across the groups of granularity 'n_m'; choices: none, all",
    ),
    (
        f"{{sparsity: 0.9, growth: random, {MOVEMENT}, {UPDATES}}}",
        "growth: 'random' needs relaxation: hard; with 'straight_through' pruned weights are kept",
    ),
    (
        f"{{sparsity: 0.9, growth: all, relaxation: latent, {PHASES}}}",
        "growth: 'all' needs relaxation: hard; with 'latent' pruned weights are kept",
    ),
    (
        "{sparsity: 0.9, growth: gradient, schedule: {constant: {every: 1 steps}}}",
        "growth.gradient: at_update 'skip_step' with an update at every step never trains; choices: step, or a longer every",
    ),
    (
        "{sparsity: 0.9, growth: {random: {at_update: skip_step}}, schedule: {cubic: {every: 1 step}}}",
        "growth.random: at_update 'skip_step' with an update at every step never trains",
    ),
    (
        f"{{sparsity: 0.9, {PHASES}}}",
        "growth: 'none' brings nothing back, and the sparsity of schedule 'phases' falls to 0 in the dense phases; choices: all, ",
    ),
    (
        "{schedule: {list: {sparsity: [0.9, 0.5], every: 1 steps}}}",
        "growth: 'none' brings nothing back, and the sparsity of schedule 'list' falls from 0.9 to 0.5",
    ),
    (
        "{sparsity: 0.5, schedule: {linear: {initial: 0.75}}}",
        "growth: 'none' brings nothing back, and the sparsity of schedule 'linear' falls from 0.75 to 0.5",
    ),
    # who learns
    (
        "{sparsity: 0.9, gradient: dense}",
        "gradient: 'dense' needs a relaxation that keeps dense weights, not 'hard'; choices: active, or relaxation dropout, ",
    ),
    ("{sparsity: 0.9, gradient: frozen}", "gradient: 'frozen' needs a relaxation that keeps dense weights, not 'hard'"),
    (
        "{sparsity: 0.9, gradient: {superset: {sparsity: 0.5}}}",
        "gradient: 'superset' needs a relaxation that keeps dense weights, not 'hard'",
    ),
    (
        f"{{sparsity: 0.9, gradient: frozen, relaxation: latent, {UPDATES}}}",
        "gradient: 'frozen' with relaxation 'latent' would train nothing; choices: active, dense, or relaxation dynamic_threshold, ",
    ),
    (
        f"{{sparsity: 0.9, relaxation: latent, gradient: {{superset: {{sparsity: 0.9}}}}, {UPDATES}}}",
        "gradient.superset.sparsity: 0.9 must be below the recipe's sparsity, 0.9",
    ),
    (
        f"{{granularity: 2:4, relaxation: latent, gradient: {{superset: {{sparsity: 0.75}}}}, {UPDATES}}}",
        "gradient.superset.sparsity: 0.75 must be below the recipe's sparsity, 0.5",
    ),
    (f"{{{STR}, gradient: {{superset: {{sparsity: 0.5}}}}}}", "gradient.superset: a superset of what? give the recipe a sparsity"),
    (
        f"{{sparsity: 0.9, relaxation: latent, penalty: exploration_l2, {UPDATES}}}",
        "penalty: 'exploration_l2' needs gradient: {superset: {sparsity: S}}, not 'active'",
    ),
    # what steps add up to
    *(
        (
            f"{{sparsity: 0.9, saliency: {{{name}: {{{fields}}}}}}}",
            f"schedule: 'one_shot' at the start ranks by what saliency {name!r} adds up while a model trains, before it has seen a step; ",
        )
        for name, fields in (("accumulated_movement", "decay: 0.8"), ("karnin", ""), ("from_init", ""), ("mfac", "dynamic: true"))
    ),
    # mask and weights of a layer together
    (
        "{sparsity: 0.5, saliency: sparsegpt, granularity: filter}",
        "granularity: saliency 'sparsegpt' chooses single weights, not pieces of 'channel'; choices: element, 2:4",
    ),
    (
        "{sparsity: 0.5, saliency: obc, allocation: global}",
        "allocation: saliency 'obc' solves layer by layer, and 'global' ranks all together; choices: amc, dynamic_programming, ",
    ),
    (
        "{sparsity: 0.5, saliency: obc, normalization: lamp}",
        "normalization: 'lamp' has no effect, as saliency 'obc' compares within a layer; drop it",
    ),
    (
        "{sparsity: 0.5, saliency: sparsegpt, compensation: least_squares}",
        "compensation: 'least_squares' has no effect, as saliency 'sparsegpt' gives survivors their weights; drop it",
    ),
    (
        f"{{sparsity: 0.5, saliency: sparsegpt, growth: random, {UPDATES}}}",
        "saliency: 'sparsegpt' changes weights for good, so that nothing can come back; choices: growth: none, relaxation: hard",
    ),
    (
        f"{{sparsity: 0.5, saliency: obc, relaxation: latent, {UPDATES}}}",
        "saliency: 'obc' changes weights for good, so that nothing can come back; choices: growth: none, relaxation: hard",
    ),
    # what survivors do
    ("{compensation: batchnorm_recalibration, penalty: l1}", "compensation: 'batchnorm_recalibration' is about what goes, and nothing is"),
    (
        f"{{sparsity: 0.5, compensation: least_squares, relaxation: latent, {UPDATES}}}",
        "compensation: 'least_squares' is of weights that go, and relaxation 'latent' keeps them; choices: hard",
    ),
    (
        "{sparsity: 0.5, compensation: least_squares, schedule: {one_shot: {rounds: 3, revive: true}}}",
        "compensation: 'least_squares' cannot be taken back, as the rounds of schedule.one_shot.revive do; drop one",
    ),
    (
        "{sparsity: 0.5, compensation: obs}",
        "compensation: 'obs' needs a saliency with a curvature, not 'magnitude'; choices: ",
    ),
    (
        "{sparsity: 0.5, compensation: merge}",
        "compensation: 'merge' is about units, not pieces of 'element'; choices: channel, head, group",
    ),
    (
        "{sparsity: 0.5, granularity: channel, compensation: coreset}",
        "compensation: 'coreset' gives a sample the weights that it was drawn with: saliency: coreset with the same fields",
    ),
    (
        "{sparsity: 0.5, granularity: channel, saliency: {coreset: {examples: 64}}, compensation: coreset}",
        "compensation: 'coreset' gives a sample the weights that it was drawn with: saliency: coreset with the same fields",
    ),
    # budgets
    (
        "{sparsity: 0.5, granularity: channel, saliency: coreset, allocation: global}",
        "allocation: saliency 'coreset' draws from each layer by itself, and 'global' ranks all together; choices: uniform, explicit",
    ),
    (
        "{sparsity: 0.5, allocation: {flops_budget: {flops: 0.25}}}",
        "sparsity: 0.5 contradicts allocation.flops_budget, which ends at 0.75; drop it or say 0.75",
    ),
    (
        "{sparsity: 0.5, allocation: redistribution}",
        "allocation: 'redistribution' shares out what grows back, and growth 'none' does not; choices: gradient, locality, momentum, ran",
    ),
    ("{sparsity: 0.5, granularity: 4x1, allocation: {uniform: {per: row}}}", "allocation.uniform.per: 'row' is of single weights that are"),
    (
        "{allocation: {uniform: {per: row}}, sparsity: 0.5, selection: bernoulli}",
        "selection: 'bernoulli' draws every piece by itself, and a",
    ),
    (
        "{sparsity: 0.5, allocation: {uniform: {per: row, ablation: 0.3}}}",
        "allocation.uniform.ablation: rows are ablated while weights are",
    ),
    ("{sparsity: 0.5, allocation: {uniform: {ablation: 0.3}}}", "allocation.uniform.ablation: it is of rows; say per: row, or drop it"),
    ("{granularity: 2:4, selection: bernoulli}", "selection: 'bernoulli' draws every piece by itself, and granularity 'n_m' counts them"),
    (
        f"{{sparsity: 0.5, selection: bernoulli, growth: random, {UPDATES}}}",
        "selection: 'bernoulli' draws every piece by itself, and growth",
    ),
    ("{sparsity: 0.5, selection: gumbel, saliency: sparsegpt}", "selection: 'gumbel' has no effect, as saliency 'sparsegpt' chooses"),
    ("{selection: gumbel, schedule: threshold_ramp}", "selection: 'gumbel' draws a count, and schedule 'threshold_ramp' has thresholds"),
    (
        f"{{selection: hysteresis, {UPDATES}}}",
        "selection: 'hysteresis' brings weights back by their values, which relaxation 'hard' forgets",
    ),
    (
        "{selection: hysteresis, relaxation: latent, sparsity: 0.5}",
        "sparsity: how many pieces go is decided by the value of selection 'hyste",
    ),
    (f"{{sparsity: 0.5, growth: rewiring, {UPDATES}}}", "schedule: growth 'rewiring' acts after every step; choices: {constant: "),
    (
        f"{{sparsity: 0.5, granularity: 4x1, growth: rewiring, {ALWAYS}}}",
        "granularity: growth 'rewiring' is of single weights, which have a",
    ),
    (
        f"{{sparsity: 0.5, allocation: {{redistribution: {{by: gradient}}}}, growth: rewiring, {ALWAYS}}}",
        "allocation: 'redistribution' looks at gradients, and growth 'rewiring' acts after the step; choose another",
    ),
    (f"{{sparsity: 0.5, granularity: channel, growth: locality, {UPDATES}}}", "growth: 'locality' is about connections between units, and"),
    ("{sparsity: 0.5, gradient: selected, relaxation: latent}", "gradient: 'selected' is of the weights themselves, not of those behind"),
    ("{penalty: l1, gradient: selected}", "gradient.selected.sparsity: missing; say what share takes no gradient, or give the recipe a"),
    # schedules that measure how much is to go
    (
        "{schedule: adaptive, granularity: 2:4}",
        "granularity: 'n_m' fixes the sparsity, and schedule 'adaptive' decides it; drop one of them",
    ),
    (
        "{schedule: rising_loss, allocation: {flops_budget: {flops: 0.25}}}",
        "allocation: 'flops_budget' decides how many pieces go, and so does schedule 'rising_loss'; drop one of them",
    ),
    ("{schedule: adaptive, growth: random}", "growth: 'random' needs a sparsity to keep, and schedule 'adaptive' measures how much goes"),
    (
        "{schedule: adaptive, sparsity: 0.9, relaxation: latent, gradient: {superset: {sparsity: 0.5}}}",
        "gradient: 'superset' needs a sparsity to be below, and schedule 'adaptive' measures what goes; choices: active, dense",
    ),
    (
        "{schedule: adaptive, granularity: output_channel, relaxation: dropout}",
        "relaxation: 'dropout' gives each step other weights, and schedule 'adaptive' follows the loss of those that are there at an",
    ),
    ("{schedule: threshold_ramp, sparsity: 0.9}", "sparsity: how many pieces go is decided by the thresholds of schedule 'threshold_ramp'"),
    ("{schedule: threshold_ramp, allocation: global}", "allocation: has no effect, as schedule 'threshold_ramp' has a threshold for each"),
    ("{schedule: threshold_ramp, saliency: obc}", "saliency: 'obc' needs a count of weights, and schedule 'threshold_ramp' has thresholds"),
    ("{schedule: threshold_ramp, growth: all}", "growth: 'all' needs a sparsity to keep, and schedule 'threshold_ramp' measures"),
    ("{schedule: adaptive, selection: {threshold: 0.1}}", "schedule: 'adaptive' says how sparse, and selection 'threshold' decides that"),
    # the size of a hidden weight does not say on which side of zero it is
    ("{sparsity: 0.9, relaxation: soft_rewiring}", "sparsity: the strength of relaxation 'soft_rewiring' decides it; drop it"),
    (
        "{sparsity: 0.9, relaxation: soft_rewiring, saliency: score, schedule: {one_shot: {at: 1 run}}}",
        "saliency: 'score' needs a relaxation that learns scores, not 'soft_rewiring'; choices: ",
    ),
    # units are compared with their likes
    *(
        (f"{{sparsity: 0.5, granularity: layer, saliency: {name}}}", f"saliency: {name!r} compares the units of one tensor, and a tensor")
        for name in ("similarity", "merge_cost", "correlation", "subset_selection", "coreset")
    ),
    ("{sparsity: 0.5, granularity: input_channel, saliency: merge_cost}", "granularity: 'input_channel' has no activity of its own, which"),
    # what is sent
    ("{sparsity: 0.9, memory: error_feedback}", "memory: 'error_feedback' is of gradients that were not sent; it needs target: gradients"),
    ("{sparsity: 0.9, memory: error_feedback, target: activations}", "memory: 'error_feedback' is of gradients"),
]


@pytest.mark.parametrize(("yaml", "said"), REFUSED)
def test_impossible_combinations_are_refused(yaml, said):
    with pytest.raises(InputError) as error:
        Recipe.from_yaml(yaml)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "yaml",
    [
        "{sparsity: 0}",
        "{schedule: adaptive}",
        "{schedule: adaptive, sparsity: 0.9, saliency: taylor, allocation: global}",
        "{schedule: rising_loss, granularity: channel, allocation: global}",
        "{schedule: threshold_ramp}",
        "{schedule: threshold_ramp, granularity: 4x1, saliency: {magnitude: {norm: l2}}, relaxation: latent, gradient: dense}",
        "{granularity: 2:4}",
        "{granularity: 2:4, allocation: global, schedule: {list: {sparsity: [0.25, 0.5], every: 1 steps}}}",
        "{granularity: 2:4, schedule: cubic}",
        f"{{granularity: 2:4, growth: all, {PHASES}}}",
        "{penalty: {l1: {}}, granularity: filter}",
        f"{{{STR}, granularity: output_channel, target: {{weights: {{include: [a]}}}}}}",
        f"{{sparsity: 0.9, {STR}, saliency: score, schedule: {{one_shot: {{at: 5 steps}}}}}}",
        f"{{sparsity: 0.9, {MOVEMENT}, schedule: {{one_shot: {{at: 1 run}}}}}}",
        f"{{sparsity: 0.9, {MOVEMENT}, {UPDATES}, gradient: frozen}}",
        f"{{sparsity: 0.9, relaxation: latent, gradient: dense, {UPDATES}}}",
        f"{{sparsity: 0.9, relaxation: latent, {PHASES}}}",
        "{sparsity: 0.9, growth: {gradient: {at_update: step}}, schedule: {constant: {every: 1 steps}}}",
        "{sparsity: 0.9, growth: gradient, schedule: {constant: {every: 2 steps}}}",
        "{sparsity: 0.9, growth: gradient, schedule: cubic}",
        "{sparsity: 0.5, growth: all, schedule: {list: {sparsity: [0.9, 0.5], every: 1 steps}}}",
        "{sparsity: 0.5, schedule: {linear: {initial: 0.5}}}",
        "{sparsity: 0.9, schedule: {phases: {dense: [0], sparse: [10], unit: steps}}}",
        "{sparsity: 0.5, saliency: karnin, schedule: {one_shot: {at: 1 run}}}",
        "{sparsity: 0.5, saliency: {mfac: {dynamic: true}}, schedule: cubic}",
        "{sparsity: 0.5, saliency: sparsegpt}",
        "{granularity: 2:4, saliency: sparsegpt}",
        "{sparsity: 0.5, saliency: obc, allocation: erdos_renyi}",
        "{sparsity: 0.5, saliency: woodfisher, compensation: obs, schedule: cubic}",
        "{sparsity: 0.5, compensation: batchnorm_recalibration, schedule: {one_shot: {rounds: 3, revive: true}}}",
        "{sparsity: 0.5, granularity: channel, compensation: merge}",
        "{sparsity: 0.5, granularity: channel, saliency: {coreset: {examples: 64}}, compensation: {coreset: {examples: 64}}}",
        "{allocation: {flops_budget: {flops: 0.25}}}",
        "{sparsity: 0.75, allocation: {flops_budget: {flops: 0.25}}}",
        f"{{sparsity: 0.5, allocation: redistribution, growth: gradient, {UPDATES}}}",
        "{sparsity: 0.5, allocation: {uniform: {per: row}}, saliency: wanda}",
        "{sparsity: 0.5, granularity: layer, saliency: taylor}",
        # not judged: these come later
        "{relaxation: hard_concrete, granularity: filter, penalty: expected_l0}",
        "{sparsity: 0.9, saliency: signal_to_noise, relaxation: variational_noise, schedule: {one_shot: {at: 1 run}}}",
        "{selection: {hysteresis: {rate: 0.1}}, relaxation: latent, gradient: dense, schedule: {constant: {every: 1 steps}}}",
        "{selection: {threshold: 0.1}}",
        "{selection: {threshold: {value: 0.1}}, schedule: {constant: {every: 1 epochs}}, granularity: filter}",
        "{granularity: layer, relaxation: {dropout: {rate: 0.2}}}",
        "{sparsity: 0.5, granularity: layer, saliency: position, relaxation: {dropout: {rate: 0.2}}, schedule: {one_shot: {at: 1 run}}}",
        "{granularity: output_channel, relaxation: {dropout: {rate: 0.2, rescale: true}}}",
        "{sparsity: 0.5, schedule: mask_stability, penalty: {l1: {of: norm}}, granularity: channel, saliency: norm_scale}",
        "{sparsity: 0.5, target: norm_scale, saliency: norm_scale}",
        "{sparsity: 0.5, granularity: input_channel, saliency: activity}",
        "{granularity: channel, penalty: group_lasso}",
        "{granularity: 4x1, penalty: {group_lasso: {apply: proximal}}}",
        f"{{sparsity: 0.9, growth: momentum, {UPDATES}}}",
        f"{{sparsity: 0.9, growth: locality, granularity: kernel, {UPDATES}}}",
        "{sparsity: 0.9, growth: rewiring, schedule: {constant: {every: 1 steps, end: 1 run}}}",
        f"{{sparsity: 0.9, growth: gradient, allocation: {{uniform: {{per: row, ablation: 0.3}}}}, {UPDATES}}}",
        "{sparsity: 0.9, selection: gumbel, granularity: 2x2}",
        "{sparsity: 0.9, selection: bernoulli, allocation: global}",
        "{sparsity: 0.9, gradient: selected, schedule: {one_shot: {at: 1 run}}}",
        "{penalty: l1, gradient: {selected: 0.5}}",
        "{sparsity: 0.9, memory: error_feedback, target: gradients}",
    ],
)
def test_possible_combinations_are_taken(yaml):
    recipe = Recipe.from_yaml(yaml)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
