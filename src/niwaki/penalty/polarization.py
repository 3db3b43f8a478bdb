"""Polarization: some scales to zero, the others away from it."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.penalty.base import Elementwise, NotNegative, Penalized, Positive


class Polarization(Elementwise):
    """L1 less the distance from the mean of all: part of the scales goes to zero, and the rest to the upper bound.

    The second term vanishes where all are equal, and is largest where half are at zero and half at the bound. It needs the bound: after
    every step scales are put back into [0, upper], and gates are bounded by the relaxation that computes them.

    Attributes:
        of: ``norm`` or ``gate``.
        t: weight of L1; larger ones send more scales to zero. Above 2 all of them go.
        upper: the bound of scales.
    """

    name = "polarization"
    equation = "c (t Σ |g| - Σ |g - mean g|), g in [0, upper]"
    source = "Zhuang, Zhang, Huang, Zeng, Shuang, Li 2020"
    effort = "one pass over the scales or gates"
    advice = "channels, in the place of L1 on scales: the cut has a gap to go through"

    of: Literal["norm", "gate"] = "norm"
    apply: Literal["gradient", "decoupled"] = "gradient"
    t: Annotated[NotNegative, Field(le=10.0)] = 1.2
    upper: Positive = 1.0
    whole = True
    remembers = True

    @property
    def after_step(self) -> bool:
        """Whether it acts after the step: always, by the bound."""
        return True

    def refresh(self, everyone: Sequence[Penalized]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the mean of all, and the mean of their signs from there, which is the derivative by the mean."""
        sizes = sum(seen.weight.numel() for seen in everyone)
        mean = torch.stack([seen.weight.sum(dtype=torch.float64) for seen in everyone]).sum() / sizes
        signs = [(torch.sign(seen.weight - mean) * seen.cost).sum(dtype=torch.float64) for seen in everyone]
        return [{} for _ in everyone], {"mean": mean, "lean": torch.stack(signs).sum() / sizes}

    def value(self, seen: Penalized) -> Tensor:
        """Return the penalty of one tensor, given the mean of all; its own where it is the only one."""
        mean = seen.shared.get("mean", seen.weight.mean())
        return ((self.t * seen.weight.abs() - (seen.weight - mean).abs()) * self.factor(seen)).sum()

    def slope(self, seen: Penalized) -> Tensor:
        """Return the derivative, that by way of the mean included."""
        signs = torch.sign(seen.weight - seen.shared["mean"]) * self.factor(seen)
        lean = seen.shared["lean"] * (self.strength * seen.ramp)
        return self.t * torch.sign(seen.weight) * self.factor(seen) - signs + lean

    def step(self, seen: Penalized, rate: float) -> Tensor:
        """Return the scales inside their bounds, after a step of the gradient if that is to be decoupled."""
        if seen.ramp == 0.0:
            return seen.weight
        moved = seen.weight - rate * self.gradient(seen) if self.apply == "decoupled" else seen.weight
        inside = moved.clamp(0.0, self.upper)
        return inside if seen.learns is None else inside.where(seen.learns, seen.weight)
