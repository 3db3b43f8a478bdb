"""How much is pruned follows the loss on examples that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated

from pydantic import Field

from niwaki.clock import Clock, Time, TimeField
from niwaki.errors import InputError
from niwaki.schedule.base import BEGIN, END, Schedule, Validation

Part = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
"""A fraction of the active pieces."""


class Validated(Schedule):
    """Looks at the validation loss every so often, and masks a fraction of the pieces that are still active where that asks for it.

    The loss is the mean over the validation examples, of the model in evaluation mode. The recipe's sparsity, if it says one, is the
    most that is masked; whether it is reached depends on the losses.

    Attributes:
        begin: the first look.
        end: no look after this time.
        every: steps between looks.
    """

    decides = True
    validates = True

    begin: TimeField = BEGIN
    end: TimeField = END
    every: TimeField = Time(1.0, "epochs")

    def at(self, step: int, sparsity: float, clock: Clock) -> float | None:
        """Return the most that may be masked, where there is a look."""
        begin = clock.steps(self.begin)
        return None if not begin <= step <= clock.steps(self.end) or (step - begin) % clock.interval(self.every) else sparsity

    def last(self, clock: Clock) -> int:  # noqa: D102
        begin, every = clock.steps(self.begin), clock.interval(self.every)
        return begin + (clock.steps(self.end) - begin) // every * every

    def validate_with(self, clock: Clock) -> None:  # noqa: D102
        self._check_span(self.begin, self.end, clock)
        self._check_every(self.every, clock)


class Adaptive(Validated):
    """Prunes the more, the more the validation loss has risen above its best: what overfits has too many weights.

    ``GL`` is the generalization loss, how many per cent the loss E of the validation examples is above its lowest so far. Nothing is
    masked while the loss is at its best.

    Attributes:
        begin: the first look.
        end: no look after this time.
        every: steps between looks.
        most: ``lambda_max``, the fraction that goes at most at an update.
        gain: ``alpha``, how fast the fraction rises with the generalization loss: at ``GL = 1 / alpha`` it is half of the most.

    >>> looks = [Validation(2.0), Validation(1.0), Validation(1.005)]
    >>> [round(Adaptive().fraction(looks[:n]), 4) for n in (1, 2, 3)]
    [0.0, 0.0, 0.3333]
    """

    name = "adaptive"
    equation = "GL_t = 100 (E_t / min_(t' <= t) E_t' - 1); fraction = lambda_max (1 - 1 / (1 + alpha GL_t))"
    source = "Prechelt 1997 (lprune: lambda_max = 2/3, alpha = 2)"

    most: Part = 2 / 3
    gain: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 2.0

    def fraction(self, seen: Sequence[Validation]) -> float:  # noqa: D102
        best = min(look.loss for look in seen)
        if best < 0.0:
            raise InputError(f"schedule.adaptive: per cent of a loss of {best:g} mean nothing; give a loss that is never negative")
        excess = seen[-1].loss - best
        if excess <= 0.0:
            return 0.0
        relative = 100.0 * self.gain * excess
        return self.most * relative / (best + relative)  # which is also right where the best loss is zero


class RisingLoss(Validated):
    """Prunes a fixed fraction whenever the validation loss rises, so that every network is trained until it overfits.

    The loss rises when it is higher than at the look before, both since the last pruning.

    Attributes:
        begin: the first look.
        end: no look after this time.
        every: steps between looks.
        first: the fraction that goes the first time.
        then: the fraction that goes each later time.

    >>> looks = [Validation(2.0), Validation(1.0), Validation(1.1, 0.35), Validation(1.5), Validation(1.6)]
    >>> [RisingLoss().fraction(looks[:n]) for n in (2, 3, 4, 5)]
    [0.0, 0.35, 0.0, 0.1]
    """

    name = "rising_loss"
    equation = "fraction = f_1 the first time that E_t > E_(t-1), then f; 0 else"
    source = "Finnoff, Hergert, Zimmermann 1993 (autoprune: 35 %, then 10 %)"

    first: Part = 0.35
    then: Part = 0.1

    def fraction(self, seen: Sequence[Validation]) -> float:  # noqa: D102
        newest, *earlier = reversed(seen)
        since = list(takewhile(lambda look: look.fraction == 0.0, earlier))
        if not since or not newest.loss > since[0].loss:
            return 0.0
        return self.first if len(since) == len(earlier) else self.then
