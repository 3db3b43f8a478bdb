"""Waits until the masks that would be drawn no longer change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from niwaki.clock import Clock, Time, TimeField
from niwaki.schedule.base import BEGIN, END, Schedule


class MaskStability(Schedule):
    """Draws a candidate mask every so often, and lets the first one act that resembles those before it; then it is done.

    The distance of two masks is the share of all pieces in which they differ. A candidate acts when its largest distance to the
    others among the last ``window`` is below ``distance``; the one at ``end`` acts in any case, so that the sparsity asked for is
    reached.

    Attributes:
        begin: the first candidate.
        end: the last candidate.
        every: steps between candidates.
        window: how many candidates are compared, the newest included.
        distance: below which masks are alike, in (0, 1].

    >>> import torch
    >>> masks = [torch.tensor(mask) for mask in ([True, True, False], [True, False, True], [True, False, True])]
    >>> patient = MaskStability(window=2)
    >>> [patient.accepts(masks[:n]) for n in (1, 2, 3)]
    [False, False, True]
    """

    name = "mask_stability"
    equation = "act when max_j |m_t ≠ m_t-j| / N < distance, j = 1 .. window - 1"
    source = "You, Li, Xu, Fu, Wang, Chen, Baraniuk, Wang, Lin 2020 (early-bird tickets)"

    begin: TimeField = BEGIN
    end: TimeField = END
    every: TimeField = Time(1.0, "epochs")
    window: Annotated[int, Field(ge=2)] = 5
    distance: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1

    @property
    def candidates(self) -> int:
        """The window."""
        return self.window

    def accepts(self, candidates: Sequence[Tensor]) -> bool:
        """Return whether the last candidate resembles all others of a full window."""
        *others, newest = candidates[-self.window :]
        return len(others) == self.window - 1 and all(float((newest != other).double().mean()) < self.distance for other in others)

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:
        """Return the sparsity where a candidate is drawn."""
        begin, end = clock.steps(self.begin), clock.steps(self.end)
        return sparsity if step == end or (begin <= step < end and (step - begin) % clock.interval(self.every) == 0) else None

    def last(self, clock: Clock) -> int:
        """Return the step of the last candidate."""
        return clock.steps(self.end)

    def validate_with(self, clock: Clock) -> None:  # noqa: D102
        self._check_span(self.begin, self.end, clock)
        self._check_every(self.every, clock)
