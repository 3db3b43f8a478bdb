"""What a saliency sees, and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from niwaki.component import Component
from niwaki.curvature import Curvature
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.statistics import Statistic

Scored = Literal["outputs", "inputs", "norms", "all"]
"""Members of a dependency group: the weights that make its units, those that read them, the scales of normalizations, or all."""


class Reduce(Protocol):
    """The pieces of one tensor. Element values have the shape of the layout's view, or can be reshaped to it."""

    def __call__(self, values: Tensor, /) -> Tensor:
        """Return the sum over each piece in float64; the values themselves where pieces are single elements."""
        ...

    def rows(self, values: Tensor, /) -> Tensor:
        """Return the elements of each piece: shape ``[pieces, elements of a piece]``, pieces in the order of the sums.

        Raises:
            InputError: the pieces differ in size.
        """
        ...

    def index(self) -> Tensor:
        """Return the number of each piece, int64, in the shape of the sums: of a unit, its number in the group."""
        ...


@dataclass(frozen=True)
class Observation:
    """All that a score may look at, for one tensor. The tensors have the shape of the layout's view, and any float dtype.

    Attributes:
        name: canonical parameter name.
        weight: the current weights.
        gradient: gradient of the loss at the current weights, for components that need ``gradient``.
        score: the relaxation's learned score, for components that need ``score``.
        seed: seed of the run.
        step: optimizer step.
        start: flat index of the first element in the whole tensor, when this is a shard of it.
        layout: of this rank's part; None only where a test builds an observation by hand.
        active: True where the mask is now (bool); None while nothing is masked.
        statistics: what the component has asked for -> its value for this tensor.
        curvature: of all tensors, for saliencies that build one.
    """

    name: str
    weight: Tensor
    gradient: Tensor | None = None
    score: Tensor | None = None
    seed: int = 0
    step: int = 0
    start: int = 0
    layout: Layout | None = None
    active: Tensor | None = None
    statistics: Mapping[Statistic, Any] = field(default_factory=dict)
    curvature: Curvature | None = None

    def of(self, statistic: Statistic) -> Any:
        """Return the value of a statistic.

        Raises:
            InputError: it was not collected for this tensor.
        """
        if statistic not in self.statistics:
            raise InputError(f"{self.name}: its {type(statistic).__name__} was not collected at step {self.step}")
        return self.statistics[statistic]


@dataclass(frozen=True)
class Solution:
    """What :meth:`Saliency.solve` returns, in the layout's view.

    Attributes:
        keep: True where active (bool).
        weight: new weights, zero where masked.
        notes: what a user should know: dead columns, damping that was raised.
    """

    keep: Tensor
    weight: Tensor
    notes: tuple[str, ...] = ()


class Saliency(Component):
    """How much a piece matters."""

    slot = "saliency"

    scored_on: ClassVar[Scored] = "outputs"
    """Which members of a dependency group it scores, for granularities whose pieces are units of groups."""
    of_units: ClassVar[bool] = False
    """Whether it says something about units (what reads them sees it), and nothing about single weights."""
    solves: ClassVar[bool] = False
    """Whether it chooses the mask of each tensor itself, step by step, and the weights with it, in :meth:`solve`."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What it asks to know of every tensor that it scores."""
        return ()

    @property
    def averages(self) -> Literal["batch", "sample"] | None:
        """Whether the score of each batch's, or each example's, gradient is computed by itself, and the scores are averaged."""
        return None

    def curvature(self, seen: Sequence[Observation]) -> Curvature | None:
        """Return the curvature of all tensors that are scored, for saliencies that need one."""
        return None

    def solve(self, seen: Observation, keep: int, pattern: tuple[int, int] | None) -> Solution:
        """Return the mask and weights of one tensor, for saliencies that choose them themselves.

        Args:
            seen: the tensor and its statistics.
            keep: how many weights stay; of N:M, the count that follows from the pattern.
            pattern: (N, M) where the granularity is N:M, else None.
        """
        raise NotImplementedError

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return one score for each piece, float32 or float64; higher: keep. NaN in what is seen stays NaN."""
        raise NotImplementedError

    def _needed(self, value: Tensor | None, seen: Observation, what: str) -> Tensor:
        if value is None:
            raise InputError(f"saliency {self.name}: {seen.name!r} has no {what} at step {seen.step}")
        return value


def at_least_float32(values: Tensor) -> Tensor:
    """Return the values in float32, or float64 where they are that."""
    return values if values.dtype == torch.float64 else values.float()
