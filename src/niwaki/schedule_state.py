"""What a schedule has seen of a run, where it decides by that: selections to compare, validation losses, scores before the first update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.pieces import Ranked
from niwaki.schedule import Schedule, Validation


class ScheduleState:
    """What the schedule of a run has seen so far.

    Attributes:
        settled: whether a selection that was waited for acts, so that no more are made.
        validations: the validation losses before the updates that were due, and what followed from them.

    Raises:
        InputError: the schedule compares selections, and a target is sharded.
    """

    def __init__(self, schedule: Schedule, ranked: Sequence[Ranked]) -> None:
        self.schedule = schedule
        self.settled = False
        self.validations: list[Validation] = []
        self._candidates: list[Tensor] = []
        self._references: dict[str, float] = {}
        sharded = next((one.name for one in ranked if one.processes is not None), None)
        if schedule.candidates and sharded is not None:
            raise InputError(f"schedule: {schedule.name!r} compares whole masks, and {sharded} is sharded; choose another schedule")

    def accept(self, pieces: Sequence[Tensor], at_end: bool) -> bool:
        """Return whether a selection is to act; one at the end of the schedule is in any case."""
        if not self.schedule.candidates:
            return True
        flat = torch.cat([kept.flatten().cpu() for kept in pieces])
        self._candidates = [*self._candidates, flat][-self.schedule.candidates :]
        self.settled = at_end or self.schedule.accepts(self._candidates)
        return self.settled

    def fraction(self, loss: float) -> float:
        """Return the fraction of the active pieces to mask, given the validation loss now."""
        fraction = self.schedule.fraction([*self.validations, Validation(loss)])
        self.validations.append(Validation(loss, fraction))
        return fraction

    def reference(self, name: str, score: Callable[[], float]) -> float:
        """Return the score that thresholds of a tensor or group are multiples of: what ``score`` returns the first time."""
        if name not in self._references:
            self._references[name] = score()
        return self._references[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the selections, bool of shape ``[selections, pieces]``, whether one acts, the validations and the scores."""
        return {
            "seen": torch.stack(self._candidates) if self._candidates else None,
            "settled": self.settled,
            "validations": [(look.loss, look.fraction) for look in self.validations],
            "references": dict(self._references),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.settled = bool(state["settled"])
        self._candidates = [] if state["seen"] is None else list(state["seen"].cpu())
        self.validations = [Validation(*look) for look in state["validations"]]
        self._references = dict(state["references"])
