"""Units that resemble each other: how far apart they are, and in which order they merge (Srinivas & Babu 2015)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.errors import InputError


@dataclass(frozen=True)
class Merge:
    """One unit that went.

    Attributes:
        unit: that went.
        into: unit that took its outgoing weights over.
        scale: by which they were multiplied.
        saliency: ``s``, the squared change that this makes of what is read, for inputs of size 1.
    """

    unit: int
    into: int
    scale: float
    saliency: float


def places(owner: Tensor, units: int, what: str) -> Tensor:
    """Return the entries of every unit, int64 ``[units, entries of one]``.

    Args:
        owner: the unit of each entry, or -1.
        units: how many there are.
        what: the units of which group, and of which tensor, for the error.

    Raises:
        InputError: units have different numbers of entries.

    >>> places(torch.tensor([1, 0, -1, 1, 0]), 2, "").tolist()
    [[1, 4], [0, 3]]
    """
    counts = torch.bincount(owner[owner >= 0], minlength=units)
    if counts.min() != counts.max():
        raise InputError(f"{what} have different numbers of entries, and cannot be compared")
    order = owner.argsort(stable=True)
    return order[owner[order] >= 0].view(units, -1)


def distances(made: Tensor, scales: bool = False) -> tuple[Tensor, Tensor]:
    """Return ``‖c w_i - w_j‖²`` and c for all units i and j, float64 ``[units, units]``.

    Args:
        made: what makes each unit, float64 ``[units, weights of one]``.
        scales: whether a multiple c of a unit counts as the same, with the best ``c ≥ 0``; else ``c = 1``.
    """
    if not scales:
        return torch.cdist(made, made, compute_mode="donot_use_mm_for_euclid_dist").square(), torch.ones_like(made @ made.T)
    products, norms = made @ made.T, made.square().sum(dim=1)
    factors = (products / norms[:, None].where(norms[:, None] > 0, 1.0)).clamp(min=0.0)
    apart = torch.stack([(factors[:, j, None] * made - made[j]).square().sum(dim=1) for j in range(len(made))], dim=1)
    return apart, factors


def merges(made: Tensor, read: Tensor, alone: Tensor, scales: bool = False) -> Iterator[Merge]:
    """Merge units one after the other until one is left: of the pair with the least ``s_ij = ‖a_j‖² ‖c w_i - w_j‖²``, unit j goes into i.

    Args:
        made: what makes each unit, float64 ``[units, weights of one]``.
        read: what reads each unit, float64 ``[units, weights of one]``; changed in place: ``a_i <- a_i + c a_j``.
        alone: which units are there, bool ``[units]``; changed in place.
        scales: as for :func:`distances`.
    """
    apart, factors = distances(made, scales)
    apart.fill_diagonal_(torch.inf)
    apart[~alone] = torch.inf
    nearest, into = apart.min(dim=0)
    while int(alone.sum()) > 1:
        saliency = (read.square().sum(dim=1) * nearest).masked_fill(~alone, torch.inf)
        unit = int(saliency.argmin())
        target = int(into[unit])
        factor = float(factors[target, unit])
        read[target] += factor * read[unit]
        alone[unit] = False
        apart[unit] = torch.inf  # nobody merges into it any more
        left = (into == unit) & alone
        nearest[left], into[left] = apart[:, left].min(dim=0)
        yield Merge(unit, target, factor, float(saliency[unit]))
