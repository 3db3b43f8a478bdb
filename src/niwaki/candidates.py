"""Selections that a schedule compares with each other before it lets one act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.pieces import Ranked
from niwaki.schedule import Schedule


class Candidates:
    """The last selections of a run.

    Attributes:
        settled: whether one acts, so that no more are made.

    Raises:
        InputError: the schedule compares selections, and a target is sharded.
    """

    def __init__(self, schedule: Schedule, ranked: Sequence[Ranked]) -> None:
        self.schedule = schedule
        self.settled = False
        self._seen: list[Tensor] = []
        sharded = next((one.name for one in ranked if one.processes is not None), None)
        if schedule.candidates and sharded is not None:
            raise InputError(f"schedule: {schedule.name!r} compares whole masks, and {sharded} is sharded; choose another schedule")

    def accept(self, pieces: Sequence[Tensor], at_end: bool) -> bool:
        """Return whether a selection is to act; one at the end of the schedule is in any case."""
        if not self.schedule.candidates:
            return True
        flat = torch.cat([kept.flatten().cpu() for kept in pieces])
        self._seen = [*self._seen, flat][-self.schedule.candidates :]
        self.settled = at_end or self.schedule.accepts(self._seen)
        return self.settled

    def state_dict(self) -> dict[str, Any]:
        """Return the selections, bool of shape ``[selections, pieces]``, and whether one acts."""
        return {"seen": torch.stack(self._seen) if self._seen else None, "settled": self.settled}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state; None is that of a schedule that compares nothing."""
        self.settled = state is not None and bool(state["settled"])
        self._seen = [] if state is None or state["seen"] is None else list(state["seen"].cpu())
