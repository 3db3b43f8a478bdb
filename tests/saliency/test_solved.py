"""SparseGPT, OBC and Wanda on tensors of every layout: as on the plain matrix that the layer multiplies with."""

import pytest
import torch
import torch.nn.functional as F

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.granularity import Element, PatternNM
from niwaki.layerwise.exact import exact
from niwaki.layerwise.moments import moments
from niwaki.layerwise.sparsegpt import sparsegpt
from niwaki.layout import Layout
from niwaki.pieces import Grid
from niwaki.saliency import OBC, Observation, SparseGPT, Wanda
from niwaki.statistics import InputGram, InputSquare


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LINEAR = Layout(("output", "input"), (6, 8))
TRANSPOSED = Layout(("input", "output"), (8, 6))
CONVOLUTION = Layout(("output", "input", "kernel", "kernel"), (5, 4, 2, 3))
GROUPED = Layout(("group", "output", "input", "kernel", "kernel"), (2, 3, 4, 2, 2))
STACKED = Layout(("stack", "output", "input"), (3, 2, 8))


def seen_of(layout, gram_seed=1, dtype=torch.float64, **fields):
    groups = layout.size("group")
    columns = layout.elements // groups // layout.size("stack") // layout.size("output")
    data = normal(groups, 4 * columns, columns, seed=gram_seed) @ normal(groups, columns, columns, seed=gram_seed + 1)
    weight = normal(*layout.shape, seed=7).to(dtype)
    statistics = {InputGram(): data.mT @ data / data.shape[1], InputSquare(): None}
    return Observation("w", weight, layout=layout, statistics=statistics, **fields)


METHODS = [
    (SparseGPT(), lambda w, g, a, k: sparsegpt(w, moments(g, 0.01, "w"), a, k)),
    (OBC(), lambda w, g, a, k: exact(w, moments(g, 0.0, "w"), a, k)),
    (OBC(per="row", damping=0.1), lambda w, g, a, k: exact(w, moments(g, 0.1, "w"), a, k, per="row")),
]


@pytest.mark.parametrize(("saliency", "function"), METHODS)
def test_a_convolution_is_the_matrix_of_its_patches(saliency, function):
    seen = seen_of(CONVOLUTION)
    solution = saliency.solve(seen, 61, None)
    matrix = seen.weight.reshape(1, 5, 24)
    keep, new = function(matrix, seen.of(InputGram()), torch.ones_like(matrix, dtype=torch.bool), 61)
    assert torch.equal(solution.keep, keep.view(CONVOLUTION.shape))
    torch.testing.assert_close(solution.weight, new.view(CONVOLUTION.shape))
    assert int(solution.keep.sum()) == 61


@pytest.mark.parametrize(("saliency", "function"), METHODS)
def test_transposed_stacked_and_grouped_weights(saliency, function):
    seen = seen_of(TRANSPOSED)
    keep, new = function(seen.weight.T[None], seen.of(InputGram()), torch.ones(1, 6, 8).bool(), 20)
    solution = saliency.solve(seen, 20, None)
    assert torch.equal(solution.keep, keep[0].T)
    torch.testing.assert_close(solution.weight, new[0].T)
    seen = seen_of(STACKED)
    solution = saliency.solve(seen, 20, None)
    assert torch.equal(
        solution.keep.view(1, 6, 8), function(seen.weight.view(1, 6, 8), seen.of(InputGram()), keep.new_ones(1, 6, 8), 20)[0]
    )
    seen = seen_of(GROUPED)
    solution = saliency.solve(seen, 50, None)
    keep, new = function(seen.weight.reshape(2, 3, 16), seen.of(InputGram()), torch.ones(2, 3, 16).bool(), 50)
    assert torch.equal(solution.keep.reshape(2, 3, 16), keep)
    torch.testing.assert_close(solution.weight.reshape(2, 3, 16), new)


@pytest.mark.parametrize("saliency", [SparseGPT(), OBC()])
@pytest.mark.parametrize("layout", [LINEAR, TRANSPOSED, CONVOLUTION, GROUPED, STACKED])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3)])  # 3 does not divide: the last group is shorter
def test_n_of_m_is_the_pattern_of_the_granularity(saliency, layout, n, m):
    pattern = PatternNM(n=n, m=m, remainder="pad")
    solution = saliency.solve(seen_of(layout), 0, (n, m))
    protected = pattern.protected(solution.keep.double(), layout)
    assert not (solution.keep & ~protected).any()
    assert int(solution.keep.sum()) == int(protected.sum())
    assert not solution.weight[~solution.keep].any()


@pytest.mark.parametrize("saliency", [SparseGPT(), OBC()])
def test_the_update_keeps_the_outputs_better_than_the_mask_alone(saliency):
    seen = seen_of(LINEAR)
    solution = saliency.solve(seen, 24, None)
    gram = seen.of(InputGram())[0]

    def error(new):
        return float((((new - seen.weight) @ gram) * (new - seen.weight)).sum())

    masked = seen.weight * solution.keep
    by_size = seen.weight * (seen.weight.abs() >= seen.weight.abs().flatten().sort(descending=True).values[23])
    assert error(solution.weight) < 0.7 * error(masked)
    assert error(solution.weight) < 0.7 * error(by_size)


def test_without_the_update_only_the_mask_is_new():
    seen = seen_of(LINEAR)
    solution, other = SparseGPT(update=False).solve(seen, 24, None), SparseGPT().solve(seen, 24, None)
    assert torch.equal(solution.keep, other.keep)
    assert torch.equal(solution.weight, seen.weight * other.keep)


@pytest.mark.parametrize("saliency", [SparseGPT(), OBC()])
def test_what_is_masked_stays_masked(saliency):
    active = torch.rand(LINEAR.shape, generator=torch.Generator().manual_seed(3)) > 0.3
    seen = seen_of(LINEAR, active=active, dtype=torch.float32)
    solution = saliency.solve(seen, 20, None)
    assert int(solution.keep.sum()) == 20
    assert not (solution.keep & ~active).any()
    assert solution.weight.dtype == torch.float32
    with pytest.raises(InputError, match="48 weights of 'w'"):
        saliency.solve(seen, 48, None)


@pytest.mark.parametrize("saliency", [SparseGPT(damping=0), OBC()])
def test_scores_are_what_a_weight_alone_would_cost(saliency):
    seen = seen_of(CONVOLUTION)
    found = saliency.score(seen, Grid(Element(), CONVOLUTION))
    inverse = torch.linalg.inv(seen.of(InputGram())[0])
    expected = seen.weight.reshape(5, 24).square() / inverse.diagonal()
    torch.testing.assert_close(found.reshape(5, 24), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("saliency", [SparseGPT(damping=0), OBC()])
def test_notes_say_what_happened_to_the_moments(saliency):
    seen = seen_of(LINEAR)
    gram = torch.zeros(1, 8, 8, dtype=torch.float64)
    gram[0, :4, :4] = 1.0  # four equal inputs, and four without data
    solution = saliency.solve(Observation("fc.weight", seen.weight, layout=LINEAR, statistics={InputGram(): gram}), 6, None)
    assert not solution.keep[:, 4:].any()
    assert len(solution.notes) == 2
    assert all("fc.weight" in note for note in solution.notes)
    rows = solution.keep.any(dim=1)
    torch.testing.assert_close(solution.weight[rows].sum(dim=1), seen.weight[rows, :4].sum(dim=1), rtol=1e-5, atol=1e-5)
    gram[0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"fc\.weight.*finite"):
        saliency.solve(Observation("fc.weight", seen.weight, layout=LINEAR, statistics={InputGram(): gram}), 6, None)


# ------------------------------------------------------------------ wanda


def test_wanda_is_weight_times_root_mean_square_of_the_input():
    data, weight = normal(20, 8), normal(6, 8, seed=1)
    seen = Observation("w", weight, layout=LINEAR, statistics={InputSquare(): data.square().mean(dim=0, keepdim=True)})
    expected = weight.abs() * data.norm(dim=0) / 20**0.5
    torch.testing.assert_close(Wanda().score(seen, Grid(Element(), LINEAR)), expected, rtol=1e-12, atol=0)


def test_wanda_of_a_convolution_looks_at_each_kernel_position():
    images, weight = normal(3, 4, 6, 7), normal(*CONVOLUTION.shape, seed=1)
    patches = F.unfold(images, (2, 3)).movedim(1, 0).flatten(1)
    square = patches.square().mean(dim=1).view(1, 4, 2, 3)
    found = Wanda().score(Observation("w", weight, layout=CONVOLUTION, statistics={InputSquare(): square}), Grid(Element(), CONVOLUTION))
    expected = weight.abs() * square.sqrt()
    assert found.shape == CONVOLUTION.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_names_and_statistics():
    assert build("saliency", "sparsegpt").statistics == build("saliency", "obc").statistics == (InputGram(),)
    assert build("saliency", "wanda").statistics == (InputSquare(),)
    assert build("saliency", {"sparsegpt": {"mask_block": 64}}).solves
    with pytest.raises(InputError, match="damping"):
        SparseGPT(damping=-1)
    with pytest.raises(InputError, match="not collected"):
        Wanda().score(Observation("w", normal(2, 2)), lambda values: values)
