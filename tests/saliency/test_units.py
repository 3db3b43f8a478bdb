"""Scores of whole units (similarity, norm scales, activity, head importance, position) against loops, closed forms and autograd."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.granularity import Block, InputChannel, OutputChannel
from niwaki.layout import Layout
from niwaki.pieces import Grid
from niwaki.saliency import Activity, HeadImportance, NormScale, Observation, Position, Similarity, similarity
from niwaki.statistics import InputSize

CONVOLUTION = Layout(("output", "input", "kernel", "kernel"), (7, 3, 2, 2))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------ similarity


@pytest.mark.parametrize("block", [1, 3, 256])
def test_similarity_is_the_sum_of_distances(block, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK", block)
    weight = normal(7, 3, 2, 2)
    found = Similarity().score(Observation("conv.weight", weight), Grid(OutputChannel(), CONVOLUTION))
    expected = [sum(math.dist(a.flatten().tolist(), b.flatten().tolist()) for b in weight) for a in weight]
    assert found.shape == (7, 1, 1, 1)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_similarity_of_input_channels_and_of_blocks():
    weight = normal(7, 3, 2, 2)
    found = Similarity().score(Observation("w", weight), Grid(InputChannel(), CONVOLUTION)).flatten()
    columns = [weight[:, c].flatten().tolist() for c in range(3)]
    expected = [sum(math.dist(a, b) for b in columns) for a in columns]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    flat = Layout(("output", "input"), (4, 6))
    found = Similarity().score(Observation("w", normal(4, 6)), Grid(Block(rows=2, columns=3), flat))
    assert found.shape == (2, 2)


def test_the_piece_at_the_geometric_median_goes_first():
    line = torch.tensor([[10.0], [11.0], [12.0], [14.0], [60.0]])  # the median of points on a line is the middle one
    scores = Similarity().score(Observation("w", line), Grid(OutputChannel(), Layout(("output", "input"), (5, 1)))).flatten()
    assert scores.tolist() == [57.0, 54.0, 53.0, 55.0, 50 + 49 + 48 + 46.0]
    assert int(scores.argmin()) == 2


def test_masked_pieces_are_not_compared_with():
    weight = normal(5, 4)
    masked = weight.clone()
    masked[[1, 3]] = 0.0
    layout = Layout(("output", "input"), (5, 4))
    found = Similarity().score(Observation("w", masked), Grid(OutputChannel(), layout)).flatten()
    rest = Similarity().score(Observation("w", weight[[0, 2, 4]]), Grid(OutputChannel(), Layout(("output", "input"), (3, 4)))).flatten()
    torch.testing.assert_close(found[[0, 2, 4]], rest, rtol=1e-14, atol=0)


def test_equal_pieces_are_at_distance_zero_also_far_from_the_origin():
    weight = torch.full((3, 8), 1e4) + torch.tensor([[0.0], [0.0], [1e-2]])
    scores = Similarity().score(Observation("w", weight), Grid(OutputChannel(), Layout(("output", "input"), (3, 8)))).flatten()
    gap = float(weight[2, 0] - weight[0, 0]) * math.sqrt(8)
    assert scores.tolist() == pytest.approx([gap, gap, 2 * gap], rel=1e-12)


def test_similarity_tells_nan_and_pieces_of_different_size():
    weight = normal(7, 3, 2, 2)
    weight[4, 0, 0, 0] = math.nan
    assert Similarity().score(Observation("w", weight), Grid(OutputChannel(), CONVOLUTION)).isnan().all()
    with pytest.raises(InputError, match="equal"):
        Similarity().score(
            Observation("w", normal(4, 6)), Grid(Block(rows=3, columns=1, remainder="pad"), Layout(("output", "input"), (4, 6)))
        )


# ------------------------------------------------------------------ norm scales


def test_norm_scale_is_the_size_of_the_scale():
    gamma = torch.tensor([-0.5, 0.0, 2.0])
    assert NormScale().score(Observation("bn.weight", gamma), lambda values: values).tolist() == [0.5, 0.0, 2.0]
    assert NormScale.scored_on == "norms"


# ------------------------------------------------------------------ activity


def test_activity_is_the_mean_over_data_and_entries():
    data = normal(50, 6)  # three units of two entries each, as after flattening a map of two positions
    activity = data.abs().mean(0, keepdim=True)
    units = torch.tensor([0, 0, 1, 1, 2, 2])

    def reduce(values):
        return torch.zeros(4, dtype=torch.float64).index_add(0, units, values.sum(0).double())

    found = Activity().score(Observation("fc.weight", torch.zeros(9, 6), statistics={InputSize(): activity}), reduce)
    expected = [sum(abs(float(row[c])) for row in data for c in (2 * u, 2 * u + 1)) / 100 for u in range(3)]
    assert found.tolist() == pytest.approx([*expected, 0.0], rel=1e-13)  # the fourth unit has no entries here
    assert Activity.scored_on == "inputs"
    assert Activity.of_units
    assert Activity().statistics == (InputSize(),)


def test_activity_of_the_inputs_of_a_convolution():
    activity = torch.tensor([1.0, 5.0, 2.0]).view(1, 3, 1, 1)
    found = Activity().score(
        Observation("w", torch.zeros(7, 3, 2, 2), statistics={InputSize(): activity}), Grid(InputChannel(), CONVOLUTION)
    )
    assert found.flatten().tolist() == [1.0, 5.0, 2.0]


def test_a_missing_activity_is_told():
    with pytest.raises(InputError, match=r"fc\.weight: its InputSize was not collected at step 0"):
        Activity().score(Observation("fc.weight", torch.ones(2, 2)), lambda values: values)


# ------------------------------------------------------------------ head importance

HEADS, WIDTH, TOKENS = 3, 4, 5


class Attention(torch.nn.Module):
    """Attention with a gate on the output of each head, written out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        dim = HEADS * WIDTH
        self.qkv = torch.nn.Linear(dim, 3 * dim, dtype=torch.float64)
        self.out = torch.nn.Linear(dim, dim, dtype=torch.float64)
        self.classify = torch.nn.Linear(dim, 2, dtype=torch.float64)

    def forward(self, x, gate):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        self.heads = F.scaled_dot_product_attention(q, k, v)
        self.heads.retain_grad()
        mixed = (self.heads * gate.view(HEADS, 1, 1)).transpose(1, 2).flatten(2)
        return self.classify(self.out(mixed).mean(1))


def test_head_importance_is_the_gradient_of_a_gate_on_each_head():
    torch.manual_seed(0)
    model = Attention()
    units = torch.arange(HEADS * WIDTH) // WIDTH

    def reduce(values):
        return torch.zeros(HEADS, dtype=torch.float64).index_add(0, units, values.sum(0))

    for example in range(4):  # one a batch, as in the paper
        x, y = normal(1, TOKENS, HEADS * WIDTH, seed=example), torch.tensor([example % 2])
        gate = torch.ones(HEADS, dtype=torch.float64, requires_grad=True)
        model.zero_grad()
        F.cross_entropy(model(x, gate), y).backward()
        found = HeadImportance().score(Observation("out.weight", model.out.weight.detach(), gradient=model.out.weight.grad), reduce)
        torch.testing.assert_close(found, gate.grad.abs(), rtol=1e-10, atol=1e-16)
        products = (model.heads.detach() * model.heads.grad).sum((0, 2, 3)).abs()  # |A^T dL/dA| of each head
        torch.testing.assert_close(found, products, rtol=1e-10, atol=1e-16)
    assert HeadImportance.scored_on == "inputs"
    assert HeadImportance.needs == {"gradient"}
    assert HeadImportance().averages == "batch"
    assert HeadImportance(over="sample").averages == "sample"


def test_head_importance_needs_a_gradient():
    with pytest.raises(InputError, match=r"'w' has no gradient"):
        HeadImportance().score(Observation("w", torch.ones(2)), lambda values: values)


# ------------------------------------------------------------------ position


def order(n):
    scores = (
        Position().score(Observation("blocks", torch.zeros(n, 1)), Grid(OutputChannel(), Layout(("output", "input"), (n, 1)))).flatten()
    )
    return sorted(range(n), key=lambda i: float(scores[i]))


@pytest.mark.parametrize("n", [2, 4, 6, 12, 16, 24])
def test_half_of_the_pieces_are_every_other_one(n):
    assert sorted(order(n)[: n // 2]) == list(range(1, n, 2))


@pytest.mark.parametrize("n", [4, 8, 12, 24])
def test_a_quarter_of_the_pieces_are_every_fourth(n):
    assert sorted(order(n)[: n // 4]) == list(range(3, n, 4))


@pytest.mark.parametrize("n", [1, 5, 12, 13, 100])
def test_every_number_of_pieces_is_spread_about_evenly(n):
    for removed in range(1, n):
        gone = sorted(order(n)[:removed])
        gaps = [b - a for a, b in itertools.pairwise([-1, *gone, n])]
        assert max(gaps) <= 4 * math.ceil(n / (removed + 1))
    assert order(n)[-1] == 0
    assert sorted(order(n)) == list(range(n))


def test_position_sees_no_values():
    nan = torch.full((7, 3, 2, 2), math.nan)
    scores = Position().score(Observation("w", nan), Grid(OutputChannel(), CONVOLUTION))
    assert scores.shape == (7, 1, 1, 1)
    assert scores.flatten().tolist() == [1.0, 0.5, 0.75, 0.25, 0.875, 0.375, 0.625]


def test_names():
    assert build("saliency", "fpgm") == build("saliency", "similarity") == Similarity()
    assert [build("saliency", name).name for name in ("norm_scale", "activity", "head_importance", "position")] == [
        "norm_scale",
        "activity",
        "head_importance",
        "position",
    ]
