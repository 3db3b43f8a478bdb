"""When masks are updated, and how sparse they are to be by then.

A schedule answers one question before every optimizer step: are the masks to be updated now, and to which sparsity? Step 0 is
before the first optimizer step. Times are resolved to whole steps by the run's clock, and ``every`` counts in whole steps (at least one).
A schedule knows nothing of how long the run is: it answers for any step, also at and beyond the end of the run.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from niwaki.clock import Clock, Time, TimeField
from niwaki.component import Component, Fraction
from niwaki.errors import InputError

BEGIN = Time(0.0, "run")
END = Time(0.75, "run")
EVERY = Time(100.0, "steps")


class Schedule(Component):
    """Base of the slot ``schedule``."""

    slot = "schedule"

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:
        """Return the sparsity that masks must have from ``step`` on, or None when they are not updated before that step.

        Args:
            step: number of optimizer steps taken so far.
            sparsity: the recipe's sparsity, in [0, 1).
            clock: the lengths of the run, as passed to ``validate_with``.
        """
        raise NotImplementedError

    def last(self, clock: Clock) -> int:
        """Return the last step before which masks are updated."""
        raise NotImplementedError

    def final(self, sparsity: float | None) -> float | None:
        """Return the sparsity of the last update, given the recipe's (None when the recipe has none)."""
        return sparsity

    def validate_with(self, clock: Clock) -> None:
        """Check the times against the run.

        Raises:
            InputError: a unit that the clock cannot resolve, an end that is not after the begin, an interval of zero.
        """
        self.last(clock)

    def _check_span(self, begin: Time, end: Time, clock: Clock) -> None:
        if clock.steps(end) <= clock.steps(begin):
            raise InputError(
                f"schedule.{self.name}: end ({end} = step {clock.steps(end)}) must come after begin ({begin} = step {clock.steps(begin)})"
            )

    def _check_every(self, every: Time, clock: Clock) -> None:
        if clock.interval(every) < 1:
            raise InputError(f"schedule.{self.name}.every: must be longer than zero, got {every}")


class OneShot(Schedule):
    """One update.

    Attributes:
        at: when. (In Python the field is ``moment``, for ``at`` is the method.)

    >>> OneShot(at="500 steps").at(500, 0.9, Clock())
    0.9
    """

    model_config = ConfigDict(populate_by_name=False)

    name = "one_shot"
    equation = "s_t = S at one step"
    source = "the simplest schedule; LeCun, Denker, Solla 1989"

    moment: TimeField = Field(default=BEGIN, alias="at")

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:  # noqa: D102
        return sparsity if step == clock.steps(self.moment) else None

    def last(self, clock: Clock) -> int:  # noqa: D102
        return clock.steps(self.moment)


class Iterative(Schedule):
    """Equal shares of what remains, in rounds: each round removes the same fraction of the pieces that are left.

    Round ``c`` of ``C`` comes at ``begin + floor(c (end - begin) / C)``, so there is training before the first round, and the last
    round is at ``end``. The fraction removed is ``1 - (1 - S)^(1/C)``: 20.6 % for 90 % in 10 rounds.

    Attributes:
        rounds: ``C``, at least 1.
        begin: when training for the first round begins.
        end: when the last round is.
    """

    name = "iterative"
    equation = "1 - s_c = (1 - S)^(c / C), c = 1 .. C"
    source = "Han, Pool, Tran, Dally 2015; Frankle & Carbin 2019"

    rounds: Annotated[int, Field(ge=1)] = 10
    begin: TimeField = BEGIN
    end: TimeField = END

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:  # noqa: D102
        begin, end = clock.steps(self.begin), clock.steps(self.end)
        if not begin < step <= end:
            return None
        # The only round that can fall on this step: the first one that is not before it.
        current = -(-(step - begin) * self.rounds // (end - begin))
        if begin + current * (end - begin) // self.rounds != step:
            return None
        return sparsity if current == self.rounds else min(max(exponential(0.0, sparsity, current / self.rounds), 0.0), sparsity)

    def last(self, clock: Clock) -> int:  # noqa: D102
        return clock.steps(self.end)

    def validate_with(self, clock: Clock) -> None:  # noqa: D102
        self._check_span(self.begin, self.end, clock)
        if (span := clock.steps(self.end) - clock.steps(self.begin)) < self.rounds:
            raise InputError(
                f"schedule.iterative.rounds: {self.rounds} rounds do not fit into {span} steps, from {self.begin} to {self.end}"
            )


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


class Constant(Schedule):
    """The same sparsity throughout, with masks updated again and again (dynamic sparse training).

    Attributes:
        begin: the first update.
        end: no update after this time.
        every: steps between updates.
    """

    name = "constant"
    equation = "s_t = S at begin, begin + every, begin + 2 every, ... <= end"
    source = "Mocanu et al. 2018 (SET); Evci et al. 2020 (RigL)"

    begin: TimeField = BEGIN
    end: TimeField = END
    every: TimeField = EVERY

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:  # noqa: D102
        begin = clock.steps(self.begin)
        return None if not begin <= step <= clock.steps(self.end) or (step - begin) % clock.interval(self.every) else sparsity

    def last(self, clock: Clock) -> int:  # noqa: D102
        begin, every = clock.steps(self.begin), clock.interval(self.every)
        return begin + (clock.steps(self.end) - begin) // every * every

    def validate_with(self, clock: Clock) -> None:  # noqa: D102
        self._check_span(self.begin, self.end, clock)
        self._check_every(self.every, clock)


class Phases(Schedule):
    """Dense and sparse phases in turn; before the first time the model is dense.

    Attributes:
        dense: times at which all pieces come back, increasing; they hold until the next time of either list.
        sparse: times at which the masks are chosen, increasing, at least one.
        unit: what the times count: ``steps``, ``epochs``, ``run`` or ``tokens``.

    >>> recipe = Phases(dense=[0, 15], sparse=[10, 20], unit="epochs")
    >>> [recipe.at(step, 0.9, Clock(steps_per_epoch=2)) for step in (0, 20, 30, 31, 40)]
    [0.0, 0.9, 0.0, None, 0.9]
    """

    name = "phases"
    equation = "s_t = 0 at the dense times, S at the sparse times"
    source = "Han et al. 2017 (DSD); Peste, Iofinova, Vladu, Alistarh 2021 (AC/DC)"

    dense: tuple[int | float, ...] = (0,)
    sparse: tuple[int | float, ...]
    unit: Literal["steps", "epochs", "run", "tokens"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sparse:
            raise InputError("sparse needs at least one time")
        for field, times in (("dense", self.dense), ("sparse", self.sparse)):
            for time in times:
                Time(time, self.unit)
            if list(times) != sorted(times):
                raise InputError(f"the times of {field} must increase, got {list(times)}")
        ordered = sorted([*self.dense, *self.sparse])
        for earlier, later in pairwise(ordered):
            if earlier == later:
                raise InputError(f"two phases begin at {later} {self.unit}: each time may stand once, in dense or in sparse")
        return self

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:  # noqa: D102
        is_sparse = _phases(self.dense, self.sparse, self.unit, clock).get(step)
        return None if is_sparse is None else sparsity if is_sparse else 0.0

    def last(self, clock: Clock) -> int:  # noqa: D102
        return max(_phases(self.dense, self.sparse, self.unit, clock))

    def final(self, sparsity: float | None) -> float | None:  # noqa: D102
        return 0.0 if max(self.dense, default=-1) > max(self.sparse) else sparsity

    def validate_with(self, clock: Clock) -> None:  # noqa: D102
        steps = [clock.steps(Time(time, self.unit)) for time in sorted([*self.dense, *self.sparse])]
        for earlier, later in pairwise(steps):
            if earlier == later:
                raise InputError(f"schedule.phases: two phases begin at step {later} of this run; every phase must last at least 1 step")


class Listed(Schedule):
    """Sparsities written out, one an update; the last one is final, whatever the recipe's sparsity.

    Attributes:
        sparsity: the values, each in [0, 1).
        at: their times, increasing; either this or ``every``. (In Python the field is ``moments``, for ``at`` is the method.)
        every: steps between updates, the first at ``begin``.
        begin: the first update, with ``every``.

    >>> warm_up = Listed(sparsity=[0.75, 0.9375, 0.984375, 0.996, 0.999], every="1 epochs")
    >>> [warm_up.at(step, 0.999, Clock(steps_per_epoch=7)) for step in (0, 1, 7, 28, 35)]
    [0.75, None, 0.9375, 0.999, None]
    """

    model_config = ConfigDict(populate_by_name=False)

    name = "list"
    equation = "s_t = the i-th value at the i-th time"
    source = "Lin, Han, Mao, Wang, Dally 2018 (DGC warm-up)"

    sparsity: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    moments: tuple[TimeField, ...] | None = Field(default=None, alias="at")
    every: TimeField | None = None
    begin: TimeField | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.moments is None) == (self.every is None):
            raise InputError("give either every or at, and not both")
        if self.moments is not None and self.begin is not None:
            raise InputError("begin goes with every; with at the first time says it")
        if self.moments is not None and len(self.moments) != len(self.sparsity):
            raise InputError(f"sparsity and at must be of equal length, got {len(self.sparsity)} and {len(self.moments)}")
        return self

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:  # noqa: D102
        return self._updates(clock).get(step)

    def last(self, clock: Clock) -> int:  # noqa: D102
        return max(self._updates(clock))

    def final(self, sparsity: float | None) -> float | None:  # noqa: D102
        return self.sparsity[-1]

    def validate_with(self, clock: Clock) -> None:  # noqa: D102
        if self.every is not None:
            self._check_every(self.every, clock)
        for earlier, later in pairwise(self.moments or ()):
            if clock.steps(later) <= clock.steps(earlier):
                raise InputError(
                    f"schedule.list.at: times must increase, but {later} (step {clock.steps(later)}) comes after"
                    f" {earlier} (step {clock.steps(earlier)})"
                )

    def _updates(self, clock: Clock) -> dict[int, float]:
        return _list(self.sparsity, self.moments, self.begin or BEGIN, self.every, clock)


def exponential(initial: float, final: float, progress: float) -> float:
    """Return the sparsity whose density lies geometrically between the densities of two others.

    >>> exponential(0.0, 0.75, 0.5)
    0.5
    """
    return 1.0 - math.pow(1.0 - initial, 1.0 - progress) * math.pow(1.0 - final, progress)


# A schedule is asked before every optimizer step; the tables are the same each time.


@lru_cache(maxsize=64)
def _phases(dense: tuple[float, ...], sparse: tuple[float, ...], unit: str, clock: Clock) -> dict[int, bool]:
    return {clock.steps(Time(time, unit)): is_sparse for times, is_sparse in ((dense, False), (sparse, True)) for time in times}


@lru_cache(maxsize=64)
def _list(sparsity: tuple[float, ...], moments: tuple[Time, ...] | None, begin: Time, every: Any, clock: Clock) -> dict[int, float]:
    if moments is None:
        steps = [clock.steps(begin) + i * clock.interval(every) for i in range(len(sparsity))]
    else:
        steps = [clock.steps(time) for time in moments]
    return dict(zip(steps, sparsity, strict=True))
