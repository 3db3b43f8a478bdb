"""Times in recipes: a number with a unit, resolved to optimizer steps by the run that they are used in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from niwaki.errors import InputError

UNITS = ("steps", "epochs", "run", "tokens")
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(step|steps|epoch|epochs|run|runs|token|tokens)\s*")


@dataclass(frozen=True)
class Time:
    """A moment or a span: ``value`` in ``unit``, where ``run`` is the whole run and the others are counted.

    >>> Time.parse("0.75 run")
    Time(value=0.75, unit='run')
    >>> str(Time.parse("1 epoch"))
    '1 epochs'
    """

    value: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS or not 0 <= self.value < math.inf:
            raise InputError(f"a time is a finite number of at least 0 in one of {', '.join(UNITS)}, got {self.value!r} {self.unit!r}")

    @classmethod
    def parse(cls, text: Any) -> Time:
        """Read ``1000 steps``, ``5 epochs``, ``0.75 run`` or ``1e6 tokens``; raises InputError for anything else."""
        if isinstance(text, Time):
            return text
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise InputError(f"a time is a number with a unit, such as '1000 steps', '5 epochs', '0.75 run' or '1e6 tokens', got {text!r}")
        unit = match[2].removesuffix("s")
        return cls(float(match[1]), unit if unit == "run" else unit + "s")

    def __str__(self) -> str:
        return f"{repr(float(self.value)).removesuffix('.0')} {self.unit}"  # the shortest text that reads back as the same number


TimeField = Annotated[Time, BeforeValidator(Time.parse), PlainSerializer(str, return_type=str)]
"""A component's field that holds a time."""


@dataclass(frozen=True)
class Clock:
    """What a run knows about its length: the optimizer steps of the whole run, of an epoch, and the tokens of a step."""

    total_steps: int | None = None
    steps_per_epoch: int | None = None
    tokens_per_step: int | None = None

    def __post_init__(self) -> None:
        for field in ("total_steps", "steps_per_epoch", "tokens_per_step"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{field} must be a whole number of at least 1, got {value!r}")

    def steps(self, time: Time) -> int:
        """Return the time in whole optimizer steps, rounded to the nearest (halves to the even one); 0 is step 0 in any unit.

        Raises:
            InputError: the unit cannot be resolved because the run did not say its length.
        """
        if time.value == 0 or time.unit == "steps":
            return round(time.value)
        if time.unit == "epochs":
            return round(time.value * self._known("steps_per_epoch", time))
        if time.unit == "run":
            return round(time.value * self._known("total_steps", time))
        return round(time.value / self._known("tokens_per_step", time))

    def interval(self, time: Time) -> int:
        """Return a span between updates in whole optimizer steps: as ``steps``, but at least one step for a positive time."""
        return max(self.steps(time), int(time.value > 0))

    def _known(self, field: str, time: Time) -> int:
        value: int | None = getattr(self, field)
        if value is None:
            raise InputError(f"the time {str(time)!r} cannot be resolved: pass {field}= to the Sparsifier")
        return value
