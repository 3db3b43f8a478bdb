"""What a saliency sees, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.component import Component
from niwaki.errors import InputError

Reduce = Callable[[Tensor], Tensor]
"""Sums element values over each piece (``Granularity.reduce`` bound to a layout); returns them as they are where pieces are elements."""


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
    """

    name: str
    weight: Tensor
    gradient: Tensor | None = None
    score: Tensor | None = None
    seed: int = 0
    step: int = 0
    start: int = 0


class Saliency(Component):
    """How much a piece matters."""

    slot = "saliency"

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
