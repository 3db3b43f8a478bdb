"""The order of input channels in which an N:M pattern keeps most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from niwaki import counter

LEAST_GAIN = 1e-12
"""Share of all that is kept, below which a gain is taken for rounding."""


@dataclass(frozen=True)
class Reading:
    """A matrix whose columns move with the units that it reads.

    Attributes:
        scores: ``[rows, columns]`` float64, not negative: what is lost with a weight. An N:M group is M consecutive columns of a row.
        places: int64 ``[units]``, the column at which each position is read. Columns that are no place stay where they are.
    """

    scores: Tensor
    places: Tensor


def kept_score(scores: Tensor, n: int, m: int) -> float:
    """Return the sum of the n highest scores of each m consecutive ones of each row; a last group may be shorter.

    >>> kept_score(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 1, 2)
    6.0
    """
    return float(_grouped(scores, m).topk(min(n, m), dim=2).values.sum())


def permute(scores: Tensor, n: int, m: int, *, restarts: int = 2, seed: int = 0) -> Tensor:
    """Return an order of columns, such that ``scores[:, order]`` keeps more in an N:M pattern: int64 ``[columns]``.

    >>> order = permute(torch.tensor([[9.0, 8.0, 1.0, 2.0], [9.0, 8.0, 2.0, 1.0]]), 1, 2)
    >>> kept_score(torch.tensor([[9.0, 8.0, 1.0, 2.0], [9.0, 8.0, 2.0, 1.0]])[:, order], 1, 2)
    34.0
    """
    return best_order([Reading(scores.to(torch.float64), torch.arange(scores.shape[1]))], n, m, restarts=restarts, seed=seed)


def best_order(readings: Sequence[Reading], n: int, m: int, *, restarts: int = 2, seed: int = 0) -> Tensor:
    """Return which unit comes to each position, so that all matrices together keep more: int64 ``[units]``.

    The gain of every exchange of two units is computed, the best exchanges that do not touch the same group of M are made, and so on
    until none gains. That is repeated from where a tenth of the units of the best order is mixed. Nothing is lost against the order that
    is. Time for a repetition is some times units² · rows.

    Args:
        readings: the matrices, of the same units.
        n: scores of a group that are kept.
        m: columns of a group.
        restarts: how often units are mixed.
        seed: of the mixing.

    Source: Pool & Yu 2021 (channel permutations for N:M sparsity).
    """
    units = len(readings[0].places)
    best, most = _improved(torch.arange(units), readings, n, m)
    mixed = max(units // 10, 2)
    for restart in range(restarts):
        start = best.clone()
        chosen = counter.uniform(counter.key(seed, restart, "permutation"), 0, units).argsort()[:mixed]
        start[chosen] = best[chosen.roll(1)]
        order, kept = _improved(start, readings, n, m)
        if kept > most * (1 + LEAST_GAIN):
            best, most = order, kept
    return best


def ordered(reading: Reading, order: Tensor) -> Tensor:
    """Return the scores once unit ``order[p]`` is at position p."""
    scores = reading.scores.clone()
    scores[:, reading.places] = reading.scores[:, reading.places[order]]
    return scores


def _improved(order: Tensor, readings: Sequence[Reading], n: int, m: int) -> tuple[Tensor, float]:
    """Exchange units until nothing gains; return the order and what is kept."""
    order, units = order.clone(), len(order)
    groups = [reading.places // m for reading in readings]
    kept = [torch.zeros(units, units, dtype=torch.float64) for _ in readings]  # of a position's group, if a unit came there
    stale = [torch.ones(units, dtype=torch.bool) for _ in readings]
    while True:
        gain = torch.zeros(units, units, dtype=torch.float64)
        for reading, group, table, old in zip(readings, groups, kept, stale, strict=True):
            table[old] = _kept_with(reading, order, old, n, m)
            now = table[:, order]
            change = now - now.diagonal()[:, None]
            gain += (change + change.T).masked_fill(group[:, None] == group, 0.0)
        best, partner = gain.max(dim=1)
        total = sum(kept_score(ordered(reading, order), n, m) for reading in readings)
        if units == 0 or float(best.max()) <= LEAST_GAIN * total:
            return order, total
        for old in stale:
            old.fill_(False)
        for p in best.argsort(descending=True, stable=True).tolist():
            if float(best[p]) <= LEAST_GAIN * total:
                break
            both = torch.tensor([p, int(partner[p])])
            touched = [torch.isin(group, group[both]) for group in groups]
            if not any(bool((old & new).any()) for old, new in zip(stale, touched, strict=True)):
                order[both] = order[both.flip(0)]
                stale = [old | new for old, new in zip(stale, touched, strict=True)]


def _kept_with(reading: Reading, order: Tensor, positions: Tensor, n: int, m: int) -> Tensor:
    """Return what the groups of some positions (bool ``[units]``) would keep, if each unit came there: ``[positions, units]``.

    Of the n best of the others of a group and a newcomer x, n - 1 stay in any case, and the last is the greater of x and the n-th.
    """
    grouped = _grouped(ordered(reading, order), m)
    ranked, at = grouped.sort(dim=2, descending=True, stable=True)
    ranked = F.pad(ranked, (0, 1))
    among = at.argsort(dim=2) < n
    threshold = torch.where(among, ranked[..., n, None], ranked[..., n - 1, None])
    sure = ranked[..., :n].sum(dim=2, keepdim=True) - torch.where(among, grouped, ranked[..., n - 1, None])
    columns = reading.places[positions]
    threshold, sure = threshold.flatten(1)[:, columns], sure.flatten(1)[:, columns]
    newcomers = reading.scores[:, reading.places]
    # Σ max(t, x) = ½ Σ (t + x + |t - x|): the last is a distance, which needs no memory for single rows.
    distances = torch.cdist(threshold.T.contiguous(), newcomers.T.contiguous(), p=1)
    return sure.sum(dim=0)[:, None] + (threshold.sum(dim=0)[:, None] + newcomers.sum(dim=0) + distances) / 2


def _grouped(scores: Tensor, m: int) -> Tensor:
    """Return ``[rows, groups, m]``, the last group filled up with zeros, which nothing is lost with."""
    return F.pad(scores, (0, -scores.shape[1] % m)).reshape(scores.shape[0], -1, m)
