"""A positive definite quadratic model of the loss around the weights of some tensors, ``δL = gᵀδ + ½ δᵀ H δ``.

Vectors over the tensors are mappings from tensor name to float64 in the layout's view. H is of the *active* weights: rows and columns of
the others are as if they were not there, and vectors are zero at them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from niwaki.curvature.matrices import cholesky

Vector = Mapping[str, Tensor]

WORKSPACE = 1 << 22
"""Numbers (float64) that a temporary tensor may have: 32 MiB."""


class Curvature(ABC):
    """H of some tensors, and what second-order pruning needs of its inverse.

    Attributes:
        active: which weights of each tensor count (bool, in the view).
        gradient: g of the quadratic model, for those that count it (WoodTaylor); None at a minimum.
        notes: what a user should know: damping that had to be raised, columns without data. Some come up only while it is used.
        workspace: numbers that each weight of a set takes while :meth:`costs` looks at it, besides those of ``[H⁻¹]_QQ``.
    """

    active: Vector
    gradient: Vector | None = None
    notes: tuple[str, ...] = ()
    workspace: int = 1

    @abstractmethod
    def inverse_diagonal(self, name: str) -> Tensor:
        """Return ``[H⁻¹]_ii`` of one tensor, in its view; infinite at inactive weights."""

    @abstractmethod
    def inverse_blocks(self, name: str, index: Tensor) -> Tensor:
        """Return ``[H⁻¹]_QQ`` of sets Q of weights of one tensor.

        Args:
            name: of the tensor.
            index: int64 ``[sets, size]``, flat indices in the view, each at most once in a set; -1 where a set is smaller.

        Returns:
            ``[sets, size, size]``; rows and columns of -1 and of inactive weights are zero, and infinite on the diagonal.
        """

    @abstractmethod
    def multiply(self, vector: Vector) -> dict[str, Tensor]:
        """Return ``H v``."""

    @abstractmethod
    def solve(self, keep: Vector, right: Vector) -> dict[str, Tensor]:
        """Return ``x`` with ``H_SS x_S = right_S`` on the set S of active weights that ``keep`` (bool) has, and zero elsewhere.

        Tensors that ``keep`` or ``right`` lack count as zero there.
        """

    def labels(self, name: str) -> Tensor | None:
        """Return int64 labels, one for each flat index of a tensor: H couples no weights of different labels. None: it may couple all."""
        return None

    @cached_property
    def newton(self) -> dict[str, Tensor] | None:
        """``H⁻¹ g``: the way to the model's minimum is minus this; None at a minimum."""
        return None if self.gradient is None else self.solve(self.active, self.gradient)

    def costs(self, name: str, index: Tensor, values: Tensor) -> Tensor:
        """Return ``½ v_Qᵀ ([H⁻¹]_QQ)⁻¹ v_Q`` of sets Q of weights of one tensor: what it costs to move all of Q by -v and the rest freely.

        Args:
            name: of the tensor.
            index: int64 ``[sets, size]``, flat indices in the view.
            values: v, flat, of the whole tensor.

        Returns:
            float64 ``[sets]``.
        """
        total = values.new_zeros(len(index), dtype=torch.float64)
        sets, parts = uncoupled(index, self.labels(name))
        step = max(1, WORKSPACE // max(1, parts.shape[1] * max(parts.shape[1], self.workspace)))
        for chosen, some in zip(torch.split(sets, step), torch.split(parts, step), strict=True):
            block = self.inverse_blocks(name, some)
            diagonal = block.diagonal(dim1=-2, dim2=-1)
            absent = diagonal.isinf()
            diagonal.masked_fill_(absent, 1.0)
            moved = values[some.clamp(min=0)].masked_fill(absent, 0.0)
            total.index_add_(0, chosen, self._block_costs(name, block, moved))
        return total

    def _block_costs(self, name: str, block: Tensor, moved: Tensor) -> Tensor:
        if block.shape[-1] == 1:
            return moved[:, 0].square() / (2 * block[:, 0, 0])
        factor, failed = torch.linalg.cholesky_ex(block)
        for bad in failed.nonzero()[:, 0].tolist():  # rounding in a nearly singular block
            factor[bad], _, notes = cholesky(block[bad], 0.0, f"{name}: the inverse of the curvature of some pieces")
            self._note(*notes)
        half: Tensor = torch.linalg.solve_triangular(factor, moved[..., None], upper=False)[..., 0]
        return half.square().sum(-1) / 2

    def _note(self, *notes: str) -> None:
        self.notes += tuple(note for note in notes if note not in self.notes)


def uncoupled(index: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Split sets of weights into parts with one label each, in the order of the labels.

    Args:
        index: int64 ``[sets, size]``, flat indices.
        labels: int64, one for each flat index; None: nothing is split.

    Returns:
        Which set each part is of, int64 ``[parts]``, and its flat indices, ``[parts, size]``, filled up with -1.

    >>> sets, parts = uncoupled(torch.tensor([[0, 1, 2], [4, 3, 5]]), torch.tensor([0, 0, 1, 1, 1, 1]))
    >>> sets.tolist(), parts.tolist()
    ([0, 0, 1], [[0, 1, -1], [2, -1, -1], [4, 3, 5]])
    """
    sets, size = index.shape
    if labels is None or not sets or not size:
        return torch.arange(sets, device=index.device), index
    label, order = labels[index].sort(dim=1, stable=True)
    index = index.gather(1, order)
    begins = torch.ones_like(label, dtype=torch.bool)
    begins[:, 1:] = label[:, 1:] != label[:, :-1]
    owner, first = begins.nonzero(as_tuple=True)
    ends = torch.cat([first[1:], first.new_full((1,), size)])
    ends[:-1][owner[1:] != owner[:-1]] = size
    by_label = label[owner, first].sort(stable=True).indices
    owner, first, ends = owner[by_label], first[by_label], ends[by_label]
    places = first[:, None] + torch.arange(int((ends - first).max()), device=index.device)
    return owner, index[owner[:, None], places.clamp(max=size - 1)].masked_fill(places >= ends[:, None], -1)
