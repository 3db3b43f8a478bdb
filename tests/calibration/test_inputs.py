"""Statistics of what weights read, against numpy on recorded inputs and torch's own unfold."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from niwaki import calibration
from niwaki.calibration import Arguments, Watched, collect, reading
from niwaki.errors import InputError
from niwaki.layout import Layout, layout_of, matrix
from niwaki.statistics import (
    GradientSquare,
    InputCovariance,
    InputGram,
    InputMean,
    InputResponses,
    InputSize,
    InputSquare,
    InputVariance,
    InputZeros,
    Movement,
)

OF_INPUTS = [InputSize(), InputMean(), InputVariance(), InputZeros(), InputCovariance()]


def watched(model, *names, active=None):
    found = []
    for name in names:
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = model.get_parameter(name)
        layout = layout_of(module, own, parameter.shape)
        found.append(Watched(name, parameter, layout, None if active is None else active.get(name)))
    return found


def ask(model, data, name, *requests, **settings):
    return collect(model, data, None, watched(model, name), requests, **settings)[name]


class Inputs(nn.Module):
    """One module of each class whose inputs can be observed; a linear layer is called twice, once with a keyword argument."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose1d(6, 4, 2)
        self.twice = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids):
        x = torch.relu(self.up(self.grouped(self.words(ids).transpose(1, 2))))
        return self.twice(self.drop(self.twice(input=x.transpose(1, 2))))


def recorded(model, data, name, axis):
    """All that a module reads, ``[observations, inputs]``."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda m, a, k: seen.append((a[0] if a else k["input"]).detach()), with_kwargs=True)
    model.eval()
    for inputs, _ in data:
        model(inputs)
    handle.remove()
    model.train()
    return [x.movedim(axis, -1).numpy() for x in seen]


@pytest.mark.parametrize(("name", "axis", "shape"), [("grouped", 1, (2, 1, 2, 1)), ("up", 1, (6, 1, 1)), ("twice", 2, (1, 4))])
def test_moments_of_inputs_are_numpys(name, axis, shape):
    torch.manual_seed(0)
    model = Inputs().double()
    data = [(torch.randint(5, (n, 6)), None) for n in (3, 2)]
    seen = recorded(model, data, name, axis)
    x = np.concatenate([part.reshape(-1, part.shape[-1]) for part in seen])
    responses = np.concatenate([part.mean(1) for part in seen])
    state = torch.random.get_rng_state()
    found = ask(model, data, f"{name}.weight", *OF_INPUTS, InputResponses(examples=4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert model.drop.training
    assert all(p.grad is None for p in model.parameters())
    for request, expected in {
        InputSize(): np.abs(x).mean(0),
        InputMean(): x.mean(0),
        InputVariance(): x.var(0),
        InputZeros(): (x == 0).mean(0),
    }.items():
        assert found[request].shape == shape
        assert found[request].dtype == torch.float64
        np.testing.assert_allclose(found[request].flatten().numpy(), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found[InputCovariance()].numpy(), np.cov(x.T, bias=True), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found[InputResponses(examples=4)].numpy(), responses[:4], rtol=1e-12)
    if name == "twice":
        assert 0 < (x == 0).mean() < 1


def test_words_are_one_hot():
    torch.manual_seed(0)
    model = Inputs().double()
    data = [(torch.randint(5, (n, 6)), None) for n in (3, 2)]
    ids = torch.cat([ids for ids, _ in data])
    x = np.eye(5)[ids.flatten().numpy()]
    found = ask(model, data, "words.weight", *OF_INPUTS, InputSquare(), InputGram(), InputResponses())
    share = x.mean(0)
    assert found[InputSize()].shape == (5, 1)
    for request, expected in {
        InputSize(): share,
        InputSquare(): share,
        InputVariance(): share * (1 - share),
        InputZeros(): 1 - share,
    }.items():
        np.testing.assert_allclose(found[request].flatten().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(found[InputGram()][0].numpy(), np.diag(share), rtol=1e-12)
    np.testing.assert_allclose(found[InputResponses()].numpy(), np.eye(5)[ids.numpy()].mean(1), rtol=1e-12)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3), (3, 4, 7, 6)),
    "padded, strided, dilated": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3)), (3, 4, 9, 8)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (3, 4, 5, 5)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (3, 4, 6, 6)),
    "circular": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (3, 4, 6, 6)),
    "reflect, one dimension": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect", stride=2), (3, 4, 9)),
    "three dimensions": (nn.Conv3d(4, 2, (2, 3, 2), padding=(1, 0, 1), stride=(1, 2, 1), groups=2), (2, 4, 3, 6, 4)),
    "without a batch": (nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "one by one": (nn.Conv2d(4, 6, 1, groups=2), (3, 4, 5, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("chunk", [2**22, 300, 1])
def test_columns_are_what_the_matrix_form_multiplies_with(name, chunk, monkeypatch):
    """Moments of W x + b follow from those of x: compare with the outputs of the convolution itself."""
    monkeypatch.setattr(reading, "CHUNK", chunk)
    torch.manual_seed(1)
    layer, shape = CONVOLUTIONS[name]
    layer = layer.double()
    nn.init.zeros_(layer.bias)
    x = torch.randn(shape, dtype=torch.float64)
    found = ask(layer, [(x, None)], "weight", InputGram(), InputSquare())
    gram = found[InputGram()]
    layout = layout_of(layer, "weight", layer.weight.shape)
    with torch.no_grad():
        y = layer(x)
    y = (y if x.ndim == len(layer.kernel_size) + 2 else y.unsqueeze(0)).movedim(1, -1).flatten(0, -2)
    y = y.reshape(len(y), layer.groups, -1).movedim(0, 1)
    w = matrix(layer.weight.detach(), layout)
    torch.testing.assert_close(w @ gram @ w.mT, y.mT @ y / y.shape[1], rtol=1e-11, atol=1e-12)
    placed = found[InputSquare()].expand(layout.shape)
    torch.testing.assert_close(matrix(placed, layout)[:, 0], gram.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-14)
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        columns = functional.unfold(x if x.ndim == 4 else x[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        flat = columns.movedim(1, 0).flatten(1).reshape(layer.groups, -1, columns.shape[0] * columns.shape[2])
        torch.testing.assert_close(gram, flat @ flat.mT / flat.shape[-1], rtol=1e-11, atol=1e-12)


def test_columns_of_transposed_convolutions_are_refused():
    layer = nn.ConvTranspose2d(3, 2, 2)
    with pytest.raises(InputError, match="weight: a transposed convolution spreads its inputs"):
        ask(layer, [(torch.ones(1, 3, 2, 2), None)], "weight", InputGram())


def test_the_linear_layer_of_gpt2_reads_columns():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(3, 4)
    x = torch.randn(2, 5, 4)
    found = ask(layer, [(x, None)], "weight", InputGram(), InputSize())
    flat = x.flatten(0, 1).double()
    torch.testing.assert_close(found[InputGram()][0], flat.T @ flat / 10, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[InputSize()], flat.abs().mean(0)[:, None], rtol=1e-12, atol=1e-14)


def test_a_weight_that_two_modules_share_sees_the_inputs_of_both():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[1].weight = model[0].weight
    x = torch.randn(4, 3, dtype=torch.float64)
    both = torch.cat([x, model[0](x).detach()])
    found = ask(model, [(x, None)], "0.weight", InputMean(), InputGram())
    torch.testing.assert_close(found[InputMean()][0], both.mean(0))
    torch.testing.assert_close(found[InputGram()][0], both.T @ both / 8)


def test_an_embedding_that_shares_its_weight_with_the_head_is_watched_where_its_layout_fits():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.words(ids))

    model = Tied()
    ids = torch.tensor([[0, 1, 1, 2]])
    assert ask(model, [(ids, None)], "words.weight", InputSize())[InputSize()].flatten().tolist() == [0.25, 0.5, 0.25, 0, 0]
    found = ask(model, [(ids, None)], "head.weight", InputMean())[InputMean()]
    torch.testing.assert_close(found[0], model.words(ids)[0].mean(0).double().detach())


def test_inputs_may_be_keyword_arguments_and_hooks_of_the_user_count():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, *, scale):
            return self.layer(x * scale)

    block = Block()
    block.layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    inputs = Arguments((torch.tensor([[1.0, 2.0]]),), {"scale": 3.0})
    assert ask(block, [(inputs, None)], "layer.weight", InputMean())[InputMean()].tolist() == [[4, 7]]


def test_all_statistics_of_inputs_take_one_pass_and_no_more_data_than_needed():
    model = nn.Linear(2, 1)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    data = [(torch.randn(3, 2), None) for _ in range(4)]
    ask(model, data, "weight", *OF_INPUTS, InputGram(), InputSquare(), InputResponses())
    assert len(calls) == 4
    rest = iter(data)
    found = ask(model, rest, "weight", InputResponses(examples=4))[InputResponses(examples=4)]
    assert len(found) == 4
    assert len(list(rest)) == 2


def test_weights_whose_inputs_cannot_be_seen_are_named():
    recurrent = nn.LSTM(3, 2)
    with pytest.raises(InputError, match="weight_ih_l0: what it reads cannot be observed"):
        ask(recurrent, [(torch.zeros(4, 3), None)], "weight_ih_l0", InputSize())
    unused = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    unused.forward = unused["a"].forward
    with pytest.raises(InputError, match=r"b\.weight: what it reads"):
        ask(unused, [(torch.zeros(1, 2), None)], "b.weight", InputSize())


def test_bad_input_is_told():
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="no batch"):
        ask(model, [], "weight", InputSize())
    with pytest.raises(InputError, match=r"expected batches \(inputs, targets\), got Tensor"):
        ask(model, [torch.zeros(1, 2)], "weight", InputSize())
    with pytest.raises(InputError, match="data= is needed"):
        ask(model, None, "weight", InputSize())
    with pytest.raises(InputError, match="loss= is needed"):
        ask(model, [(torch.zeros(1, 2), torch.zeros(1))], "weight", GradientSquare())
    with pytest.raises(InputError, match="Movement is not collected from data"):
        ask(model, None, "weight", Movement())


def test_nothing_asked_reads_nothing():
    model = nn.Linear(2, 2)
    assert collect(model, None, None, watched(model, "weight"), []) == {"weight": {}}
    assert collect(model, None, None, [], [InputSize()]) == {}


def test_the_public_names_are_there():
    assert set(calibration.__all__) <= set(dir(calibration))
    assert Watched("w", nn.Parameter(torch.zeros(1)), Layout(("output",), (1,))).active is None
