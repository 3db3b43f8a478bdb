"""One update, or several that are all alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from niwaki.clock import Clock, TimeField
from niwaki.errors import InputError
from niwaki.schedule.base import BEGIN, END, EVERY, Schedule
from niwaki.schedule.ramp import exponential


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
