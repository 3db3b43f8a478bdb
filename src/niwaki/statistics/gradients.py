"""Statistics of gradients of the loss on few examples at a time, of weights in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from niwaki.layout import Layout
from niwaki.statistics.base import Labels, Source, Statistic


@dataclass(frozen=True)
class GradientStatistic(Statistic):
    """Base: something about gradients ``g_j`` of the mean loss of ``samples_per_gradient`` examples each.

    Several ranks share the gradients out evenly. If the data has fewer, there is a warning and all of them count.

    Attributes:
        gradients: how many; None for all that the data has.
        samples_per_gradient: examples of one gradient, whatever batches they come in; None: a batch as the data has it.
        labels: of the data, or drawn from the model's softmax (true Fisher).
    """

    source: ClassVar[Source] = "gradients"
    needs_loss: ClassVar[bool] = True

    gradients: int | None = None
    samples_per_gradient: int | None = 1
    labels: Labels = "given"


@dataclass(frozen=True)
class GradientSquare(GradientStatistic):
    """Mean of ``g²``, the diagonal of the empirical Fisher matrix; in the view, float64."""

    def memory(self, layout: Layout) -> int:
        """Return the bytes of one number a weight."""
        return 8 * layout.elements


@dataclass(frozen=True)
class GradientMean(GradientStatistic):
    """Mean of ``g``; in the view, float64."""

    def memory(self, layout: Layout) -> int:
        """Return the bytes of one number a weight."""
        return 8 * layout.elements


@dataclass(frozen=True)
class GradientBank(GradientStatistic):
    """The gradients themselves: ``[gradients, *view]``, float32 (float64 of a float64 model); of one rank after the other."""

    gradients: int | None = 400

    def memory(self, layout: Layout) -> int:
        """Return the bytes of all gradients."""
        return 4 * (self.gradients or 0) * layout.elements

    def within(self, budget: int, layouts: list[Layout]) -> str:
        """Say how many gradients fit."""
        fitting = budget // max(4 * sum(layout.elements for layout in layouts), 1)
        return f"gradients: {fitting}" if fitting else ""
