"""Growth where the gradients of pruned weights are large."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.errors import InputError
from niwaki.growth.base import ByFraction
from niwaki.growth.decay import CosineDecay, DecayField
from niwaki.statistics import Momentum, Statistic

if TYPE_CHECKING:
    from niwaki.saliency import Observation


class GradientGrowth(ByFraction):
    """Pruned pieces come back where the loss would fall fastest: at the largest gradients of the dense model.

    The gradient is that of all elements at the pruned model, and is needed only at update steps.
    """

    name = "gradient"
    equation = "G = sum over piece of |dL/dw|"
    source = "Evci, Gale, Menick, Castro, Elsen 2020 (RigL)"
    effort = "the gradient of all weights at updates"
    advice = "training that is sparse from the first step; the default choice, with rare updates in long trainings"
    reads_gradient = True

    fraction: DecayField = CosineDecay(initial=0.3)
    at_update: Literal["skip_step", "step"] = "skip_step"

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        if seen.gradient is None:
            raise InputError(f"growth.gradient: {seen.name} has no gradient at this update; it must take part in the loss")
        # Sums over pieces in at least float32: bfloat16 would lose small addends.
        return reduce(seen.gradient.abs().to(torch.promote_types(seen.gradient.dtype, torch.float32)))


class MomentumGrowth(ByFraction):
    """Pruned pieces come back where gradients have agreed over many steps: at the largest moving averages of them.

    The gradient of all elements is needed at **every** step, so a step costs as much as two forward passes of the sparse model and one of
    the dense one, and clipping sees the norm of all elements. The average begins where the sparsifier is attached, and has no part in the
    optimizer's own momentum.

    Attributes:
        decay: of earlier gradients, ``d`` in [0, 1).
    """

    name = "momentum"
    equation = "G = sum over piece of |m|, m <- d m + (1 - d) dL/dw at every step"
    source = "Dettmers & Zettlemoyer 2019 (sparse momentum, SNFS)"
    effort = "the gradient of all weights at every step, and one float64 number a weight"
    advice = "where the gradient of a single batch is noisy and its cost does not matter"
    every_gradient = True

    fraction: DecayField = CosineDecay(initial=0.5)
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The moving average of the gradients."""
        return (Momentum(self.decay), *super().statistics)

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        return reduce(seen.of(Momentum(self.decay)).abs())
