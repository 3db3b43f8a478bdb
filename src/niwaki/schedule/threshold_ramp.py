"""A value that rises, below which weights go."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from niwaki.clock import Clock, Time, TimeField
from niwaki.errors import InputError
from niwaki.schedule.base import EVERY, Schedule


class ThresholdRamp(Schedule):
    """Masks the pieces whose score is below a threshold of each tensor that rises with time, slowly and then one and a half times as fast.

    The scores decide how many pieces go, so the recipe has no sparsity. ``q`` is, for each tensor (or group), the score that the
    given quantile of its active pieces lies below at the first update; that of a trained model, if the training starts from one. Where
    the weights keep their distribution, about that share is masked in the end.

    Attributes:
        begin: ``t_s``, the first update.
        ramp: ``t_r``, from when on the threshold rises faster, between ``begin`` and ``end``.
        end: ``t_e``, the last update.
        every: steps between updates; one at ``end`` too.
        share: which quantile ``q`` is.

    >>> ramp = ThresholdRamp(begin="100 steps", ramp="1000 steps", end="2000 steps")
    >>> [round(ramp.threshold(step, Clock()), 3) for step in (100, 1000, 2000)]
    [0.0, 0.376, 1.001]
    """

    decides = True

    name = "threshold_ramp"
    equation = "e_t = D q (t - t_s + 1), from t_r on D q ((t_r - t_s + 1) + 1.5 (t - t_r + 1)); D = 2 / (2 (t_r - t_s) + 3 (t_e - t_r))"
    source = "Narang, Diamos, Sengupta, Elsen 2017"

    begin: TimeField = Time(0.05, "run")
    ramp: TimeField = Time(0.25, "run")
    end: TimeField = Time(0.5, "run")
    every: TimeField = EVERY
    share: Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)] = 0.9

    @property
    def quantile(self) -> float:
        """The share."""
        return self.share

    def threshold(self, step: int, clock: Clock) -> float:  # noqa: D102
        begin, ramp, end = (clock.steps(time) for time in (self.begin, self.ramp, self.end))
        rise = 2.0 / (2 * (ramp - begin) + 3 * (end - ramp))
        return rise * (step - begin + 1) if step < ramp else rise * ((ramp - begin + 1) + 1.5 * (step - ramp + 1))

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:
        """Return ``sparsity``, which decides nothing, where thresholds are applied."""
        begin, end = clock.steps(self.begin), clock.steps(self.end)
        return sparsity if step == end or (begin <= step < end and (step - begin) % clock.interval(self.every) == 0) else None

    def last(self, clock: Clock) -> int:  # noqa: D102
        return clock.steps(self.end)

    def validate_with(self, clock: Clock) -> None:  # noqa: D102
        self._check_span(self.begin, self.end, clock)
        self._check_every(self.every, clock)
        begin, ramp, end = (clock.steps(time) for time in (self.begin, self.ramp, self.end))
        if not begin <= ramp <= end:
            raise InputError(
                f"schedule.threshold_ramp: ramp ({self.ramp} = step {ramp}) must lie between begin ({self.begin} = step {begin}) and"
                f" end ({self.end} = step {end})"
            )
