"""Layouts, checked against what each weight does in the module's real forward."""

import copy
from math import prod

import pytest
import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.layout import Layout, is_normalization, layout_of

MODULES = {
    "linear": nn.Linear(3, 4, bias=False),
    "conv1d": nn.Conv1d(3, 4, 2, bias=False),
    "conv2d": nn.Conv2d(2, 3, (2, 3), bias=False),
    "conv3d": nn.Conv3d(2, 3, (2, 1, 2), bias=False),
    "conv grouped": nn.Conv2d(4, 6, 2, groups=2, bias=False),
    "conv depthwise": nn.Conv2d(3, 3, 2, groups=3, bias=False),
    "conv depthwise multiplied": nn.Conv1d(3, 6, 2, groups=3, bias=False),
    "transposed 1d": nn.ConvTranspose1d(3, 4, 2, bias=False),
    "transposed 2d": nn.ConvTranspose2d(2, 3, (2, 3), bias=False),
    "transposed 3d": nn.ConvTranspose3d(2, 3, (1, 2, 2), bias=False),
    "transposed grouped": nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
    "transposed depthwise": nn.ConvTranspose1d(3, 3, 2, groups=3, bias=False),
    "rnn input": nn.RNNCell(3, 4, bias=False),
}
INPUTS = {1: (3,), 2: (6,), 3: (4, 5), 4: (4, 4), 5: (3, 3, 3)}


def channels_of_each_weight(module: nn.Module, name: str, inputs: int) -> list[tuple[int, int]]:
    """Set one weight after the other to 1 and all others to 0: which output reacts, and to which input."""
    module = copy.deepcopy(module).double()
    weight = getattr(module, name)
    # The module's input is [batch, channel, *space]; a convolution needs as many space dimensions as its weight has kernel dimensions.
    space = (5,) * (weight.dim() - 2)
    found = []
    for index in range(weight.numel()):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
            weight.view(-1)[index] = 1.0
        x = torch.rand(1, inputs, *space, dtype=torch.float64, requires_grad=True)
        y = module(x)
        [output] = (
            y.detach().abs().flatten(2).sum(-1)[0].nonzero().flatten().tolist() if space else y.detach()[0].nonzero().flatten().tolist()
        )
        y.sum().backward()
        assert x.grad is not None
        [entry] = x.grad.flatten(2).abs().sum(-1)[0].nonzero().flatten().tolist() if space else x.grad[0].nonzero().flatten().tolist()
        found.append((output, entry))
    return found


@pytest.mark.parametrize("kind", list(MODULES))
def test_view_coordinates_name_the_channels_that_a_weight_connects(kind):
    module = MODULES[kind]
    name = "weight_ih" if isinstance(module, nn.RNNCell) else "weight"
    weight = getattr(module, name)
    layout = layout_of(module, name, weight.shape)
    assert layout is not None
    real = channels_of_each_weight(module, name, layout.inputs)
    for index, (output, entry) in enumerate(real):
        at = dict(zip(layout.roles, (int(i) for i in torch.unravel_index(torch.tensor(index), layout.shape)), strict=True))
        sizes = dict(zip(layout.roles, layout.shape, strict=True))
        group = at.get("group", 0)
        assert (group * sizes["output"] + at["output"], group * sizes["input"] + at["input"]) == (output, entry)
    assert layout.outputs == len({output for output, _ in real})
    assert layout.inputs == len({entry for _, entry in real})
    assert layout.elements == weight.numel()
    kernels = prod(layout.kernel)
    assert kernels == weight.numel() // len(set(real))


def test_embedding_reads_its_vocabulary_as_inputs():
    module = nn.Embedding(5, 3)
    layout = layout_of(module, "weight", module.weight.shape)
    assert layout == Layout(("input", "output"), (5, 3), embedding=True)
    assert (layout.inputs, layout.outputs, layout.kernel) == (5, 3, ())
    assert layout_of(nn.EmbeddingBag(5, 3), "weight", (5, 3)) == layout


def test_attention_stacks_three_separate_matrices():
    module = nn.MultiheadAttention(8, 2)
    layout = layout_of(module, "in_proj_weight", module.in_proj_weight.shape)
    assert layout == Layout(("stack", "output", "input"), (3, 8, 8), shared_stack=False)
    assert (layout.outputs, layout.inputs) == (24, 8)
    assert layout_of(module.out_proj, "weight", module.out_proj.weight.shape) == Layout(("output", "input"), (8, 8))
    other = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    for name, inputs in (("q_proj_weight", 8), ("k_proj_weight", 4), ("v_proj_weight", 6)):
        assert layout_of(other, name, getattr(other, name).shape) == Layout(("output", "input"), (8, inputs))


@pytest.mark.parametrize(
    ("module", "gates"),
    [
        (nn.RNN(3, 5, num_layers=2, bidirectional=True), 1),
        (nn.RNN(3, 5, nonlinearity="relu"), 1),
        (nn.GRU(3, 5, num_layers=2, bidirectional=True), 3),
        (nn.LSTM(3, 5, num_layers=2, bidirectional=True), 4),
        (nn.LSTM(3, 5, proj_size=2), 4),
        (nn.RNNCell(3, 5), 1),
        (nn.GRUCell(3, 5), 3),
        (nn.LSTMCell(3, 5), 4),
    ],
    ids=str,
)
def test_recurrent_gates_share_their_outputs(module, gates):
    weights = {n: p for n, p in module.named_parameters() if n.startswith("weight")}
    assert len(weights) >= 2
    for name, weight in weights.items():
        layout = layout_of(module, name, weight.shape)
        assert layout is not None
        if gates == 1 or name.startswith("weight_hr"):
            assert layout == Layout(("output", "input"), tuple(weight.shape))
        else:
            assert layout == Layout(("stack", "output", "input"), (gates, 5, weight.shape[1]), shared_stack=True)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Linear(3, 4), "bias"),
        (nn.Conv2d(3, 4, 2), "bias"),
        (nn.BatchNorm2d(3), "weight"),
        (nn.LayerNorm(3), "weight"),
        (nn.PReLU(), "weight"),
        (nn.MultiheadAttention(8, 2), "in_proj_bias"),
        (nn.LSTM(3, 5), "bias_ih_l0"),
        (nn.LSTM(3, 5), "bias_hh_l0"),
    ],
    ids=str,
)
def test_no_layout_for_what_is_no_weight(module, name):
    assert layout_of(module, name, getattr(module, name).shape) is None


def test_subclasses_have_the_layout_of_their_class():
    class Scaled(nn.Conv2d):
        pass

    assert layout_of(Scaled(2, 3, 3), "weight", (3, 2, 3, 3)) == Layout(("output", "input", "kernel", "kernel"), (3, 2, 3, 3))


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [
        (nn.LSTM(3, 5), "weight_ih_l0", (7, 3)),
        (nn.MultiheadAttention(8, 2), "in_proj_weight", (10, 8)),
        (nn.Conv2d(4, 6, 2, groups=2), "weight", (3, 2, 2, 2)),
    ],
    ids=["lstm", "attention", "grouped"],
)
def test_a_shard_that_cuts_through_a_stack_is_refused(module, name, shape):
    with pytest.raises(InputError, match="does not split") as caught:
        layout_of(module, name, shape)
    assert "\n" not in str(caught.value)
    assert type(module).__name__ in str(caught.value)


def test_the_transposed_linear_layer_of_gpt_2_is_known_by_its_name():
    """A stand-in with the name that transformers gives it; tests/tasks has the real one."""
    conv1d = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    found = layout_of(conv1d(), "weight", (3, 5))
    assert (found.roles, found.shape) == (("input", "output"), (3, 5))
    assert layout_of(type("Conv1D", (nn.Module,), {})(), "weight", (3, 5)) is None
    assert layout_of(conv1d(), "bias", (5,)) is None


def test_normalizations_are_known_by_their_name():
    class LlamaRMSNorm(nn.Module):
        pass

    class Scale(nn.LayerNorm):
        pass

    for module in (
        nn.BatchNorm1d(2),
        nn.SyncBatchNorm(2),
        nn.GroupNorm(1, 2),
        nn.InstanceNorm2d(2),
        nn.RMSNorm(2),
        LlamaRMSNorm(),
        Scale(2),
    ):
        assert is_normalization(module)
    for module in (nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2))):
        assert not is_normalization(module)
