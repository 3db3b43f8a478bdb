"""Magnitude against plain loops with exactly rounded sums."""

import math

import numpy as np
import pytest
import torch

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.granularity import Block, Element
from niwaki.layout import Layout
from niwaki.pieces import Grid
from niwaki.saliency import Magnitude, Observation


def identity(values):
    return values


def rows(values):
    return values.sum(1, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_norms_of_pieces_equal_loops(dtype):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    seen = Observation("w", weight)
    l1 = [math.fsum(abs(v) for v in row) for row in weight.tolist()]
    l2 = [math.sqrt(math.fsum(v * v for v in row)) for row in weight.tolist()]
    for norm, expected in (("l1", l1), ("l2", l2)):
        found = Magnitude(norm=norm).score(seen, rows)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_single_weights_keep_every_bit_of_their_size(norm, dtype):
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    denormals = [k * smallest * torch.finfo(dtype).eps for k in (1, 2, 3)]
    values = [0.0, *denormals, smallest, 1.0, largest]
    weight = torch.tensor([v * (-1) ** i for i, v in enumerate(values)], dtype=torch.float64).to(dtype)
    found = Magnitude(norm=norm).score(Observation("w", weight), identity)
    assert found.tolist() == values
    assert found.dtype in (torch.float32, torch.float64)
    assert (found.diff() > 0).all()


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_sums_of_low_precision_weights_do_not_overflow(norm):
    weight = torch.full((2, 16), 60000.0, dtype=torch.float16)
    expected = float(weight[0, 0]) * (16 if norm == "l1" else 4)
    assert Magnitude(norm=norm).score(Observation("w", weight), rows).tolist() == [expected] * 2


def test_infinite_and_missing_numbers():
    weight = torch.tensor([[1.0, -torch.inf], [torch.nan, 1.0], [0.0, -0.0]])
    for norm in ("l1", "l2"):
        found = Magnitude(norm=norm).score(Observation("w", weight), rows).tolist()
        assert found[0] == math.inf
        assert math.isnan(found[1])
        assert found[2] == 0.0


def test_the_weights_are_not_changed():
    weight = torch.tensor([[-2.0, 1.0]], dtype=torch.float64)
    for norm in ("l1", "l2"):
        for reduce in (identity, rows):
            Magnitude(norm=norm).score(Observation("w", weight), reduce)
    assert weight.tolist() == [[-2.0, 1.0]]


def test_recipe():
    assert build("saliency", "magnitude") == Magnitude(norm="l1")
    l2 = build("saliency", {"magnitude": {"norm": "l2"}})
    assert l2 == Magnitude(norm="l2")
    assert build("saliency", l2.to_data()) == l2
    with pytest.raises(InputError, match="'l1', 'l2' or 'max'"):
        build("saliency", {"magnitude": {"norm": "l3"}})


def test_largest_weight_of_a_piece():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    layout = Layout(("output", "input"), (6, 8))
    found = Magnitude(norm="max").score(Observation("w", weight), Grid(Block(rows=2, columns=4), layout))
    expected = [[max(abs(float(weight[r, c])) for r in (i, i + 1) for c in range(j, j + 4)) for j in (0, 4)] for i in (0, 2, 4)]
    assert found.tolist() == expected
    assert Magnitude(norm="max").score(Observation("w", weight), Grid(Element(), layout)).tolist() == weight.abs().tolist()


def test_size_in_standard_deviations_of_the_active_weights():
    weight = 0.3 + 0.1 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    component = Magnitude(over="deviation")
    found = component.score(Observation("w", weight), identity)
    torch.testing.assert_close(found, weight.abs() / float(np.std(weight.numpy())), rtol=1e-13, atol=0)
    assert int((found < 2.5).sum()) == int((weight.abs() < 2.5 * np.std(weight.numpy())).sum())  # Han's threshold q std(w)
    active = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = weight * active
    found = component.score(Observation("w", masked, active=active), identity)
    torch.testing.assert_close(found[active], masked[active].abs() / float(np.std(masked[active].numpy())), rtol=1e-13, atol=0)
    found = Magnitude(norm="l2", over="deviation").score(Observation("w", weight), rows)
    torch.testing.assert_close(found, weight.norm(dim=1) / float(np.std(weight.numpy())), rtol=1e-13, atol=0)
    assert component.score(Observation("w", torch.full((2, 2), 3.0)), identity).tolist() == [[3.0, 3.0]] * 2
