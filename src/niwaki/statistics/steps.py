"""Statistics of the training itself, updated before every optimizer step from the weight ``w_t`` and its gradient ``g_t``.

They begin where the sparsifier is attached and are part of its state. All are in the view, float64, sums and not means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from niwaki.layout import Layout
from niwaki.statistics.base import Source, Statistic


@dataclass(frozen=True)
class StepStatistic(Statistic):
    """Base: something that is summed up over the steps."""

    source: ClassVar[Source] = "steps"
    needs_data: ClassVar[bool] = False

    def memory(self, layout: Layout) -> int:
        """Return the bytes of one number a weight."""
        return 8 * layout.elements


@dataclass(frozen=True)
class InitialWeight(StepStatistic):
    """The weight when the sparsifier was built."""


@dataclass(frozen=True)
class Movement(StepStatistic):
    """``-Σ_t g_t w_t``: positive where training moves a weight away from zero (Sanh, Wolf, Rush 2020).

    Attributes:
        decay: of earlier steps, ``m <- d m - (1 - d) g_t w_t``, as in skeletonization with 0.8 (Mozer & Smolensky 1988); None: a plain sum.
    """

    decay: float | None = None


@dataclass(frozen=True)
class Momentum(StepStatistic):
    """``m <- d m + (1 - d) g_t``: a moving average of the gradients, from 0 (Dettmers & Zettlemoyer 2019, sparse momentum)."""

    decay: float = 0.9


@dataclass(frozen=True)
class WeightChange(StepStatistic):
    """``Σ_t |w_(t+1) - w_t|``: how far a weight has come, there and back."""

    def memory(self, layout: Layout) -> int:
        """Return the bytes of the sum and of the last weight."""
        return 16 * layout.elements


@dataclass(frozen=True)
class PathSensitivity(StepStatistic):
    """``Σ_t g_t (w_(t+1) - w_t)``: what the weight's changes have done to the loss (Karnin 1990)."""

    def memory(self, layout: Layout) -> int:
        """Return the bytes of the sum, the last weight and the last gradient."""
        return 24 * layout.elements


@dataclass(frozen=True)
class StepGradients(StepStatistic):
    """The gradients of the last ``window`` steps, oldest first: ``[steps, *view]``, float32 (float64 of a float64 weight).

    The value is the window itself, without a copy: it changes with the next step.
    """

    window: int = 512

    def memory(self, layout: Layout) -> int:
        """Return the bytes of the window."""
        return 4 * self.window * layout.elements

    def within(self, budget: int, layouts: list[Layout]) -> str:
        """Say how many gradients fit."""
        fitting = budget // max(4 * sum(layout.elements for layout in layouts), 1)
        return f"window: {fitting}" if fitting else ""
