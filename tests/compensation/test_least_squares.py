"""The least-squares compensation against least squares on the data."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from niwaki.compensation import Change, LeastSquares, Removal
from niwaki.component import build
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.statistics import InputGram


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CONVOLUTION = Layout(("output", "input", "kernel", "kernel"), (3, 4, 2, 2))


def convolution(seed=0):
    images, weight = normal(5, 4, 6, 6, seed=seed) @ normal(6, 6, seed=seed + 9), normal(3, 4, 2, 2, seed=seed + 1)
    patches = F.unfold(images, (2, 2)).movedim(1, 0).flatten(1).T
    return images, weight, patches, {InputGram(): (patches.T @ patches / len(patches))[None]}


def by_lstsq(patches, weight, keep):
    result = torch.zeros_like(weight)
    for row, old, stays in zip(result.flatten(1), weight.flatten(1), keep.flatten(1), strict=True):
        at = stays.nonzero().flatten()
        row[at] = torch.from_numpy(np.linalg.lstsq(patches[:, at].numpy(), (patches @ old).numpy(), rcond=None)[0])
    return result


def test_readers_of_units_are_solved_for_all_outputs():
    images, weight, patches, statistics = convolution()
    keep = torch.ones(weight.shape, dtype=torch.bool)
    keep[:, 1] = False
    change = Change("conv.weight", CONVOLUTION, weight, torch.ones_like(keep), keep, statistics)
    removal = Removal({"conv.weight": change})
    [(name, found)] = LeastSquares(ridge=0).compensate(removal).items()
    assert name == "conv.weight"
    torch.testing.assert_close(found, by_lstsq(patches, weight, keep), rtol=1e-9, atol=1e-9)
    assert not removal.notes
    before = F.conv2d(images, weight)
    assert (F.conv2d(images, found) - before).square().mean() < 0.99 * (F.conv2d(images, weight * keep) - before).square().mean()


def test_single_weights_of_each_row():
    _, weight, patches, statistics = convolution(seed=4)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    change = Change("conv.weight", CONVOLUTION, weight, torch.ones_like(keep), keep, statistics)
    found = LeastSquares(ridge=0).compensate(Removal({"conv.weight": change}))["conv.weight"]
    torch.testing.assert_close(found, by_lstsq(patches, weight, keep), rtol=1e-8, atol=1e-8)


def test_groups_and_dtypes():
    layout = Layout(("group", "output", "input"), (2, 3, 5))
    data, weight = normal(2, 40, 5) @ normal(2, 5, 5, seed=1), normal(2, 3, 5, seed=2)
    keep = torch.tensor([True, True, False, True, False]).expand(2, 3, 5)
    statistics = {InputGram(): data.mT @ data / 40}
    change = Change("w", layout, weight.float(), torch.ones_like(keep), keep, statistics)
    found = LeastSquares(ridge=0).compensate(Removal({"w": change}))["w"]
    assert found.dtype == torch.float32
    for g in range(2):
        expected = by_lstsq(data[g], weight[g], keep[g])
        torch.testing.assert_close(found[g].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_ridge_holds_weights_near_their_values():
    _, weight, _, statistics = convolution()
    keep = torch.ones(weight.shape, dtype=torch.bool)
    keep[:, 1] = False
    change = Change("conv.weight", CONVOLUTION, weight, torch.ones_like(keep), keep, statistics)
    moves = [
        float((LeastSquares(ridge=ridge).compensate(Removal({"c": change}))["c"] - weight * keep).norm()) for ridge in (0, 0.1, 1, 1e6)
    ]
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < 1e-4 < moves[0]


def test_where_whole_outputs_go_there_is_nothing_to_solve():
    layout = Layout(("output", "input"), (3, 4))
    keep = torch.tensor([[True], [False], [True]]).expand(3, 4)
    change = Change("w", layout, normal(3, 4), torch.ones_like(keep), keep)  # no statistics are looked at
    assert LeastSquares().compensate(Removal({"w": change})) == {}


def test_dependent_inputs_are_told_and_duplicates_made_up_for():
    layout = Layout(("output", "input"), (2, 3))
    data = normal(30, 3)
    data[:, 2] = data[:, 1] = data[:, 0]
    keep = torch.tensor([True, True, False]).expand(2, 3)
    weight = normal(2, 3, seed=1)
    removal = Removal({"fc.weight": Change("fc.weight", layout, weight, torch.ones_like(keep), keep, {InputGram(): (data.T @ data)[None]})})
    found = LeastSquares(ridge=0).compensate(removal)["fc.weight"]
    torch.testing.assert_close(data @ found.T, data @ weight.T, rtol=1e-6, atol=1e-6)
    assert len(removal.notes) == 1
    assert "fc.weight" in removal.notes[0]


def test_bad_input():
    layout, keep = Layout(("output", "input"), (2, 3)), torch.tensor([True, True, False]).expand(2, 3)
    gram = torch.full((1, 3, 3), float("inf"))
    with pytest.raises(InputError, match=r"fc\.weight.*finite"):
        LeastSquares().compensate(
            Removal({"fc.weight": Change("fc.weight", layout, normal(2, 3), torch.ones_like(keep), keep, {InputGram(): gram})})
        )
    with pytest.raises(InputError, match="ridge"):
        build("compensation", {"least_squares": {"ridge": -1}})
