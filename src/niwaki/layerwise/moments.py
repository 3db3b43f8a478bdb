"""Second moments of what a layer reads, as a positive definite matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.errors import InputError

LEAST_DAMPING = 1e-10
"""The first try where the matrix is singular, as a share of the mean diagonal; ten times as much each time it is not enough."""


@dataclass(frozen=True)
class Moments:
    """H of ``E‖(W' - W) x‖² = Σ_rows δᵀ H δ``, one for each group of rows, made positive definite.

    Attributes:
        matrix: damped, ``[groups, columns, columns]`` float64; 1 on the diagonal of dead columns.
        factor: its lower Cholesky factor.
        dead: bool ``[groups, columns]``: columns that are zero for all data.
        notes: what a user should know.
    """

    matrix: Tensor
    factor: Tensor
    dead: Tensor
    notes: tuple[str, ...] = ()

    def inverse(self) -> Tensor:
        """Return ``H⁻¹``, ``[groups, columns, columns]``."""
        return torch.cholesky_inverse(self.factor)


def moments(gram: Tensor, damping: float, name: str) -> Moments:
    """Return second moments with ``damping`` times their mean diagonal added, and as much more as it takes to be positive definite.

    A matrix counts as singular where a column is a combination of others up to rounding. Dead columns stand apart: they are orthogonal to
    all others, and no damping is meant for them.

    Args:
        gram: ``E[x xᵀ]``, ``[groups, columns, columns]``; symmetric.
        damping: share of the mean of the diagonal, over columns that are not dead.
        name: of the tensor, for messages.

    Raises:
        InputError: numbers that are not finite.

    >>> found = moments(torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]), 0.0, "fc.weight")
    >>> found.dead.tolist(), len(found.notes)
    ([[False, False, True]], 2)
    """
    gram = gram.to(torch.float64)
    if not bool(gram.isfinite().all()):
        raise InputError(f"{name}: second moments of its inputs are not finite; look for infinite or NaN values in the data or the weights")
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    scale = diagonal.sum(dim=-1) / (~dead).sum(dim=-1).clamp(min=1)
    factor, added = factored(gram, damping, scale)
    notes = []
    if bool(dead.any()):
        notes.append(f"{name}: {int(dead.sum())} of {dead.numel()} input columns are zero for all data; their weights go first")
    if bool((added > damping).any()):
        notes.append(
            f"{name}: its inputs are linearly dependent on this data; damping was raised from {damping:g} to {float(added.max()):g}"
        )
    return Moments(damped(gram, added * scale), factor, dead, tuple(notes))


def damped(matrices: Tensor, added: Tensor) -> Tensor:
    """Return matrices ``[..., n, n]`` with ``added`` ``[...]`` on the diagonal, and 1 where the diagonal is zero."""
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    extra = added[..., None].expand(diagonal.shape).where(diagonal > 0, 1.0 - diagonal)
    return matrices + torch.diag_embed(extra)


def factored(matrices: Tensor, damping: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factors of matrices ``[..., n, n]``, and what damping each took, in units of ``scale`` ``[...]``.

    Where a factor's squared diagonal is no more than rounding of the matrix's own, the matrix is singular, and damping is raised.
    """
    added = torch.full_like(scale, damping)
    while True:
        tried = damped(matrices, added * scale)
        factor, info = torch.linalg.cholesky_ex(tried)
        size = matrices.shape[-1]
        left = factor.diagonal(dim1=-2, dim2=-1).square() / tried.diagonal(dim1=-2, dim2=-1)
        singular = (info != 0) | (left < 4 * size * torch.finfo(torch.float64).eps).any(dim=-1)
        if not bool(singular.any()):
            return factor, added
        added = torch.where(singular, (10 * added).clamp(min=LEAST_DAMPING), added)
