"""Symmetric matrices that may be singular or indefinite, and what is said of them."""

from __future__ import annotations

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.layout import Layout, matrix

EPSILON = torch.finfo(torch.float64).eps


def cholesky(symmetric: Tensor, damping: float, what: str) -> tuple[Tensor, float, tuple[str, ...]]:
    """Return the lower Cholesky factor of ``symmetric + damping I``, with damping raised until that is safely positive definite.

    Args:
        symmetric: float64 ``[n, n]``.
        damping: to begin with; where it does not do, ``1e-10`` of the mean diagonal, then ten times as much each time.
        what: what the matrix is, for the note.

    Returns:
        The factor, the damping, and a note for the user where it was raised.

    >>> factor, damping, notes = cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), 0.0, "H of 'weight'")
    >>> round(damping, 9), notes
    (10.0, ("H of 'weight' is not positive definite (or nearly singular): damping was raised from 0 to 10",))
    """
    first, size = damping, len(symmetric)
    scale = float(symmetric.diagonal().abs().mean()) if size else 1.0
    identity = torch.eye(size, dtype=symmetric.dtype, device=symmetric.device)
    while True:
        damped = symmetric + damping * identity
        factor, failed = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal().square()
        if not failed and (not size or bool(pivots.min() > size * EPSILON * damped.diagonal().max())):
            break
        damping = max(10 * damping, 1e-10 * (scale or 1.0))
    told = f"{what} is not positive definite (or nearly singular): damping was raised from {first:.3g} to {damping:.3g}"
    return factor, damping, () if damping == first else (told,)


def revived(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix whose zero rows and columns have a tiny diagonal, and which those are (bool).

    What they stand for changes nothing, so it shall cost next to nothing, but not make the matrix singular: 1e-8 of the others' mean.
    """
    dead = (symmetric == 0).all(-1)
    if not bool(dead.any()):
        return symmetric, dead
    diagonal = symmetric.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.abs().sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    return symmetric + torch.diag_embed(dead * torch.where(scale > 0, 1e-8 * scale, 1.0)), dead


def finite(values: Tensor, name: str, what: str) -> Tensor:
    """Return the values.

    Raises:
        InputError: some of them are not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name}: its {what} is not finite; a finite loss with a finite gradient at every example would be right")
    return values


def coordinates(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return group, row and column in the matrix form, int64, of each flat index of a layout's view.

    >>> coordinates(Layout(("input", "output"), (2, 2)))
    (tensor([0, 0, 0, 0]), tensor([0, 1, 0, 1]), tensor([0, 0, 1, 1]))
    """
    flat = matrix(torch.arange(layout.elements).view(layout.shape), layout)
    place = torch.empty(layout.elements, dtype=torch.int64)
    place[flat.flatten()] = torch.arange(layout.elements)
    rows, columns = flat.shape[1:]
    return place // (rows * columns), place // columns % rows, place % columns
