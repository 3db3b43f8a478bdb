"""The catalogue: complete rows, valid recipes with the published settings, and the rules of ``method``."""

import math
import re
from importlib.resources import files

import pytest
from catalogue.survey import ROWS
from ruamel.yaml import YAML

from niwaki.catalogue import CHAPTERS, METHODS, Columns, find, left_out, method, parse_rows
from niwaki.clock import Clock
from niwaki.errors import InputError
from niwaki.granularity import Grouped
from niwaki.recipe import Recipe
from niwaki.recipe.stages import unroll

# Published settings, written out as components: slot -> data
PUBLISHED = {
    "iterative_magnitude": {"sparsity": 0.89, "allocation": "uniform", "saliency": "magnitude"},
    "gmp": {"allocation": "uniform", "saliency": "magnitude", "schedule": "cubic"},
    "dsd": {"sparsity": 0.3, "growth": "all", "schedule": "phases"},
    "acdc": {"sparsity": 0.9, "allocation": "global", "growth": "all", "schedule": "phases"},
    "static_erk": {"saliency": "random", "allocation": "erdos_renyi_kernel", "schedule": "one_shot"},
    "static_uniform": {"saliency": "random", "allocation": "uniform", "schedule": "one_shot"},
    "snip": {"saliency": "snip", "allocation": "global", "schedule": "one_shot"},
    "magnitude": {"saliency": "magnitude", "allocation": "global", "schedule": "one_shot"},
    "random": {"saliency": "random", "allocation": "uniform", "schedule": "one_shot"},
    "movement": {
        "sparsity": 0.9,
        "saliency": "score",
        "relaxation": "straight_through",
        "schedule": "cubic",
        "objective": "distillation",
    },
    "str": {"sparsity": None, "relaxation": "soft_threshold"},
    "set": {"saliency": "magnitude", "allocation": "erdos_renyi", "growth": "random", "schedule": "constant"},
    "rigl": {"sparsity": 0.9, "saliency": "magnitude", "allocation": "erdos_renyi_kernel", "growth": "gradient", "schedule": "constant"},
    "iterative_snip": {"saliency": "snip", "allocation": "global", "schedule": "one_shot"},
    "force": {"saliency": "snip", "allocation": "global", "schedule": "one_shot"},
    "grasp": {"saliency": "grasp", "allocation": "global", "schedule": "one_shot"},
    "synflow": {"saliency": "synflow", "allocation": "global", "schedule": "one_shot"},
    "random_tickets": {"saliency": "random", "allocation": "smart_ratio", "schedule": "one_shot"},
    "accumulated_movement": {"saliency": "accumulated_movement", "schedule": "cubic", "relaxation": "hard"},
    "weight_change": {"saliency": "weight_change", "schedule": "one_shot"},
    "eigendamage": {"granularity": "eigenbasis", "saliency": "kfac_obd", "allocation": "global"},
    "gmp_uniform_plus": {"allocation": "uniform_plus", "saliency": "magnitude", "schedule": "cubic"},
    "flops_magnitude": {"sparsity": None, "allocation": "flops_budget", "normalization": "per_flop", "schedule": "cubic"},
    "top_kast": {"sparsity": 0.9, "relaxation": "latent", "gradient": "superset", "penalty": "exploration_l2", "allocation": "uniform"},
}

# name -> what the one stage that prunes by score says: its sparsity, granularity, saliency, allocation and compensation
PRUNING_STAGE = {
    "supermask": (0.8, "element", "from_init", "uniform", None),
    "connection_correlation": (0.75, "element", "connection_correlation", "uniform", None),
    "karnin": (0.5, "element", "karnin", "uniform", None),
    "obd": (0.6, "element", "obd", "global", None),
    "optimal_cell_damage": (0.3, "input_channel", "obd", "global", None),
    "obs": (0.76, "element", "obs", "global", "obs"),
    "woodfisher": (0.95, "element", "woodfisher", "global", "obs"),
    "woodtaylor": (0.95, "element", "woodtaylor", "global", None),
    "mfac": (0.95, "element", "mfac", "global", "obs"),
    "kfac_obs": (0.9, "element", "kfac_obs", "global", "obs"),
    "kfac_obd": (0.5, "channel", "kfac_obd", "global", None),
    "l_obs": (0.9, "element", "l_obs", "error_bound", "obs"),
    "obc": (0.5, "element", "obc", "uniform", None),
    "sparsegpt": (0.5, "element", "sparsegpt", "uniform", None),
    "wanda": (0.5, "element", "wanda", "uniform", None),
    "skeletonization": (0.3, "channel", "taylor", "uniform", None),
    "constant_units": (0.2, "channel", "activity_variance", "uniform", "bias_absorb"),
    "duplicate_units": (0.2, "channel", "correlation", "uniform", "merge"),
    "subset_selection": (0.3, "channel", "subset_selection", "uniform", "least_squares"),
    "goodness_factor": (0.3, "channel", "contribution", "uniform", None),
    "output_sensitivity": (0.3, "channel", "output_sensitivity", "uniform", None),
    "variance_nullity": (0.3, "channel", "variance_nullity", "uniform", None),
    "iterative_least_squares": (0.3, "channel", "contribution", "uniform", "least_squares"),
    "linear_dependence": (0.3, "channel", "linear_dependence", "uniform", "least_squares"),
    "data_free_merging": (0.2, "channel", "merge_cost", "uniform", "merge"),
    "inbound": (0.3, "channel", "activity_variance", "uniform", None),
    "apoz": (0.4, "channel", "apoz", "uniform", None),
    "thinet": (0.5, "channel", "thinet", "uniform", "least_squares"),
    "lasso_channels": (0.5, "channel", "lasso_channels", "uniform", "least_squares"),
    "activation_entropy": (0.3, "channel", "entropy", "uniform", None),
    "diversity_networks": (0.3, "channel", "subset_selection", "uniform", "least_squares"),
    "nisp": (0.5, "channel", "nisp", "uniform", None),
    "fisher_pruning": (0.5, "channel", "taylor", "global", None),
    "importance_estimation": (0.5, "channel", "taylor", "global", None),
    "gate_decorator": (0.5, "channel", "gate_decorator", "global", None),
    "pfa": (0.5, "channel", "correlation", "pfa", None),
    "data_dependent_coreset": (0.5, "element", "coreset", "uniform", "coreset"),
    "provable_filter_pruning": (0.3, "channel", "coreset", "uniform", "coreset"),
    "coreset": (0.3, "channel", "coreset", "uniform", "coreset"),
    "lamp": (0.9, "element", "magnitude", "global", None),
    "sensitivity_filters": (0.3, "channel", "magnitude", "sensitivity", None),
    "amc": (0.5, "element", "magnitude", "amc", None),
    "evolutionary": (0.5, "element", "magnitude", "evolutionary", None),
    "owl": (0.7, "element", "wanda", "outlier_weighted", None),
    "filter_l1": (0.3, "channel", "magnitude", "uniform", None),
    "filter_l2": (0.3, "channel", "magnitude", "uniform", None),
    "fpgm": (0.4, "channel", "similarity", "uniform", None),
    "taylor_filters": (0.5, "channel", "taylor", "global", None),
    "head_importance": (0.4, "head", "head_importance", "global", None),
    "network_slimming": (0.7, "channel", "norm_scale", "global", None),
    "early_bird_channels": (0.5, "channel", "norm_scale", "global", None),
    "layerdrop": (0.5, "layer", "position", "global", None),
}

STAGED = ("train_prune_retrain", "lottery_ticket", "learning_rate_rewinding")
"""Rows whose stages prune a share of what is left again and again."""

LEAST_ROWS, LEAST_RECIPES = 163, 190
"""How many rows of the survey's table have a method, and how many recipes there are. Raise them when there are more."""

CODES = YAML(typ="safe").load(files("niwaki.catalogue").joinpath("codes.yaml").read_text(encoding="utf-8"))

OTHER_WORDS = {
    ("skeletonization", "criterion"): "gate gradient",
    ("head_importance", "criterion"): "gate grad",
    ("accumulated_movement", "criterion"): "ste (Σ -g w)",
    ("accumulated_movement", "growth"): "impl",
    ("accumulated_movement", "regularization"): "- / L1 σ(S)",
    ("movement", "regularization"): "- / L1 σ(S)",
    ("soft_movement", "budget"): "uni/glob topv",
    ("supermask_bernoulli", "when"): "post / gate",
    ("supermask_bernoulli", "budget"): "uni",
    ("kernel_granularity", "what"): "W..U",
}
"""What a row says otherwise than the survey's codes do: other words for the same, or one variant of several."""


def test_the_catalogue_is_the_surveys_table():
    numbers = [row.row for row in METHODS.values() if row.row is not None]
    assert len(set(numbers)) >= LEAST_ROWS
    assert len({row.recipe.to_yaml() for row in METHODS.values()}) >= LEAST_RECIPES
    assert set(numbers) | set(left_out()) == set(ROWS) == set(range(1, 261))
    assert not set(numbers) & set(left_out())
    assert "rigl" in METHODS
    assert "rigel" not in METHODS
    with pytest.raises(TypeError):
        METHODS["new"] = METHODS["rigl"]


def test_a_row_that_repeats_the_recipe_of_another_is_its_alias():
    recipes = [row.recipe.to_yaml() for row in METHODS.values() if row.of is None]
    assert len(set(recipes)) == len(recipes)


@pytest.mark.parametrize("number", sorted(left_out()))
def test_what_is_left_out_says_what_it_lacks(number):
    row, (name, years, _) = left_out()[number], ROWS[number]
    assert (row.row, row.name, row.year) == (number, name, years[0])
    assert row.lacks.strip() == row.lacks
    assert row.why.endswith(".")


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_complete(name):
    row = METHODS[name]
    assert row.name == name
    words = row.columns.in_words()
    assert list(words) == ["what", "when", "criterion", "growth", "budget", "regularization"]
    assert all((text == "-") == (codes == ()) for text, (_, codes) in zip(words.values(), row.columns, strict=True))
    assert all(len(text) > 1 or text == "-" for text in words.values())
    assert re.fullmatch(r"5|[3467]\.\d", row.section)
    citation = row.citation
    assert all(len(text) > 1 for text in (row.title, citation.authors, citation.title, citation.venue))
    assert str(citation) == f"{citation.authors}. {citation.title}. {citation.venue}, {citation.year}."
    assert row.faithful == (f"alias of {row.of}" if row.of else row.fidelity)
    assert row.differs
    assert all(note.endswith((".", ".)")) for note in row.differs)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.row is not None])
def test_a_row_says_what_the_survey_says_of_it(name):
    row = METHODS[name]
    _, years, columns = ROWS[row.row]
    assert min(years) - 1 <= row.year <= max(years) + 1  # of the preprint, or of the conference
    for (column, said), cell in zip(row.columns, columns.split(" | "), strict=True):
        codes = [code for code in re.split(r"[^\w-]+", cell) if code in CODES[column]]
        assert not codes or set(codes) & set(said) or OTHER_WORDS.get((name, column)) == cell, f"{column}: {cell}"


@pytest.mark.parametrize("name", METHODS)
def test_a_rows_recipe_runs_with_the_published_settings(name):
    recipe = METHODS[name].recipe
    recipe.require_complete()
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    for slot, expected in PUBLISHED.get(name, {}).items():
        chosen = getattr(recipe, slot)
        assert (chosen if slot == "sparsity" else chosen.name) == expected
    recipe.fit(Clock(total_steps=1000, steps_per_epoch=50))
    assert method(name) == recipe


def updates(recipe, total, per_epoch):
    clock = Clock(total_steps=total, steps_per_epoch=per_epoch)
    found = ((step, recipe.schedule.at(step, recipe.final_sparsity, clock)) for step in range(total + 1))
    return {step: sparsity for step, sparsity in found if sparsity is not None}


def test_the_published_times_hold_for_a_run_of_any_length():
    # AC/DC: 100 epochs of 7 steps, at the epochs of the published configuration
    sparse, dense = [*range(10, 80, 10), 85], [0, *range(15, 75, 10), 75]
    expected = {7 * e: 0.9 for e in sparse} | {7 * e: 0.0 for e in dense}
    assert updates(METHODS["acdc"].recipe, 700, 7) == dict(sorted(expected.items()))
    # GMP: Gale et al. prune ResNet-50 from step 40k to 100k of 128k, every 2k
    gmp = updates(METHODS["gmp"].recipe, 128_000, 1000)
    assert list(gmp) == list(range(40_000, 100_001, 2_000))
    assert gmp[100_000] == 0.9
    assert gmp[70_000] == pytest.approx(0.9 * (1 - 0.5**3), abs=1e-12)
    # RigL: every 100 steps, over three quarters of the run; 32k steps in the paper
    assert list(updates(METHODS["rigl"].recipe, 32_000, 1000)) == list(range(0, 24_001, 100))
    # SET: after every epoch
    assert list(updates(METHODS["set"].recipe, 100, 20)) == [0, 20, 40, 60, 80, 100]
    # Han: the same share of what is left ten times, with equal times between
    han = updates(METHODS["iterative_magnitude"].recipe, 1000, 100)
    assert list(han) == list(range(300, 931, 70))
    assert [1 - s for s in han.values()] == pytest.approx([0.11 ** (c / 10) for c in range(1, 11)], rel=1e-12)
    # DSD: thirds
    assert updates(METHODS["dsd"].recipe, 3000, 100) == {0: 0.0, 999: 0.3, 2001: 0.0}
    # Top-KAST: every step
    assert set(updates(METHODS["top_kast"].recipe, 50, 10)) == set(range(51))


def leaves_of(name):
    """The stages of a row for a run of 100 epochs of 20 steps: (epochs, fraction pruned, snapshot saved, what is restored)."""
    clock = Clock(total_steps=2000, steps_per_epoch=20)
    return [
        (
            (leaf.clock(clock).total_steps or 0) / 20,
            leaf.prune and leaf.prune.fraction,
            leaf.save,
            leaf.restore and (leaf.restore.weights, leaf.restore.optimizer, leaf.restore.learning_rate),
        )
        for leaf in unroll(METHODS[name].recipe)
    ]


def test_the_stages_of_tickets_and_of_retraining():
    rewound = (0, 0.2, None, ("ticket", "fresh", "ticket"))
    assert leaves_of("lottery_ticket") == [(5, None, "ticket", None), *[(95, None, None, None), rewound] * 10, (95, None, None, None)]
    replayed = [(0, 0.2, None, ("keep", "keep", "early")), (90, None, None, None)]
    assert leaves_of("learning_rate_rewinding") == [(10, None, "early", None), (90, None, None, None), *replayed * 10]
    assert leaves_of("train_prune_retrain") == [(100, None, None, None), *[(0, 0.2, None, None), (23, None, None, None)] * 10]
    for name in STAGED:
        density = math.prod(1 - prune.fraction for leaf in unroll(METHODS[name].recipe) if (prune := leaf.prune) is not None)
        assert 1 - density == pytest.approx(0.893, abs=5e-4)
        assert any("0.893" in note for note in METHODS[name].differs)


OF_SPARSITY = [name for name, row in METHODS.items() if row.recipe.sparsity is not None and row.recipe.gradient.name != "superset"]
"""Rows with a sparsity of their own on which no other field depends."""


@pytest.mark.parametrize("name", OF_SPARSITY)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_a_sparsity_replaces_the_published_one_and_nothing_else(name, sparsity):
    recipe = method(name, sparsity=sparsity)
    assert recipe.sparsity == sparsity
    assert recipe.to_data() == METHODS[name].recipe.to_data() | {"sparsity": sparsity}


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.recipe.stages is not None])
def test_a_sparsity_goes_to_the_one_stage_that_says_one(name):
    said = [leaf.recipe.sparsity for leaf in unroll(METHODS[name].recipe)]
    if METHODS[name].takes_sparsity:
        asked = unroll(method(name, sparsity=0.25))
        assert [leaf.recipe.sparsity for leaf in asked] == [None if sparsity is None else 0.25 for sparsity in said]
        for before, after in zip(unroll(METHODS[name].recipe), asked, strict=True):
            assert (before.length, before.prune, before.finish) == (after.length, after.prune, after.finish)
            assert after.recipe.to_data() == before.recipe.to_data() | ({} if after.recipe.sparsity is None else {"sparsity": 0.25})
    else:
        assert len({leaf.where for leaf in unroll(METHODS[name].recipe) if leaf.recipe.sparsity is not None}) != 1
        with pytest.raises(InputError, match=f"^sparsity: the stages of {name!r} decide it"):
            method(name, sparsity=0.25)


@pytest.mark.parametrize("name", PRUNING_STAGE)
def test_staged_rows_prune_in_one_stage_whose_sparsity_can_be_said(name):
    def pruning(recipe):
        [leaf] = [leaf for leaf in unroll(recipe) if leaf.recipe.final_sparsity is not None]
        return leaf

    leaf = pruning(method(name))
    said = leaf.recipe
    compensation = said.compensation and said.compensation.name
    assert (said.sparsity, said.granularity.name, said.saliency.name, said.allocation.name, compensation) == PRUNING_STAGE[name]
    assert leaf.finish == ("shrink" if isinstance(said.granularity, Grouped) else None)
    changed = method(name, sparsity=0.25)
    assert pruning(changed).recipe.sparsity == 0.25
    before, after = (pruning(recipe).recipe.to_data() for recipe in (method(name), changed))
    assert after == before | {"sparsity": 0.25}
    assert [leaf.length for leaf in unroll(changed)] == [leaf.length for leaf in unroll(method(name))]
    with pytest.raises(InputError, match=r"^sparsity: must be in \[0, 1\), got 1\.5"):
        method(name, sparsity=1.5)
    with pytest.raises(InputError, match=r"reaches its sparsity without a final cut"):
        method(name, sparsity=0.5, cut=True)


def test_penalties_and_thresholds_of_structured_rows():
    slimming = unroll(method("network_slimming"))
    assert slimming[0].recipe.to_data() == {"target": "norm_scale", "penalty": {"l1": {"strength": 1e-4}}}
    assert [str(leaf.length) for leaf in slimming] == ["1 run", "None", "1 run"]
    lasso = unroll(method("ssl"))[0].recipe
    assert lasso.penalty.to_data() == {"group_lasso": {"ratio": 0.8, "apply": "proximal"}}
    assert (lasso.selection.name, lasso.final_sparsity) == ("threshold", None)
    rounds = unroll(method("prunetrain"))
    assert len(rounds) == 10
    assert all(leaf.recipe.penalty.to_data() == {"group_lasso": {"ratio": 0.25, "scaled": False}} for leaf in rounds)
    assert all(leaf.finish == "shrink" and leaf.recipe.selects for leaf in rounds)
    early = unroll(method("early_bird_channels"))[0].recipe
    assert (early.schedule.window, early.schedule.distance, early.penalty.of) == (5, 0.1, "norm")
    dropped = [leaf.prune.fraction for leaf in unroll(method("dropnet")) if leaf.prune is not None]
    assert 1 - math.prod(1 - fraction for fraction in dropped) == pytest.approx(0.672, abs=5e-4)


def test_rounds_thresholds_and_budgets_of_the_new_rows():
    def rounds(name):
        [leaf] = [leaf for leaf in unroll(method(name)) if leaf.recipe.acts]
        schedule = leaf.recipe.schedule
        return schedule.rounds, schedule.spacing, schedule.revive

    assert rounds("synflow") == (100, "exponential", False)
    assert rounds("iterative_snip") == (60, "exponential", False)
    assert rounds("force") == (60, "exponential", True)
    [threshold] = [leaf.recipe for leaf in unroll(method("magnitude_threshold")) if leaf.recipe.acts]
    assert (threshold.saliency.over, threshold.selection.value, threshold.final_sparsity) == ("deviation", 1.0, None)
    assert method("flops_magnitude").final_sparsity == pytest.approx(0.75)
    for name, share, cost in (("energy_aware", 0.5, "energy"), ("spdy", 0.5, "flops")):
        [stage] = [leaf.recipe for leaf in unroll(method(name)) if leaf.recipe.acts]
        assert (stage.allocation.share, stage.allocation.cost) == (share, cost)
        with pytest.raises(InputError, match=f"^sparsity: the stages of {name!r} decide it"):
            method(name, sparsity=0.6)
    for name in ("two_four", "adaprune"):
        [stage] = [leaf.recipe for leaf in unroll(method(name)) if leaf.recipe.acts]
        assert (stage.granularity.to_data(), stage.final_sparsity) == ({"n_m": {"n": 2, "m": 4}}, 0.5)
    # WoodFisher's schedule for ResNet-50: epochs 1, 6, ... 36 and 40 of 100
    gradual = unroll(method("woodfisher"))[1].recipe
    assert list(updates(gradual, 1000, 10)) == [10, 60, 110, 160, 210, 260, 310, 360, 400]
    assert gradual.saliency.model_dump(exclude={"labels"}) == {"block": 2000, "gradients": 400, "samples_per_gradient": 1, "damping": 1e-5}


def test_fields_replace_slots():
    recipe = method("rigl", sparsity=0.5, allocation="uniform", granularity="4x1", growth={"gradient": {"fraction": 0.1}})
    assert recipe.to_data() == {
        "sparsity": 0.5,
        "granularity": {"block": {"rows": 4, "columns": 1}},
        "saliency": "magnitude",
        "allocation": "uniform",
        "schedule": METHODS["rigl"].recipe.to_data()["schedule"],
        "growth": {"gradient": {"fraction": 0.1}},
    }
    assert "growth" not in method("dsd", growth=None, schedule="one_shot").to_data()


def test_a_fixed_sparsity_takes_the_place_of_the_published_one():
    assert method("gmp", granularity="2:4").final_sparsity == 0.5
    assert method("magnitude", schedule={"list": {"sparsity": [0.25, 0.75], "every": "1 epochs"}}).final_sparsity == 0.75
    with pytest.raises(InputError, match=r"^sparsity: 0\.9 contradicts granularity\.n_m"):
        method("gmp", sparsity=0.9, granularity="2:4")


def test_a_final_cut():
    assert method("str", sparsity=0.8, cut=True).to_data() == {
        "sparsity": 0.8,
        "saliency": "score",
        "allocation": "global",
        "schedule": {"one_shot": {"at": "1 run"}},
        "relaxation": METHODS["str"].recipe.to_data()["relaxation"],
    }
    assert method("str", sparsity=0.8, cut=True, allocation="uniform").allocation.name == "uniform"


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.by_strength and row.recipe.relaxation.has_scores])
def test_what_strength_decides_takes_a_sparsity_by_a_final_cut(name):
    assert METHODS[name].recipe.final_sparsity is None
    assert method(name, sparsity=0.75, cut=True).final_sparsity == 0.75
    with pytest.raises(InputError, match=f"^sparsity: the strength of {name!r} decides it"):
        method(name, sparsity=0.75)
    with pytest.raises(InputError, match=f"^cut: 'gmp' reaches its sparsity without a final cut; choices: .*\\b{name}\\b"):
        method("gmp", sparsity=0.75, cut=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "rigel"}, "unknown method 'rigel'; did you mean 'rigl'? choices: accumulated_movement, acdc, "),
        (
            {"name": "str", "sparsity": 0.9},
            "sparsity: the strength of 'str' decides it; drop it, or ask for a final exact cut by its learned score (cut=True, or --cut)",
        ),
        ({"name": "str", "cut": True}, "cut: needs the sparsity to cut to"),
        ({"name": "gmp", "sparsity": 0.9, "cut": True}, "cut: 'gmp' reaches its sparsity without a final cut; choices: str"),
        (
            {"name": "lottery_ticket", "sparsity": 0.9},
            "sparsity: the stages of 'lottery_ticket' decide it; drop it, or change them (niwaki methods lottery_ticket shows the recipe)",
        ),
        ({"name": "lottery_ticket", "sparsity": 0.9, "cut": True}, "sparsity: the stages of 'lottery_ticket' decide it"),
        ({"name": "lottery_ticket", "cut": True}, "cut: 'lottery_ticket' reaches its sparsity without a final cut; choices: str"),
        ({"name": "gmp", "sparsity": 1.5}, "sparsity: must be in [0, 1), got 1.5"),
        ({"name": "gmp", "alocation": "global"}, "unknown field 'alocation'; did you mean 'allocation'? choices: "),
        ({"name": "gmp", "allocation": "globl"}, "allocation: unknown component 'globl'; did you mean 'global'? choices: "),
        ({"name": "gmp", "relaxation": "hart"}, "relaxation: unknown component 'hart'; did you mean 'hard'? choices: "),
        ({"name": "gmp", "granularity": "5:4"}, "granularity"),
        (
            {"name": "top_kast", "sparsity": 0.8, "gradient": {"superset": {"sparsity": 0.8}}},
            "gradient.superset.sparsity: 0.8 must be below the recipe's sparsity, 0.8",
        ),
        ({"name": "rigl", "schedule": "one_shot"}, "growth: 'gradient' needs a schedule that updates again"),
    ],
)
def test_errors_are_one_line(arguments, said):
    with pytest.raises(InputError) as error:
        method(**arguments)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


ROW = """
name:
  title: A method
  citation: {authors: A. Author, title: A work, venue: A venue, year: 2020}
  section: "4.1"
  row: 1
  columns: {what: [W], when: [it], criterion: [mag], growth: [], budget: [uni], regularization: []}
  fidelity: exact
  differs: []
  recipe: {sparsity: 0.5}
"""


def row(**changes):
    data = YAML(typ="safe").load(ROW)
    for path, value in changes.items():
        *parents, key = path.split("__")
        inner = data["name"]
        for parent in parents:
            inner = inner[parent]
        if value is None:
            inner.pop(key, None)
        else:
            inner[key] = value
    return data


ALIAS = {"fidelity": "alias_of", "recipe": None}


def two(**changes):
    """Return a row ``name`` and an alias of it, ``other``, with some fields of it changed."""
    return row() | {"other": row(**ALIAS | {"of": "name"} | changes)["name"]}


def test_an_alias_has_the_recipe_of_the_row_that_it_names():
    read = parse_rows({"first.yaml": {"other": two()["other"]}, "second.yaml": row()})
    assert list(read) == ["other", "name"]
    assert read["other"].recipe == read["name"].recipe == Recipe(sparsity=0.5)
    assert (read["other"].faithful, read["name"].faithful) == ("alias of name", "exact")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (two(of="nome"), "file.yaml: other: of: unknown method 'nome'; did you mean 'name'?"),
        (two(fidelity="exact"), "file.yaml: other: of: names the row whose recipe an alias has"),
        (two(of=None), "file.yaml: other: of: names the row whose recipe an alias has"),
        (two(recipe={"sparsity": 0.5}), "file.yaml: other: recipe: an alias has that of 'name'; drop it"),
        (two() | {"third": two(of="other")["other"]}, "file.yaml: third: of: 'other' is an alias itself, of 'name'; name that"),
    ],
)
def test_a_wrong_alias_is_told(data, said):
    with pytest.raises(InputError) as error:
        parse_rows({"file.yaml": data})
    assert str(error.value).startswith(said)


def test_no_name_stands_in_two_files():
    with pytest.raises(InputError, match=r"^second\.yaml: name: there is a method of this name in first\.yaml$"):
        parse_rows({"first.yaml": row(), "second.yaml": row()})


def test_a_good_row_is_read():
    assert parse_rows({"file.yaml": row()})["name"].recipe == Recipe(sparsity=0.5)
    assert parse_rows({"file.yaml": row(row=None)})["name"].row is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([1], "file.yaml: expected a mapping from names to rows, got [1]"),
        ({"name": 3}, "file.yaml: name: expected a mapping of fields, got 3"),
        (row(title=None), "file.yaml: name: title: this field is required"),
        (row(title=""), "file.yaml: name: title: "),
        (row(titel="x"), "file.yaml: name: unknown field 'titel'; did you mean 'title'?"),
        (row(name="other"), "file.yaml: name: name: the key of a row is its name"),
        (row(citation__venue=None), "file.yaml: name: citation.venue: this field is required"),
        (row(citation__year="soon"), "file.yaml: name: citation.year: "),
        (row(section="chapter 4"), "file.yaml: name: section: "),
        (row(row=261), "file.yaml: name: row: "),
        (row(fidelity="close"), "file.yaml: name: fidelity: Input should be 'exact', 'simplified' or 'alias_of', got 'close'"),
        (row(differs=[""]), "file.yaml: name: differs[0]: "),
        (row(columns__what=["V"]), "file.yaml: name: columns.what: unknown code 'V'; choices: A, B, D, "),
        (row(columns__budget=None), "file.yaml: name: columns.budget: this field is required"),
        (row(columns__how=["W"]), "file.yaml: name: columns: unknown field 'how'"),
        (row(recipe={"sparsity": 2}), "file.yaml: name: recipe.sparsity: must be in [0, 1), got 2"),
        (
            row(recipe={"sparsity": 0.5, "saliency": "magnitud"}),
            "file.yaml: name: recipe.saliency: unknown component 'magnitud'; did you mean 'magnitude'?",
        ),
        (row(recipe="gmp"), "file.yaml: name: recipe: a recipe is a mapping of fields, got 'gmp'"),
    ],
)
def test_a_wrong_row_is_told_with_file_row_and_field(data, said):
    with pytest.raises(InputError) as error:
        parse_rows({"file.yaml": data})
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_every_code_of_the_survey_has_words():
    assert list(CODES) == list(Columns.model_fields)
    assert all(isinstance(words, str) and words for column in CODES.values() for words in column.values())
    assert len(CODES["what"]) == 16
    assert len(CODES["when"]) == 10


def test_no_data_file_is_left_unread():
    stored = {entry.name for entry in files("niwaki.catalogue").iterdir() if entry.name.endswith(".yaml")}
    assert stored == {f"{chapter}.yaml" for chapter in (*CHAPTERS, "codes", "left_out")}


def test_a_file_with_stages_takes_the_sparsity_of_the_one_stage_that_says_one(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("stages:\n- {for: 1 run}\n- {sparsity: 0.5, allocation: global}\n- {for: 0.5 run}\n")
    assert [stage.sparsity for stage in find(str(file), 0.75).stages] == [None, 0.75, None]
    assert find(str(file), 0.75).stages[1].allocation == find(str(file)).stages[1].allocation
    with pytest.raises(InputError, match="a fraction, not per cent"):
        find(str(file), 75.0)
    file.write_text("stages:\n- {for: 1 run, sparsity: 0.5}\n- {for: 1 run, sparsity: 0.6}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: sparsity: with stages, say it in the stage that prunes"):
        find(str(file), 0.75)
