"""Refits against least squares on the data, and second moments that cannot be inverted."""

import numpy as np
import pytest
import torch

from niwaki.errors import InputError
from niwaki.layerwise import least_squares as module
from niwaki.layerwise.least_squares import refit
from niwaki.layerwise.moments import moments


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_lstsq(data, weight, keep, ridge=0.0):
    """Each row by itself; the ridge as further equations."""
    result = torch.zeros_like(weight)
    strength = ridge * float(data.square().mean())  # of the mean of the diagonal of the second moments
    for r, (row, stays) in enumerate(zip(weight, keep, strict=True)):
        at = stays.nonzero().flatten()
        a = np.concatenate([data[:, at].numpy() / np.sqrt(len(data)), np.sqrt(strength) * np.eye(len(at))])
        b = np.concatenate([(data @ row).numpy() / np.sqrt(len(data)), np.sqrt(strength) * row[at].numpy()])
        result[r, at] = torch.from_numpy(np.linalg.lstsq(a, b, rcond=None)[0])
    return result


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("memory", [1, 5000, 1 << 27])
def test_rows_of_all_kinds_of_supports(ridge, memory, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", memory)
    data, weight = normal(40, 9) @ normal(9, 9, seed=1), normal(12, 9, seed=2)
    keep = torch.rand(12, 9, generator=torch.Generator().manual_seed(3)) > 0.5
    keep[3:6] = keep[2]  # some rows with the same support
    keep[8], keep[9] = False, True  # nothing left, everything left
    found, used = refit(weight, data.T @ data / len(data), keep, ridge)
    torch.testing.assert_close(found, by_lstsq(data, weight, keep, ridge), rtol=1e-9, atol=1e-9)
    assert used == ridge
    assert torch.equal(found[9], weight[9])


def test_one_support_of_all_rows():
    data, weight = normal(40, 9) @ normal(9, 9, seed=1), normal(30, 9, seed=2)
    keep = torch.tensor([True, False, True] * 3).expand(30, 9)
    found, _ = refit(weight, data.T @ data / len(data), keep)
    torch.testing.assert_close(found, by_lstsq(data, weight, keep), rtol=1e-9, atol=1e-9)


def test_inputs_that_depend_on_each_other():
    data = normal(5, 9)  # fewer observations than inputs
    weight, keep = normal(4, 9, seed=1), torch.arange(9).expand(4, 9) < 7
    found, used = refit(weight, data.T @ data / len(data), keep)
    assert used > 0
    # What can be made up for at all is; the seven that stay span the data.
    torch.testing.assert_close(data @ found.T, data @ weight.T, rtol=1e-6, atol=1e-6)
    assert not found[:, 7:].any()


def test_inputs_without_data():
    data, weight = normal(20, 5), normal(3, 5, seed=1)
    data[:, 2] = 0.0
    keep = torch.tensor([True, False, True, True, False]).expand(3, 5)
    found, used = refit(weight, data.T @ data / len(data), keep)
    assert torch.equal(found[:, 2], weight[:, 2])
    assert used == 0.0
    others = [0, 1, 3, 4]
    expected = by_lstsq(data[:, others], weight[:, others], keep[:, others])
    torch.testing.assert_close(found[:, others], expected, rtol=1e-9, atol=1e-9)


def test_moments_are_damped_by_a_share_of_their_mean_diagonal():
    gram = torch.diag(torch.tensor([1.0, 3.0, 0.0])).double()[None]
    found = moments(gram, 0.5, "fc.weight")
    assert found.matrix[0].diagonal().tolist() == [2.0, 4.0, 1.0]  # the mean is of the columns that live: 2
    assert found.dead.tolist() == [[False, False, True]]
    torch.testing.assert_close(found.inverse() @ found.matrix, torch.eye(3, dtype=torch.float64)[None])
    assert any("fc.weight" in note and "1 of 3" in note for note in found.notes)
    assert moments(gram[:, :2, :2], 0.0, "w").notes == ()


def test_singular_moments_are_damped_until_they_are_not_and_it_is_told():
    data = normal(2, 6, 6)
    data[0, 4:] = 0.0  # of rank four
    gram = data.mT @ data
    found = moments(gram, 0.0, "fc.weight")
    assert torch.equal(found.matrix[1], gram[1])
    added = found.matrix[0].diagonal() - gram[0].diagonal()
    assert 0 < float(added.min()) <= float(added.max()) < 1e-6 * float(gram[0].diagonal().mean())
    assert any("fc.weight" in note and "damping" in note for note in found.notes)
    assert float(torch.linalg.eigvalsh(found.matrix).min()) > 0


def test_a_matrix_of_one_direction_only():
    line = normal(1, 30)
    found = moments(line.mT @ line[None], 0.0, "w")
    assert bool(found.inverse().isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite(value):
    gram = torch.eye(3)[None].clone()
    gram[0, 1, 1] = value
    with pytest.raises(InputError, match=r"fc\.weight.*finite"):
        moments(gram, 0.01, "fc.weight")
