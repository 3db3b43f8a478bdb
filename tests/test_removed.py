"""A removal as data: what it means for names, shapes and modules, against indexing by hand."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from niwaki.errors import InputError
from niwaki.removed import Removed, compose, cut, replay


def chain():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


KEEP = {"tensors": {"0.weight": {"0": [1, 3]}, "0.bias": {"0": [1, 3]}, "2.weight": {"1": [1, 3]}}}


def test_it_is_plain_data():
    removed = Removed.of(KEEP | {"attributes": {"heads": 2}, "layers": {"blocks": [0, 2]}})
    assert Removed.of(json.loads(removed.model_dump_json())) == removed
    assert not Removed()
    assert removed


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, lambda m: AveragedModel(m, use_buffers=True)])
def test_what_is_kept_is_what_stays(wrap):
    model = chain()
    before = copy.deepcopy(model.state_dict())
    wrapped = wrap(model)
    assert replay(wrapped, KEEP) is wrapped
    inner = wrapped.module if isinstance(wrapped, AveragedModel) else model
    assert torch.equal(inner[0].weight, before["0.weight"][[1, 3]])
    assert torch.equal(inner[0].bias, before["0.bias"][[1, 3]])
    assert torch.equal(inner[2].weight, before["2.weight"][:, [1, 3]])
    assert (inner[0].out_features, inner[2].in_features) == (2, 2)


def test_parameters_stay_themselves_with_gradients_slots_ties_and_hooks():
    model = chain()
    model.add_module("3", nn.Linear(2, 4))
    model[3].weight = nn.Parameter(torch.randn(2, 2))
    model[3].bias = model[2].bias
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    loss = model(torch.randn(5, 3)).square().sum()
    loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    gradient = model[0].weight.grad.clone()
    slots = {name: slot.clone() for name, slot in optimizer.state[model[0].weight].items()}
    replay(model, KEEP, optimizer)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model[0].weight.grad, gradient[[1, 3]])
    for name, slot in optimizer.state[model[0].weight].items():
        assert torch.equal(slot, slots[name] if slot.ndim == 0 else slots[name][[1, 3]])
    assert model[3].bias is model[2].bias
    optimizer.zero_grad()
    model(torch.randn(5, 3)).square().sum().backward()  # with the old loss and its graph still there
    optimizer.step()
    assert seen == [torch.Size([4, 3]), torch.Size([2, 3])]


def test_buffers_that_are_not_saved_are_cut_too():
    model = nn.Linear(3, 4)
    model.register_buffer("scale", torch.arange(4.0), persistent=False)
    replay(model, {"tensors": {"scale": {"0": [0, 3]}}})
    assert model.scale.tolist() == [0.0, 3.0]
    assert list(model.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("module", "tensors", "numbers"),
    [
        (nn.Linear(4, 5), {"weight": {"0": [0, 2], "1": [1]}, "bias": {"0": [0, 2]}}, {"out_features": 2, "in_features": 1}),
        (nn.Bilinear(4, 5, 6), {"weight": {"1": [0, 3], "2": [4]}}, {"out_features": 6, "in1_features": 2, "in2_features": 1}),
        (nn.Conv2d(4, 6, 3), {"weight": {"0": [1], "1": [0, 1]}}, {"out_channels": 1, "in_channels": 2, "groups": 1}),
        (nn.Conv2d(6, 6, 3, groups=6), {"weight": {"0": [1, 5]}}, {"out_channels": 2, "in_channels": 2, "groups": 2}),
        (nn.Conv2d(6, 12, 3, groups=6), {"weight": {"0": [2, 3, 10, 11]}}, {"out_channels": 4, "in_channels": 2, "groups": 2}),
        (nn.Conv1d(8, 8, 1, groups=2), {"weight": {"0": [0, 7], "1": [2]}}, {"out_channels": 2, "in_channels": 2, "groups": 2}),
        (nn.Conv1d(8, 8, 1, groups=4), {"weight": {"0": [2, 6]}}, {"out_channels": 2, "in_channels": 4, "groups": 2}),
        (nn.ConvTranspose2d(4, 6, 3), {"weight": {"0": [1], "1": [0, 1]}}, {"out_channels": 2, "in_channels": 1, "groups": 1}),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), {"weight": {"0": [0, 1]}}, {"out_channels": 3, "in_channels": 2, "groups": 1}),
        (nn.BatchNorm2d(4), {n: {"0": [0, 3]} for n in ("weight", "bias", "running_mean", "running_var")}, {"num_features": 2}),
        (nn.BatchNorm1d(4, affine=False), {n: {"0": [2]} for n in ("running_mean", "running_var")}, {"num_features": 1}),
        (nn.LayerNorm(4), {"weight": {"0": [0, 3]}, "bias": {"0": [0, 3]}}, {"normalized_shape": (2,)}),
        (nn.RMSNorm(4), {"weight": {"0": [3]}}, {"normalized_shape": (1,)}),
        (nn.GroupNorm(2, 6), {"weight": {"0": [3, 4, 5]}, "bias": {"0": [3, 4, 5]}}, {"num_channels": 3, "num_groups": 1}),
        (nn.PReLU(4), {"weight": {"0": [0, 3]}}, {"num_parameters": 2}),
        (nn.Embedding(9, 4), {"weight": {"1": [0, 3]}}, {"num_embeddings": 9, "embedding_dim": 2}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            {"k_proj_weight": {"1": [0]}, "v_proj_weight": {"1": [1, 2]}},
            {"kdim": 1, "vdim": 2},
        ),
        (nn.GRUCell(3, 2), {"weight_ih": {"1": [0, 1]}}, {"input_size": 2, "hidden_size": 2}),
    ],
    ids=lambda value: str(value).split("(")[0] if isinstance(value, nn.Module) else "",
)
def test_the_numbers_of_torchs_modules_follow(module, tensors, numbers):
    replay(module, {"tensors": tensors})
    assert {name: getattr(module, name) for name in numbers} == numbers


def test_a_recurrent_layer_runs_with_fewer_units():
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        layer = kind(3, 5, batch_first=True).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                for gate in range(gates):
                    parameter[gate * 5 + 1] = 0.0
            layer.weight_hh_l0[:, 1] = 0.0
        x = torch.randn(2, 4, 3, dtype=torch.float64)
        expected = layer(x)[0]
        rows = [gate * 5 + i for gate in range(gates) for i in (0, 2, 3, 4)]
        own = {name: {"0": rows} for name, _ in layer.named_parameters()}
        own["weight_hh_l0"]["1"] = [0, 2, 3, 4]
        replay(layer, {"tensors": own})
        assert layer.hidden_size == 4
        torch.testing.assert_close(layer(x)[0], expected[..., [0, 2, 3, 4]])


def test_uneven_groups_are_refused():
    with pytest.raises(InputError, match="has 2 groups of 3 channels; take out whole groups, or as many channels of each"):
        replay(nn.Conv2d(6, 6, 1, groups=2), {"tensors": {"weight": {"0": [0, 1, 3]}}})


class Stack(nn.Module):
    """Blocks that know their place, and a configuration with a list of one entry each."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(4))
        for i, block in enumerate(self.blocks):
            block.layer_idx = i
        self.config = type("Config", (), {})()
        self.config.model_type, self.config.kinds, self.config.depth = "stack", list("abcd"), 4

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_go_with_their_numbers_lists_and_optimizer_state():
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kept = [model.blocks[0], model.blocks[3]]
    replay(model, {"layers": {"blocks": [0, 3]}, "attributes": {"config.depth": 2}}, optimizer)
    assert list(model.blocks) == kept
    assert [block.layer_idx for block in model.blocks] == [0, 1]
    assert (model.config.kinds, model.config.depth) == (["a", "d"], 2)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters()) == set(optimizer.state)


def test_names_with_blocks_out():
    removed = Removed(layers={"blocks": [1, 3], "blocks.3": [0]})
    names = ["blocks.0.1.weight", "blocks.1.1.weight", "blocks.3.0.bias", "blocks.3.1.bias", "head.weight", "blocks"]
    assert [removed.name_after(name) for name in names] == [None, "blocks.0.1.weight", "blocks.1.0.bias", None, "head.weight", "blocks"]
    assert all(removed.name_before(after) == name for name in names if (after := removed.name_after(name)) is not None)


def test_two_in_a_row_are_one_also_with_blocks():
    first = Removed.of({"layers": {"blocks": [0, 2, 3]}, "tensors": {"blocks.2.0.weight": {"0": [1]}, "blocks.3.1.weight": {"1": [0]}}})
    second = Removed.of({"layers": {"blocks": [1, 2]}, "tensors": {"blocks.1.1.bias": {"0": [1]}}, "attributes": {"config.depth": 2}})
    one, other = Stack(), Stack()
    other.load_state_dict(one.state_dict())
    replay(replay(one, first), second)
    both = compose(first, second)
    assert both.layers == {"blocks": [2, 3]}
    replay(other, both)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert both.shapes_after({name: list(t.shape) for name, t in Stack().state_dict().items()}) == {
        name: list(t.shape) for name, t in one.state_dict().items()
    }


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ({"tensors": {"9.weight": {"0": [0]}}}, "removed: this Sequential has no tensor '9.weight'"),
        ({"tensors": {"0.bias": {"1": [0]}}}, "removed: '0.bias' of this Sequential has no dimension 1"),
        ({"tensors": {"0.weight": {"0": [0, 4]}}}, "removed: '0.weight' has 4 entries along dimension 0, and index 4 is to be kept"),
        (
            {"tensors": {"0.weight": {"0": [-1]}}},
            "the indices kept of '0.weight' along dimension 0 must be at least one, from 0, and increasing",
        ),
        ({"tensors": {"0.weight": {"0": []}}}, "the indices kept of '0.weight' along dimension 0 must be at least one"),
        ({"tensors": {"0.weight": {"0": [1, 1]}}}, "and increasing"),
        ({"tensors": {"0.weight": {"rows": [1]}}}, "the indices kept of '0.weight' along dimension rows"),
        ({"attributes": {"heads": 3}}, "attributes: this Sequential has no 'heads'"),
        ({"attributes": {"0.weight": 3}}, "attributes: '0.weight' is Parameter containing"),
        ({"attributes": {"0.in_features": 0}}, "attributes: '0.in_features' is 3 in this Sequential, and 0 cannot take its place"),
        ({"layers": {"blocks": [0]}}, "removed: this Sequential has no ModuleList or Sequential 'blocks'"),
        ({"layers": {"": [0, 3]}}, "removed: '' has 3 blocks, and index 3 is to be kept"),
        ({"channels": {}}, "removed.channels: Extra inputs are not permitted"),
    ],
)
def test_a_removal_of_another_model_is_refused_and_changes_nothing(removed, said):
    model = chain()
    with pytest.raises(InputError) as error:
        replay(model, {**removed, "tensors": {"2.weight": {"0": [0]}} | removed.get("tensors", {})})
    assert said in str(error.value)
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [(4, 3), (4,), (2, 4), (2,)]


def test_cutting_takes_the_history_of_lbfgs_away():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    cut(model.weight, 1, torch.tensor([0, 1]), optimizer)
    assert not optimizer.state


# ---------------------------------------------------------------- entries that are added


def test_added_entries_are_zero_and_their_slots_are_fresh():
    model = chain()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.25)
    model(torch.randn(5, 3)).square().sum().backward()
    gradient = model[0].weight.grad.clone()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    replay(
        model,
        {
            "tensors": {
                "0.weight": {"0": [0, -1, 1, 2, 3, -1]},
                "0.bias": {"0": [0, -1, 1, 2, 3, -1]},
                "2.weight": {"1": [0, -1, 1, 2, 3, -1]},
            }
        },
        optimizer,
    )
    old, new = [0, 2, 3, 4], [1, 5]
    assert torch.equal(model[0].weight[old], before["0.weight"])
    assert torch.equal(model[2].weight[:, old], before["2.weight"])
    assert not model[0].weight[new].any()
    assert not model[2].weight[:, new].any()
    assert torch.equal(model[0].weight.grad[old], gradient)
    assert not model[0].weight.grad[new].any()
    slots = optimizer.state[model[0].weight]
    assert (slots["step_size"][new] == 0.25).all()
    assert (slots["prev"][new] == 0).all()
    assert (model[0].out_features, model[2].in_features) == (6, 6)


def test_what_was_added_can_be_taken_out_again_and_added_to():
    first, second = {"tensors": {"w": {"0": [0, -1, 1, 2]}}}, {"tensors": {"w": {"0": [0, 1, 3]}}}
    assert compose(first, second).tensors == {"w": {"0": [0, -1, 2]}}
    assert compose(compose(first, second), {"tensors": {"w": {"0": [-1, 1, -1, 2]}}}).tensors == {"w": {"0": [-1, -1, -1, 2]}}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"0.weight": {"0": [0, -2]}}, "removed.*at least one, from 0, and increasing"),
        ({"0.weight": {"0": [-1, -1]}}, "removed.*at least one, from 0, and increasing"),
        ({"0.weight": {"0": [1, -1, 0]}}, "removed.*at least one, from 0, and increasing"),
        ({"0.weight": {"0": [0, 4, -1]}}, "has 4 entries along dimension 0, and index 4 is to be kept"),
    ],
)
def test_added_entries_in_a_record_that_is_wrong(tensors, message):
    with pytest.raises(InputError, match=message):
        replay(chain(), {"tensors": tensors})


def test_the_number_of_groups_has_to_be_told_where_channels_are_added():
    layer = nn.Conv2d(4, 4, 1, groups=4)
    kept = {"0": [0, 1, -1, 2, 3]}
    with pytest.raises(InputError, match="0 has 4 groups and gains channels; tell the number of its groups among the attributes"):
        replay(nn.Sequential(layer), {"tensors": {"0.weight": kept, "0.bias": kept}})
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4))
    replay(model, {"tensors": {"0.weight": kept, "0.bias": kept}, "attributes": {"0.groups": 5}})
    assert (model[0].groups, model[0].in_channels, model[0].out_channels) == (5, 5, 5)
    assert model(torch.ones(1, 5, 2, 2)).shape == (1, 5, 2, 2)
