"""What saliencies that choose a tensor's mask and weights themselves have in common."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from niwaki.errors import InputError
from niwaki.layerwise.counts import pattern_groups
from niwaki.layerwise.moments import Moments, moments
from niwaki.layerwise.sparsegpt import Pattern
from niwaki.layout import columns_view, from_matrix, matrix
from niwaki.saliency.base import Observation, Reduce, Saliency, Solution
from niwaki.statistics import InputGram, Statistic


class Solved(Saliency):
    """Base: row-wise optimal brain surgeons with the layer's own Hessian ``E[x xᵀ]``. Itself not registered.

    Attributes:
        damping: added to the diagonal of H, as a share of its mean; raised where that is not enough, which is told.
    """

    solves: ClassVar[bool] = True

    damping: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Second moments of what the layer reads."""
        return (InputGram(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return ``w² / [H⁻¹]_jj``, what a weight alone would cost, for allocations that compare layers; float64."""
        assert seen.layout is not None
        found = moments(seen.of(InputGram()), self.damping, seen.name)
        cost = (1 / found.inverse().diagonal(dim1=1, dim2=2)).masked_fill(found.dead, 0.0)
        return reduce(seen.weight.to(torch.float64).square() * columns_view(cost, seen.layout))

    def solve(self, seen: Observation, keep: int, pattern: tuple[int, int] | None) -> Solution:
        """Return the mask and weights of one tensor; the weights have the dtype of the old ones.

        Args:
            seen: the tensor, with :class:`InputGram`.
            keep: how many of its weights stay; follows from the pattern where there is one.
            pattern: (N, M): of each M consecutive inputs of a row, at one kernel position, the best N stay; of a shorter last group N too.

        Raises:
            InputError: more weights to keep than are active, or second moments that are not finite.
        """
        layout = seen.layout
        assert layout is not None
        active = torch.ones(layout.shape, dtype=torch.bool, device=seen.weight.device) if seen.active is None else seen.active
        if pattern is None and not 0 <= keep <= int(active.sum()):
            raise InputError(f"saliency {self.name}: {keep} weights of {seen.name!r} are to stay, and {int(active.sum())} are active")
        found = moments(seen.of(InputGram()), self.damping, seen.name)
        weight, alive = matrix(seen.weight, layout).to(torch.float64), matrix(active, layout)
        groups = None
        if pattern is not None:
            inputs = layout.size("input")
            groups = Pattern(pattern[0], pattern_groups(inputs, pattern[1], weight.shape[2] // max(inputs, 1)).to(weight.device))
        stays, new = self._choose(weight, found, alive, keep, groups)
        return Solution(from_matrix(stays, layout), from_matrix(new, layout).to(seen.weight.dtype), found.notes)

    def _choose(self, weight: Tensor, found: Moments, active: Tensor, keep: int, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError
