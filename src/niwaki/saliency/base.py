"""What a saliency sees, and what it returns."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from niwaki.component import Component
from niwaki.errors import InputError

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
        activity: mean over the data of the size of each input entry that the weight reads, for components that need ``activity``; of
            size 1 in all dimensions that are no inputs.
        seed: seed of the run.
        step: optimizer step.
        start: flat index of the first element in the whole tensor, when this is a shard of it.
    """

    name: str
    weight: Tensor
    gradient: Tensor | None = None
    score: Tensor | None = None
    activity: Tensor | None = None
    seed: int = 0
    step: int = 0
    start: int = 0


class Saliency(Component):
    """How much a piece matters."""

    slot = "saliency"

    scored_on: ClassVar[Scored] = "outputs"
    """Which members of a dependency group it scores, for granularities whose pieces are units of groups."""

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
