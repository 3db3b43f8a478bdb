"""One matrix for every row of a weight: the Hessian of a layer's own output error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from niwaki.curvature.base import Curvature, Vector
from niwaki.curvature.matrices import cholesky, coordinates, finite, revived
from niwaki.layout import Layout, from_matrix, matrix


class RowsCurvature(Curvature):
    """``H = 2 E[x xᵀ]`` for each row of ``W``: the quadratic model of ``E ‖(W + δ) x - W x‖²``, which is exact; rows do not meet.

    Each row has its own set of active columns, hence its own inverse. Inputs that are always zero are told, and cost next to nothing.

    Source: Dong, Chen, Pan 2017 (layer-wise OBS); Frantar, Singh, Alistarh 2022.

    Args:
        grams: name -> ``E[x xᵀ]``, ``[groups, columns, columns]``.
        layouts: name -> layout.
        active: name -> which weights count (bool, in the view).
        damping: added to the diagonal, in shares of its mean; raised until H is positive definite, which is told.

    Raises:
        InputError: a matrix is not finite.

    >>> import torch
    >>> layout, gram = Layout(("output", "input"), (1, 2)), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]).double()
    >>> RowsCurvature({"w": gram}, {"w": layout}, {"w": torch.ones(1, 2, dtype=torch.bool)}).inverse_diagonal("w")
    tensor([[0.3333, 0.3333]], dtype=torch.float64)
    """

    def __init__(
        self, grams: Mapping[str, Tensor], layouts: Mapping[str, Layout], active: Mapping[str, Tensor], damping: float = 0.0
    ) -> None:
        self.active, self._layouts = active, layouts
        self._matrices: dict[str, Tensor] = {}
        self._inverses: dict[str, tuple[tuple[int, int], Tensor]] = {}
        for name, gram in grams.items():
            found, dead = revived(2 * finite(gram, name, "input gram").to(torch.float64))
            if bool(dead.any()):
                self._note(f"{name}: {int(dead.sum())} of {dead.numel()} inputs are always zero")
            for group in found:
                _, added, notes = cholesky(group, damping * float(group.diagonal().mean()), f"{name}: the Hessian of its outputs")
                self._note(*notes)
                group.diagonal().add_(added)
            self._matrices[name] = found

    def labels(self, name: str) -> Tensor:
        """Return the number of the row that each weight is in."""
        group, row, _ = coordinates(self._layouts[name])
        return (group * (int(row.max()) + 1) + row).to(self.active[name].device)

    def _supports(self, name: str, keep: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield sets of columns that rows keep: the group, the rows (int64), and the columns (int64)."""
        for group, rows in enumerate(matrix(keep, self._layouts[name])):
            supports, owner = torch.unique(rows, dim=0, return_inverse=True)
            for number, support in enumerate(supports):
                yield group, (owner == number).nonzero()[:, 0], support.nonzero()[:, 0]

    def inverse_diagonal(self, name: str) -> Tensor:
        """Return ``[H⁻¹]_ii`` of one tensor, in its view; infinite at inactive weights."""
        mask = matrix(self.active[name], self._layouts[name])
        found = torch.full(mask.shape, torch.inf, dtype=torch.float64, device=mask.device)
        for group, rows, columns in self._supports(name, self.active[name]):
            part = self._matrices[name][group][columns[:, None], columns]
            found[group, rows[:, None], columns] = torch.cholesky_inverse(torch.linalg.cholesky(part)).diagonal()
        return from_matrix(found, self._layouts[name])

    def inverse_blocks(self, name: str, index: Tensor) -> Tensor:
        """Return ``[H⁻¹]_QQ`` of sets of weights."""
        places = index.clamp(min=0)
        inside = self.active[name].flatten()[places] & (index >= 0)
        group, row, column = (numbers.to(index.device)[places] for numbers in coordinates(self._layouts[name]))
        mask = matrix(self.active[name], self._layouts[name])
        found = torch.zeros((*index.shape, index.shape[1]), dtype=torch.float64, device=index.device)
        for number in torch.unique(group[inside]).tolist():
            used = torch.unique(row[inside & (group == number)])
            supports, owner = torch.unique(mask[number][used], dim=0, return_inverse=True)
            for i, support in enumerate(supports):
                here = inside & (group == number) & torch.isin(row, used[owner == i])
                pairs = here[:, :, None] & here[:, None, :] & (row[:, :, None] == row[:, None, :])
                inverse = self._inverse(name, number, support)
                found += torch.where(pairs, inverse[column[:, :, None], column[:, None, :]], 0.0)
        found.diagonal(dim1=-2, dim2=-1).masked_fill_(~inside, torch.inf)
        return found

    def _inverse(self, name: str, group: int, support: Tensor) -> Tensor:
        """Return the inverse for rows with these active columns, zero elsewhere; the last one of a tensor is remembered."""
        key = (group, hash(support.cpu().numpy().tobytes()))
        if self._inverses.get(name, (None,))[0] != key:
            columns = support.nonzero()[:, 0]
            whole = torch.zeros_like(self._matrices[name][group])
            part = self._matrices[name][group][columns[:, None], columns]
            whole[columns[:, None], columns] = torch.cholesky_inverse(torch.linalg.cholesky(part))
            self._inverses[name] = (key, whole)
        return self._inverses[name][1]

    def multiply(self, vector: Vector) -> dict[str, Tensor]:
        """Return ``H v``."""
        return {
            name: from_matrix(matrix(vector[name], self._layouts[name]) @ found, self._layouts[name]) * self.active[name]
            if name in vector
            else torch.zeros(self.active[name].shape, dtype=torch.float64, device=found.device)
            for name, found in self._matrices.items()
        }

    def solve(self, keep: Vector, right: Vector) -> dict[str, Tensor]:
        """Return ``x`` with ``H_SS x_S = right_S``: the normal equations of each row; rows with equal sets are solved together."""
        found = {name: torch.zeros(mask.shape, dtype=torch.float64, device=mask.device) for name, mask in self.active.items()}
        for name in found.keys() & keep.keys() & right.keys():
            wanted = matrix(right[name], self._layouts[name]).to(torch.float64)
            values = torch.zeros_like(wanted)
            for group, rows, columns in self._supports(name, keep[name].to(torch.bool) & self.active[name]):
                factor = torch.linalg.cholesky(self._matrices[name][group][columns[:, None], columns])
                values[group, rows[:, None], columns] = torch.cholesky_solve(wanted[group, rows[:, None], columns].T, factor).T
            found[name] = from_matrix(values, self._layouts[name])
        return found
