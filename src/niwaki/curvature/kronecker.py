"""Kronecker-factored Fisher matrices (K-FAC)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from niwaki.curvature.base import WORKSPACE, Curvature, Vector
from niwaki.curvature.matrices import cholesky, coordinates, finite
from niwaki.errors import InputError
from niwaki.layout import Layout, from_matrix, matrix

DIRECT = 2000
"""Weights up to which a set of them is solved for by a matrix of its own."""


class KroneckerCurvature(Curvature):
    """``H = (A + π √λ I) ⊗ (G + √λ/π I)`` of each tensor by itself, ``π² = (tr A / columns) / (tr G / rows)``; tensors do not meet.

    On all weights that some rows and some columns share, inverses are those of the factors. On any other set they are not: up to
    :data:`DIRECT` weights (on the set, or missing in it) are solved for exactly, more by conjugate gradients, to 1e-10; there the inverse's
    diagonal and blocks are those without the mask, which is told.

    Source: Martens & Grosse 2015 (factors, damping); Zeng & Urtasun 2019, Wang et al. 2019 (pruning).

    Args:
        factors: name -> A ``[groups, columns, columns]`` and G ``[groups, rows, rows]``.
        layouts: name -> layout.
        active: name -> which weights count (bool, in the view).
        damping: λ.

    Raises:
        InputError: a factor is not finite.

    >>> import torch
    >>> layout, a, g = Layout(("output", "input"), (2, 1)), torch.ones(1, 1, 1).double(), 3 * torch.eye(2).double()[None]
    >>> curvature = KroneckerCurvature({"w": (a, g)}, {"w": layout}, {"w": torch.ones(2, 1, dtype=torch.bool)}, damping=0.0)
    >>> curvature.inverse_diagonal("w").flatten()
    tensor([0.3333, 0.3333], dtype=torch.float64)
    """

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        layouts: Mapping[str, Layout],
        active: Mapping[str, Tensor],
        damping: float = 1e-5,
    ) -> None:
        if damping < 0:
            raise InputError(f"damping {damping}: it must not be negative")
        self.active, self._layouts = active, layouts
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._groups: dict[str, list[Factored]] = {}
        for name, (inputs, outputs) in factors.items():
            finite(inputs, name, "Kronecker factor of inputs")
            finite(outputs, name, "Kronecker factor of output gradients")
            self._factors[name] = []
            for a, g in zip(inputs.to(torch.float64), outputs.to(torch.float64), strict=True):
                ratio = float((a.trace() / len(a)) / (g.trace() / len(g)))
                pi = ratio**0.5 if 0 < ratio < float("inf") else 1.0
                if pi == 1.0 and ratio != 1.0:
                    self._note(f"{name}: its inputs or the gradients of its outputs are all zero, so that its weights seem to cost nothing")
                for one, share, what in ((a, pi * damping**0.5, "inputs"), (g, damping**0.5 / pi, "output gradients")):
                    _, added, notes = cholesky(one, share, f"{name}: the Kronecker factor of its {what}")
                    self._note(*notes)
                    one = one + added * torch.eye(len(one), dtype=one.dtype, device=one.device)
                    a, g = (one, g) if what == "inputs" else (a, one)
                self._factors[name].append((a, g))
            self._groups[name] = [
                Factored(*pair, mask) for pair, mask in zip(self._factors[name], matrix(active[name], layouts[name]), strict=True)
            ]
            if not all(group.exact for group in self._groups[name]):
                self._note(f"{name}: its mask is too irregular for its Kronecker curvature, whose inverse is looked at without the mask")

    def labels(self, name: str) -> Tensor:
        """Return the number of the group that each weight is in."""
        return coordinates(self._layouts[name])[0].to(self.active[name].device)

    def inverse_diagonal(self, name: str) -> Tensor:
        """Return ``[H⁻¹]_ii`` of one tensor, in its view; infinite at inactive weights."""
        return from_matrix(torch.stack([group.diagonal() for group in self._groups[name]]), self._layouts[name])

    def inverse_blocks(self, name: str, index: Tensor) -> Tensor:
        """Return ``[H⁻¹]_QQ`` of sets of weights."""
        places = index.clamp(min=0)
        inside = self.active[name].flatten()[places] & (index >= 0)
        group, row, column = (numbers.to(index.device)[places] for numbers in coordinates(self._layouts[name]))
        found = torch.zeros((*index.shape, index.shape[1]), dtype=torch.float64, device=index.device)
        for number in torch.unique(group[inside]).tolist():
            here = inside & (group == number)
            found += self._groups[name][number].blocks(row, column, here)
        found.diagonal(dim1=-2, dim2=-1).masked_fill_(~inside, torch.inf)
        return found

    def multiply(self, vector: Vector) -> dict[str, Tensor]:
        """Return ``H v``."""

        def product(a: Tensor, g: Tensor, values: Tensor) -> Tensor:
            return g @ values @ a

        return {name: self._each(name, vector[name], product) if name in vector else self._zeros(name) for name in self._factors}

    def solve(self, keep: Vector, right: Vector) -> dict[str, Tensor]:
        """Return ``x`` with ``H_SS x_S = right_S``."""
        found = {name: self._zeros(name) for name in self._factors}
        for name in found.keys() & keep.keys() & right.keys():
            if keep[name] is self.active[name]:
                groups = self._groups[name]
            else:
                masks = matrix(keep[name].to(torch.bool) & self.active[name], self._layouts[name])
                groups = [Factored(a, g, mask) for (a, g), mask in zip(self._factors[name], masks, strict=True)]
            wanted = matrix(right[name].to(torch.float64), self._layouts[name])
            solved = [group.solve(values) for group, values in zip(groups, wanted, strict=True)]
            found[name] = from_matrix(torch.stack([values for values, _ in solved]), self._layouts[name])
            rest = max(rest for _, rest in solved)
            if rest > TOLERANCE:
                self._note(f"{name}: conjugate gradients stopped at a relative residual of {rest:.1e}; more damping would help")
        return found

    def _each(self, name: str, values: Tensor, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        parts = matrix(values.to(torch.float64), self._layouts[name])
        done = [function(a, g, part) for (a, g), part in zip(self._factors[name], parts, strict=True)]
        return from_matrix(torch.stack(done), self._layouts[name]) * self.active[name]

    def _zeros(self, name: str) -> Tensor:
        return torch.zeros(self.active[name].shape, dtype=torch.float64, device=self.active[name].device)


TOLERANCE = 1e-10
"""Relative residual at which conjugate gradients stop."""


class Factored:
    """``A ⊗ G`` on a set S of the weights of one matrix ``[rows, columns]``.

    Rows and columns without any weight of S are cut off. What is left is the product of two factors but for the weights Q that are not in
    S: ``[H_SS]⁻¹ = [P - P_:Q (P_QQ)⁻¹ P_Q:]_SS`` with ``P = A⁻¹ ⊗ G⁻¹``.
    """

    def __init__(self, a: Tensor, g: Tensor, mask: Tensor) -> None:
        self._mask = mask
        self._rows, self._columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        self._a, self._g = a[self._columns[:, None], self._columns], g[self._rows[:, None], self._rows]
        self._inside = mask[self._rows[:, None], self._columns]
        self._missing = (~self._inside).nonzero(as_tuple=True)
        self._present = self._inside.nonzero(as_tuple=True)
        self._few_missing, self._few = len(self._missing[0]) <= DIRECT, len(self._present[0]) <= DIRECT
        self.exact = self._few_missing or self._few
        """Whether the inverse is known, and not only systems with it."""

    @cached_property
    def _inverses(self) -> tuple[Tensor, Tensor]:
        return torch.cholesky_inverse(torch.linalg.cholesky(self._a)), torch.cholesky_inverse(torch.linalg.cholesky(self._g))

    @cached_property
    def _direct(self) -> Tensor:
        """Cholesky factor of H_SS, of few weights."""
        rows, columns = self._present
        factor: Tensor = torch.linalg.cholesky(self._g[rows[:, None], rows] * self._a[columns[:, None], columns])
        return factor

    @cached_property
    def _direct_inverse(self) -> Tensor:
        return torch.cholesky_inverse(self._direct)

    @cached_property
    def _correction(self) -> Tensor:
        """Cholesky factor of P_QQ, of few weights."""
        inverse_a, inverse_g = self._inverses
        rows, columns = self._missing
        factor: Tensor = torch.linalg.cholesky(inverse_g[rows[:, None], rows] * inverse_a[columns[:, None], columns])
        return factor

    def _half(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return ``L⁻¹ P_Qi`` of some weights i, shape [missing, weights]: what their inverse lacks is the inner products."""
        inverse_a, inverse_g = self._inverses
        cross = inverse_g[self._missing[0][:, None], rows] * inverse_a[self._missing[1][:, None], columns]
        half: Tensor = torch.linalg.solve_triangular(self._correction, cross, upper=False)
        return half

    def diagonal(self) -> Tensor:
        """Return the diagonal of the inverse, infinite outside S."""
        found = torch.full(self._mask.shape, torch.inf, dtype=torch.float64, device=self._mask.device)
        rows, columns = self._present
        if self._few and len(self._missing[0]):
            values = self._direct_inverse.diagonal()
        else:
            inverse_a, inverse_g = self._inverses
            values = inverse_g.diagonal()[rows] * inverse_a.diagonal()[columns]
            if self.exact and len(self._missing[0]):
                step = max(1, WORKSPACE // len(self._missing[0]))
                parts = zip(torch.split(rows, step), torch.split(columns, step), strict=True)
                values = values - torch.cat([self._half(r, c).square().sum(0) for r, c in parts])
        found[self._rows[rows], self._columns[columns]] = values
        return found

    def blocks(self, rows: Tensor, columns: Tensor, inside: Tensor) -> Tensor:
        """Return blocks of the inverse for sets of weights of S, ``[sets, size]`` each; zero where ``inside`` is not."""
        pairs = inside[:, :, None] & inside[:, None, :]
        rows, columns = self._local(rows, self._rows), self._local(columns, self._columns)
        if self._few and len(self._missing[0]):
            place = torch.zeros_like(self._inside, dtype=torch.int64)
            place[self._present] = torch.arange(len(self._present[0]), device=place.device)
            chosen = place[rows, columns]
            return torch.where(pairs, self._direct_inverse[chosen[:, :, None], chosen[:, None, :]], 0.0)
        inverse_a, inverse_g = self._inverses
        found = inverse_g[rows[:, :, None], rows[:, None, :]] * inverse_a[columns[:, :, None], columns[:, None, :]]
        if self.exact and len(self._missing[0]):
            for i in range(len(found)):
                half = self._half(rows[i], columns[i])
                found[i] -= half.T @ half
        return torch.where(pairs, found, 0.0)

    def _local(self, numbers: Tensor, kept: Tensor) -> Tensor:
        """Return where row or column numbers are among those that are kept; anything for the others."""
        return torch.searchsorted(kept, numbers.contiguous()).clamp(max=max(len(kept) - 1, 0))

    def solve(self, right: Tensor) -> tuple[Tensor, float]:
        """Return ``x`` with ``H_SS x_S = right_S``, zero elsewhere, and the relative residual."""
        found = torch.zeros(self._mask.shape, dtype=torch.float64, device=self._mask.device)
        wanted = right[self._rows[:, None], self._columns] * self._inside
        if not bool(wanted.any()):
            return found, 0.0
        rest = 0.0
        if self._few and len(self._missing[0]):
            values = torch.zeros_like(wanted)
            values[self._present] = torch.cholesky_solve(wanted[self._present][:, None], self._direct)[:, 0]
        elif self._few_missing:
            values = self._product(wanted)
            if len(self._missing[0]):
                excess = torch.zeros_like(wanted)
                excess[self._missing] = torch.cholesky_solve(values[self._missing][:, None], self._correction)[:, 0]
                values = (values - self._product(excess)) * self._inside
        else:
            values, rest = conjugate_gradients(
                lambda x: (self._g @ x @ self._a) * self._inside, wanted, lambda r: self._product(r) * self._inside
            )
        found[self._rows[:, None], self._columns] = values
        return found, rest

    def _product(self, values: Tensor) -> Tensor:
        inverse_a, inverse_g = self._inverses
        return inverse_g @ values @ inverse_a


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, precondition: Callable[[Tensor], Tensor], most: int = 1000
) -> tuple[Tensor, float]:
    """Return ``x`` with ``H x = right`` to a relative residual of :data:`TOLERANCE` or after ``most`` products, and the residual.

    Args:
        product: of H, symmetric positive definite, with anything of the shape of ``right``.
        right: float64, not zero.
        precondition: product with something near the inverse of H, positive definite too.
        most: products.

    >>> x, rest = conjugate_gradients(lambda v: 2 * v, torch.tensor([4.0, 2.0]).double(), lambda v: v)
    >>> x.tolist(), rest < 1e-10
    ([2.0, 1.0], True)
    """
    x, residual, size = torch.zeros_like(right), right.clone(), float(right.norm())
    direction = precondition(residual)
    inner = float((residual * direction).sum())
    for _ in range(most):
        image = product(direction)
        length = inner / float((direction * image).sum())
        x += length * direction
        residual -= length * image
        if float(residual.norm()) <= TOLERANCE * size:
            break
        turned = precondition(residual)
        following = float((residual * turned).sum())
        direction, inner = turned + (following / inner) * direction, following
    return x, float((right - product(x)).norm()) / size
