"""Which weights are targets: by default, by name, tied, wrapped, sharded; and every reason for leaving one out."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from niwaki.errors import InputError
from niwaki.recipe import Recipe
from niwaki.target import NormScale, Weights, select_targets


class Small(nn.Module):
    """Two convolutions, a norm and two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Linear(6, 5))
        self.head = nn.Linear(5, 2)


class Language(nn.Module):
    """An embedding tied to the output projection, between attention and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.memory = nn.LSTM(8, 8)
        self.middle = nn.Linear(8, 8)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.words.weight


class Own(nn.Module):
    """Parameters of its own, of no class that the table knows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 3, 2, 5))
        self.scale = nn.Parameter(torch.ones(4))
        self.whole = nn.Parameter(torch.ones(2, 2, dtype=torch.int32), requires_grad=False)
        self.layer = nn.Linear(3, 2)


def names(model, **fields):
    return [t.name for t in select_targets(model, Weights(**fields))[0]]


def reasons(model, **fields):
    return {left.name: left.reason for left in select_targets(model, Weights(**fields))[1]}


def test_the_default_leaves_out_the_first_convolution_and_the_last_layer():
    targets, left_out = select_targets(Small(), Weights())
    assert [(t.name, t.module_name, t.layout.roles, t.layout.shape) for t in targets] == [
        ("body.0.weight", "body.0", ("group", "output", "input", "kernel", "kernel"), (2, 3, 2, 3, 3)),
        ("body.2.weight", "body.2", ("output", "input"), (5, 6)),
    ]
    assert [(left.name, left.reason) for left in left_out] == [
        ("stem.weight", "first convolution"),
        ("stem.bias", "not a weight"),
        ("norm.weight", "not a weight"),
        ("norm.bias", "not a weight"),
        ("body.0.bias", "not a weight"),
        ("body.2.bias", "not a weight"),
        ("head.weight", "last layer"),
        ("head.bias", "not a weight"),
    ]


def test_targets_are_the_models_own_parameters():
    model = Small()
    assert [t.parameter for t in select_targets(model, Weights())[0]] == [model.body[0].weight, model.body[2].weight]
    for target in select_targets(model, Weights())[0]:
        assert model.get_submodule(target.module_name).weight is target.parameter


def test_a_multilayer_perceptron_keeps_its_first_layer_as_a_target():
    assert names(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))) == ["0.weight", "1.weight"]


def test_the_last_layer_is_the_last_in_module_order_whatever_comes_after():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.ConvTranspose2d(4, 2, 1), nn.LSTM(4, 4), nn.LayerNorm(4))
    assert reasons(model)["2.weight"] == "last layer"
    assert reasons(model)["1.weight"] == "first convolution"
    assert names(model) == ["0.weight", "3.weight_ih_l0", "3.weight_hh_l0"]


def test_embeddings_attention_and_recurrence():
    assert names(Language()) == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "memory.weight_ih_l0",
        "memory.weight_hh_l0",
        "middle.weight",
    ]
    assert reasons(Language())["words.weight"] == "tied to an embedding"
    assert "output.weight" not in reasons(Language())  # one parameter, one entry, under its first name


@pytest.mark.parametrize("pattern", ["words.weight", "output.weight", "output", "*t.weight"])
def test_a_tied_weight_can_be_named_by_any_of_its_names_and_comes_once(pattern):
    model = Language()
    targets, left_out = select_targets(model, Weights(include=[pattern, "middle"]))
    assert [t.name for t in targets] == ["words.weight", "middle.weight"]
    assert targets[0].parameter is model.output.weight
    assert targets[0].layout.embedding
    assert {left.name for left in left_out} & {"words.weight", "output.weight"} == set()


def test_a_weight_tied_to_the_last_layer_is_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert names(model) == ["1.weight"]
    assert reasons(model)["0.weight"] == "tied to the last layer"


def test_a_module_used_twice_counts_once():
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, layer, nn.Linear(3, 2))) == ["0.weight"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"include": ["*"]}, ["stem.weight", "body.0.weight", "body.2.weight", "head.weight"]),
        ({"include": ["body"]}, ["body.0.weight", "body.2.weight"]),
        ({"include": ["body.?"]}, ["body.0.weight", "body.2.weight"]),
        ({"include": ["body.2"]}, ["body.2.weight"]),
        ({"include": ["*.weight"]}, ["stem.weight", "body.0.weight", "body.2.weight", "head.weight"]),
        ({"include": ["head.weight", "stem"]}, ["stem.weight", "head.weight"]),
        ({"include": ["*"], "exclude": ["stem", "body.0.*"]}, ["body.2.weight", "head.weight"]),
        ({"exclude": ["body.0"]}, ["body.2.weight"]),
        ({"exclude": ["norm", "body.0"]}, ["body.2.weight"]),
        ({"include": ["module.body.2", "_orig_mod.head.weight"]}, ["body.2.weight", "head.weight"]),
    ],
)
def test_patterns(fields, expected):
    assert names(Small(), **fields) == expected


def test_patterns_are_case_sensitive_and_match_whole_names():
    for pattern in ("Body", "ody", "body.2.weigh", "bod", "body.2.weight.x"):
        with pytest.raises(InputError, match="matches no weight"):
            select_targets(Small(), Weights(include=[pattern]))


def test_reasons_for_leaving_out():
    assert reasons(Small(), include=["body.2", "head"], exclude=["head"]) == {
        "stem.weight": "not matched by include",
        "stem.bias": "not a weight",
        "norm.weight": "not a weight",
        "norm.bias": "not a weight",
        "body.0.weight": "not matched by include",
        "body.0.bias": "not a weight",
        "body.2.bias": "not a weight",
        "head.weight": "excluded by 'head'",
        "head.bias": "not a weight",
    }


def test_every_parameter_is_a_target_or_left_out():
    for model in (Small(), Language(), Own()):
        every = {name for name, _ in model.named_parameters()}
        for fields in ({"include": ["*"]}, {"include": ["*"], "exclude": ["head"] if isinstance(model, Small) else []}):
            targets, left_out = select_targets(model, Weights(**fields))
            listed = [t.name for t in targets] + [left.name for left in left_out]
            assert len(listed) == len(set(listed))
            assert set(listed) == every


def test_a_parameter_of_an_unknown_module_is_taken_only_by_its_exact_name():
    model = Own()
    assert names(model, include=["*"]) == ["layer.weight"]
    assert reasons(model, include=["*"])["table"] == "module class not known; name it in include to take it"
    [target] = select_targets(model, Weights(include=["table"]))[0]
    assert (target.name, target.module_name) == ("table", "")
    assert (target.layout.roles, target.layout.shape) == (("output", "input", "kernel", "kernel"), (4, 3, 2, 5))


def test_frozen_weights_are_targets():
    model = Small().requires_grad_(False)
    assert names(model) == ["body.0.weight", "body.2.weight"]


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        (
            Small(),
            {"include": ["bodi.2.weight"]},
            "target.weights.include: pattern 'bodi.2.weight' matches no weight of the model; nearest: body.2.weight, body.0.weight",
        ),
        (
            Small(),
            {"include": ["body", "hed"]},
            "target.weights.include: pattern 'hed' matches no weight of the model; nearest: head.weight",
        ),
        (Small(), {"include": ["norm"]}, "target.weights.include: pattern 'norm' matches no weight of the model; nearest: "),
        (Small(), {"exclude": ["nothing"]}, "target.weights.exclude: pattern 'nothing' matches no weight of the model; nearest: "),
        (
            Small(),
            {"include": ["head.bias"]},
            "target.weights.include: 'head.bias' is not a weight (1 dimension(s), float32); two or more of real floats are needed",
        ),
        (Own(), {"include": ["whole"]}, "target.weights.include: 'whole' is not a weight (2 dimension(s), int32)"),
        (Own(), {"include": ["tabl*"]}, "target.weights.include: pattern 'tabl*' matches no weight of the model; nearest: "),
        (nn.Linear(3, 2), {}, "target.weights: no weight is left (weight: last layer); name what to prune in include"),
        (nn.BatchNorm2d(3), {}, "target.weights: no weight is left (the model has none); name what to prune in include"),
        (nn.ReLU(), {"include": ["x"]}, "target.weights.include: pattern 'x' matches no weight of the model; it has no weights"),
        (
            Small(),
            {"exclude": ["body"]},
            "target.weights: no weight is left (stem.weight: first convolution; body.0.weight: excluded by 'body'; ",
        ),
        (Small(), {"include": []}, "target.weights: no weight is left (stem.weight: not matched by include; "),
        (nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), {}, "0.weight: not initialized; run the model once on an example"),
    ],
)
def test_errors_name_the_field_and_the_nearest_in_one_line(model, fields, said):
    with pytest.raises(InputError) as error:
        select_targets(model, Weights(**fields))
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_targets_of_a_recipe_that_cannot_be_bound():
    with pytest.raises(InputError, match=r"^target: target 'gradients' does not name weights of a model; choices: norm_scale, weights$"):
        select_targets(Small(), Recipe.from_yaml("{sparsity: 0.5, target: gradients}").target)


def test_wrappers_do_not_change_names():
    model = Small()
    plain = select_targets(model, Weights())
    compiled = torch.compile(model, backend="eager")
    wrapped = nn.DataParallel(copy.deepcopy(model))
    inner = Small()
    inner.body = torch.compile(inner.body, backend="eager")
    for other in (compiled, wrapped, inner):
        targets, left_out = select_targets(other, Weights())
        assert [t.name for t in targets] == [t.name for t in plain[0]]
        assert left_out == plain[1]
        for target in targets:
            assert other.get_submodule(target.module_name).weight is target.parameter


def test_two_parameters_cannot_share_a_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    model.register_parameter("weight", nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(InputError, match=r"^weight: two parameters have this name once wrapper prefixes are dropped"):
        select_targets(model, Weights())


def test_a_sharded_parameter_has_the_layout_of_the_whole():
    from torch.testing._internal.distributed.fake_pg import FakeStore  # one process plays a world of two

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        model = Small()
        for module in (model.body[0], model.body[2]):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
        targets = select_targets(model, Weights())[0]
        assert [tuple(t.parameter.to_local().shape) for t in targets] == [(3, 2, 3, 3), (3, 6)]
        assert [t.layout.shape for t in targets] == [(2, 3, 2, 3, 3), (5, 6)]
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------ scales of normalizations


class Normalized(nn.Module):
    """Every kind of normalization, one without a scale, and one that is only called so."""

    def __init__(self):
        super().__init__()
        self.batch = nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm1d(3, affine=False)
        self.group = nn.GroupNorm(2, 6)
        self.instance = nn.InstanceNorm2d(5, affine=True)
        self.layer = nn.LayerNorm((2, 3))
        self.root = nn.RMSNorm(7)
        self.own = LlamaRMSNorm(8)
        self.linear = nn.Linear(3, 3)


class LlamaRMSNorm(nn.Module):
    """A normalization that is no class of torch."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


def test_norm_scales_are_the_weights_of_normalizations():
    targets, left_out = select_targets(Normalized(), NormScale())
    assert [(t.name, t.layout.shape) for t in targets] == [
        ("batch.weight", (4,)),
        ("group.weight", (6,)),
        ("instance.weight", (5,)),
        ("layer.weight", (2, 3)),
        ("root.weight", (7,)),
        ("own.weight", (8,)),
    ]
    assert {left.name: left.reason for left in left_out} == dict.fromkeys(
        ["batch.bias", "group.bias", "instance.bias", "layer.bias", "linear.weight", "linear.bias"], "not a normalization scale"
    )


def test_norm_scales_by_name():
    model = Normalized()
    assert [t.name for t in select_targets(model, NormScale(include=["batch", "o*"], exclude=["own"]))[0]] == ["batch.weight"]
    for fields, said in (
        ({"include": ["linear"]}, "target.norm_scale.include: pattern 'linear' matches no normalization scale of the model; nearest: "),
        ({"include": ["linear.weight"]}, "target.norm_scale.include: pattern 'linear.weight' matches no normalization scale of the model"),
        ({"exclude": ["*"]}, "target.norm_scale: no normalization scale is left (batch.weight: excluded by '*'; "),
    ):
        with pytest.raises(InputError) as error:
            select_targets(model, NormScale(**fields))
        assert str(error.value).startswith(said)
    with pytest.raises(InputError, match=r"^target\.norm_scale: no normalization scale is left \(the model has none\)"):
        select_targets(nn.Linear(2, 2), NormScale())
