"""The exact greedy optimal brain surgeon, row by row (ExactOBS)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from niwaki.layerwise.counts import equal_shares
from niwaki.layerwise.least_squares import refit
from niwaki.layerwise.moments import Moments
from niwaki.layerwise.sparsegpt import Pattern

MEMORY = 1 << 27
"""Bytes that the inverses of rows which are pruned side by side may take; one inverse where it alone takes more."""

PANEL = 48
"""Removals after which the inverses of a row's remaining weights are brought up to date."""

COMPACT = 0.7
"""Share of a matrix that is still in use, at which the rest is dropped."""


def exact(
    weight: Tensor, moments: Moments, active: Tensor, keep: int, pattern: Pattern | None = None, *, per: Literal["tensor", "row"] = "tensor"
) -> tuple[Tensor, Tensor]:
    """Return which weights stay (bool) and their new values, both ``[groups, rows, columns]``.

    Each row by itself: the weight with the least ``w_q² / [H⁻¹]_qq`` goes, all others follow by ``w -= w_q / [H⁻¹]_qq · H⁻¹ e_q``, and
    ``H⁻¹ -= H⁻¹ e_q e_qᵀ H⁻¹ / [H⁻¹]_qq`` is that of the rest. How many go from each row: over all rows always the one that costs least
    next; or the same of each row; or what an N:M pattern says. Equal costs keep the lower index.

    The steps are a Cholesky factorization of each row's H⁻¹ with its own order of pivots, done in panels. Time is about
    ``rows · columns³ / 3`` multiply-adds.

    Args:
        weight: float64, zero where not active.
        moments: of the columns.
        active: bool, what may stay.
        keep: how many weights stay; not looked at with a pattern.
        pattern: N:M; then N of each group of each row stay.
        per: whether ``keep`` is shared over all rows by cost, or equally.

    Source: Frantar & Alistarh 2022 (optimal brain compression), algorithms 1 and 2.

    >>> from niwaki.layerwise.moments import moments
    >>> found = moments(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]), 0.0, "fc.weight")
    >>> exact(torch.tensor([[[3.0, 1.0]]], dtype=torch.float64), found, torch.ones(1, 1, 2, dtype=torch.bool), 1)
    (tensor([[[ True, False]]]), tensor([[[3.5000, 0.0000]]], dtype=torch.float64))
    """
    groups, rows, columns = weight.shape
    count = groups * rows
    # Columns in reverse: the first of equal costs goes, and that is to be the last column.
    flat = active.reshape(count, columns).flip(1)
    values = weight.masked_fill(moments.dead[:, None] | ~active, 0.0)  # nothing is lost with a dead weight
    reverse, pattern = values.reshape(count, columns).flip(1), pattern and Pattern(pattern.n, pattern.groups.flip(0))
    alive = flat.sum(dim=1)
    if pattern is not None:
        limits = alive - _kept_of(flat, pattern)
    elif per == "row":
        limits = alive - equal_shares(keep, alive)
    else:
        limits = alive
    group_of = torch.arange(groups, device=weight.device).repeat_interleave(rows)
    order = torch.zeros(count, max(int(limits.max()), 0), dtype=torch.int64, device=weight.device)
    losses = torch.full(order.shape, torch.inf, dtype=torch.float64, device=weight.device)
    matrices, inverses = moments.matrix.flip(1, 2), moments.inverse().flip(1, 2)
    for chunk in torch.split(torch.arange(count, device=weight.device), max(MEMORY // (8 * columns**2), 1)):
        inverse = _inverses(matrices, inverses, group_of[chunk], flat[chunk])
        steps = int(limits[chunk].max())
        order[chunk, :steps], losses[chunk, :steps] = _greedy(reverse[chunk], inverse, flat[chunk], steps, pattern)
    go = limits if pattern is not None or per == "row" else _cheapest(losses, int(alive.sum()) - keep)
    stays = flat.clone()
    row, step = (torch.arange(order.shape[1], device=weight.device) < go[:, None]).nonzero(as_tuple=True)
    stays[row, order[row, step]] = False
    keeps = stays.flip(1).view(weight.shape)
    new = torch.stack([refit(w, h, k)[0] for w, h, k in zip(values, moments.matrix, keeps, strict=True)])
    return keeps, torch.where(moments.dead[:, None] & keeps, weight, new)


def _kept_of(active: Tensor, pattern: Pattern) -> Tensor:
    """Return how many weights of each row an N:M pattern leaves."""
    return _in_groups(active, pattern.groups).clamp(max=pattern.n).sum(dim=1)


def _in_groups(values: Tensor, groups: Tensor) -> Tensor:
    counts = torch.zeros(len(values), int(groups.max()) + 1, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(1, groups.expand(values.shape), values.to(torch.int64))


def _inverses(matrices: Tensor, inverses: Tensor, group: Tensor, active: Tensor) -> Tensor:
    """Return the inverse of the H of each row's active weights, ``[rows, columns, columns]``; not to be written into."""
    if bool(active.all()):
        return inverses[group[0]].expand(len(group), -1, -1) if bool((group == group[0]).all()) else inverses[group]
    both = active[:, :, None] & active[:, None, :]
    matrix = matrices[group].masked_fill_(~both, 0.0)
    matrix.diagonal(dim1=1, dim2=2).masked_fill_(~active, 1.0)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _greedy(weight: Tensor, inverse: Tensor, active: Tensor, steps: int, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
    """Return which column each row loses at each step, and what that costs (infinite once no more may go).

    Of equal costs the first column goes.
    """
    rows, size = weight.shape
    every = torch.arange(rows, device=weight.device)
    ids = torch.arange(size, device=weight.device).expand(rows, size)
    alive, free, matrix = active.clone(), active.clone(), inverse
    room = torch.zeros(rows, 1) if pattern is None else _in_groups(active, pattern.groups) - pattern.n  # how many of a group still may go
    if pattern is not None:
        free &= (room > 0).gather(1, pattern.groups[ids])
    diagonal = matrix.diagonal(dim1=1, dim2=2).clone()
    order = torch.zeros(rows, steps, dtype=torch.int64, device=weight.device)
    losses = torch.full((rows, steps), torch.inf, dtype=torch.float64, device=weight.device)
    panel, filled = matrix.new_zeros(rows, PANEL, size), 0
    for step in range(steps):
        cost = (weight.square() / diagonal).masked_fill_(~free, torch.inf)
        loss, pivot = cost.min(dim=1)
        order[:, step], losses[:, step] = ids[every, pivot], loss
        column = matrix[every, pivot]
        if filled:
            at = panel.gather(2, pivot[:, None, None].expand(-1, PANEL, 1)).mT  # zero where not filled yet: cheaper than a slice
            column = column[:, None].baddbmm(at, panel, alpha=-1.0)[:, 0]
        length = diagonal[every, pivot].sqrt()
        column = (column / length[:, None]).masked_fill_(loss[:, None].isinf(), 0.0)
        weight = weight.addcmul(column, (weight[every, pivot] / length)[:, None], value=-1.0)
        diagonal = diagonal.addcmul_(column, column, value=-1.0)
        free[every, pivot] = False
        alive[every, order[:, step]] &= loss.isinf()
        if pattern is not None:
            room[every, pattern.groups[order[:, step]]] -= 1
            free &= (room > 0).gather(1, pattern.groups[ids])
        panel[:, filled] = column
        filled += 1
        if filled == PANEL and step + 1 < steps:
            left = int(alive.sum(dim=1).max())
            if left <= COMPACT * size:
                place = alive.gather(1, ids).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :left]
                matrix = _parts(matrix, place)
                panel = panel.gather(2, place[:, None].expand(-1, PANEL, -1))
                ids, weight, diagonal, free = (t.gather(1, place) for t in (ids, weight, diagonal, free))
                size = left
            matrix = matrix.baddbmm(panel.mT, panel, alpha=-1.0) if matrix is inverse else matrix.baddbmm_(panel.mT, panel, alpha=-1.0)
            panel, filled = panel.zero_(), 0
    return order, losses


def _parts(matrices: Tensor, places: Tensor) -> Tensor:
    """Return the rows and columns of each matrix that are named: ``[matrices, n, n]``."""
    size = places.shape[1]
    parts = matrices.new_empty(len(matrices), size, size)
    for matrix, place, part in zip(matrices, places, parts, strict=True):
        torch.index_select(matrix.index_select(0, place), 1, place, out=part)
    return parts


def _cheapest(losses: Tensor, count: int) -> Tensor:
    """Return how many of each row go, if ``count`` times the row whose next removal costs least gives one up.

    A row's next removal is only reached through those before it, so that its price is the largest so far. Of equal rows the last gives.
    """
    price = losses.cummax(dim=1).values.flip(0)
    taken = price.flatten().argsort(stable=True)[:count]
    return torch.bincount(taken // max(price.shape[1], 1), minlength=len(losses)).flip(0)
