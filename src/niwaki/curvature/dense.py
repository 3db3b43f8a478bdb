"""The whole matrix, of small problems."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from niwaki.curvature.base import Curvature, Vector
from niwaki.curvature.matrices import cholesky, finite, revived
from niwaki.errors import InputError


class DenseCurvature(Curvature):
    """H as one matrix over the weights of all tensors together, and its inverse: exact, for some thousand weights.

    Weights that change nothing (a zero row) are told and cost next to nothing. An indefinite matrix is damped until it is definite.

    Args:
        matrix: float64 ``[n, n]``, symmetric: the tensors one after the other, each flattened in its view.
        active: name -> which weights count (bool, in the view), in the order of the rows.
        damping: added to the diagonal, in shares of its mean.
        gradient: of the loss, for a model that counts it.
        memory: most bytes that the matrix, its inverse and what is between them may take.

    Raises:
        InputError: the matrix does not fit the tensors or the memory, or is not finite.

    >>> import torch
    >>> curvature = DenseCurvature(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double(), {"w": torch.ones(2, dtype=torch.bool)})
    >>> curvature.inverse_diagonal("w")
    tensor([0.6667, 0.6667], dtype=torch.float64)
    """

    def __init__(
        self, matrix: Tensor, active: Mapping[str, Tensor], damping: float = 0.0, *, gradient: Vector | None = None, memory: int = 4 << 30
    ) -> None:
        sizes = [mask.numel() for mask in active.values()]
        if matrix.shape != (sum(sizes), sum(sizes)):
            raise InputError(f"a Hessian of shape {tuple(matrix.shape)} is not of {', '.join(active)} with {sum(sizes)} weights together")
        needed = 5 * 8 * matrix.numel()
        if needed > memory:
            raise InputError(
                f"the Hessian of {sum(sizes):,} weights with its inverse takes {needed / 2**30:.1f} GiB of {memory / 2**30:.1f} GiB;"
                f" {int((memory / 40) ** 0.5):,} weights fit: choose fewer targets, or woodfisher, mfac or kfac_obs"
            )
        self.active, self.gradient = active, gradient
        self._rows = dict(zip(active, torch.split(torch.arange(sum(sizes), device=matrix.device), sizes), strict=True))
        for name, rows in self._rows.items():
            finite(matrix[rows], name, "Hessian")
        self._mask = torch.cat([mask.flatten() for mask in active.values()])
        kept = self._mask.nonzero()[:, 0]
        part = matrix[kept[:, None], kept].to(torch.float64)
        part, dead = revived((part + part.T) / 2)
        if bool(dead.any()):
            self._note(f"{int(dead.sum()):,} weights do not change the loss: their rows of the Hessian are zero")
        factor, added, notes = cholesky(part, damping * float(part.diagonal().abs().mean()) if len(part) else 0.0, "the Hessian")
        self._note(*notes)
        self._matrix = part + added * torch.eye(len(part), dtype=part.dtype, device=part.device)
        self._inverse = torch.cholesky_inverse(factor)
        self._place = self._mask.cumsum(0) - 1

    def inverse_diagonal(self, name: str) -> Tensor:
        """Return ``[H⁻¹]_ii`` of one tensor, in its view; infinite at inactive weights."""
        whole = self._inverse.new_full(self._mask.shape, torch.inf).masked_scatter(self._mask, self._inverse.diagonal())
        return whole[self._rows[name]].view(self.active[name].shape)

    def inverse_blocks(self, name: str, index: Tensor) -> Tensor:
        """Return ``[H⁻¹]_QQ`` of sets of weights."""
        rows = self._rows[name][index.clamp(min=0)]
        inside = self._mask[rows] & (index >= 0)
        place = self._place[rows]
        blocks = self._inverse[place[:, :, None], place[:, None, :]] * (inside[:, :, None] & inside[:, None, :])
        blocks.diagonal(dim1=-2, dim2=-1).masked_fill_(~inside, torch.inf)
        return blocks

    def multiply(self, vector: Vector) -> dict[str, Tensor]:
        """Return ``H v``."""
        return self._split(self._matrix @ self._joined(vector))

    def solve(self, keep: Vector, right: Vector) -> dict[str, Tensor]:
        """Return ``x`` with ``H_SS x_S = right_S``, by the Cholesky factor of ``H_SS``."""
        chosen = self._joined(keep).bool().nonzero()[:, 0]
        factor = torch.linalg.cholesky(self._matrix[chosen[:, None], chosen])
        found = self._matrix.new_zeros(len(self._matrix))
        found[chosen] = torch.cholesky_solve(self._joined(right)[chosen, None], factor)[:, 0]
        return self._split(found)

    def _joined(self, vector: Vector) -> Tensor:
        """Return the active entries of all tensors in one row."""
        parts = [vector[name].flatten().to(self._matrix) if name in vector else mask.flatten() * 0.0 for name, mask in self.active.items()]
        return torch.cat(parts).to(torch.float64)[self._mask]

    def _split(self, joined: Tensor) -> dict[str, Tensor]:
        whole = joined.new_zeros(self._mask.shape).masked_scatter(self._mask, joined)
        return {name: whole[rows].view(self.active[name].shape) for name, rows in self._rows.items()}
