"""One update, or several that are all alike."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from niwaki.clock import Clock, TimeField
from niwaki.errors import InputError
from niwaki.schedule.base import BEGIN, END, EVERY, Schedule
from niwaki.schedule.ramp import exponential


class OneShot(Schedule):
    """One update, at once or in rounds without training between them.

    Rounds score anew what the round before has left, at sparsities that remove the same share of it each (or the same number).

    Attributes:
        at: when. (In Python the field is ``moment``, for ``at`` is the method.)
        rounds: ``R``, at least 1.
        spacing: the same share of what remains in every round, or the same number of pieces.
        revive: whether a round may take back what an earlier one has removed: the weights before the first round are then scored, with
            the gradients of the network as the last round has left it (de Jorge et al. 2020, FORCE).

    >>> OneShot(at="500 steps").at(500, 0.9, Clock())
    0.9
    >>> [round(s, 3) for s in OneShot(rounds=2).sparsities(0.99)]
    [0.9, 0.99]
    """

    model_config = ConfigDict(populate_by_name=False)

    name = "one_shot"
    equation = "s_t = S at one step; in rounds 1 - s_r = (1 - S)^(r / R)"
    source = "the simplest schedule; LeCun, Denker, Solla 1989; in rounds: Tanaka et al. 2020 (SynFlow)"

    moment: TimeField = Field(default=BEGIN, alias="at")
    rounds: Annotated[int, Field(ge=1)] = 1
    spacing: Literal["exponential", "linear"] = "exponential"
    revive: bool = False

    @model_validator(mode="after")
    def _revives_in_rounds(self) -> Self:
        if self.revive and self.rounds == 1:
            raise InputError("revive: there is nothing to take back in a single round; say rounds, such as 100")
        return self

    def sparsities(self, sparsity: float) -> list[float]:  # noqa: D102
        shares = [r / self.rounds for r in range(1, self.rounds)]
        way = [share * sparsity if self.spacing == "linear" else exponential(0.0, sparsity, share) for share in shares]
        return [*(min(max(s, 0.0), sparsity) for s in way), sparsity]

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
