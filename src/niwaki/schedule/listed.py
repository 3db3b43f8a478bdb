"""Updates at times that are written out."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from niwaki.clock import Clock, Time, TimeField
from niwaki.component import Fraction
from niwaki.errors import InputError
from niwaki.schedule.base import BEGIN, Schedule


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
