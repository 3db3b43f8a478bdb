"""Sparsities that follow a curve, from one value to another."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from niwaki.clock import Clock, TimeField
from niwaki.component import Fraction
from niwaki.schedule.base import BEGIN, END, EVERY, Schedule


def exponential(initial: float, final: float, progress: float) -> float:
    """Return the sparsity whose density lies geometrically between the densities of two others.

    >>> exponential(0.0, 0.75, 0.5)
    0.5
    """
    return 1.0 - math.pow(1.0 - initial, 1.0 - progress) * math.pow(1.0 - final, progress)


class Ramp(Schedule):
    """From ``initial`` to the recipe's sparsity, updated at ``begin``, then ``every`` so often, and at ``end``.

    The update at ``begin`` has exactly ``initial``, the one at ``end`` exactly the sparsity asked for, also when the span is no
    multiple of ``every``.

    Attributes:
        initial: sparsity at ``begin``, in [0, 1).
        begin: the first update.
        end: the last update.
        every: steps between updates.
    """

    initial: Fraction = 0.0
    begin: TimeField = BEGIN
    end: TimeField = END
    every: TimeField = EVERY

    def value(self, sparsity: float, progress: float) -> float:
        """Return the sparsity at ``progress`` in (0, 1) of the span."""
        raise NotImplementedError

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:  # noqa: D102
        begin, end = clock.steps(self.begin), clock.steps(self.end)
        if step == end:
            return sparsity
        if not begin <= step < end or (step - begin) % clock.interval(self.every):
            return None
        if step == begin:
            return self.initial
        value = self.value(sparsity, (step - begin) / (end - begin))
        # Rounding must not carry it past either end.
        return min(max(value, min(self.initial, sparsity)), max(self.initial, sparsity))

    def last(self, clock: Clock) -> int:  # noqa: D102
        return clock.steps(self.end)

    def validate_with(self, clock: Clock) -> None:  # noqa: D102
        self._check_span(self.begin, self.end, clock)
        self._check_every(self.every, clock)


class Linear(Ramp):
    """Sparsity rises at a constant speed.

    >>> Linear(end="100 steps", every="10 steps").at(50, 0.5, Clock())
    0.25
    """

    name = "linear"
    equation = "s_t = s_i + (S - s_i) p, p = (t - begin) / (end - begin)"
    source = "survey 3.2"

    def value(self, sparsity: float, progress: float) -> float:  # noqa: D102
        return self.initial + (sparsity - self.initial) * progress


class Cubic(Ramp):
    """Sparsity rises fast while there is much to remove, and slowly towards the end.

    >>> round(Cubic(end="100 steps", every="10 steps").at(50, 0.8, Clock()), 12)
    0.7
    """

    name = "cubic"
    equation = "s_t = S + (s_i - S) (1 - p)^3, p = (t - begin) / (end - begin)"
    source = "Zhu & Gupta 2017"

    def value(self, sparsity: float, progress: float) -> float:  # noqa: D102
        return sparsity + (self.initial - sparsity) * (1.0 - progress) ** 3


class Polynomial(Ramp):
    """Sparsity rises by a power of the time that is left: ``linear`` is the first, ``cubic`` the third.

    Attributes:
        degree: ``d``, above 0; the larger, the earlier pieces go.

    >>> Polynomial(degree=2, end="100 steps", every="10 steps").at(50, 0.8, Clock()) == 0.75 * 0.8
    True
    """

    name = "polynomial"
    equation = "s_t = S + (s_i - S) (1 - p)^d, p = (t - begin) / (end - begin)"
    source = "Zhu & Gupta 2017 (d = 3); Singh & Alistarh 2020 (any degree)"

    degree: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 3.0

    def value(self, sparsity: float, progress: float) -> float:  # noqa: D102
        return sparsity + (self.initial - sparsity) * math.pow(1.0 - progress, self.degree)


class Exponential(Ramp):
    """Density falls by the same factor at every update.

    >>> Exponential(end="100 steps", every="10 steps").at(50, 0.75, Clock())
    0.5
    """

    name = "exponential"
    equation = "1 - s_t = (1 - s_i)^(1 - p) (1 - S)^p, p = (t - begin) / (end - begin)"
    source = "Tanaka, Kunin, Yamins, Ganguli 2020 (SynFlow)"

    def value(self, sparsity: float, progress: float) -> float:  # noqa: D102
        return exponential(self.initial, sparsity, progress)


class Cosine(Ramp):
    """Sparsity rises along half a cosine wave: slowly, fast, slowly.

    >>> round(Cosine(end="100 steps", every="10 steps").at(50, 0.8, Clock()), 12)
    0.4
    """

    name = "cosine"
    equation = "s_t = S + (s_i - S) (1 + cos(pi p)) / 2, p = (t - begin) / (end - begin)"
    source = "Loshchilov & Hutter 2017 (the curve)"

    def value(self, sparsity: float, progress: float) -> float:  # noqa: D102
        return sparsity + (self.initial - sparsity) * (1.0 + math.cos(math.pi * progress)) / 2.0
