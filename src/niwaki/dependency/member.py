"""What a dependency group is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from niwaki.granularity import Kind

Role = Literal["output", "input", "along"]
"""Of a dimension: its entries are made by the weight, read by it, or ride along (biases, normalizations, depthwise weights, buffers)."""


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one parameter or buffer.

    Attributes:
        name: canonical name of the tensor.
        dim: the dimension.
        units: int64, one for each entry of the dimension: the unit that it belongs to, -1 where it belongs to none of the group.
        role: what the tensor does with the entries.
    """

    name: str
    dim: int
    units: Tensor
    role: Role

    def entries(self, units: Tensor) -> Tensor:
        """Return the entries of the dimension that belong to any of the given units, increasing."""
        return torch.isin(self.units, units).nonzero().flatten()


COLUMNS = ("group", "kind", "units", "made by", "read by", "along", "removable")
"""Of :meth:`Group.row`."""


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are removed one by one, each from all members at once.

    Attributes:
        name: of the module (or tensor) that makes the units, such as ``layer1.0.conv1``; unique.
        kind: what the units are.
        size: number of units.
        members: all dimensions that the units have entries in.
        reason: why units cannot be removed; empty when they can.
        note: what a person has written about it.
        summed: whether something that is no weight sums over the units: taking out zeros changes nothing, one more that is not zero does.
    """

    name: str
    kind: Kind
    size: int
    members: tuple[Member, ...]
    reason: str = ""
    note: str = ""
    summed: bool = False

    @property
    def removable(self) -> bool:
        """Whether units can be removed."""
        return not self.reason

    def made_by(self) -> tuple[Member, ...]:
        """Return the members whose entries the weights make."""
        return tuple(m for m in self.members if m.role == "output")

    def read_by(self) -> tuple[Member, ...]:
        """Return the members that read the units."""
        return tuple(m for m in self.members if m.role == "input")

    def row(self) -> tuple[str, ...]:
        """Return the group in words, one for each of ``COLUMNS``; ``along`` is the number of tensors that ride along."""
        along = sum(member.role == "along" for member in self.members)
        verdict = f"no: {self.reason}" if self.reason else "yes"
        note = f" ({self.note})" if self.note else ""
        return self.name, self.kind, str(self.size), _few(self.made_by()), _few(self.read_by()), str(along), verdict + note

    def to_data(self) -> dict[str, Any]:
        """Return the group as plain data; ``entries`` are those of each member that belong to some unit."""
        members = [
            {"name": m.name, "dimension": m.dim, "role": m.role, "entries": int((m.units >= 0).sum()), "of": len(m.units)}
            for m in self.members
        ]
        return {"name": self.name, "kind": self.kind, "units": self.size, "reason": self.reason, "note": self.note, "members": members}


def _few(members: Sequence[Member]) -> str:
    """Return the first of some tensors, and how many more there are."""
    names = list(dict.fromkeys(member.name.removesuffix(".weight") for member in members))
    return f"{names[0]} +{len(names) - 1}" if len(names) > 1 else names[0] if names else "-"
