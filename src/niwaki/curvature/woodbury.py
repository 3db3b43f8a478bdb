"""Systems of ``λ I + Cᵀ C`` with few rows C and many columns, by the inner products of the rows (Woodbury's identity)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from niwaki.curvature.base import WORKSPACE, Vector

Range = tuple[str, int, int]
"""Weights of a tensor that stand one after the other: its name, the first flat index, and the one behind the last."""


class Bank:
    """Gradients of several tensors, read in pieces as ``C = G / √m``.

    Attributes:
        rows: name -> gradients ``[m, weights]``, float32 or float64; never copied as a whole.
        count: m.
    """

    def __init__(self, gradients: Mapping[str, Tensor], active: Vector) -> None:
        self.rows = {name: rows.reshape(len(rows), -1) for name, rows in gradients.items()}
        self.count = len(next(iter(gradients.values())))
        self._active = active

    def columns(self, ranges: Sequence[Range], keep: Vector) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the columns of C at active weights that ``keep`` has: name, their flat indices, and float64 ``[m, few]``."""
        step = max(1, WORKSPACE // self.count)
        for name, start, stop in ranges:
            if name in keep:
                chosen = keep[name].flatten()[start:stop].to(torch.bool) & self._active[name].flatten()[start:stop]
                for index in torch.split(chosen.nonzero()[:, 0] + start, step):
                    if len(index):
                        yield name, index, self.pick(name, index)

    def pick(self, name: str, index: Tensor) -> Tensor:
        """Return the columns of C at some weights, in increasing order: float64 ``[m, weights]``."""
        first, last, count = int(index[0]), int(index[-1]), len(index)
        rows = self.rows[name]
        found = rows[:, first : last + 1] if last + 1 - first == count else rows.index_select(1, index)
        return found.to(torch.float64, copy=True).div_(self.count**0.5)

    def gram(self, ranges: Sequence[Range], keep: Vector) -> Tensor:
        """Return ``C Cᵀ`` of some weights: float64 ``[m, m]``."""
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=self.rows[ranges[0][0]].device)
        for _, _, columns in self.columns(ranges, keep):
            total.addmm_(columns, columns.T)
        return total


class Woodbury:
    """``H = λ I + Cᵀ C`` of the weights that are kept in some ranges, factored: the m × m dual, or H itself where that is no larger.

    Args:
        bank: of gradients.
        ranges: which weights.
        keep: which of them.
        damping: λ.
        gram: ``C Cᵀ`` of them, where it is known.
    """

    def __init__(self, bank: Bank, ranges: Sequence[Range], keep: Vector, damping: float, gram: Tensor | None = None) -> None:
        self._bank, self._ranges, self._keep, self._damping = bank, ranges, keep, damping
        kept = sum(int(keep[name].flatten()[start:stop].count_nonzero()) for name, start, stop in ranges if name in keep)
        self.direct = kept <= bank.count
        if self.direct:
            parts = list(bank.columns(ranges, keep))
            columns = torch.cat([columns for _, _, columns in parts], 1) if parts else torch.zeros(bank.count, 0, dtype=torch.float64)
            matrix = columns.T @ columns
            self._start = {name: start for name, start, _ in ranges}
            self._place = {name: torch.zeros(stop - start, dtype=torch.int64, device=matrix.device) for name, start, stop in ranges}
            for (name, index, _), place in zip(parts, torch.split(torch.arange(kept), [len(index) for _, index, _ in parts]), strict=True):
                self._place[name][index - self._start[name]] = place.to(matrix.device)
        else:
            matrix = bank.gram(ranges, keep) if gram is None else gram.clone()
        matrix.diagonal().add_(damping)
        self._factor = torch.linalg.cholesky(matrix)
        self._inverse = torch.cholesky_inverse(self._factor) if self.direct else None

    def _columns(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        return self._bank.columns(self._ranges, self._keep)

    def diagonal(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield flat indices of kept weights of a tensor, and ``[H⁻¹]_ii`` of them."""
        for one, index, columns in self._bank.columns([r for r in self._ranges if r[0] == name], self._keep):
            if self._inverse is not None:
                yield index, self._inverse.diagonal()[self._place[one][index - self._start[one]]]
            else:
                half = torch.linalg.solve_triangular(self._factor, columns, upper=False)
                yield index, (1 - half.square_().sum(0)) / self._damping

    def blocks(self, name: str, index: Tensor, inside: Tensor) -> Tensor:
        """Return ``[H⁻¹]_QQ`` of sets Q of a tensor's weights; zero where ``inside`` (of the shape of ``index``) is not.

        Args:
            name: of the tensor.
            index: int64 ``[sets, size]``, flat indices.
            inside: which of them are weights of this H.
        """
        pairs = inside[:, :, None] & inside[:, None, :]
        if self._inverse is not None:
            place = self._place[name][(index - self._start[name]) * inside]
            return self._inverse[place[:, :, None], place[:, None, :]] * pairs
        used, position = torch.unique(index, return_inverse=True)
        half = torch.linalg.solve_triangular(self._factor, self._bank.pick(name, used), upper=False).T[position] * inside[..., None]
        found: Tensor = (torch.diag_embed(inside.to(half.dtype)) - half @ half.mT) / self._damping
        return found

    def solve(self, right: Vector) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield ``H⁻¹ right`` of the kept weights: name, flat indices, values."""
        wanted = [_at(right, name, index) for name, index, _ in self._columns()]
        if self.direct:
            together = torch.cat([*wanted, self._factor.new_zeros(0)])[:, None]
            found = list(torch.split(torch.cholesky_solve(together, self._factor)[:, 0], [len(w) for w in wanted]))
        else:
            found = [torch.zeros_like(w) for w in wanted]
            seen = torch.zeros_like(self._factor[0])  # C x
            for _ in range(2):  # the second time for what rounding has left, which 1/λ magnifies
                rest = [
                    w - self._damping * x - seen @ columns for w, x, (_, _, columns) in zip(wanted, found, self._columns(), strict=True)
                ]
                dual = sum((columns @ r for r, (_, _, columns) in zip(rest, self._columns(), strict=True)), torch.zeros_like(seen))
                dual = torch.cholesky_solve(dual[:, None], self._factor)[:, 0]
                for x, r, (_, _, columns) in zip(found, rest, self._columns(), strict=True):
                    step = (r - dual @ columns) / self._damping
                    x += step
                    seen += columns @ step
        for x, (name, index, _) in zip(found, self._columns(), strict=True):
            yield name, index, x


def _at(vector: Vector, name: str, index: Tensor) -> Tensor:
    """Return what a vector has at some weights of a tensor, float64; zero for a tensor that it lacks."""
    return vector[name].flatten()[index].to(torch.float64) if name in vector else index.new_zeros(len(index), dtype=torch.float64)
