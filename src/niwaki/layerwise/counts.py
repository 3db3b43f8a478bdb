"""How many weights go from where: exact shares, the lowest scores, and groups of columns of an N:M pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Return parts of ``total`` in proportion to sizes, none larger than its size, with the exact sum.

    >>> shares(5, [4, 4, 2])
    [2, 2, 1]
    """
    whole, before, result = max(sum(sizes), 1), 0, []
    for size in sizes:
        result.append(total * (before + size) // whole - total * before // whole)
        before += size
    return result


def equal_shares(total: int, limits: Tensor) -> Tensor:
    """Return as equal parts of ``total`` as limits (int64) allow; the first have one more where it does not come out even.

    >>> equal_shares(8, torch.tensor([5, 1, 5]))
    tensor([4, 1, 3])
    """
    result = torch.zeros_like(limits)
    while (left := total - int(result.sum())) > 0:
        room = (result < limits).nonzero().flatten()
        each = max(left // len(room), 1)
        room = room if left >= len(room) else room[:left]
        result[room] = torch.minimum(result[room] + each, limits[room])
    return result


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return which are the ``count`` lowest scores (bool, same shape); of equal ones those with the higher flat index.

    >>> lowest(torch.tensor([1.0, 0.0, 1.0, 2.0]), 2)
    tensor([False,  True,  True, False])
    """
    flat = scores.flatten()
    found = torch.zeros(flat.shape, dtype=torch.bool, device=scores.device)
    found[flat.numel() - 1 - flat.flip(0).argsort(stable=True)[:count]] = True
    return found.view(scores.shape)


def pattern_groups(inputs: int, m: int, positions: int = 1) -> Tensor:
    """Return the N:M group of each column, for columns that are inputs times kernel positions: ``[inputs * positions]`` int64.

    A group is M consecutive inputs at one position; the last of a position may be shorter. Groups are numbered position by position.

    >>> pattern_groups(5, 2).tolist()
    [0, 0, 1, 1, 2]
    """
    each = -(-inputs // m)
    return (torch.arange(inputs)[:, None] // m + each * torch.arange(positions)).flatten()
