import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from niwaki.metrics import forward_flops, weight_uses

torch.manual_seed(0)

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "conv1d stride": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2)), (2, 4, 9, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 8)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed 2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 2, 2)),
}


def uses_by_gradient(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """With inputs of one, the gradient of the sum of the outputs by a weight is how often the weight was multiplied."""
    layer = layer.double()
    layer(torch.ones(shape, dtype=torch.float64)).sum().backward()
    return layer.weight.grad


@pytest.mark.parametrize("name", LAYERS)
def test_uses_equal_the_gradient_of_the_sum(name):
    make, shape = LAYERS[name]
    layer = make()
    expected = uses_by_gradient(copy.deepcopy(layer), shape)
    found = weight_uses(layer, lambda: layer(torch.ones(shape)), examples=shape[0])
    assert set(found) == {"weight"}
    assert torch.equal(expected, torch.full_like(expected, found["weight"] * shape[0]))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.integers(0, 10**6))
def test_sparse_flops_sum_the_uses_of_active_weights(name, seed):
    make, shape = LAYERS[name]
    layer = make()
    uses = uses_by_gradient(copy.deepcopy(layer), shape)
    mask = torch.rand(uses.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    flops = forward_flops(layer, (torch.ones(shape),), masks={"weight": mask})
    assert flops.sparse * shape[0] == pytest.approx(2 * uses[mask].sum().item(), rel=1e-12)
    assert flops.dense * shape[0] == pytest.approx(2 * uses.sum().item(), rel=1e-12)
    assert flops.layers[0].active == int(mask.sum())


def reference_total(model: nn.Module, *inputs: torch.Tensor) -> int:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            copy.deepcopy(model).eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


class Attend(nn.Module):
    """Attention written by hand, so that its products are between activations only."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-3, -2)
        return self.out(nn.functional.scaled_dot_product_attention(query, key, value).transpose(-3, -2).flatten(-2))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10)), (3, 1, 8, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3, padding=1)), (2, 3, 6, 6)),
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 5, 16)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False), (3, 4, 16)),
        (Attend(), (2, 6, 8)),
        (nn.GRU(8, 16), (5, 3, 8)),
    ],
)
def test_dense_total_equals_torchs_counter(model, shape):
    inputs = torch.randn(shape)
    assert forward_flops(model, (inputs,), examples=1).dense == reference_total(model, inputs)
    assert forward_flops(model, (inputs,)).dense == pytest.approx(reference_total(model, inputs) / shape[0])


def test_attention_products_are_the_part_without_weights():
    tokens, width = 6, 8
    flops = forward_flops(Attend(), (torch.randn(2, tokens, width),))
    assert flops.activation_products == 2 * (2 * tokens * tokens * width)  # queries by keys, and weights by values


@pytest.mark.parametrize("kdim", [None, 6])
def test_multihead_attention_counts_each_projection_on_its_own_tokens(kdim):
    attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=kdim)
    query, key = torch.randn(3, 5, 8), torch.randn(3, 7, kdim or 8)
    masks = {"out_proj.weight": torch.zeros(8, 8, dtype=torch.bool)}
    if kdim is None:
        keep = torch.zeros(24, 8, dtype=torch.bool)
        keep[:8, :2] = keep[8:16, :3] = keep[16:, :4] = True
        masks["in_proj_weight"] = keep
        expected = 2 * (8 * 2 * 5 + 8 * 3 * 7 + 8 * 4 * 7)
    else:
        masks["q_proj_weight"] = torch.zeros(8, 8, dtype=torch.bool)
        expected = 2 * (2 * 8 * 6 * 7)
    flops = forward_flops(attention, (query, key, key), masks=masks)
    assert flops.dense == reference_total(attention, query, key, key) / 3
    assert flops.sparse - flops.activation_products == expected
    assert flops.activation_products == 2 * (2 * 5 * 7 * 8)


@pytest.mark.parametrize("module", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_weights_are_used_once_a_time_step(module):
    layer = module(3, 4, num_layers=2, bidirectional=True)
    names = [name for name, _ in layer.named_parameters() if "weight" in name]
    uses = weight_uses(layer, lambda: layer(torch.randn(7, 5, 3)), examples=5)
    assert uses == dict.fromkeys(names, 7.0)


def test_a_packed_sequence_counts_real_tokens_only():
    layer = nn.LSTM(3, 4, batch_first=True)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 6, 3), [6, 2], batch_first=True)
    assert weight_uses(layer, lambda: layer(packed))["weight_hh_l0"] == 8


def test_tied_weights_add_up_and_embeddings_are_free():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 4)
            self.hidden = nn.Linear(4, 4)
            self.again = self.hidden
            self.output = nn.Linear(4, 11, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output(self.again(self.hidden(self.embedding(x))))

    model = Tied()
    tokens = torch.zeros(2, 5, dtype=torch.long)
    assert weight_uses(model, lambda: model(tokens), examples=2) == {"embedding.weight": 5.0, "hidden.weight": 10.0}
    assert forward_flops(model, (tokens,)).dense == reference_total(model, tokens) / 2


def test_a_parametrized_weight_is_counted_under_the_modules_name():
    layer = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    flops = forward_flops(layer, (torch.randn(2, 3),))
    assert flops.dense == 24
    assert flops.layers[0].name == "0.weight"


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 3))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random_state = torch.random.get_rng_state()
    forward_flops(model, (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)),))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failing_forward_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 6)).train()
    with pytest.raises(RuntimeError):
        forward_flops(model, (torch.randn(2, 3),))
    assert model[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_compiled_model_counts_like_the_plain_one():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    compiled = torch.compile(model, backend="eager")
    inputs = torch.randn(2, 1, 6, 6)
    compiled(inputs)
    assert weight_uses(compiled, lambda: compiled(inputs), examples=2) == {"0.weight": 16.0, "2.weight": 1.0}
    assert forward_flops(compiled, (inputs,)).dense == reference_total(model, inputs) / 2
