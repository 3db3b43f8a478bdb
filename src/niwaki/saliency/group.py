"""What scores of whole units look at: all that makes, carries and reads them, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.saliency.base import Observation, Reduce, Saliency, Scored


@dataclass(frozen=True)
class GroupObservation:
    """The members of a dependency group, each with its pieces: those of the units that have entries in it.

    Attributes:
        units: how many there are; ``reduce.index()`` says which of them the pieces of a member are.
        makers: the weights that make them.
        readers: the weights that read them.
        along: parameters that they run along: biases, scales and shifts of normalizations, depthwise weights.
    """

    units: int
    makers: Sequence[tuple[Observation, Reduce]]
    readers: Sequence[tuple[Observation, Reduce]]
    along: Sequence[tuple[Observation, Reduce]] = ()

    @property
    def name(self) -> str:
        """Name of the first weight that makes the units."""
        return self.makers[0][0].name

    def weights(self, members: Sequence[tuple[Observation, Reduce]]) -> Tensor:
        """Return the weights of every unit in some members, float64 ``[units, weights of one]``; 0 where it has no entries.

        Raises:
            InputError: units have different numbers of entries in a member.
        """
        return self._units([(reduce.index(), reduce.rows(seen.weight)) for seen, reduce in members])

    def _units(self, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        device = self.makers[0][0].weight.device
        columns = [torch.zeros(self.units, 0, dtype=torch.float64, device=device)]
        for index, rows in found:
            whole = torch.zeros(self.units, rows.shape[1], dtype=torch.float64, device=device)
            whole[index.flatten().to(device)] = rows.to(device, torch.float64)
            columns.append(whole)
        return torch.cat(columns, dim=1)

    def active(self) -> Tensor:
        """Return which units are not masked wholly in what makes them, bool ``[units]``."""
        return (self._units([(reduce.index(), _active_rows(seen, reduce)) for seen, reduce in self.makers]) > 0).any(dim=1)


def _active_rows(seen: Observation, reduce: Reduce) -> Tensor:
    active = torch.ones_like(seen.weight, dtype=torch.float64) if seen.active is None else seen.active.to(torch.float64)
    return reduce(active).reshape(-1, 1)


class GroupSaliency(Saliency):
    """Base of scores that need to see all members of a dependency group together."""

    scored_on: ClassVar[Scored] = "inputs"
    of_units: ClassVar[bool] = True

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Refuse a tensor by itself.

        Raises:
            InputError: always.
        """
        raise InputError(f"saliency {self.name}: it looks at all that makes and reads a unit; choose granularity channel or head")

    def score_group(self, seen: GroupObservation) -> Tensor:
        """Return one score for each unit of a group, float64 ``[units]``; higher: keep."""
        raise NotImplementedError
