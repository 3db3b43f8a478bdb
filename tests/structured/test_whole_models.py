"""Whole units of many kinds of models: the smaller model equals the masked one on inputs that it was not made with."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from structured.whole import Dense, Inverted, Recurrent, Tokens, check, masked, masks_of, outputs, randomized
from torch import nn

import niwaki
from niwaki.dependency import Group, Member, find_groups
from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.structured import Removed, cutting, replay, running, shrink
from niwaki.tasks import networks

UNITS = ("channel", "channel_group", "head", "query_head", "head_dim")


def tokens(batch, length, seed=3):
    return (torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(seed)),)


def images(batch, channels, size, seed=3):
    return (torch.randn(batch, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


MODELS = {
    "transformer": (lambda: Tokens(2), tokens, 5),
    "multi-query": (lambda: Tokens(2, key_heads=1), tokens, 5),
    "one key for each query": (lambda: Tokens(2, key_heads=4), tokens, 5),
    "built-in transformer": (lambda: networks.Transformer(11, 16, 24, 2, 4), tokens, 5),
    "lstm": (Recurrent, tokens, 5),
    "lstm of two layers, both ways": (lambda: Recurrent(num_layers=2, bidirectional=True), tokens, 5),
    "gru": (lambda: Recurrent(nn.GRU), tokens, 5),
    "depthwise and squeeze": (Inverted, lambda batch, _, **seed: images(batch, 3, 6, **seed), 0),
    "dense and groups": (Dense, lambda batch, _, **seed: images(batch, 2, 6, **seed), 0),
    "vgg": (lambda: networks.VGG(3, 4), lambda batch, _, **seed: images(batch, 3, 32, **seed), 0),
    "resnet": (lambda: networks.ResNet(2, 3, 4), lambda batch, _, **seed: images(batch, 3, 16, **seed), 0),
}


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_masked_units_go(name, share):
    build, inputs, length = MODELS[name]
    model = randomized(build())
    example = inputs(1, length)
    groups = find_groups(model, example)
    masks = masks_of(model, groups, UNITS, share)
    smaller = check(model, masks, example, inputs(3, length + 2, seed=8))
    assert smaller.masks.sparsity < masks.sparsity
    after = {group.name: group.size for group in find_groups(smaller.model, example)}
    taken = [
        g
        for g in groups
        if g.removable and g.kind in ("channel", "head", "query_head") and not any("MultiheadAttention" in n for n in smaller.notes)
    ]
    assert taken
    for group in taken:
        if group.name in after:
            assert after[group.name] == group.size - int(group.size * share)


@pytest.mark.parametrize("kind", ["head", "query_head"])
def test_heads_go_with_the_numbers_that_count_them(kind):
    model = randomized(Tokens(2))
    masks = masks_of(model, find_groups(model, tokens(1, 4)), [kind])
    smaller = check(model, masks, tokens(1, 4), tokens(2, 6, seed=1))
    attention = smaller.model.blocks[1].attn
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == {"head": (2, 1, 3), "query_head": (2, 2, 3)}[kind]
    assert smaller.removed.attributes["blocks.1.attn.num_heads"] == 2
    assert model.blocks[1].attn.num_heads == 4


def test_one_head_of_each_layer_by_itself():
    model = randomized(Tokens(2, key_heads=4))
    groups = [g for g in find_groups(model, tokens(1, 4)) if g.kind == "head"]
    masks = dict(masks_of(model, groups[:1], ["head"], 0.25)) | {
        name: mask for name, mask in masks_of(model, groups[1:], ["head"], 0.75).items() if name.startswith("blocks.1")
    }
    smaller = check(model, Masks(masks), tokens(1, 4), tokens(2, 6, seed=1))
    assert [block.attn.num_heads for block in smaller.model.blocks] == [3, 1]


class Odd(nn.Module):
    """Attention whose number of heads has a name of its own, beside a number that happens to be the same."""

    def __init__(self, names=("antlers",)):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        for name in names:
            setattr(self, name, 4)
        self.names = names
        self.other = nn.Linear(8, 2)

    def forward(self, x):
        heads = sum(getattr(self, name) for name in self.names) // len(self.names)
        q, k, v = (y(x).unflatten(-1, (heads, 2)).transpose(1, 2) for y in (self.q, self.k, self.v))
        y = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.other(self.o(y) + x)


def test_a_number_with_an_unknown_name_is_found_by_trying():
    model = randomized(Odd())
    model.repeats = 4
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    masks = masks_of(model, find_groups(model, (x,)), ["head"])
    smaller = check(model, masks, (x,), (torch.randn(2, 5, 8, dtype=torch.float64),))
    assert (smaller.model.antlers, smaller.model.repeats) == (2, 4)
    assert smaller.removed.attributes == {"antlers": 2}


def test_what_cannot_be_found_can_be_said():
    class Hidden(Odd):
        """Twice the heads: no number has the value that changes."""

        def __init__(self):
            super().__init__(())
            self.twice = 8

        def forward(self, x):
            self.names, self.heads_now = ("heads_now",), self.twice // 2
            return super().forward(x)

    model = randomized(Hidden())
    model.twice = 9
    x = (torch.randn(1, 3, 8, dtype=torch.float64),)
    masks = masks_of(model, find_groups(model, x), ["head"])
    smaller = shrink(model, masks, x)
    assert not smaller.removed
    [note] = smaller.notes
    assert ":head: 2 masked units were not removed: with 2 of 4 the model computes something else (" in note
    assert "whatever numbers follow (heads_now=2). If another one has to, say attributes={path: value} (the model: twice=9, " in note
    smaller = shrink(model, masks, x, attributes={"twice": 5})
    assert smaller.removed.attributes["twice"] == 5
    torch.testing.assert_close(smaller.model(*x), masked(model, masks)(*x))
    with pytest.raises(InputError, match="attributes: this Hidden has no 'thrice'"):
        shrink(model, masks, x, attributes={"thrice": 5})


class Shared(nn.Module):
    """Attention layers that read the number of heads where all of them can: in an object, or in one that is read twice."""

    def __init__(self, settings, layers):
        super().__init__()
        self.settings = settings
        self.layers = nn.ModuleList(Reader(settings) for _ in range(layers))
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.down(torch.relu(self.up(x)))


class Reader(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        antlers, points = self.settings.antlers, self.settings.points
        q, k, v = (y(x).unflatten(-1, (antlers, -1)).transpose(1, 2) for y in (self.q, self.k, self.v))
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], points)) + x


def shared_heads(counts, kind=SimpleNamespace):
    """A model of layers with 4 heads of 2, and masks of some of them in each layer, and of half of the hidden units."""
    model = randomized(Shared(kind(antlers=4, points=8, other=4), len(counts)), seed=1)
    groups = find_groups(model, vectors(1))
    masks = dict(masks_of(model, groups, ["channel"]))
    for group, count in zip([g for g in groups if g.kind == "head"], counts, strict=True):
        mine = masks_of(model, [group], ["head"], count / 4, seed=count)
        masks = {name: mask & mine[name] for name, mask in masks.items()}
    return model, Masks(masks)


def vectors(seed, count=2):
    return (torch.randn(count, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


def test_heads_of_all_layers_go_with_the_numbers_that_they_share():
    """Two numbers, neither of which does it alone, and a third of the same value that must stay."""
    model, masks = shared_heads([2, 2, 2])
    smaller = check(model, masks, vectors(1), vectors(2))
    assert vars(smaller.model.settings) == {"antlers": 2, "points": 4, "other": 4}
    assert smaller.removed.attributes == {"settings.antlers": 2, "settings.points": 4}
    assert vars(model.settings) == {"antlers": 4, "points": 8, "other": 4}
    assert (smaller.model.layers[2].o.in_features, smaller.model.up.out_features) == (4, 3)
    assert smaller.notes == []
    shrink(model, masks, vectors(1), in_place=True)
    assert vars(model.settings) == {"antlers": 2, "points": 4, "other": 4}


def test_of_groups_that_share_a_number_as_many_go_as_of_the_one_that_loses_fewest():
    model, masks = shared_heads([3, 2, 1])
    smaller = check(model, masks, vectors(1), vectors(2))
    assert vars(smaller.model.settings) == {"antlers": 3, "points": 6, "other": 4}
    assert [layer.o.in_features for layer in smaller.model.layers] == [6, 6, 6]
    assert [note.split(":head: ")[1][:14] for note in smaller.notes] == ["2 masked units", "1 masked unit "]
    assert "if groups share one, mask as many units of each" in smaller.notes[0]


def test_groups_that_cannot_share_a_smaller_number_stay_and_the_others_go():
    model, masks = shared_heads([2, 2, 0])
    smaller = check(model, masks, vectors(1), vectors(2))
    assert vars(smaller.model.settings) == vars(model.settings)
    assert (smaller.model.layers[0].q.out_features, smaller.model.up.out_features) == (8, 3)
    assert len(smaller.notes) == 2
    assert smaller.notes[0].startswith("layers.0.q:head: 2 masked units were not removed: with 2 of 4 the model computes something else")


def test_a_shared_number_can_be_told():
    model, masks = shared_heads([2, 2, 2])
    smaller = check(model, masks, vectors(1), vectors(2), attributes={"layers.1.settings.antlers": 2, "settings.points": 4})
    assert vars(smaller.model.settings) == {"antlers": 2, "points": 4, "other": 4}


def test_numbers_of_frozen_objects_stay():
    @dataclass(frozen=True)
    class Frozen:
        antlers: int
        points: int
        other: int

    model, masks = shared_heads([2, 2, 2], Frozen)
    smaller = check(model, masks, vectors(1), vectors(2))
    assert smaller.model.settings == Frozen(4, 8, 4)
    assert smaller.model.up.out_features == 3
    assert len(smaller.notes) == 3


def test_the_search_is_not_made_again_for_each_layer(monkeypatch):
    calls = []
    monkeypatch.setattr(cutting, "run", lambda *given: calls.append(1) or running.run(*given))
    counts = []
    for layers in (3, 6):
        model, masks = shared_heads([2] * (layers - 1) + [0])
        calls.clear()
        assert len(shrink(model, masks, vectors(1)).notes) == layers - 1
        counts.append(len(calls))
    assert counts[1] - counts[0] <= 6 * 3  # a few for each layer
    assert counts[1] < 60


def test_parts_of_one_layer_that_are_split_by_one_number():
    """As in Res2Net: four groups of channels in one convolution."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 6
            self.first, self.last = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 4, 1)
            self.norm = nn.BatchNorm2d(24)
            self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))

        def forward(self, x):
            *parts, rest = torch.split(torch.relu(self.norm(self.first(x))), self.width, 1)
            return self.last(torch.cat([*(conv(part) for conv, part in zip(self.convs, parts, strict=True)), rest], 1))

    model = randomized(Split())
    masks = masks_of(model, find_groups(model, images(1, 3, 4)), ["channel"], 0.5)
    smaller = check(model, masks, images(1, 3, 4), images(2, 3, 5))
    assert (smaller.model.width, smaller.model.first.out_channels, smaller.model.norm.num_features) == (3, 12, 12)
    assert [conv.weight.shape[:2] for conv in smaller.model.convs] == [(3, 3)] * 3


def test_what_modules_keep_of_their_weights_is_made_anew():
    class Keeping(nn.Module):
        """Keeps its bias, repeated, in evaluation mode, as some transformers for images do."""

        def __init__(self):
            super().__init__()
            self.up, self.down, self.bias, self.kept = nn.Linear(4, 8), nn.Linear(8, 2), nn.Parameter(torch.zeros(8)), None

        def train(self, mode=True):
            self.kept = None if mode else self.kept
            return super().train(mode)

        def forward(self, x):
            if self.kept is None:
                self.kept = self.bias.expand(3, -1)
            return self.down(torch.relu(self.up(x) + self.kept))

    model = randomized(Keeping()).eval()
    x = (torch.randn(3, 4, dtype=torch.float64),)
    masks = masks_of(model, find_groups(model, x), ["channel"])
    expected = masked(model, masks).train()(*x)
    with torch.no_grad():
        model(*x)
    assert shrink(model, masks, x).model.down.in_features == 4
    shrink(model, masks, x, in_place=True)
    assert model.down.in_features == 4
    assert not model.training
    torch.testing.assert_close(model(*x), expected)


def test_heads_of_torchs_own_attention_stay_and_are_told():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = randomized(nn.Sequential(layer, nn.Linear(8, 2)))
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    masks = masks_of(model, find_groups(model, (x,)), UNITS)
    smaller = check(model, masks, (x,), (torch.randn(2, 5, 8, dtype=torch.float64),))
    assert smaller.model[0].linear1.out_features == 6
    assert smaller.model[0].self_attn.num_heads == 2


# ---------------------------------------------------------------- whole blocks


def test_masked_blocks_are_taken_out_and_the_others_renumbered():
    model = randomized(Tokens(4))
    parameters = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    masks = Masks({name: keep & (".1." not in f".{name}" and not name.startswith("blocks.2.")) for name, keep in parameters.items()})
    smaller = check(model, masks, tokens(1, 4), tokens(2, 6, seed=1))
    assert smaller.removed.layers == {"blocks": [0, 3]}
    assert len(smaller.model.blocks) == 2
    assert torch.equal(smaller.model.blocks[1].up.weight, model.blocks[3].up.weight)
    assert all(name in dict(smaller.model.named_parameters()) for name in smaller.masks)
    assert smaller.masks.sparsity == 0.0


def test_blocks_and_units_go_together():
    model = randomized(Tokens(3))
    example = tokens(1, 4)
    groups = find_groups(model, example)
    masks = dict(masks_of(model, groups, UNITS, 0.5))
    masks |= {name: torch.zeros_like(mask) for name, mask in masks.items() if name.startswith("blocks.1.")}
    smaller = check(model, Masks(masks), example, tokens(2, 6, seed=1))
    assert smaller.removed.layers == {"blocks": [0, 2]}
    assert not any(name.startswith("blocks.1.") for name in smaller.removed.tensors)
    assert [block.down.in_features for block in smaller.model.blocks] == [5, 5]
    assert [name for name in smaller.removed.attributes if name.startswith("blocks")]


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Deep(nn.Module):
    """Blocks that are taken by their numbers: as many as a number of the model's own, or of its settings, or always three."""

    def __init__(self, where):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(3))
        self.last, self.where, self.depth, self.settings = nn.Linear(4, 2), where, 3, SimpleNamespace(rows=3)

    def forward(self, x):
        for i in range({"own": self.depth, "settings": self.settings.rows, "nowhere": 3}[self.where]):
            x = self.blocks[i](x)
        return self.last(x)


@pytest.mark.parametrize(("where", "blocks"), [("own", 2), ("settings", 2), ("nowhere", 3)])
def test_a_number_of_blocks_follows_or_they_stay_and_the_rest_goes(where, blocks):
    model = randomized(Deep(where))
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    masks |= {name: torch.zeros_like(mask) for name, mask in masks.items() if name.startswith("blocks.1.")}
    masks["blocks.2.2.weight"][:, :2] = False
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    smaller = check(model, Masks(masks), (x[0],), (x[1],), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(smaller.model.blocks) == blocks
    [group] = smaller.optimizer.param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in smaller.model.parameters()}
    assert smaller.model.blocks[-1][2].in_features == 4
    assert (smaller.model.depth, smaller.model.settings.rows) == {"own": (2, 3), "settings": (2, 2), "nowhere": (3, 3)}[where]
    assert any("with 2 of 3 the model computes something else (IndexError" in note for note in smaller.notes) is (where == "nowhere")


def test_one_block_stays():
    model = randomized(Tokens(2))
    masks = Masks({name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters() if name.startswith("blocks")})
    assert len(check(model, masks, tokens(1, 4), tokens(2, 6, seed=1)).model.blocks) == 1


# ---------------------------------------------------------------- what a user asks for besides


def two_layers():
    return randomized(nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 2)))


def columns(gone):
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[:, gone] = False
    return {"2.weight": keep}


def test_widths_are_rounded_up_with_the_units_of_largest_norm():
    model = two_layers()
    gone = [0, 2, 3, 7, 9, 10, 11]
    norms = (model[0].weight.square().sum(1) + model[0].bias.square() + model[2].weight.square().sum(0)).sqrt()
    best = sorted(gone, key=lambda i: -norms[i].item())[:3]
    x = (torch.randn(1, 3, dtype=torch.float64),)
    smaller = check(model, Masks(columns(gone)), x, (torch.randn(4, 3, dtype=torch.float64),), round_to=8)
    assert smaller.removed.tensors["0.bias"]["0"] == sorted({*range(12)} - {*gone} | {*best})
    assert shrink(model, columns([0]), x, round_to=8).model[0].out_features == 12
    assert shrink(model, columns(gone), x, round_to=1).model[0].out_features == 5


def test_a_minimum_stays():
    x = (torch.randn(1, 3, dtype=torch.float64),)
    smaller = shrink(two_layers(), columns(range(12)), x, minimum=4)
    assert smaller.model[0].out_features == 4
    assert smaller.notes[0] == "0: 4 masked units were not removed: all of them are masked, and at least one has to stay"
    assert shrink(two_layers(), columns(range(12)), x).model[0].out_features == 1
    assert shrink(two_layers(), columns([1]), x, minimum=99).model[0].out_features == 12


def test_rounding_counts_entries_of_heads():
    """Heads of 3 dimensions: widths are multiples of 6 with an even number of heads."""
    model = randomized(Tokens(1, key_heads=4))
    masks = masks_of(model, find_groups(model, tokens(1, 4)), ["head"], 0.75)
    smaller = check(model, masks, tokens(1, 4), tokens(2, 4, seed=2), round_to=6)
    assert smaller.model.blocks[0].attn.num_heads == 2


@pytest.mark.parametrize("pattern", ["0", "2.weight", "0.*", ["2*", "0"]])
def test_what_is_excluded_stays(pattern):
    x = (torch.randn(1, 3, dtype=torch.float64),)
    smaller = shrink(two_layers(), columns([1, 2]), x, exclude=pattern)
    assert not smaller.removed
    assert smaller.notes == ["0: 2 masked units were not removed: it is excluded"]


def group_of(name, dim, entries):
    return Group("g", "channel", 3, (Member(name, dim, torch.arange(entries), "output"),))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exclude": "conv*"}, "exclude: 'conv*' matches no group and no tensor of one; choices: 0, 2"),
        ({"round_to": 0}, "round_to: 0 is no number of units; give at least 1"),
        ({"minimum": 0}, "minimum: 0 is no number of units"),
        (
            {"groups": [Group("g", "channel", 3, (Member("9.weight", 0, torch.arange(3), "output"),))]},
            "groups: g: the model has no tensor '9.weight'",
        ),
        ({"groups": [Group("g", "channel", 3, (Member("0.bias", 1, torch.arange(3), "along"),))]}, "no tensor '0.bias' with a dimension 1"),
        (
            {"groups": [Group("g", "channel", 3, (Member("0.bias", 0, torch.arange(12), "along"),))]},
            "groups: g: its units for '0.bias' are 12 numbers up to 11; expected one for each of the 12 entries",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(options, said):
    model = two_layers()
    with pytest.raises(InputError) as error:
        shrink(model, columns([1]), (torch.randn(1, 3, dtype=torch.float64),), **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_masks_and_examples_that_do_not_fit_are_told():
    with pytest.raises(InputError, match=r"masks: '3\.weight' is not a parameter of this Sequential"):
        shrink(two_layers(), {"3.weight": torch.ones(2, dtype=torch.bool)}, torch.randn(1, 3, dtype=torch.float64))
    with pytest.raises(InputError, match="example: Sequential does not run on it"):
        shrink(two_layers(), columns([1]), torch.randn(1, 4, dtype=torch.float64))


def test_groups_by_hand():
    """Only what they say goes together goes."""
    model = two_layers()
    units = torch.arange(12)
    members = (Member("0.weight", 0, units, "output"), Member("0.bias", 0, units, "along"), Member("2.weight", 1, units, "input"))
    x = (torch.randn(1, 3, dtype=torch.float64),)
    group = Group("mine", "channel", 12, members)
    assert check(model, Masks(columns([1, 5])), x, (torch.randn(4, 3, dtype=torch.float64),), groups=[group]).model[0].out_features == 10
    vetoed = Group("mine", "channel", 12, members, reason="I say so")
    smaller = shrink(model, columns([1, 5]), x, groups=[vetoed])
    assert smaller.notes == ["mine: 2 masked units were not removed: I say so"]


def test_a_recipe_masks_once_and_what_it_masks_goes():
    model = randomized(networks.VGG(3, 4)).train()
    example = images(1, 3, 32)
    recipe = niwaki.Recipe(sparsity=0.5, granularity="channel")
    smaller = shrink(model, recipe, example)
    convolutions = [(a, b) for a, b in zip(model, smaller.model, strict=True) if isinstance(a, nn.Conv2d)]
    assert all(b.out_channels == a.out_channels // 2 for a, b in convolutions[1:])
    assert model.training
    assert smaller.model.training


def test_in_place_the_model_and_its_optimizer_are_the_same_objects():
    model = two_layers().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    x = torch.randn(4, 3, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    masks = {**columns([3, 4]), "0.weight": torch.ones(12, 3, dtype=torch.bool)}
    masks["0.weight"][7] = False  # a constant, which the bias of the second layer takes over
    expected = masked(model, Masks(masks))(x)
    smaller = shrink(model, masks, x[:1], optimizer=optimizer, in_place=True)
    assert smaller.model is model
    assert smaller.optimizer is optimizer
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(x), expected)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (9, 3)
    assert not shrink(model, {}, x[:1]).removed


def test_a_copy_leaves_model_and_optimizer_alone_and_brings_its_own():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(4, 3, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    smaller = shrink(model, columns([3, 4]), x[:1], optimizer=optimizer)
    assert {id(p) for p in smaller.optimizer.param_groups[0]["params"]} == {id(p) for p in smaller.model.parameters()}
    assert smaller.optimizer.state[smaller.model[0].bias]["momentum_buffer"].shape == (10,)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert optimizer.state[model[0].bias]["momentum_buffer"].shape == (12,)


@pytest.mark.parametrize(("kind", "options"), [(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})])
def test_training_goes_on_as_that_of_the_masked_model(kind, options):
    """Momentum in float64: five masked steps, shrinking, and five more, against ten masked steps."""
    model = randomized(Inverted()).train()
    example = images(1, 3, 6)
    masks = masks_of(model, find_groups(model, example), ["channel"], 0.5)
    masks.apply_(model)
    other = copy.deepcopy(model)

    def train(model, optimizer, masks, steps):
        for step in steps:
            optimizer.zero_grad()
            model(*images(4, 3, 6, seed=step)).square().sum().backward()
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter.grad[~masks[name]] = 0.0
            optimizer.step()
            masks.apply_(model)

    optimizers = kind(model.parameters(), **options), kind(other.parameters(), **options)
    train(model, optimizers[0], masks, range(5))
    train(other, optimizers[1], masks, range(10))
    smaller = shrink(model, masks, example, optimizer=optimizers[0])
    train(smaller.model, smaller.optimizer, smaller.masks, range(5, 10))
    x = images(3, 3, 6, seed=77)
    torch.testing.assert_close(smaller.model.eval()(*x), other.eval()(*x), rtol=1e-9, atol=1e-9)
    average = replay(torch.optim.swa_utils.AveragedModel(other), smaller.removed)
    torch.testing.assert_close(average.module(*x), other(*x), rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_masked_model():
    model = randomized(Tokens(2))
    example = tokens(1, 4)
    masks = masks_of(model, find_groups(model, example), ["channel", "head"], 0.5)
    smaller = shrink(model, masks, example)
    whole = masked(model, masks)
    x = tokens(3, 6, seed=4)
    for one in (smaller.model.eval(), whole):
        one(*x).square().sum().backward()
    for name, parameter in smaller.model.named_parameters():
        gradient = whole.get_parameter(name).grad
        for dim, kept in smaller.removed.tensors.get(name, {}).items():
            gradient = gradient.index_select(int(dim), torch.tensor(kept))
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- dead units


@pytest.mark.parametrize(("build", "x"), [(networks.LeNet5, images(2, 1, 28)), (lambda: networks.ResNet(1, 10, 8), images(2, 3, 16))])
def test_dead_units_of_a_network_of_98_percent_zeros_go_and_outputs_stay(build, x):
    """The largest 2 % of all weights, as magnitude pruning over all layers leaves them."""
    model = randomized(build())
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    scores = {name: p.detach().abs() / p[0].numel() ** 0.5 for name, p in weights.items()}  # larger ones in small layers
    threshold = torch.cat([score.flatten() for score in scores.values()]).quantile(0.98)
    masks = Masks({name: score > threshold for name, score in scores.items()})
    smaller = check(model, masks, tuple(t[:1] for t in x), x)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (smaller.model, model)]
    assert sizes[0] < 0.9 * sizes[1]
    assert smaller.masks.active <= masks.active


def test_nothing_to_remove_gives_an_equal_copy():
    model = two_layers()
    smaller = shrink(model, {}, torch.randn(1, 3, dtype=torch.float64))
    assert smaller.removed == Removed()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), smaller.model.parameters(), strict=True))


def test_devices_dtypes_and_hooks():
    model = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 2)).to(torch.bfloat16)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    smaller = shrink(model, columns([1, 2]), torch.randn(1, 3).to(torch.bfloat16))
    assert smaller.model[0].weight.dtype == torch.bfloat16
    calls.clear()
    smaller.model(torch.randn(1, 3).to(torch.bfloat16))
    assert calls == [1]
    assert outputs(smaller.model, (torch.ones(1, 3).to(torch.bfloat16),)).shape == (1, 2)
