"""Recipes: every field, defaults, round trips, files, and the vocabulary's own ten examples."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from niwaki.component import REGISTRY, Missing
from niwaki.errors import InputError
from niwaki.granularity import Channel, Element, PatternNM
from niwaki.recipe import DEFAULTS, Recipe
from niwaki.saliency import Magnitude

TEN = {
    "rigl": """
sparsity: 0.9
saliency: magnitude
allocation: erdos_renyi_kernel
schedule: {constant: {every: 100 steps, end: 0.75 run}}
growth: {gradient: {fraction: {cosine: {initial: 0.3}}, at_update: skip_step}}
""",
    "woodfisher": """
sparsity: 0.95
saliency: {woodfisher: {block: 2000, gradients: 400, samples_per_gradient: 1, damping: 1e-5}}
allocation: global
schedule: {cubic: {initial: 0.05, begin: 1 epochs, every: 5 epochs, end: 40 epochs}}
compensation: obs
""",
    "str": "relaxation: {soft_threshold: {gate: sigmoid, initial: -3200, per: tensor, weight_decay: inherit}}",
    "l0": """
granularity: input_channel
relaxation: {hard_concrete: {beta: 0.667, gamma: -0.1, zeta: 1.1, drop: 0.5}}
penalty: {expected_l0: {strength: 0.1, of: gate}}
""",
    "network_slimming": """
stages:
- {for: 160 epochs, target: norm_scale, penalty: {l1: {strength: 1e-4}}}
- {sparsity: 0.7, granularity: channel, saliency: norm_scale, allocation: global, schedule: one_shot, finish: shrink}
- {for: 160 epochs}
""",
    "lottery_ticket": """
stages:
- {for: 1000 steps, save: ticket}
- repeat: 10
  stages:
  - {for: 1 run}
  - {prune: {fraction: 0.2, saliency: magnitude, allocation: global}, restore: {weights: ticket, optimizer: fresh, learning_rate: ticket}}
- {for: 1 run}
""",
    "acdc": """
sparsity: 0.9
saliency: magnitude
allocation: global
schedule: {phases: {dense: [0, 15, 25, 35, 45, 55, 65, 75], sparse: [10, 20, 30, 40, 50, 60, 70, 85], unit: epochs}}
growth: all
""",
    "top_kast": """
sparsity: 0.9
saliency: magnitude
schedule: {constant: {every: 1 steps}}
relaxation: latent
gradient: {superset: {sparsity: 0.8}}
penalty: {exploration_l2: {strength: 1e-4}}
""",
    "movement": """
sparsity: 0.9
relaxation: {straight_through: {scores: zeros, learning_rate: 1e-2}}
saliency: score
allocation: global
schedule: {cubic: {initial: 0, begin: 0.1 run, every: 1 steps, end: 0.7 run}}
objective: {distillation: {temperature: 2, weight: 0.9}}
""",
    "dgc": """
target: gradients
schedule: {list: {sparsity: [0.75, 0.9375, 0.984375, 0.996, 0.999], every: 1 epochs}}
saliency: magnitude
allocation: {uniform: {per: tensor}}
selection: {sampled_top_k: {sample: 0.01}}
memory: {error_feedback: {momentum: 0.9, mask_momentum: true, clip: local}}
""",
}

MISSING = {
    "dgc": ["target 'gradients'", "selection 'sampled_top_k'", "memory 'error_feedback'"],
}


def plain(yaml):
    return YAML(typ="safe").load(yaml)


@pytest.mark.parametrize("name", TEN)
def test_the_ten_recipes_of_the_vocabulary_parse_and_come_back(name):
    recipe = Recipe.from_yaml(TEN[name])
    assert recipe.missing == MISSING.get(name, [])
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    written = plain(TEN[name])
    assert plain(recipe.to_yaml()) == written  # said again as it was said: nothing added, nothing lost
    assert list(recipe.to_data()) == [slot for slot in ("sparsity", *DEFAULTS, "stages") if slot in written]
    assert all(line.count("\n") == 0 and line.endswith(".") for line in recipe.describe())


@pytest.mark.parametrize("name", TEN)
def test_a_resolved_recipe_means_the_same(name):
    recipe = Recipe.from_yaml(TEN[name])
    resolved = recipe.to_data(defaults=True)
    again = Recipe.from_data(resolved)
    assert again.to_data(defaults=True) == resolved
    assert again.final_sparsity == recipe.final_sparsity
    assert list(again.components()) == list(recipe.components())


def test_what_is_missing_is_named_in_one_line():
    with pytest.raises(
        InputError,
        match=r"^this recipe needs what this version of Niwaki cannot run yet: target 'gradients', selection 'sampled_top_k', memory",
    ):
        Recipe.from_yaml(TEN["dgc"]).require_complete()
    for name in TEN.keys() - MISSING.keys():
        Recipe.from_yaml(TEN[name]).require_complete()


def test_defaults_are_those_of_the_vocabulary():
    recipe = Recipe(sparsity=0.5)
    filled = {slot: getattr(recipe, slot) for slot in DEFAULTS}
    assert {slot: component and component.name for slot, component in filled.items()} == {
        "target": "weights",
        "granularity": "element",
        "saliency": "magnitude",
        "normalization": "none",
        "allocation": "uniform",
        "schedule": "one_shot",
        "selection": "top_k",
        "growth": "none",
        "gradient": "active",
        "relaxation": "hard",
        "penalty": None,
        "compensation": None,
        "objective": None,
        "memory": None,
    }
    assert recipe.stages is None
    assert recipe.to_yaml() == "{sparsity: 0.5}\n"
    assert all(component is None or component.slot == slot for slot, component in filled.items())


def test_what_was_said_is_written_even_if_it_is_the_default():
    recipe = Recipe(sparsity=0.5, saliency="magnitude", schedule={"one_shot": {"at": "0 run"}})
    assert plain(recipe.to_yaml()) == {"sparsity": 0.5, "saliency": "magnitude", "schedule": {"one_shot": {"at": "0 run"}}}
    assert recipe.given == {"sparsity", "saliency", "schedule"}
    assert Recipe(sparsity=0.5, penalty=None).given == {"sparsity"}


def test_components_can_be_given_as_objects():
    assert Recipe(sparsity=0.5, saliency=Magnitude(norm="l2")) == Recipe.from_yaml("{sparsity: 0.5, saliency: {magnitude: {norm: l2}}}")
    with pytest.raises(InputError, match=r"^saliency: 'element' is a component of granularity"):
        Recipe(sparsity=0.5, saliency=Element())


def test_shorthands():
    assert Recipe(granularity="2:4").granularity == PatternNM(n=2, m=4)
    assert Recipe(sparsity=0.5, granularity="filter").granularity == Channel()
    assert Recipe.from_yaml("{sparsity: 0.5, granularity: 4x1}").granularity.to_data() == {"block": {"rows": 4, "columns": 1}}


@pytest.mark.parametrize(
    ("yaml", "final"),
    [
        ("{sparsity: 0.25}", 0.25),
        ("{sparsity: 0}", 0.0),
        ("{granularity: 1:4}", 0.75),
        ("{granularity: 2:4, sparsity: 0.5}", 0.5),
        ("{granularity: 1:3, sparsity: 0.6666666666}", 0.6666666666),
        ("schedule: {list: {sparsity: [0.5, 0.8], every: 10 steps}}", 0.8),
        ("relaxation: soft_threshold", None),
        ("penalty: {l1: {strength: 1}}", None),
        ("stages: [{for: 1 run}]", None),
    ],
)
def test_the_final_sparsity_is_said_or_implied(yaml, final):
    assert Recipe.from_yaml(yaml).final_sparsity == final


def test_a_recipe_is_frozen_and_can_be_copied():
    recipe = Recipe.from_yaml(TEN["lottery_ticket"])
    with pytest.raises(ValueError, match="frozen"):
        recipe.sparsity = 0.1
    for other in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert other == recipe
        assert other.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("yaml", ["{schedule: threshold_ramp}", "{selection: {threshold: 0.1}}"])
def test_where_scores_meet_values_no_allocation_is_written(yaml):
    recipe = Recipe.from_yaml(yaml)
    written = recipe.to_data(defaults=True)
    assert "allocation" not in written
    assert Recipe.from_data(written).to_data(defaults=True) == written


def test_replace_keeps_what_was_said_and_says_more():
    recipe = Recipe.from_yaml(TEN["rigl"])
    other = recipe.replace(sparsity=0.5, growth=None)
    assert other.to_data() == {k: v for k, v in recipe.to_data().items() if k != "growth"} | {"sparsity": 0.5}
    with pytest.raises(InputError, match=r"^unknown field 'growht'; did you mean 'growth'\?"):
        recipe.replace(growht="none")


CHOICES = {
    "target": ["weights", {"weights": {"include": ["a.*", "b.weight"], "exclude": ["c"]}}, "gradients", {"heads": {"of": "attention"}}],
    "granularity": ["element", "2:4", "4x1", {"n_m": {"n": 1, "m": 16, "remainder": "pad"}}, {"vector": {"length": 8}}, "channel", "head"],
    "saliency": [
        "magnitude",
        {"magnitude": {"norm": "l2"}},
        "random",
        "taylor",
        "snip",
        "score",
        {"woodfisher": {"damping": 1e-5}},
        "sparsegpt",
        {"coreset": {"examples": 64}},
        "signal_to_noise",
    ],
    "normalization": ["none", "lamp", "rank", {"per_flop": {"power": 0.3}}],
    "allocation": [
        "uniform",
        "global",
        {"explicit": {"layers": {"a.*": 0.5, "b": 0}}},
        {"erdos_renyi_kernel": {"power": 0.5}},
        "sensitivity",
        {"uniform": {"per": "row"}},
        {"flops_budget": {"flops": 0.5}},
        {"redistribution": {"by": "survivors"}},
    ],
    "schedule": [
        "one_shot",
        {"one_shot": {"at": "1e3 steps"}},
        {"one_shot": {"rounds": 5, "revive": True}},
        {"iterative": {"rounds": 3}},
        {"cubic": {"initial": 0.125, "begin": "1 epoch", "end": "1e6 tokens"}},
        {"constant": {"every": "1 steps"}},
        {"phases": {"dense": [0, 0.5], "sparse": [0.25, 0.75], "unit": "run"}},
        {"list": {"sparsity": [0.1, 0.5], "at": ["1 steps", "2 steps"]}},
        {"threshold_ramp": {"share": 0.75, "ramp": "2 epochs"}},
        {"adaptive": {"most": 0.5, "every": "10 steps"}},
        "rising_loss",
        {"polynomial": {"degree": 5}},
    ],
    "selection": [
        "top_k",
        {"sampled_top_k": {"sample": 0.01}},
        {"gumbel": {"temperature": 0.5}},
        "bernoulli",
        {"hysteresis": {"rate": 0.5}},
    ],
    "growth": [
        "none",
        "all",
        "random",
        {"gradient": {"fraction": 0.25, "initial_mask": "saliency"}},
        {"gradient": {"fraction": "cosine"}},
        {"momentum": {"decay": 0.5, "initial_value": {"gradient": {"power": 0.5}}}},
        {"random": {"threshold": {"initial": 0.25}}},
        {"locality": {"by": "paths"}},
        {"rewiring": {"start": 0.25}},
    ],
    "gradient": ["active", "dense", "frozen", {"superset": {"sparsity": 0.25}}, {"selected": {"sparsity": 0.5}}],
    "relaxation": ["hard", "latent", {"straight_through": {"learning_rate": 0.01}}, {"soft_threshold": {"initial": -5}}, "sigmoid_anneal"],
    "penalty": [
        {"exploration_l2": {"strength": 1e-3}},
        {"l1": {"strength": 1}},
        {"l1": {"of": "gate", "apply": "proximal"}},
        {"kl": {"begin": "1 epochs", "end": "0.5 run"}},
        {"group_lasso": {"ratio": 0.25, "weigh": "flops"}},
        {"augmented_lagrangian": {"sparsity": 0.5}},
        {"sum": {"terms": ["hoyer", {"nuclear_norm": {"every": "1 epochs"}}]}},
        "learning_compression",
        "sr_ste",
    ],
    "compensation": ["obs", "batchnorm_recalibration", {"merge": {"scale": True}}, {"coreset": {"examples": 64}}],
    "objective": [{"distillation": {"temperature": 2}}],
    "memory": [{"error_feedback": {"clip": "local", "mask": True}}],
}


def test_the_choices_below_cover_every_registered_component():
    assert set(CHOICES) == set(DEFAULTS)
    assert set(REGISTRY) - {"addition", "decay", "initial_value"} <= set(DEFAULTS)


@given(
    st.fixed_dictionaries({}, optional={"sparsity": st.sampled_from([0, 0.5, 0.9]), **{s: st.sampled_from(c) for s, c in CHOICES.items()}})
)
@settings(max_examples=300, deadline=None)
def test_every_combination_round_trips_or_is_refused_in_one_line(data):
    try:
        recipe = Recipe.from_data(data)
    except InputError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "\n" not in refusal
        assert refusal.partition(":")[0].partition(".")[0] in {*DEFAULTS, "sparsity"}
        return
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.given == recipe.given == set(data)
    assert set(plain(recipe.to_yaml())) == set(data)
    assert recipe.missing == [str(getattr(recipe, slot)) for slot in DEFAULTS if isinstance(getattr(recipe, slot), Missing)]
    assert Recipe.from_data(recipe.to_data(defaults=True)).to_data(defaults=True) == recipe.to_data(defaults=True)


ERRORS = [
    ("sparisty: 0.9", "unknown field 'sparisty'; did you mean 'sparsity'? choices: allocation, "),
    ("{sparsity: 0.9, 3: x}", "the key 3 is not text; write it in quotes"),
    ("{sparsity: 0.9, ~: x}", "the key None is not text; write it in quotes"),
    ("{sparsity: 0.9, allocation: {explicit: {layers: {0: 0.5}}}}", "the key 0 is not text; write it in quotes"),
    ("{sparsity: 0.9, saliency: magnitud}", "saliency: unknown component 'magnitud'; did you mean 'magnitude'? choices: "),
    ("{sparsity: 0.9, saliency: }", "saliency: unknown component 'None'; choices: "),
    ("{sparsity: 0.9, saliency: {magnitude: {nrom: l1}}}", "saliency.magnitude: unknown field 'nrom'; did you mean 'norm'? choices: norm"),
    ("{sparsity: 0.9, saliency: {magnitude: {norm: l3}}}", "saliency.magnitude.norm: Input should be 'l1', 'l2' or 'max', got 'l3'"),
    ("{sparsity: 0.9, saliency: {magnitude: {1: l1}}}", "the key 1 is not text; write it in quotes"),
    ("{sparsity: 0.9, saliency: {magnitude: {}, random: {}}}", "saliency: expected one component as NAME or {NAME: {field: value}}"),
    ("{sparsity: 0.9, saliency: [magnitude]}", "saliency: unknown component "),
    ("{sparsity: 0.9, granularity: 4:2}", "granularity"),
    ("{sparsity: 0.9, schedule: {cubic: {end: 5}}}", "schedule.cubic.end: a time is a number with a unit"),
    ("{sparsity: 0.9, schedule: {cubic: {every: 5 days}}}", "schedule.cubic.every: a time is a number with a unit"),
    ("{sparsity: 0.9, schedule: {cubics: {}}}", "schedule: unknown component 'cubics'; did you mean 'cubic'? choices: "),
    ("{sparsity: 0.9, schedule: phases}", "schedule.phases.sparse: this field is required"),
    (
        "{sparsity: 0.9, growth: {gradient: {fraction: cosin}}, schedule: constant}",
        "growth.gradient.fraction: decay: unknown component 'cosin'; did you mean",
    ),
    ("{sparsity: 0.9, relaxation: latent, gradient: superset}", "gradient.superset: give either sparsity or multiple, and not both"),
    ("{sparsity: 1}", "sparsity: must be in [0, 1), got 1"),
    ("{sparsity: 1.0}", "sparsity: must be in [0, 1), got 1.0"),
    ("{sparsity: -0.1}", "sparsity: must be in [0, 1), got -0.1"),
    ("{sparsity: .nan}", "sparsity: must be in [0, 1), got nan"),
    ("{sparsity: .inf}", "sparsity: must be in [0, 1), got inf"),
    ("{sparsity: 1.5}", "sparsity: must be in [0, 1), got 1.5"),
    ("{sparsity: 90}", "sparsity: must be in [0, 1), got 90; a fraction, not per cent: 0.9"),
    ("{sparsity: '0.9'}", "sparsity: must be a number in [0, 1), got '0.9'"),
    ("{sparsity: false}", "sparsity: must be a number in [0, 1), got False"),
    ("{sparsity: [0.9]}", "sparsity: must be a number in [0, 1), got [0.9]"),
    ("[1, 2]", "a recipe is a mapping of fields, got [1, 2]; fields: sparsity, target, "),
    ("", "a recipe is a mapping of fields, got None; fields: sparsity, "),
    ("rigl", "a recipe is a mapping of fields, got 'rigl'; fields: sparsity, "),
    ("{sparsity: 0.9, stages: nothing}", "stages: "),
]


@pytest.mark.parametrize(("yaml", "said"), ERRORS)
def test_errors_name_the_field_in_one_line(yaml, said):
    with pytest.raises(InputError) as error:
        Recipe.from_yaml(yaml)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError) as located:
        Recipe.from_yaml(yaml, "my.yaml")
    assert str(located.value) == f"my.yaml: {error.value}"


def test_files(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEN["rigl"], encoding="utf-8")
    assert Recipe.read(path) == Recipe.read(str(path)) == Recipe.from_yaml(TEN["rigl"])
    path.write_text("saliency: magnitud\nsparsity: 0.5", encoding="utf-8")
    with pytest.raises(InputError, match=r"recipe\.yaml: saliency: unknown component 'magnitud'; did you mean 'magnitude'\?"):
        Recipe.read(path)
    path.write_text("sparsity: 0.5\nsparsity: 0.6", encoding="utf-8")
    with pytest.raises(InputError, match=r"recipe\.yaml, line 2: found duplicate key"):
        Recipe.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"recipe\.yaml: not UTF-8 text"):
        Recipe.read(path)
    for wrong in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            Recipe.read(wrong)


def test_a_description_says_what_is_chosen():
    lines = Recipe.from_yaml(TEN["rigl"]).describe()
    assert lines[0] == "sparsity: 90 % of the target is masked at the end."
    assert [line.partition(":")[0] for line in lines[1:]] == [slot for slot, default in DEFAULTS.items() if default is not None]
    assert any(line.startswith("schedule: constant (every 100 steps, end 0.75 run). ") for line in lines) or any(
        line.startswith("schedule: constant (end 0.75 run, every 100 steps). ") for line in lines
    )
    assert "saliency: woodfisher" in "\n".join(Recipe.from_yaml(TEN["woodfisher"]).describe())
    assert Recipe.from_yaml(TEN["str"]).describe()[0] == "sparsity: decided by the strength of the relaxation soft_threshold."
    assert not any(line.startswith("schedule") for line in Recipe.from_yaml(TEN["str"]).describe())
    ends_dense = Recipe(sparsity=0.3, growth="all", schedule={"phases": {"dense": [0, 2], "sparse": [1], "unit": "epochs"}})
    followed = Recipe(sparsity=0.9, schedule="adaptive")
    assert followed.describe()[0] == "sparsity: at most 90 % of the target is masked at the end."
    assert Recipe(schedule="adaptive").describe()[0] == "sparsity: decided by the schedule adaptive and the validation loss."
    ramp = Recipe(schedule="threshold_ramp").describe()[0]
    assert ramp == "sparsity: decided by the schedule threshold_ramp and the scores, which it compares with thresholds."
    assert ends_dense.describe()[0] == "sparsity: 30 % of the target is masked in the sparse phases, nothing at the end."
    assert Recipe.from_yaml(TEN["lottery_ticket"]).describe()[1:3] == [
        "stage 2: 10 times the stages within.",
        "stage 2.1: train for 1 run.",
    ]
    assert Recipe.from_yaml(TEN["lottery_ticket"]).describe()[3] == (
        "stage 2.2: prune 20 % of what is active (saliency magnitude, allocation global); restore weights ticket, optimizer fresh,"
        " learning_rate ticket."
    )
