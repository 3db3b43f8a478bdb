"""Budgets that are tried out: losses that are measured once each, and randomness of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from niwaki.allocation.base import Evidence
from niwaki.counter import key
from niwaki.errors import InputError


class Losses:
    """Mean loss of counts, each measured once; infinite where it is not finite.

    >>> losses = Losses(Evidence(loss=lambda counts: float(sum(counts))), "search")
    >>> losses([1, 2]), losses.best
    (3.0, [1, 2])
    """

    def __init__(self, evidence: Evidence, name: str) -> None:
        assert evidence.loss is not None
        self._measure, self._name = evidence.loss, name
        self.measured: dict[tuple[int, ...], float] = {}
        """Counts -> loss, in the order in which they were tried."""

    def __call__(self, counts: Sequence[int]) -> float:
        """Return the loss of these counts."""
        counts = tuple(counts)
        if counts not in self.measured:
            loss = float(self._measure(counts))
            self.measured[counts] = loss if math.isfinite(loss) else math.inf
        return self.measured[counts]

    @property
    def best(self) -> list[int]:
        """The counts with the least loss so far, the first of equal ones.

        Raises:
            InputError: no loss was finite.
        """
        counts, loss = min(self.measured.items(), key=lambda one: one[1])
        if loss == math.inf:
            raise InputError(
                f"allocation.{self._name}: the loss was not finite in any of {len(self.measured)} trials; look at the model and its"
                " data, or choose a lower sparsity"
            )
        return list(counts)


def generator(evidence: Evidence, name: str) -> np.random.Generator:
    """Return random numbers that depend on the run's seed, the step and the component alone."""
    return np.random.default_rng(key(evidence.seed, evidence.step, f"allocation.{name}") & 0xFFFF_FFFF_FFFF_FFFF)
