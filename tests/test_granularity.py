"""Granularities against plain loops over pieces, and against what masked modules really compute."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from niwaki.component import REGISTRY, build
from niwaki.errors import InputError
from niwaki.granularity import (
    Block,
    Channel,
    Element,
    Granularity,
    Grouped,
    Head,
    InputChannel,
    Kernel,
    OutputChannel,
    PatternNM,
    Vector,
    WholeLayer,
)
from niwaki.layout import ROLES, Layout, layout_of

# ---------------------------------------------------------------- the oracle: where each weight sits, by torch's own documentation


class Place(NamedTuple):
    stack: int
    group: int
    output: int  # within the group
    input: int  # within the group
    position: int  # in the kernel, row-major


class Case(NamedTuple):
    module: nn.Module
    name: str
    places: list[Place]  # in the order of the flat index
    kernel: tuple[int, ...]
    shared: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.module.get_parameter(self.name).shape

    @property
    def layout(self) -> Layout:
        found = layout_of(self.module, self.name, self.shape)
        assert found is not None
        return found


def product(kernel: tuple[int, ...]) -> int:
    return int(torch.tensor(kernel, dtype=torch.int64).prod()) if kernel else 1


def linear(outputs: int, inputs: int) -> Case:
    places = [Place(0, 0, o, i, 0) for o in range(outputs) for i in range(inputs)]
    return Case(nn.Linear(inputs, outputs, bias=False, device="meta"), "weight", places, ())


def convolution(outputs: int, inputs: int, groups: int, kernel: tuple[int, ...]) -> Case:
    """Shape of the weight: (out_channels, in_channels / groups, *kernel)."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
    module = kind(inputs * groups, outputs * groups, kernel, groups=groups, bias=False, device="meta")
    places = [
        Place(0, o // outputs, o % outputs, i, k) for o in range(outputs * groups) for i in range(inputs) for k in range(product(kernel))
    ]
    return Case(module, "weight", places, kernel)


def transposed(outputs: int, inputs: int, groups: int, kernel: tuple[int, ...]) -> Case:
    """Shape of the weight: (in_channels, out_channels / groups, *kernel)."""
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[len(kernel)]
    module = kind(inputs * groups, outputs * groups, kernel, groups=groups, bias=False, device="meta")
    places = [
        Place(0, i // inputs, o, i % inputs, k) for i in range(inputs * groups) for o in range(outputs) for k in range(product(kernel))
    ]
    return Case(module, "weight", places, kernel)


def embedding(outputs: int, inputs: int) -> Case:
    """Shape of the weight: (num_embeddings, embedding_dim)."""
    places = [Place(0, 0, o, i, 0) for i in range(inputs) for o in range(outputs)]
    return Case(nn.Embedding(inputs, outputs, device="meta"), "weight", places, ())


def attention(size: int) -> Case:
    """Shape of the weight: (3 * embed_dim, embed_dim)."""
    places = [Place(s, 0, o, i, 0) for s in range(3) for o in range(size) for i in range(size)]
    return Case(nn.MultiheadAttention(size, 1, device="meta"), "in_proj_weight", places, ())


def recurrent(kind: type[nn.Module], gates: int, name: str, outputs: int, inputs: int) -> Case:
    """Shape of the weight: (gates * hidden_size, input_size)."""
    module = kind(inputs, outputs, device="meta")
    columns = module.get_parameter(name).shape[1]
    places = [Place(s, 0, o, i, 0) for s in range(gates) for o in range(outputs) for i in range(columns)]
    return Case(module, name, places, (), shared=True)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: linear(5, 7),
    "conv1d": lambda: convolution(4, 3, 1, (5,)),
    "conv2d": lambda: convolution(6, 4, 1, (3, 3)),
    "conv3d": lambda: convolution(3, 2, 1, (2, 3, 2)),
    "conv grouped": lambda: convolution(3, 4, 2, (3, 2)),
    "conv depthwise": lambda: convolution(1, 1, 5, (3, 3)),
    "conv depthwise multiplied": lambda: convolution(2, 1, 3, (3,)),
    "transposed1d": lambda: transposed(4, 3, 1, (5,)),
    "transposed2d": lambda: transposed(4, 6, 1, (3, 2)),
    "transposed3d": lambda: transposed(2, 3, 1, (2, 1, 3)),
    "transposed grouped": lambda: transposed(3, 2, 2, (3, 3)),
    "transposed depthwise": lambda: transposed(1, 1, 4, (3,)),
    "embedding": lambda: embedding(3, 7),
    "attention": lambda: attention(4),
    "lstm input": lambda: recurrent(nn.LSTM, 4, "weight_ih_l0", 3, 5),
    "lstm hidden": lambda: recurrent(nn.LSTM, 4, "weight_hh_l0", 3, 5),
    "gru": lambda: recurrent(nn.GRU, 3, "weight_ih_l0", 2, 5),
    "rnn": lambda: recurrent(nn.RNN, 1, "weight_ih_l0", 4, 5),
    "lstm cell": lambda: recurrent(nn.LSTMCell, 4, "weight_ih", 3, 2),
    "gru cell": lambda: recurrent(nn.GRUCell, 3, "weight_hh", 3, 2),
}

Key = Callable[[Place, Case], tuple[int, ...]]


def along(role: str, length: int | None, *, rows: bool) -> Key:
    """Name the run of ``length`` weights along a role that a place is in. ``rows``: runs along the kernel stay in a kernel's row."""

    def find(place: Place, case: Case) -> tuple[int, ...]:
        role_of = {"kernel": "position"}.get(role, role)
        where = getattr(place, role_of)
        if role == "kernel" and rows and case.kernel:
            row, where = divmod(where, case.kernel[-1])
        else:
            row = 0
        rest = tuple(getattr(place, field) for field in place._fields if field != role_of)
        return (*rest, row, 0 if length is None else where // length)

    return find


PIECES: dict[str, tuple[Granularity, Key]] = {
    "element": (Element(), lambda p, c: p),
    "n_m": (PatternNM(n=2, m=4, remainder="pad"), lambda p, c: p),
    "kernel": (Kernel(), lambda p, c: p[:4]),
    "output_channel": (OutputChannel(), lambda p, c: (0 if c.shared else p.stack, p.group, p.output)),
    "input_channel": (InputChannel(), lambda p, c: (0 if c.shared else p.stack, p.group, p.input)),
    "block 4x1": (
        Block(rows=4, columns=1, remainder="pad"),
        lambda p, c: (p.stack, p.group, p.output // 4, p.input, p.position),
    ),
    "block 2x3": (
        Block(rows=2, columns=3, remainder="pad"),
        lambda p, c: (p.stack, p.group, p.output // 2, p.input // 3, p.position),
    ),
    "vector input": (Vector(), along("input", None, rows=True)),
    "vector output": (Vector(dimension="output"), along("output", None, rows=True)),
    "vector kernel": (Vector(dimension="kernel"), along("kernel", None, rows=True)),
    "vector group": (Vector(dimension="group"), along("group", None, rows=True)),
    "vector input 2": (Vector(length=2, remainder="pad"), along("input", 2, rows=True)),
    "vector output 3": (Vector(length=3, dimension="output", remainder="pad"), along("output", 3, rows=True)),
    "vector kernel 2": (Vector(length=2, dimension="kernel", remainder="pad"), along("kernel", 2, rows=True)),
}


def pieces_of(case: Case, key: Key) -> list[list[int]]:
    """Return the flat indices of each piece, pieces in the order of their first element."""
    pieces: dict[tuple[int, ...], list[int]] = {}
    for index, place in enumerate(case.places):
        pieces.setdefault(key(place, case), []).append(index)
    return list(pieces.values())


def agree(case: Case, granularity: Granularity, key: Key, seed: int = 0) -> None:
    layout, expected = case.layout, pieces_of(case, key)
    generator = torch.Generator().manual_seed(seed)
    grid = granularity.grid(layout)
    assert len(grid) == len(layout.shape)
    assert int(torch.tensor(grid).prod()) == len(expected)
    # Small integers in float64: sums are exact in any order.
    values = torch.randint(-1000, 1000, case.shape, generator=generator).double()
    flat = values.flatten().tolist()
    assert granularity.reduce(values, layout).flatten().tolist() == [sum(flat[i] for i in piece) for piece in expected]
    assert tuple(granularity.reduce(values.reshape(layout.shape), layout).shape) == grid
    keep = torch.rand(grid, generator=generator) < 0.5
    kept = {i for piece, on in zip(expected, keep.flatten().tolist(), strict=True) if on for i in piece}
    elements = granularity.expand(keep, layout)
    assert elements.dtype == torch.bool
    assert elements.shape == layout.shape
    assert elements.is_contiguous()
    assert elements.flatten().tolist() == [i in kept for i in range(len(flat))]


@pytest.mark.parametrize("pieces", list(PIECES))
@pytest.mark.parametrize("kind", list(CASES))
def test_pieces_equal_a_loop_over_places(kind, pieces):
    agree(CASES[kind](), *PIECES[pieces])


sizes = st.integers(1, 7)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["linear", "embedding", "attention", "lstm", "convolution", "transposed"]))
    outputs, inputs = draw(sizes), draw(sizes)
    if kind == "linear":
        return linear(outputs, inputs)
    if kind == "embedding":
        return embedding(outputs, inputs)
    if kind == "attention":
        return attention(outputs)
    if kind == "lstm":
        return recurrent(nn.LSTM, 4, draw(st.sampled_from(["weight_ih_l0", "weight_hh_l0"])), outputs, inputs)
    kernel = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return {"convolution": convolution, "transposed": transposed}[kind](outputs, inputs, draw(st.integers(1, 3)), kernel)


@st.composite
def divided(draw: st.DrawFn) -> tuple[Granularity, Key]:
    first, second = draw(sizes), draw(sizes)
    role = draw(st.sampled_from(ROLES))
    if draw(st.booleans()):
        return Vector(length=first, dimension=role, remainder="pad"), along(role, first, rows=True)  # type: ignore[arg-type]
    block = Block(rows=first, columns=second, remainder="pad")
    return block, lambda p, c: (p.stack, p.group, p.output // first, p.input // second, p.position)


@settings(deadline=None)
@given(case=cases(), pieces=divided(), seed=st.integers(0, 1000))
def test_any_length_on_any_shape(case, pieces, seed):
    agree(case, *pieces, seed)


@settings(deadline=None)
@given(case=cases(), n=sizes, more=st.integers(0, 5), role=st.sampled_from(ROLES), spread=st.integers(0, 6), seed=st.integers(0, 1000))
def test_protected_are_the_n_best_of_each_group(case, n, more, role, spread, seed):
    m = n + more
    pattern = PatternNM(n=n, m=m, dimension=role, remainder="pad")
    # Few distinct values, so that there are ties in most groups.
    scores = torch.randint(-spread, spread + 1, case.shape, generator=torch.Generator().manual_seed(seed)).double() * -0.5
    flat = scores.flatten().tolist()
    expected: set[int] = set()
    for group in pieces_of(case, along(role, m, rows=False)):
        expected.update(sorted(group, key=lambda i: (-flat[i], i))[:n])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2):
        found = pattern.protected(scores.to(dtype), case.layout)
        assert found.shape == case.layout.shape
        assert found.dtype == torch.bool
        assert found.is_contiguous()
        assert found.flatten().nonzero().flatten().tolist() == sorted(expected)


def test_protected_with_infinities_zeros_and_a_short_group():
    layout = Layout(("output", "input"), (3, 6))
    infinity = torch.inf
    scores = torch.tensor(
        [
            [-infinity, -infinity, -infinity, -infinity, -infinity, -infinity],
            [infinity, 0.0, infinity, infinity, -0.0, 1.0],
            [-0.0, 0.0, -0.0, 0.0, -infinity, 0.0],
        ]
    )
    assert PatternNM(n=2, m=4, remainder="pad").protected(scores, layout).int().tolist() == [
        [1, 1, 0, 0, 1, 1],
        [1, 0, 1, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
    ]
    short = PatternNM(n=1, m=4, remainder="pad").protected(scores, layout)
    assert short.int().tolist() == [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1]]


def test_only_a_pattern_fixes_sparsity_and_protects():
    layout = Layout(("output", "input"), (4, 4))
    for granularity, _ in PIECES.values():
        if not isinstance(granularity, PatternNM):
            assert granularity.sparsity is None
            assert granularity.protected(torch.rand(4, 4), layout) is None
    assert PatternNM(n=2, m=4).sparsity == 0.5
    assert PatternNM(n=1, m=4).sparsity == 0.75
    assert PatternNM(n=4, m=4).sparsity == 0.0


def test_two_of_four_is_what_torch_can_store():
    """The mask of 2:4 along the inputs is what semi-structured kernels take: two in each four of every row."""
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    kept = PatternNM(n=2, m=4).protected(weight.abs(), Layout(("output", "input"), (8, 16)))
    assert (kept.reshape(8, 4, 4).sum(-1) == 2).all()
    dropped = weight.abs().masked_fill(kept, 0).reshape(8, 4, 4).amax(-1)
    smallest_kept = weight.abs().masked_fill(~kept, torch.inf).reshape(8, 4, 4).amin(-1)
    assert (dropped < smallest_kept).all()


# ---------------------------------------------------------------- what masked modules compute


def masked(module: nn.Module, name: str, granularity: Granularity, piece: int) -> nn.Module:
    """Return a float64 copy without biases and without one piece."""
    module = copy.deepcopy(module).double()
    weight = module.get_parameter(name)
    layout = layout_of(module, name, weight.shape)
    assert layout is not None
    keep = torch.ones(granularity.grid(layout), dtype=torch.bool)
    keep.view(-1)[piece] = False
    with torch.no_grad():
        weight.masked_fill_(~granularity.expand(keep, layout).reshape(weight.shape), 0.0)
        for parameter_name, parameter in module.named_parameters():
            if "bias" in parameter_name:
                parameter.zero_()
    return module


CONVOLUTIONS = [
    nn.Linear(4, 6),
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d(3, 4, 2),
    nn.Conv2d(4, 4, 3, groups=4),
    nn.Conv3d(2, 4, 2, groups=2),
    nn.ConvTranspose1d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(3, 4, 2),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(4, 4, 3, groups=4),
    nn.ConvTranspose3d(2, 4, 2, groups=2),
]


def sensitivity(module: nn.Module, inputs: int) -> Tensor:
    """Return how much each output channel depends on each input channel: the summed absolute Jacobian, [outputs, inputs]."""
    space = (3,) * (module.get_parameter("weight").dim() - 2)
    x = torch.rand(1, inputs, *space, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, x)
    before = len(space) + 2
    return jacobian.abs().sum(dim=[0, *range(2, before + 1), *range(before + 2, 2 * before)])


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_channel_and_kernel_pieces_cut_exactly_one_dependence(module):
    inputs = getattr(module, "in_channels", None) or module.in_features
    dense = sensitivity(copy.deepcopy(module).double(), inputs) > 0
    outputs, groups = dense.shape[0], getattr(module, "groups", 1)
    assert dense.sum() == outputs * inputs / groups
    layout = layout_of(module, "weight", module.weight.shape)
    assert layout is not None
    for granularity, count in ((OutputChannel(), outputs), (InputChannel(), inputs), (Kernel(), outputs * inputs // groups)):
        assert int(torch.tensor(granularity.grid(layout)).prod()) == count
        cut_before: set[tuple[int, ...]] = set()
        for piece in range(count):
            left = sensitivity(masked(module, "weight", granularity, piece), inputs) > 0
            assert not (left & ~dense).any()
            lost = dense & ~left
            if isinstance(granularity, OutputChannel):
                assert torch.equal(lost.any(1).nonzero(), torch.tensor([[piece]]))
                assert torch.equal(lost[piece], dense[piece])
            elif isinstance(granularity, InputChannel):
                assert torch.equal(lost.any(0).nonzero(), torch.tensor([[piece]]))
                assert torch.equal(lost[:, piece], dense[:, piece])
            else:
                [where] = lost.nonzero().tolist()
                cut_before.add(tuple(where))
        if isinstance(granularity, Kernel):
            assert len(cut_before) == count


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_output_channel_zeroes_that_channel_of_the_output(module):
    inputs = getattr(module, "in_channels", None) or module.in_features
    outputs = getattr(module, "out_channels", None) or module.out_features
    x = torch.rand(2, inputs, *(3,) * (module.weight.dim() - 2), dtype=torch.float64) + 0.1
    for piece in range(outputs):
        y = masked(module, "weight", OutputChannel(), piece)(x)
        silent = [bool((y[:, channel] == 0).all()) for channel in range(outputs)]
        assert silent == [channel == piece for channel in range(outputs)]


def test_embedding_pieces_are_words_and_features():
    module, words = nn.Embedding(5, 3), torch.arange(5)
    for piece in range(5):
        assert ((masked(module, "weight", InputChannel(), piece)(words) == 0).all(1) == (words == piece)).all()
    for piece in range(3):
        assert ((masked(module, "weight", OutputChannel(), piece)(words) == 0).all(0) == (torch.arange(3) == piece)).all()


@pytest.mark.parametrize("granularity", [OutputChannel(), InputChannel()], ids=str)
def test_attention_pieces_stay_in_one_of_query_key_and_value(granularity):
    size = 4
    module = nn.MultiheadAttention(size, 2)
    x = torch.rand(3, 1, size, dtype=torch.float64)
    for piece in range(3 * size):
        which, channel = divmod(piece, size)
        projections = [w.detach().double().clone() for w in module.in_proj_weight.chunk(3)]
        if isinstance(granularity, OutputChannel):
            projections[which][channel] = 0
        else:
            projections[which][:, channel] = 0
        found = masked(module, "in_proj_weight", granularity, piece)
        # The function that takes three separate matrices is another path through torch.
        expected, _ = F.multi_head_attention_forward(
            x, x, x, size, 2, None, torch.zeros(3 * size, dtype=torch.float64), None, None, False, 0.0,
            found.out_proj.weight, None, use_separate_proj_weight=True,
            q_proj_weight=projections[0], k_proj_weight=projections[1], v_proj_weight=projections[2],
        )  # fmt: skip
        torch.testing.assert_close(found(x, x, x)[0], expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(found.in_proj_weight.detach(), torch.cat(projections))


def recurrent_modules() -> Iterator[nn.Module]:
    for kind in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        yield kind(3, 4)


def hidden(module: nn.Module, x: Tensor, state: Tensor) -> Tensor:
    """Return the hidden state after one step from hidden state ``state`` (and a cell state of zero)."""
    cell = torch.zeros_like(state)
    if isinstance(module, nn.LSTMCell):
        return module(x, (state, cell))[0]
    if isinstance(module, nn.RNNCellBase):
        return module(x, state)
    start = (state[None], cell[None]) if isinstance(module, nn.LSTM) else state[None]
    return module(x[None], start)[0][0]


@pytest.mark.parametrize("module", list(recurrent_modules()), ids=lambda m: type(m).__name__)
def test_recurrent_pieces_are_hidden_units_and_inputs(module):
    suffix = "" if isinstance(module, nn.RNNCellBase) else "_l0"
    x, zero = torch.rand(2, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    for unit in range(4):
        # Without its gates' weights a unit stays at zero: every gate's new content is tanh(0).
        without = masked(masked(module, f"weight_ih{suffix}", OutputChannel(), unit), f"weight_hh{suffix}", OutputChannel(), unit)
        state = zero
        for _ in range(3):
            state = hidden(without, x, state)
        assert (state == 0).all(0).tolist() == [other == unit for other in range(4)]
    for channel in range(3):
        without = masked(module, f"weight_ih{suffix}", InputChannel(), channel)
        jacobian = torch.autograd.functional.jacobian(lambda v, m=without: hidden(m, v, zero).sum(0), x)
        assert (jacobian == 0).all(1).all(0).tolist() == [other == channel for other in range(3)]
    if not isinstance(module, (nn.GRU, nn.GRUCell)):  # a GRU also carries its state over past the weights
        for unit in range(4):
            without = masked(module, f"weight_hh{suffix}", InputChannel(), unit)
            jacobian = torch.autograd.functional.jacobian(lambda s, m=without: hidden(m, x, s).sum(0), torch.rand_like(zero))
            assert (jacobian == 0).all(1).all(0).tolist() == [other == unit for other in range(4)]


# ---------------------------------------------------------------- numbers and memory


def test_element_values_are_untouched():
    values = torch.tensor([[1e-45, -0.0], [torch.inf, torch.nan]], dtype=torch.bfloat16)
    assert Element().reduce(values, Layout(("output", "input"), (2, 2))) is values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_taken_in_float64(dtype):
    layout = Layout(("output", "input"), (2, 4096))
    values = torch.full((2, 4096), 60000.0).to(dtype)
    assert OutputChannel().reduce(values, layout).tolist() == [[float(values[0, 0]) * 4096]] * 2
    small = torch.tensor([[1.0, 2.0**-50]])
    assert OutputChannel().reduce(small, Layout(("output", "input"), (1, 2))).tolist() == [[1.0 + 2.0**-50]]


@pytest.mark.parametrize("pieces", ["output_channel", "kernel", "block 2x3", "vector output 3"])
def test_memory_format_does_not_matter(pieces):
    case = convolution(6, 4, 1, (3, 3))
    granularity, key = PIECES[pieces]
    values = torch.arange(6 * 4 * 9).double().reshape(6, 4, 3, 3).to(memory_format=torch.channels_last)
    assert not values.is_contiguous()
    expected = [float(sum(piece)) for piece in pieces_of(case, key)]
    assert granularity.reduce(values, case.layout).flatten().tolist() == expected
    strided = torch.zeros(6, 4, 3, 6, dtype=torch.float64)[..., ::2].copy_(values)
    assert granularity.reduce(strided, case.layout).flatten().tolist() == expected
    keep = torch.arange(len(expected)).reshape(granularity.grid(case.layout)) % 3 == 0
    turned = keep.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(granularity.expand(keep, case.layout), granularity.expand(turned, case.layout))
    assert torch.equal(PatternNM(n=1, m=2).protected(values, case.layout), PatternNM(n=1, m=2).protected(values.contiguous(), case.layout))


def test_values_and_masks_are_not_changed():
    case = linear(5, 7)
    values, keep = torch.rand(5, 7), torch.ones(2, 7, dtype=torch.bool)
    before = values.clone(), keep.clone()
    block = Block(rows=4, columns=1, remainder="pad")
    block.reduce(values, case.layout)
    block.expand(keep, case.layout)[0, 0] = False
    PatternNM(n=2, m=4, remainder="pad").protected(values, case.layout)
    assert torch.equal(values, before[0])
    assert torch.equal(keep, before[1])


# ---------------------------------------------------------------- remainders, texts and errors

UNEVEN = [
    (PatternNM(n=2, m=4), linear(4, 6), "input", 6, 4),
    (PatternNM(n=2, m=4, dimension="output"), linear(6, 4), "output", 6, 4),
    (PatternNM(n=4, m=6, dimension="kernel"), convolution(2, 2, 1, (3, 3)), "kernel", 9, 6),
    (PatternNM(n=1, m=2, dimension="kernel"), linear(2, 2), "kernel", 1, 2),
    (PatternNM(n=2, m=4), convolution(1, 1, 8, (3, 3)), "input", 1, 4),
    (Block(rows=4, columns=1), linear(6, 3), "output", 6, 4),
    (Block(rows=1, columns=4), embedding(3, 6), "input", 6, 4),
    (Block(rows=4, columns=1), recurrent(nn.LSTM, 4, "weight_ih_l0", 5, 4), "output", 5, 4),
    (Vector(length=4), transposed(4, 6, 2, (3,)), "input", 6, 4),
    (Vector(length=2, dimension="kernel"), convolution(2, 2, 1, (2, 3)), "kernel", 3, 2),
]


@pytest.mark.parametrize(("granularity", "case", "role", "size", "length"), UNEVEN)
def test_a_dimension_that_is_not_divided(granularity, case, role, size, length):
    with pytest.raises(InputError) as caught:
        granularity.check(case.layout, "features.0.weight")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("'features.0.weight'", f"the {role} dimension", str(size), str(length), "remainder: pad", "remainder: skip"):
        assert part in message
    assert granularity.model_copy(update={"remainder": "skip"}).check(case.layout, "w") is False
    assert granularity.model_copy(update={"remainder": "pad"}).check(case.layout, "w") is True


@pytest.mark.parametrize("remainder", ["error", "pad", "skip"])
def test_a_dimension_that_is_divided(remainder):
    for granularity, case in (
        (PatternNM(n=2, m=4, remainder=remainder), linear(3, 8)),
        (PatternNM(n=4, m=9, dimension="kernel", remainder=remainder), convolution(2, 5, 1, (3, 3))),
        (PatternNM(n=1, m=4, dimension="group", remainder=remainder), convolution(1, 1, 8, (3, 3))),
        (Block(rows=4, columns=2, remainder=remainder), transposed(4, 2, 3, (3,))),
        (Vector(length=3, dimension="kernel", remainder=remainder), convolution(2, 2, 1, (5, 3))),
        (Vector(remainder=remainder), linear(3, 7)),
    ):
        assert granularity.check(case.layout, "w") is True


def test_whole_pieces_fit_everywhere():
    for kind in CASES.values():
        for granularity in (Element(), Kernel(), OutputChannel(), InputChannel()):
            assert granularity.check(kind().layout, "w") is True


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("element", Element()),
        ("2:4", PatternNM(n=2, m=4)),
        (" 1 : 16 ", PatternNM(n=1, m=16)),
        ("4x1", Block(rows=4, columns=1)),
        ("1x16", Block(rows=1, columns=16)),
        ({"n_m": {"n": 2, "m": 4, "dimension": "output", "remainder": "pad"}}, PatternNM(n=2, m=4, dimension="output", remainder="pad")),
        ({"block": {"rows": 2, "columns": 2, "remainder": "skip"}}, Block(rows=2, columns=2, remainder="skip")),
        ("vector", Vector()),
        ({"vector": {"length": 8, "dimension": "kernel"}}, Vector(length=8, dimension="kernel")),
        ("kernel", Kernel()),
        ("output_channel", OutputChannel()),
        ("filter", Channel()),
        ("channel", Channel()),
        ({"channel": {"aggregate": "l2"}}, Channel(aggregate="l2")),
        ("head", Head()),
        ("layer", WholeLayer()),
        ({"group": {"kinds": ["channel", "head_dim"], "aggregate": "max"}}, Grouped(kinds=("channel", "head_dim"), aggregate="max")),
        ("input_channel", InputChannel()),
    ],
    ids=str,
)
def test_recipe_texts_round_trip(data, expected):
    built = build("granularity", data)
    assert built == expected
    assert build("granularity", built.to_data()) == built


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("5:4", "5:4"),
        ({"n_m": {"n": 5, "m": 4}}, "5:4"),
        ("0:4", "greater than or equal to 1"),
        ("0x4", "greater than or equal to 1"),
        ({"n_m": {"n": 2}}, "required"),
        ({"n_m": {"n": 2, "m": 4, "dimension": "rows"}}, "'input'"),
        ({"block": {"rows": 2, "columns": 2, "remainder": "crop"}}, "'pad'"),
        ({"block": {"row": 2, "columns": 2}}, "did you mean 'rows'"),
        ({"vector": {"length": 0}}, "greater than or equal to 1"),
        ("elements", "did you mean 'element'"),
        ("2/4", "unknown component '2/4'"),
        ("2:4:8", "unknown component"),
        ({"group": {"kinds": ["layer", "channel"]}}, "'layer' stands alone"),
        ({"group": {"kinds": ["chanel"]}}, "'channel'"),
        ({"group": {"kinds": []}}, "at least 1"),
        ({"channel": {"kinds": ["head"]}}, "'channel'"),
        ({"channel": {"aggregate": "median"}}, "'mean'"),
    ],
    ids=str,
)
def test_wrong_recipes_are_one_line(data, part):
    with pytest.raises(InputError, match=re.escape(part)) as caught:
        build("granularity", data)
    assert "\n" not in str(caught.value)


def test_every_granularity_says_what_it_is():
    assert set(REGISTRY["granularity"]) == {
        "element", "n_m", "block", "vector", "kernel", "output_channel", "input_channel", "filter", "channel", "head", "layer", "group",
        "eigenbasis",
    }  # fmt: skip
    for kind in REGISTRY["granularity"].values():
        assert kind.equation
        assert kind.source
