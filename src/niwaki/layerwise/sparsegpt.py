"""SparseGPT: columns are pruned in order, and those behind them take over what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.layerwise.counts import lowest, shares
from niwaki.layerwise.moments import Moments


@dataclass(frozen=True)
class Pattern:
    """An N:M pattern over columns.

    Attributes:
        n: weights of a group that stay.
        groups: int64 ``[columns]``, the group of each column.
    """

    n: int
    groups: Tensor


def sparsegpt(
    weight: Tensor, moments: Moments, active: Tensor, keep: int, pattern: Pattern | None = None, *, block: int = 128, mask_block: int = 128
) -> tuple[Tensor, Tensor]:
    """Return which weights stay (bool) and their new values, both ``[groups, rows, columns]``.

    With ``[H_(j:)⁻¹]`` the inverse of the trailing part of H from column j on: column by column, where weight ``w_j`` of a row is masked,
    ``w_k -= w_j / [H_(j:)⁻¹]_jj · [H_(j:)⁻¹]_jk`` for all ``k > j``; that is the optimal brain surgeon's update with the columns before j
    held. All these inverses are rows of one Cholesky factor: ``H⁻¹ = Uᵀ U``, ``[H_(j:)⁻¹]_jk = U_jj U_jk``. The mask is chosen for
    ``mask_block`` columns at a time, over all rows, when they are reached: the lowest ``w_j² / [H_(j:)⁻¹]_jj`` go, the same share in
    each block.

    Weights of dead columns go first. Equal scores keep the lower index.

    Args:
        weight: ``[groups, rows, columns]`` float64, zero where not active.
        moments: of the columns.
        active: bool, what may stay.
        keep: how many weights stay; not looked at with a pattern.
        pattern: N:M; then the best N of each group of each row stay.
        block: columns whose effect on later ones is added up before it is applied; changes speed, and nothing else.
        mask_block: columns whose mask is chosen at one time.

    Source: Frantar & Alistarh 2023 (SparseGPT).

    >>> from niwaki.layerwise.moments import moments
    >>> found = moments(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]), 0.0, "fc.weight")
    >>> sparsegpt(torch.tensor([[[1.0, 3.0]]], dtype=torch.float64), found, torch.ones(1, 1, 2, dtype=torch.bool), 1)
    (tensor([[[False,  True]]]), tensor([[[0.0000, 3.5000]]], dtype=torch.float64))
    """
    if pattern is not None:
        order = pattern.groups.argsort(stable=True)  # so that groups are consecutive
        back = order.argsort()
        inverse = moments.inverse()[:, order][:, :, order]
        ends = torch.bincount(pattern.groups).cumsum(0).tolist()
    else:
        order = back = torch.arange(weight.shape[-1], device=weight.device)
        inverse = moments.inverse()
        ends = [*range(mask_block, weight.shape[-1], mask_block), weight.shape[-1]]
    upper = torch.linalg.cholesky(inverse, upper=True)
    sections = list(zip([0, *ends[:-1]], ends, strict=True))
    dead = moments.dead[:, None, order].expand(weight.shape)
    active = active[..., order]
    work = weight[..., order].masked_fill(dead | ~active, 0.0)
    go = torch.zeros_like(active)
    budgets = _budgets(active, dead, keep, sections) if pattern is None else [pattern.n] * len(sections)
    diagonal = upper.diagonal(dim1=1, dim2=2)
    for chunk in _chunks(list(zip(sections, budgets, strict=True)), block):
        first, last = chunk[0][0][0], chunk[-1][0][1]
        errors = work.new_zeros(*work.shape[:2], last - first)
        for (begin, end), budget in chunk:
            scores = (work[..., begin:end] / diagonal[:, None, begin:end]).square()
            scores = scores.masked_fill(dead[..., begin:end], -1.0).masked_fill(~active[..., begin:end], -2.0)
            go[..., begin:end] = lowest(scores, budget) if pattern is None else _all_but_best(scores, budget)
            for j in range(begin, end):
                error = torch.where(go[..., j], work[..., j], 0.0) / diagonal[:, None, j]
                work[..., j:last] -= error[..., None] * upper[:, None, j, j:last]
                errors[..., j - first] = error
        work[..., last:] -= errors @ upper[:, first:last, last:]
    # A dead weight that stays is as good with its own value.
    return ~go[..., back], torch.where(dead, weight[..., order], work).masked_fill(go, 0.0)[..., back]


def _budgets(active: Tensor, dead: Tensor, keep: int, sections: Sequence[tuple[int, int]]) -> list[int]:
    """Return how many weights of each section are masked: inactive ones, dead ones before others, then the same share of each."""
    masked = [int((~active[..., a:b]).sum()) for a, b in sections]
    first = [int((active & dead)[..., a:b].sum()) for a, b in sections]
    rest = [int((active & ~dead)[..., a:b].sum()) for a, b in sections]
    go = sum(first) + sum(rest) - keep
    found = zip(masked, shares(min(go, sum(first)), first), shares(max(go - sum(first), 0), rest), strict=True)
    return [sum(parts) for parts in found]


def _all_but_best(scores: Tensor, n: int) -> Tensor:
    """Return, for groups along the last dimension, all but the n highest scores; of equal ones the lower index counts as higher."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :n]
    go = torch.ones(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, best, False)
    return go | (scores == -2.0)  # what was masked before


def _chunks(sections: list[tuple[tuple[int, int], int]], block: int) -> list[list[tuple[tuple[int, int], int]]]:
    """Return consecutive sections in chunks of at most ``block`` columns, or one section where that has more."""
    chunks: list[list[tuple[tuple[int, int], int]]] = []
    for section in sections:
        if chunks and section[0][1] - chunks[-1][0][0][0] <= block:
            chunks[-1].append(section)
        else:
            chunks.append([section])
    return chunks
