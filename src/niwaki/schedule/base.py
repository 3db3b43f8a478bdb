"""What a schedule is: an answer to one question before every optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from niwaki.clock import Clock, Time
from niwaki.component import Component
from niwaki.errors import InputError

BEGIN = Time(0.0, "run")
END = Time(0.75, "run")
EVERY = Time(100.0, "steps")


@dataclass(frozen=True)
class Validation:
    """The validation loss before an update that was due, and the fraction of the active pieces that was then masked."""

    loss: float
    fraction: float = 0.0


class Schedule(Component):
    """Base of the slot ``schedule``."""

    slot = "schedule"

    decides: ClassVar[bool] = False
    """Whether what it measures decides how sparse the model gets, rather than the recipe's sparsity."""
    validates: ClassVar[bool] = False
    """Whether it looks at the validation loss before every update, and :meth:`fraction` says how much goes."""

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:
        """Return the sparsity that masks must have from ``step`` on, or None when they are not updated before that step.

        Args:
            step: number of optimizer steps taken so far.
            sparsity: the recipe's sparsity, in [0, 1).
            clock: the lengths of the run, as passed to ``validate_with``.
        """
        raise NotImplementedError

    def fraction(self, seen: Sequence[Validation]) -> float:
        """Return the fraction of the active pieces to mask now, given all looks at the validation loss, the newest last."""
        raise NotImplementedError

    @property
    def quantile(self) -> float | None:
        """The quantile of the scores before its first update that thresholds are multiples of; None where pieces are counted."""
        return None

    def threshold(self, step: int, clock: Clock) -> float:
        """Return what a score must reach to be kept at an update, as a multiple of the score at its :attr:`quantile`."""
        raise NotImplementedError

    def sparsities(self, sparsity: float) -> list[float]:
        """Return the sparsities of the rounds that an update to ``sparsity`` goes through, without training between them."""
        return [sparsity]

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

    @property
    def candidates(self) -> int:
        """How many of the last selections it looks at before it lets one act; 0 where each acts at once."""
        return 0

    def accepts(self, candidates: Sequence[Tensor]) -> bool:
        """Return whether the last of these selections is to act: each a flat bool tensor of all pieces, True where kept."""
        return True

    def _check_span(self, begin: Time, end: Time, clock: Clock) -> None:
        if clock.steps(end) <= clock.steps(begin):
            raise InputError(
                f"schedule.{self.name}: end ({end} = step {clock.steps(end)}) must come after begin ({begin} = step {clock.steps(begin)})"
            )

    def _check_every(self, every: Time, clock: Clock) -> None:
        if clock.interval(every) < 1:
            raise InputError(f"schedule.{self.name}.every: must be longer than zero, got {every}")
