"""Which inputs of a layer it can do without: orders in which units are removed, from second moments of what the units contribute.

A unit u contributes ``x̂_u = Σ_(j in u) w_j x_j`` to the outputs; ``M_uv = E[x̂_uᵀ x̂_v]`` is all that a squared error of them depends on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from niwaki.layerwise.moments import Moments

ROUNDING = 1e-12
"""Share of a number's first value below which what is left of it is rounding."""


def contributions(weight: Tensor, gram: Tensor, unit: Tensor, units: int) -> Tensor:
    """Return M of units, ``[units, units]`` float64.

    Args:
        weight: ``[groups, rows, columns]`` float64.
        gram: ``E[x xᵀ]``, ``[groups, columns, columns]`` float64.
        unit: int64 ``[groups, columns]``, the unit of each column, or -1 for none.
        units: how many there are.

    >>> contributions(torch.tensor([[[3.0, 4.0, 5.0]]]), torch.eye(3)[None], torch.tensor([[0, 1, 0]]), 2).tolist()
    [[34.0, 0.0], [0.0, 16.0]]
    """
    result = weight.new_zeros(units + 1, units + 1)
    for w, g, u in zip(weight, gram, unit, strict=True):
        at = u.where(u >= 0, units)
        columns = (g * (w.T @ w)).new_zeros(units + 1, g.shape[1]).index_add_(0, at, g * (w.T @ w))
        result.index_add_(1, at, columns)
    return result[:units, :units]


def thinet_order(products: Tensor, present: Tensor) -> Tensor:
    """Return the round in which each unit is removed, 0 first: int64 ``[units]``.

    In each round the unit goes with which ``E‖Σ_(u removed) x̂_u‖²`` becomes least. Equal ones keep the lower unit.

    Args:
        products: M, ``[units, units]``.
        present: bool; units that are not have gone before all others.

    >>> thinet_order(torch.tensor([[4.0, 0.0, -4.0], [0.0, 1.0, 0.0], [-4.0, 0.0, 5.0]]), torch.ones(3, dtype=torch.bool)).tolist()
    [1, 0, 2]
    """
    after = products.diagonal().flip(0).clone()  # in reverse, as the first minimum is the one that goes
    flipped, size = products.flip(0, 1), len(products)
    rounds, left = torch.zeros(size, dtype=torch.int64, device=products.device), present.flip(0).clone()
    first = int((~present).sum())
    rounds[~left] = torch.arange(first, device=products.device)
    for step in range(first, size):
        goes = int(after.masked_fill(~left, torch.inf).argmin())
        rounds[goes], left[goes] = step, False
        after += 2 * flipped[goes]
    return rounds.flip(0)


def lasso_path(products: Tensor) -> Tensor:
    """Return for each unit the penalty λ from which on it is out: ``[units]`` float64, 0 for one that is never in.

    ``min_β ½ E‖Σ_u (1 - β_u) x̂_u‖² + λ ‖β‖₁``, for all λ: the solution is piecewise linear in λ, and is followed from the λ at which
    all is zero down to 0 (least angle regression with the lasso's drops). A unit that is in more than once has the largest λ.

    Args:
        products: M, ``[units, units]`` float64, positive semidefinite.

    Source: Efron, Hastie, Johnstone, Tibshirani 2004; Osborne, Presnell, Turlach 2000.

    >>> lasso_path(torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))).tolist()
    [4.0, 1.0, 0.0]
    """
    size, target = len(products), products.sum(dim=1)  # E[x̂_uᵀ Y] of the outputs Y, which all units make together
    table = torch.cat([products, target[:, None]], dim=1)  # swept at u: row u is of the solution with u in
    signs = products.new_zeros(size)
    inside = torch.zeros(size, dtype=torch.bool, device=products.device)
    floor = ROUNDING * products.diagonal()
    result = products.new_zeros(size)
    if size == 0 or float(target.abs().max()) <= 0:
        return result
    now = float(target.abs().max()) * (1 + ROUNDING)
    for _ in range(8 * size + 8):
        fit, slope = table[:, size], table[:, :size].masked_fill(~inside, 0.0) @ signs
        # β of those inside, and E[x̂_uᵀ error] of the others, are fit - λ slope. The first leave at zero, the others enter at ±λ.
        usable = ~inside & (table.diagonal() > floor)
        leave = torch.where(inside & (signs * slope < 0), fit / slope, -torch.inf)
        above = torch.where(usable & (slope > -1), fit / (1 + slope), -torch.inf)
        below = torch.where(usable & (slope < 1), -fit / (1 - slope), -torch.inf)
        events = torch.stack([leave, above, below])
        events = events.masked_fill(events > now * (1 + 1e-9), -torch.inf)
        now, which = float(events.max()), int(events.argmax())
        if now <= 0:
            return result
        kind, unit = divmod(which, size)
        if kind:
            result[unit] = result[unit].clamp(min=now)
        signs[unit] = (0.0, 1.0, -1.0)[kind]
        table = _sweep(table, unit)
        inside[unit] = kind > 0
    return result


def _sweep(table: Tensor, pivot: int) -> Tensor:
    """Return the table of linear equations solved for one variable more; for one fewer, where it was solved for that one.

    With the set A solved for, of the matrix M and right sides b: rows in A are ``[M_AA⁻¹, M_AA⁻¹ M_A·, M_AA⁻¹ b]`` and others
    ``[-M_·A M_AA⁻¹, M_·· - M_·A M_AA⁻¹ M_A·, b - M_·A M_AA⁻¹ b]``: one Gauss-Jordan step.
    """
    row = table[pivot] / table[pivot, pivot]
    column = table[:, pivot].clone()
    new = table - column[:, None] * row
    new[:, pivot] = -column / table[pivot, pivot]
    new[pivot] = row
    new[pivot, pivot] = 1 / table[pivot, pivot]
    return new


def dependence_order(weight: Tensor, moments: Moments, columns: Tensor, present: Tensor) -> Tensor:
    """Return the round in which each unit is removed, 0 first, if the others take over what it did: int64 ``[units]``.

    In each round the unit u goes that raises ``E‖(W' - W) x‖²`` least after all other weights are solved anew, so that it is replaced by
    a linear combination of the other units: ``tr W_u ([H⁻¹]_uu)⁻¹ W_uᵀ`` with the weights and the H of those that are left. Equal ones
    keep the lower unit.

    Args:
        weight: ``[groups, rows, columns]`` float64.
        moments: of the columns.
        columns: int64 ``[units, columns of a unit]``, flat over groups; those of a unit are in one group.
        present: bool; units that are not have gone before all others.

    >>> from niwaki.layerwise.moments import moments
    >>> data = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 2.0, 2.1]], dtype=torch.float64)
    >>> found = moments((data.T @ data)[None], 0.0, "fc.weight")
    >>> present = torch.ones(3, dtype=torch.bool)
    >>> dependence_order(torch.ones(1, 1, 3, dtype=torch.float64), found, torch.arange(3)[:, None], present).argmax()
    tensor(2)
    """
    inverse, work = moments.inverse(), weight.masked_fill(moments.dead[:, None], 0.0)
    columns, left = columns.flip(0), present.flip(0).clone()  # in reverse, as the first minimum is the one that goes
    group, columns = columns[:, 0] // weight.shape[2], columns % weight.shape[2]
    first = int((~present).sum())
    rounds = torch.zeros(len(columns), dtype=torch.int64, device=weight.device)
    rounds[~left] = torch.arange(first, device=weight.device)
    gone = ~left
    for step in range(first, len(columns)):
        for g in torch.unique(group[gone]).tolist():
            at = columns[gone & (group == g)].flatten()
            solved = torch.linalg.solve(inverse[g][at][:, at], inverse[g][at])
            work[g] -= work[g][:, at] @ solved
            inverse[g] -= inverse[g][:, at] @ solved
        blocks = inverse[group[:, None, None], columns[:, :, None], columns[:, None, :]]
        blocks[~left] = torch.eye(columns.shape[1], dtype=weight.dtype, device=weight.device)
        parts = work[group[:, None], :, columns]  # [units, columns of one, rows]
        cost = (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2)).masked_fill(~left, torch.inf)
        goes = int(cost.argmin())
        rounds[goes], left[goes] = step, False
        gone = torch.arange(len(columns), device=weight.device) == goes
    return rounds.flip(0)
