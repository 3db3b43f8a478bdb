"""The empirical Fisher matrix of a bank of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from niwaki.curvature.base import Curvature, Vector
from niwaki.curvature.matrices import finite
from niwaki.curvature.woodbury import Bank, Range, Woodbury
from niwaki.errors import InputError


class LowRankCurvature(Curvature):
    """``H = λ I + (1/m) Σ_j g_j g_jᵀ`` of m gradients: in blocks of consecutive weights, of whole tensors, or of all of them together.

    With ``C = G / √m`` of shape ``[m, n]``, ``H⁻¹ = (I - Cᵀ (λ I + C Cᵀ)⁻¹ C) / λ``: neither H nor its inverse is ever there, only matrices
    of m × m, one at a time, and the bank is read in pieces. Blocks of no more than m weights are inverted themselves, which is as cheap and
    more exact.

    Source: Singh & Alistarh 2020 (WoodFisher: blocks), Frantar, Kurtic, Alistarh 2021 (M-FAC: all together).

    Args:
        gradients: name -> gradients ``[m, *view]``, float32 or float64; they are not copied.
        active: name -> which weights count (bool, in the view).
        damping: λ; raised tenfold until rounding leaves it a meaning, which is told.
        block: weights of a block (WoodFisher); None: whole tensors.
        joint: all tensors together (M-FAC), without blocks.
        gradient: of the loss, for a model that counts it.

    Raises:
        InputError: there is no gradient, one is not finite, or λ is not positive.

    >>> import torch
    >>> gradients, active = {"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.ones(2, dtype=torch.bool)}
    >>> LowRankCurvature(gradients, active, damping=1.0).inverse_diagonal("w")
    tensor([0.6538, 0.3846], dtype=torch.float64)
    """

    def __init__(
        self,
        gradients: Mapping[str, Tensor],
        active: Mapping[str, Tensor],
        damping: float = 1e-5,
        *,
        block: int | None = None,
        joint: bool = False,
        gradient: Vector | None = None,
    ) -> None:
        counts = sorted({len(bank) for bank in gradients.values()})
        if len(counts) != 1 or 0 in counts:
            raise InputError(f"a Fisher matrix needs gradients, equally many of every tensor, and there are {counts or 'none'}")
        if not damping > 0:
            raise InputError(f"damping {damping}: a Fisher matrix of few gradients is singular without; 1e-5 would be right")
        self.active, self.gradient, self.damping, self.joint = active, gradient, damping, joint
        self.bank = Bank(gradients, active)
        self.workspace = self.bank.count
        self._size = block or max(mask.numel() for mask in active.values())
        self._blocks: list[list[Range]] = [[]] if joint else []
        self._first: dict[str, int] = {}
        for name, mask in active.items():
            self._first[name] = 0 if joint else len(self._blocks)
            if joint:
                self._blocks[0].append((name, 0, mask.numel()))
            else:
                starts = range(0, mask.numel(), self._size)
                self._blocks += [[(name, start, min(start + self._size, mask.numel()))] for start in starts]
        self._check()

    def _check(self) -> None:
        """Look at all gradients once."""
        squares = [dict.fromkeys((name for name, *_ in ranges), 0.0) for ranges in self._blocks]
        for ranges, found in zip(self._blocks, squares, strict=True):
            for name, _, columns in self.bank.columns(ranges, self.active):
                found[name] += float(finite(columns.square_().sum(), name, "bank of gradients"))
        silent = [name for name in self.active if not any(found.get(name) for found in squares)]
        if silent:
            self._note(f"all gradients of {', '.join(silent)} are zero, so that its weights seem to cost nothing")
        first, largest = self.damping, max(sum(found.values()) for found in squares)
        while self.damping < 1e-12 * largest:
            self.damping *= 10
        if self.damping != first:
            self._note(f"damping {first:.3g} is lost in rounding beside gradients this large: it was raised to {self.damping:.3g}")

    def _open(self, number: int) -> Woodbury:
        return self._joint if self.joint else Woodbury(self.bank, self._blocks[number], self.active, self.damping)

    @cached_property
    def _joint(self) -> Woodbury:
        return Woodbury(self.bank, self._blocks[0], self.active, self.damping, self._gram)

    @cached_property
    def _gram(self) -> Tensor:
        """``C Cᵀ`` of all active weights together."""
        return self.bank.gram(self._blocks[0], self.active)

    def labels(self, name: str) -> Tensor:
        """Return the number of the block that each weight of a tensor is in."""
        rows = self.bank.rows[name]
        index = torch.arange(rows.shape[1], device=rows.device)
        return torch.zeros_like(index) if self.joint else self._first[name] + index // self._size

    def inverse_diagonal(self, name: str) -> Tensor:
        """Return ``[H⁻¹]_ii`` of one tensor, in its view; infinite at inactive weights."""
        rows = self.bank.rows[name]
        found = torch.full(rows.shape[1:], torch.inf, dtype=torch.float64, device=rows.device)
        for number in torch.unique(self.labels(name)).tolist():
            for index, values in self._open(number).diagonal(name):
                found[index] = values
        return found.view(self.active[name].shape)

    def inverse_blocks(self, name: str, index: Tensor) -> Tensor:
        """Return ``[H⁻¹]_QQ`` of sets of weights."""
        places = index.clamp(min=0)
        inside = self.active[name].flatten()[places] & (index >= 0)
        label = self.labels(name)[places].masked_fill(~inside, -1)
        found = torch.zeros((*index.shape, index.shape[1]), dtype=torch.float64, device=index.device)
        for number in torch.unique(label).tolist():
            if number >= 0:
                here = label == number
                sets = here.any(1).nonzero()[:, 0]
                found[sets] += self._open(number).blocks(name, places[sets], here[sets])
        found.diagonal(dim1=-2, dim2=-1).masked_fill_(~inside, torch.inf)
        return found

    def multiply(self, vector: Vector) -> dict[str, Tensor]:
        """Return ``H v``."""
        found = {name: (self.damping * vector[name]).flatten() if name in vector else self._zeros(name) for name in self.active}
        support = {name: values != 0 for name, values in vector.items()}
        for ranges in self._blocks:
            parts = [columns @ vector[name].flatten()[index] for name, index, columns in self.bank.columns(ranges, support)]
            if parts:
                dual = torch.stack(parts).sum(0)
                for name, index, columns in self.bank.columns(ranges, self.active):
                    found[name][index] += dual @ columns
        return self._shaped(found)

    def solve(self, keep: Vector, right: Vector) -> dict[str, Tensor]:
        """Return ``x`` with ``H_SS x_S = right_S``, block by block, through the inner products of what S has of the gradients."""
        found = {name: self._zeros(name) for name in self.active}
        for ranges in self._blocks:
            if any(bool(right[name].flatten()[start:stop].any()) for name, start, stop in ranges if name in right):  # else x is zero
                known = self.joint and keep is self.active
                block = self._joint if known else Woodbury(self.bank, ranges, keep, self.damping)
                for name, index, values in block.solve(right):
                    found[name][index] = values
        return self._shaped(found)

    def exchange(self, position: int, gradients: Vector) -> None:
        """Put another gradient in the place of one, as a window over training does, in O(m n): the other inner products stay.

        Only of all tensors together. The banks that were given are written to.

        Args:
            position: which of the m gradients.
            gradients: name -> gradient, in the view.

        Raises:
            InputError: the gradient is not finite, or the curvature is of blocks.
        """
        if not self.joint:
            raise InputError("exchange: the curvature must be of all tensors together (joint=True)")
        gram = self._gram
        for name, rows in self.bank.rows.items():
            rows[position] = finite(gradients[name].flatten(), name, "gradient")
        inner = torch.zeros_like(gram[0])
        for _, _, columns in self.bank.columns(self._blocks[0], self.active):
            inner += columns @ columns[position]
        gram[position], gram[:, position] = inner, inner
        for outdated in ("_joint", "newton"):
            self.__dict__.pop(outdated, None)

    def _zeros(self, name: str) -> Tensor:
        rows = self.bank.rows[name]
        return torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)

    def _shaped(self, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values.view(self.active[name].shape) for name, values in flat.items()}
