"""New values for the weights that stay, so that a layer's outputs on data change least."""

from __future__ import annotations

import torch
from torch import Tensor

from niwaki.layerwise.moments import factored

MEMORY = 1 << 27
"""Bytes that the matrices of rows which are computed together may take."""


def refit(weight: Tensor, gram: Tensor, keep: Tensor, damping: float = 0.0) -> tuple[Tensor, float]:
    """Return the weights with ``keep`` as their support that change the outputs of the rows least.

    Of each row, with S what stays, Q what goes and ``H = gram + λ I``: ``argmin (w' - w)ᵀ H (w' - w)``, which is
    ``w'_S = w_S + H_SS⁻¹ H_SQ w_Q``. Rows with the same support are solved together.

    Args:
        weight: ``[rows, columns]`` float64, before the removal.
        gram: ``E[x xᵀ]`` ``[columns, columns]`` float64.
        keep: bool ``[rows, columns]``.
        damping: λ as a share of the mean diagonal; where H_SS is singular it is raised as far as need be.

    Returns:
        Weights ``[rows, columns]``, zero where not kept, and the largest damping that was used.

    >>> both = torch.ones(2, 2, dtype=torch.float64)  # two inputs that are always the same
    >>> refit(torch.tensor([[3.0, 4.0]], dtype=torch.float64), both, torch.tensor([[True, False]]))[0].tolist()
    [[7.0, 0.0]]
    """
    kept = weight.masked_fill(~keep, 0.0)
    lost = (weight - kept) @ gram  # H_SQ w_Q at S
    diagonal = gram.diagonal()
    scale = diagonal.sum() / (diagonal > 0).sum().clamp(min=1)
    changed = ((lost != 0) & keep).any(dim=1)
    supports, which = torch.unique(keep[changed], dim=0, return_inverse=True)
    rows_of = torch.bincount(which, minlength=len(supports))
    sizes = supports.sum(dim=1)
    result, rows = kept.clone(), changed.nonzero().flatten()
    used = damping
    for chosen in _batches(sizes, rows_of):
        members, place, nth = _members(which, chosen)
        size, most = int(sizes[chosen].max()), int(rows_of[chosen].max())
        columns = supports[chosen].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]  # of S, and then others to fill up
        real = torch.arange(size, device=weight.device) < sizes[chosen, None]
        parts = gram[columns[:, :, None], columns[:, None, :]] * (real[:, :, None] & real[:, None, :])
        right = weight.new_zeros(len(chosen), size, most)
        right[place, :, nth] = lost[rows[members]].gather(1, columns[place]) * real[place]
        factor, added = factored(parts, damping, scale.expand(len(chosen)))
        used = max(used, float(added.max()))
        delta = torch.cholesky_solve(right, factor)[place, :, nth] * real[place]
        result[rows[members]] = result[rows[members]].scatter_add(1, columns[place], delta)
    return result, used


def _members(which: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows that have one of the chosen supports, the position of that support among them, and the row's own among its rows."""
    position = torch.full((int(which.max()) + 1,), -1, device=which.device)
    position[chosen] = torch.arange(len(chosen), device=which.device)
    place = position[which]
    members = (place >= 0).nonzero().flatten()
    members = members[place[members].argsort(stable=True)]
    place = place[members]
    first = torch.searchsorted(place, torch.arange(len(chosen), device=which.device))
    return members, place, torch.arange(len(members), device=which.device) - first[place]


def _batches(sizes: Tensor, rows_of: Tensor) -> list[Tensor]:
    """Return the supports in batches of similar size, each of no more than ``MEMORY`` or of one support."""
    batches: list[list[int]] = []
    widest = most = 0
    for i in sizes.argsort(stable=True).tolist():
        widest, most = max(widest, int(sizes[i])), max(most, int(rows_of[i]))
        if batches and (len(batches[-1]) + 1) * 8 * widest * (3 * widest + 2 * most) <= MEMORY:
            batches[-1].append(i)
        else:
            batches.append([i])
            widest, most = int(sizes[i]), int(rows_of[i])
    return [torch.tensor(batch, device=sizes.device) for batch in batches]
