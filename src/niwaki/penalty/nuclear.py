"""Low rank: the sum of singular values."""

from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from niwaki.clock import Time, TimeField
from niwaki.errors import InputError
from niwaki.layout import from_matrix, matrix
from niwaki.penalty.base import Penalized, Weigh, WithStrength


class NuclearNorm(WithStrength):
    """Sum of the singular values of every weight as a matrix: rows are outputs, columns inputs and kernel positions.

    Directions that are not needed vanish, so that the matrix splits into two thin ones. The proximal step shrinks the singular values
    (singular value thresholding); it can be taken less often, and is then as long as the steps since the last one.

    Attributes:
        every: the time between two proximal or decoupled steps.
        weigh: multiply the strength of a tensor by the FLOPs of one of its weights, relative to the mean; ``parameters`` changes nothing.
    """

    name = "nuclear_norm"
    equation = "c Σ_l Σ σ_i(W_l); proximal: U max(Σ - rate c, 0) Vᵀ; gradient c U Vᵀ"
    source = "Alvarez & Salzmann 2017; Zhou, Alvarez, Porikli 2016 (less is more)"
    effort = "a singular value decomposition of each weight each time it acts: time cubic in the smaller side"
    advice = "with group_lasso in a sum, before a low-rank factorization; proximal once an epoch"
    whole = True

    every: TimeField = Time(1.0, "steps")
    weigh: Weigh = "none"

    @model_validator(mode="after")
    def _every_is_of_steps(self) -> Self:
        if self.apply == "gradient" and "every" in self.model_fields_set and self.every != Time(1.0, "steps"):
            raise InputError("every: is between steps of its own, and a gradient is added at all of the optimizer's; say apply: proximal")
        return self

    def value(self, seen: Penalized) -> Tensor:
        """Return the sum of the singular values."""
        sigma: Tensor = torch.linalg.svdvals(self._matrix(seen))
        return sigma.sum() * self.factor(seen)

    def slope(self, seen: Penalized) -> Tensor:
        """Return ``U Vᵀ`` of the singular values that are not zero: the smallest subgradient."""
        u, sigma, v = torch.linalg.svd(self._matrix(seen), full_matrices=False)
        there = sigma > sigma.amax(dim=-1, keepdim=True) * torch.finfo(sigma.dtype).eps * max(u.shape[-2], v.shape[-1])
        return self._back(seen, (u * there[..., None, :]) @ v) * self.factor(seen)

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight with its singular values soft-thresholded."""
        u, sigma, v = torch.linalg.svd(self._matrix(seen), full_matrices=False)
        return self._back(seen, (u * (sigma - self.factor(seen) * rate).clamp(min=0.0)[..., None, :]) @ v)

    def _matrix(self, seen: Penalized) -> Tensor:
        assert seen.layout is not None
        return matrix(seen.weight, seen.layout)

    def _back(self, seen: Penalized, found: Tensor) -> Tensor:
        assert seen.layout is not None
        return from_matrix(found, seen.layout).reshape(seen.weight.shape)
