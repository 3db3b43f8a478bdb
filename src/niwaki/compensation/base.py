"""What survivors do when others are removed: new values for the weights that stay, and for biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from niwaki.component import Component
from niwaki.curvature import Curvature
from niwaki.layout import Layout
from niwaki.statistics import Statistic


@dataclass(frozen=True)
class Change:
    """One tensor whose mask changes. All tensors are in the layout's view.

    Attributes:
        name: canonical parameter name.
        layout: its layout.
        weight: before the removal, zero where it was masked before.
        active: True where it was active before.
        keep: True where it stays active; a subset of ``active``.
        statistics: what the compensation has asked for.
        bias: the bias that the tensor's module adds, ``[outputs]``; None where it has none.
        bias_name: canonical name of the bias.
    """

    name: str
    layout: Layout
    weight: Tensor
    active: Tensor
    keep: Tensor
    statistics: Mapping[Statistic, Any] = field(default_factory=dict)
    bias: Tensor | None = None
    bias_name: str | None = None


@dataclass(frozen=True)
class Units:
    """Units of a dependency group that go or stay, and where their weights are.

    Attributes:
        name: of the group.
        active: bool ``[units]``, before.
        keep: bool ``[units]``, after.
        makers: for each tensor that makes units: its name, the dimension of the *parameter* that they are in, the parameter's shape, and
            int64 ``[entries of the dimension]``: the unit of each entry, or -1.
        readers: the same for each tensor that reads them.
        along: for each parameter that they run along (biases, normalizations, depthwise weights): its name, the dimension, its values, and
            the unit of each entry.
    """

    name: str
    active: Tensor
    keep: Tensor
    makers: Sequence[tuple[str, int, tuple[int, ...], Tensor]]
    readers: Sequence[tuple[str, int, tuple[int, ...], Tensor]]
    along: Sequence[tuple[str, int, Tensor, Tensor]] = ()


@dataclass(frozen=True)
class Removal:
    """Everything that one mask update removes.

    Attributes:
        changes: the tensors whose masks change, by name.
        units: of dependency groups, where the granularity has units; else empty.
        curvature: the saliency's, where it has one.
        notes: a compensation adds sentences for the user.
    """

    changes: Mapping[str, Change]
    units: Sequence[Units] = ()
    curvature: Curvature | None = None
    notes: list[str] = field(default_factory=list)


class Compensation(Component):
    """What survivors do."""

    slot = "compensation"

    needs_curvature: ClassVar[bool] = False
    """Whether the saliency must be one that has a curvature."""
    needs_units: ClassVar[bool] = False
    """Whether the granularity must have units of dependency groups."""

    recalibrates: ClassVar[bool] = False
    """Whether batch normalization's statistics are estimated anew on the data once the masks have changed."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What it asks to know of every tensor, collected before the removal."""
        return ()

    def compensate(self, removal: Removal) -> dict[str, Tensor]:
        """Return new values: of a changed tensor in its view (what is not kept is set to zero by the caller), of a bias ``[outputs]``."""
        raise NotImplementedError
