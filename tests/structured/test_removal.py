"""Smaller models against the masked ones they come from, in float64; what goes is known from how the masks were made."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from niwaki.errors import NiwakiError
from niwaki.masks import Masks
from niwaki.structured import compose, constants, replay, shrink
from niwaki.tasks import networks


def randomized(model, seed=0):
    """Random numbers in every parameter and statistic, so that nothing cancels by luck; positive variances."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model


def images(*shape, seed=9):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs_masked(model, gone):
    """Masks with whole input channels off: name -> indices."""
    parameters = dict(model.named_parameters())
    masks = {name: torch.ones(parameters[name].shape, dtype=torch.bool) for name in gone}
    for name, indices in gone.items():
        masks[name][:, list(indices)] = False
    return Masks(masks)


def outputs_masked(model, gone):
    parameters = dict(model.named_parameters())
    masks = {name: torch.ones(parameters[name].shape, dtype=torch.bool) for name in gone}
    for name, indices in gone.items():
        masks[name][list(indices)] = False
    return Masks(masks)


def masked(model, masks):
    other = copy.deepcopy(model).eval()
    masks.apply_(other)
    return other


def check(model, masks, x):
    """Shrink; compare outputs on other inputs than the example, gradients with respect to the input, and a replayed fresh model."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = shrink(model, masks, (x[:1],))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole = masked(model, masks)
    x = x.clone().requires_grad_()
    expected = whole(x)
    got = smaller.model.eval()(x)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    direction = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    slopes = [torch.autograd.grad(out, x, direction)[0] for out in (got, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-11)
    fresh = randomized(copy.deepcopy(model), seed=77)
    assert replay(fresh, smaller.removed) is fresh
    fresh.load_state_dict(smaller.model.state_dict())
    assert torch.equal(fresh.eval()(x), got)
    assert repr(fresh) == repr(smaller.model)
    for name, mask in smaller.masks.items():
        assert mask.shape == smaller.model.get_parameter(name).shape
        index = smaller.removed.tensors.get(name, {})
        expected_mask = masks[name]
        for d, kept in index.items():
            expected_mask = expected_mask.index_select(int(d), torch.tensor(kept))
        assert torch.equal(mask, expected_mask)
    return smaller


# ---------------------------------------------------------------- what no layer reads


def test_units_of_a_perceptron_that_nobody_reads_go():
    model = randomized(networks.Perceptron(12, 4, (10, 8)))
    smaller = check(model, inputs_masked(model, {"3.weight": [0, 4, 9], "5.weight": [7]}), images(5, 12))
    shapes = {name: tuple(p.shape) for name, p in smaller.model.named_parameters()}
    assert shapes == {"1.weight": (7, 12), "1.bias": (7,), "3.weight": (7, 7), "3.bias": (7,), "5.weight": (4, 7), "5.bias": (4,)}
    assert smaller.removed.tensors["1.weight"] == {"0": [1, 2, 3, 5, 6, 7, 8]}
    assert smaller.removed.tensors["3.weight"] == {"0": [0, 1, 2, 3, 4, 5, 6], "1": [1, 2, 3, 5, 6, 7, 8]}
    assert (smaller.model[1].out_features, smaller.model[3].in_features) == (7, 7)
    assert smaller.masks.sparsity == 0.0
    assert smaller.notes == []


def test_what_goes_leaves_others_unread():
    """Unit 2 of the last hidden layer is the only one that reads unit 5 of the one before, which alone reads unit 0 of the first."""
    model = randomized(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4), nn.GELU(), nn.Linear(4, 2)))
    masks = dict(inputs_masked(model, {"6.weight": [2]}))
    masks["4.weight"] = torch.ones(4, 7, dtype=torch.bool)
    masks["4.weight"][[0, 1, 3], 5] = False
    masks["2.weight"] = torch.ones(7, 6, dtype=torch.bool)
    masks["2.weight"][[0, 1, 2, 3, 4, 6], 0] = False
    smaller = check(model, Masks(masks), images(5, 3))
    assert [tuple(m.weight.shape) for m in smaller.model if isinstance(m, nn.Linear)] == [(5, 3), (6, 5), (3, 6), (2, 3)]


class Caffe(networks.LeNet5):
    """LeNet-5 with fewer channels."""

    def __init__(self):
        nn.Module.__init__(self)
        self.conv1, self.conv2 = nn.Conv2d(1, 5, 5), nn.Conv2d(5, 6, 5)
        self.linear1, self.linear2 = nn.Linear(6 * 4 * 4, 9), nn.Linear(9, 3)


def test_channels_of_lenet_go_with_their_places_in_the_flattened_input():
    model = randomized(Caffe())
    places = [c * 16 + i for c in (1, 4) for i in range(16)]
    masks = inputs_masked(model, {"conv2.weight": [3], "linear1.weight": places, "linear2.weight": [0]})
    smaller = check(model, masks, images(2, 1, 28, 28))
    assert smaller.model.conv1.weight.shape == (4, 1, 5, 5)
    assert smaller.model.conv2.weight.shape == (4, 4, 5, 5)
    assert smaller.model.linear1.weight.shape == (8, 64)
    assert smaller.removed.tensors["linear1.weight"]["1"] == [i for i in range(96) if i not in places]
    assert (smaller.model.conv2.in_channels, smaller.model.conv2.out_channels) == (4, 4)


def test_a_channel_that_is_read_in_one_place_stays():
    model = randomized(Caffe())
    smaller = check(model, inputs_masked(model, {"linear1.weight": list(range(15))}), images(2, 1, 28, 28))
    assert not smaller.removed
    assert smaller.notes == []


def test_channels_of_vgg_go_with_their_normalizations():
    model = randomized(networks.VGG(classes=3, width=4))
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    masks = inputs_masked(model, {f"{name}.weight": [1, 2] for name in convolutions[1:]})
    smaller = check(model, masks, images(2, 3, 32, 32))
    widths = [smaller.model.get_submodule(name).out_channels for name in convolutions]
    assert widths == [2, 2, 6, 6, 14, 16]
    norms = [module for module in smaller.model if isinstance(module, nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == widths
    assert smaller.removed.tensors["1.running_var"] == {"0": [0, 3]}


class Spatial(nn.Module):
    """Mean over space, reshaping by the batch size, dropout, one-dimensional convolutions and normalizations of flat features."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.conv2 = nn.Conv1d(2, 6, 3, bias=False), nn.Conv1d(6, 5, 3, stride=2, padding=1)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout1d(0.2)
        self.pool = nn.AvgPool1d(2)
        self.flat_norm = nn.BatchNorm1d(5 if how in ("mean", "keep") else 15)
        self.linear = nn.Linear(5 if how in ("mean", "keep") else 15, 4)

    def forward(self, x):
        x = self.pool(self.conv2(F.dropout(self.drop(F.silu(self.norm(self.conv(x)))), 0.1, self.training)))
        x = {
            "mean": lambda: x.mean(-1),
            "keep": lambda: torch.mean(x, dim=2, keepdim=True).flatten(1),
            "size": lambda: x.view(x.size(0), -1),
            "shape": lambda: x.reshape(x.shape[0], -1),
            "flatten": lambda: torch.flatten(x, start_dim=1),
        }[self.how]()
        return self.linear(torch.sigmoid(self.flat_norm(x)))


@pytest.mark.parametrize("how", ["mean", "keep", "size", "shape", "flatten"])
def test_ways_from_space_to_features(how):
    model = randomized(Spatial(how))
    block = model.linear.in_features // 5
    gone = [c * block + i for c in (0, 3) for i in range(block)]
    smaller = check(model, inputs_masked(model, {"conv2.weight": [5], "linear.weight": gone}), images(3, 2, 14))
    assert (smaller.model.conv.out_channels, smaller.model.conv2.out_channels) == (5, 3)
    assert smaller.model.flat_norm.num_features == smaller.model.linear.in_features == 3 * block


def test_tokens_keep_their_features_in_the_last_dimension():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.down(F.gelu(self.up(x))).mean(dim=1))

    model = randomized(Tokens())
    smaller = check(model, inputs_masked(model, {"down.weight": [1, 6], "head.weight": [5]}), images(3, 7, 4))
    assert (smaller.model.up.out_features, smaller.model.down.out_features) == (6, 5)


# ---------------------------------------------------------------- what is a constant


def test_constants_are_folded_into_the_biases_that_read_them():
    model = randomized(Caffe())
    smaller = check(
        model, outputs_masked(model, {"conv1.weight": [0, 2], "conv2.weight": [5], "linear1.weight": [1, 3]}), images(2, 1, 28, 28)
    )
    assert [tuple(p.shape[:2]) for n, p in smaller.model.named_parameters() if n.endswith("weight")] == [(3, 1), (5, 3), (7, 80), (3, 7)]
    assert smaller.notes == []
    biases = [F.relu(model.linear1.bias[[1, 3]]) @ model.linear2.weight[:, [1, 3]].T + model.linear2.bias]
    torch.testing.assert_close(smaller.model.linear2.bias.detach(), biases[0].detach())


def test_constants_through_normalization_and_padding_stay_unless_they_are_zero():
    model = randomized(networks.VGG(classes=3, width=4))
    with torch.no_grad():
        model[1].bias[:2], model[1].bias[2:] = -9.0, 9.0  # after the ReLU: zero, and something
        model[1].weight.fill_(0.1)
    smaller = check(model, outputs_masked(model, {"0.weight": [0, 1, 2]}), images(2, 3, 32, 32))
    assert smaller.removed.tensors["0.weight"] == {"0": [2, 3]}
    [note] = smaller.notes
    assert note.startswith("0: 1 masked unit was not removed: what they are without weights cannot be folded into")


@pytest.mark.parametrize(
    ("options", "goes"),
    [
        ({}, True),
        ({"padding": 1}, False),
        ({"padding": 1, "padding_mode": "circular"}, True),
        ({"bias": False}, False),
        ({"padding": "same"}, False),
        ({"padding": "valid"}, True),
        ({"padding": (0, 1)}, False),
        ({"stride": 2, "dilation": 2}, True),
    ],
)
def test_a_convolution_takes_over_a_constant_where_its_padding_changes_nothing(options, goes):
    model = randomized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3, **options), nn.ReLU(), nn.AdaptiveAvgPool2d(2)))
    smaller = check(model, outputs_masked(model, {"0.weight": [1]}), images(2, 2, 10, 10))
    assert smaller.model[0].out_channels == (3 if goes else 4)


def test_a_constant_that_padding_in_a_pool_makes_uneven_is_folded_where_places_are_read_one_by_one():
    def build(*last):
        return randomized(nn.Sequential(nn.Conv2d(1, 3, 3), nn.AvgPool2d(3, stride=2, padding=1), *last))

    flat = build(nn.Flatten(), nn.Linear(3 * 9, 2))
    assert check(flat, outputs_masked(flat, {"0.weight": [2]}), images(2, 1, 7, 7)).model[0].out_channels == 2
    again = build(nn.Conv2d(3, 2, 2))
    assert check(again, outputs_masked(again, {"0.weight": [2]}), images(2, 1, 7, 7)).model[0].out_channels == 3


def test_all_outputs_masked_leaves_one():
    model = randomized(networks.Perceptron(5, 3, (4, 4)))
    smaller = check(model, outputs_masked(model, {"1.weight": range(4)}), images(3, 5))
    assert smaller.model[1].out_features == 1
    assert smaller.notes == ["1: 1 masked unit was not removed: all of them are masked, and at least one has to stay"]


def test_removal_makes_more_units_constant():
    """Unit 0 reads only unit 1, which goes; what unit 0 is then can be folded too."""
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    masks = dict(outputs_masked(model, {"0.weight": [1]}))
    masks["2.weight"] = torch.ones(5, 4, dtype=torch.bool)
    masks["2.weight"][0, [0, 2, 3]] = False
    smaller = check(model, Masks(masks), images(3, 3))
    assert (smaller.model[0].out_features, smaller.model[2].out_features) == (3, 4)


# ---------------------------------------------------------------- what is left alone


def test_residual_networks_shrink_inside_their_blocks_and_across_them():
    model = randomized(networks.ResNet(blocks=1, classes=3, width=4))
    gone = {"layer1.0.conv2.weight": [0, 1], "layer1.0.conv1.weight": [2], "layer2.0.conv1.weight": [2]}
    smaller = check(model, inputs_masked(model, gone), images(2, 3, 16, 16))
    assert smaller.model.layer1[0].conv1.weight.shape == (2, 4, 3, 3)  # the sum after it is read by the shortcut of layer 2 too
    assert smaller.model.conv1.out_channels == 4
    masks = inputs_masked(model, gone | {"layer3.0.conv1.weight": [2 + 2], "linear.weight": [2 + 2 + 4]})
    smaller = check(model, masks, images(2, 3, 16, 16))
    assert [m.out_channels for m in smaller.model.modules() if isinstance(m, nn.Conv2d)] == [3, 2, 3, 8, 7, 16, 15]


class Odd(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between, features=8):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(4, features), between, nn.Linear(features, 2)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("between", "said"),
    [
        (nn.Softmax(dim=-1), "softmax runs over it"),
        (nn.LayerNorm(8), "a normalization takes the mean and variance over it"),
        (Call(lambda x: F.softmax(x, dim=1)), "softmax runs over it"),
        (Call(lambda x: x.flip(1)), "flip runs over it"),
    ],
)
def test_everything_else_is_left_alone_and_told(between, said):
    model = randomized(Odd(between))
    smaller = check(
        model, Masks({**inputs_masked(model, {"last.weight": [3]}), **outputs_masked(model, {"first.weight": [5]})}), images(3, 4)
    )
    assert not smaller.removed
    assert smaller.notes[0].startswith(f"first: 2 masked units were not removed: {said}")


@pytest.mark.parametrize(
    "between", [nn.PReLU(8), Call(lambda x: torch.cat([x[:, :4], x[:, 4:]], dim=1)), Call(lambda x: x + 2 * x), Call(lambda x: x.T.T)]
)
def test_what_keeps_units_apart_is_passed(between):
    model = randomized(Odd(between))
    masks = Masks({**inputs_masked(model, {"last.weight": [3]}), **outputs_masked(model, {"first.weight": [5]})})
    assert check(model, masks, images(3, 4)).model.last.in_features == 6


def test_a_mean_over_units_counts_them():
    model = randomized(Odd(Call(lambda x: x.mean(1, keepdim=True).expand(-1, 8))))
    smaller = check(model, outputs_masked(model, {"first.weight": [5]}), images(3, 4))
    assert not smaller.removed


def test_a_size_in_the_models_own_code_keeps_its_group_and_the_others_go():
    model = randomized(nn.Sequential(Odd(Call(lambda x: x.view(-1, 8))), nn.Tanh(), nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)))
    masks = inputs_masked(model, {"0.last.weight": [3], "4.weight": [0, 2]})
    smaller = check(model, masks, images(3, 4))
    assert (smaller.model[0].first.out_features, smaller.model[2].out_features) == (8, 3)
    [note] = smaller.notes
    assert note == (
        "0.first: 1 masked unit was not removed: with 7 of 8 the model computes something else (RuntimeError: shape '[-1, 8]' is invalid"
        " for input of size 7), whatever numbers follow (none has such a value). If another one has to, say attributes={path: value} (the"
        " modules have none); if groups share one, mask as many units of each; if none can, exclude='0.first' saves the trials"
    )
    assert not torch.equal(smaller.masks["0.last.weight"], torch.ones(2, 8, dtype=torch.bool))
    [note] = shrink(model, masks, (images(3, 4),), exclude="0.first").notes
    assert note == "0.first: 1 masked unit was not removed: it is excluded"


def test_a_bias_that_took_constants_over_gives_them_back_when_their_group_stays():
    model = randomized(Odd(Call(lambda x: x.view(-1, 8))))
    smaller = check(model, outputs_masked(model, {"first.weight": [3]}), images(3, 4))
    assert not smaller.removed
    assert torch.equal(smaller.model.last.bias, model.last.bias)


class Many(nn.Module):
    """A layer used twice, two layers with one weight, and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.tied, self.other = (nn.Linear(6, 6) for _ in range(4))
        self.other.weight = self.tied.weight
        self.before, self.grouped, self.last = nn.Conv1d(6, 6, 1), nn.Conv1d(6, 6, 1, groups=2), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        x = self.other(self.tied(torch.relu(self.twice(self.twice(x)))))
        return self.last(self.grouped(self.before(x.unsqueeze(2))).mean(-1))


def test_layers_that_are_shared_tied_or_grouped_shrink_as_one():
    model = randomized(Many())
    masks = inputs_masked(model, {"twice.weight": [1], "tied.weight": [1], "before.weight": [1], "last.weight": [0, 3]})
    smaller = check(model, masks, images(2, 6)).model
    assert (smaller.first.out_features, smaller.twice.weight.shape, smaller.tied.in_features) == (5, (5, 5), 5)
    assert smaller.tied.weight is smaller.other.weight
    assert (smaller.grouped.out_channels, smaller.grouped.groups, smaller.last.in_features) == (4, 2, 4)


def test_weights_that_read_themselves_are_read_as_long_as_another_reads_them():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.shared(F.relu(self.shared(F.relu(self.first(x))))))

    model = randomized(Shared())
    masks = inputs_masked(model, {"shared.weight": [2]})
    assert not check(model, masks, images(3, 4)).removed  # last reads it
    masks = inputs_masked(model, {"shared.weight": [2], "last.weight": [2]})
    assert check(model, masks, images(3, 4)).model.shared.weight.shape == (3, 3)


def test_a_gate_makes_of_a_constant_what_is_none():
    """The masked unit is its bias times a gate that depends on the input; with one place the example alone does not show that."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(3, 5), nn.Linear(3, 1), nn.Linear(5, 2)

        def forward(self, x):
            return self.down(self.up(x) * torch.sigmoid(self.gate(x)))

    model = randomized(Gated())
    smaller = check(model, outputs_masked(model, {"up.weight": [1]}), images(4, 3))
    assert not smaller.removed
    assert smaller.notes[0].startswith("up: 1 masked unit was not removed: what they are")
    with torch.no_grad():
        model.up.bias[1] = 0.0
    assert check(model, outputs_masked(model, {"up.weight": [1]}), images(4, 3)).model.up.out_features == 4


def test_a_unit_that_is_dead_on_the_example_alone_stays():
    """It has no active weight in one branch of a sum, and the other is zero on the example."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.relu(self.a(x)) + torch.relu(self.b(x)))

    model = randomized(Branches())
    with torch.no_grad():
        model.b.bias[0] = -1.0
        model.b.weight[0] = 0.1
        model.a.bias[0] = 0.0
    assert not check(model, outputs_masked(model, {"a.weight": [0]}), torch.cat([images(1, 3) * 0.1, images(4, 3) * 100])).removed


def test_constants_from_masked_scales_of_normalizations_are_folded():
    """As after network slimming: the scale is masked, the convolution and the offset are not."""
    model = randomized(nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.Flatten(), nn.Linear(27, 2)))
    scale = torch.tensor([True, False, True, False, True])
    smaller = check(model, Masks({"1.weight": scale}), images(2, 2, 7, 7))
    assert (smaller.model[0].out_channels, smaller.model[1].num_features, smaller.model[3].in_channels) == (3, 3, 3)


def test_a_bias_that_is_masked_takes_nothing_over():
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    masks = {**outputs_masked(model, {"0.weight": [1]}), "2.bias": torch.tensor([True, False])}
    assert not check(model, Masks(masks), images(3, 3)).removed


def test_what_runs_may_depend_on_the_data():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.b(self.a(x) * 2)

    model = randomized(Branches())
    smaller = shrink(model, inputs_masked(model, {"b.weight": [0]}), (images(2, 3).abs(),))
    assert smaller.model.a.out_features == 2


def test_random_masks_change_nothing_in_what_is_computed():
    """Masks that follow no plan: whatever goes, the outputs stay."""
    removed = 0
    for seed in range(6):
        model = randomized(Caffe(), seed)
        generator = torch.Generator().manual_seed(seed)
        masks = {n: torch.rand(p.shape, generator=generator) < 0.03 for n, p in model.named_parameters() if n.endswith("weight")}
        removed += len(check(model, Masks(masks), images(2, 1, 28, 28)).removed.tensors)
    assert removed


# ---------------------------------------------------------------- faults


def test_a_removal_that_changes_outputs_is_taken_back(monkeypatch):
    model = randomized(networks.Perceptron(5, 3, (4, 4)))
    model[1].bias.data[:2] = 1.0
    monkeypatch.setattr(constants, "fold", lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    smaller = shrink(model, outputs_masked(model, {"1.weight": [0, 1]}), (images(3, 5),), in_place=True)
    assert not smaller.removed
    assert smaller.notes[0].startswith("1: 2 masked units were not removed: with 2 of 4 the model computes something else")
    assert "(outputs of size 1 differ by " in smaller.notes[0]
    kept = torch.tensor([False, False, True, True])
    assert torch.equal(model[1].weight, before["1.weight"] * kept[:, None])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name != "1.weight")


def test_a_number_that_is_told_wrong_is_an_error_and_nothing_is_changed():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.times = nn.Linear(4, 8), nn.Linear(8, 2), 3

        def forward(self, x):
            return self.last(torch.relu(self.first(x))) * self.times

    model = randomized(Scaled())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NiwakiError, match=r"shrink changed what the model computes: outputs of size .* differ .*; nothing was changed"):
        shrink(model, inputs_masked(model, {"last.weight": [3]}), (images(3, 4),), attributes={"times": 5}, in_place=True)
    assert model.times == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_and_what_requires_gradients_stay_and_the_model_trains_on():
    model = randomized(networks.VGG(classes=3, width=4)).train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    smaller = shrink(model, inputs_masked(model, {"3.weight": [0]}), (images(1, 3, 32, 32),)).model
    assert [m.training for m in smaller.modules()] == [m.training for m in model.modules()]
    assert not smaller[0].weight.requires_grad
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.1)
    before = smaller[3].weight.clone()
    smaller(images(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert not torch.equal(smaller[3].weight, before)


def test_two_removals_in_a_row_are_one():
    model = randomized(networks.Perceptron(6, 3, (8, 8)))
    x = images(4, 6)
    first = shrink(model, inputs_masked(model, {"3.weight": [0, 5]}), (x,))
    second = shrink(first.model, inputs_masked(first.model, {"3.weight": [1], "5.weight": [7]}), (x,))
    both = compose(first.removed, second.removed)
    assert both.tensors["1.weight"] == {"0": [1, 3, 4, 6, 7]}
    fresh = replay(randomized(networks.Perceptron(6, 3, (8, 8)), 3), both)
    fresh.load_state_dict(second.model.state_dict())
    assert torch.equal(fresh(x), second.model(x))
