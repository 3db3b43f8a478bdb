"""What a recipe ranks: the pieces of one tensor, or the units of a dependency group, which have entries in many.

Both are the same thing to an update: pieces that are scored and kept, and parts (one tensor, or all members of the group) that say how
the elements of a tensor make up its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from niwaki.allocation import Layer
from niwaki.binding import Bound
from niwaki.errors import InputError
from niwaki.granularity import Granularity, Grouped
from niwaki.growth import Growth
from niwaki.layout import Layout
from niwaki.masks import local
from niwaki.saliency import GroupObservation, GroupSaliency, Observation, Saliency


@dataclass(frozen=True, eq=False)
class Grid:
    """All elements of a tensor, in the pieces of a granularity."""

    granularity: Granularity
    layout: Layout

    def __call__(self, values: Tensor) -> Tensor:
        """Return the sum over each piece, shape of the granularity's grid."""
        return self.granularity.reduce(values, self.layout)

    def rows(self, values: Tensor) -> Tensor:
        """Return the elements of each piece."""
        return self.granularity.elements(values, self.layout)

    def index(self) -> Tensor:
        """Return the number of each piece."""
        grid = self.granularity.grid(self.layout)
        return torch.arange(prod(grid)).view(grid)

    def expand(self, values: Tensor, elsewhere: float) -> Tensor:
        """Return for each element the value of its piece."""
        return self.granularity.expand(values, self.layout)

    def protected(self, scores: Tensor) -> Tensor | None:
        """Return the elements that N:M keeps."""
        return self.granularity.protected(scores, self.layout)


@dataclass(frozen=True, eq=False)
class Slices:
    """The entries of one dimension of a tensor that units own: a piece for each unit that owns any, in the order of the units.

    Attributes:
        name: of the tensor.
        view: shape of the layout's view.
        shape: shape of the tensor.
        dim: the dimension.
        units: int64, which units these are, increasing.
        places: int64, shape [units, most entries of one]: the entries of each unit, filled up with the size of the dimension.
    """

    name: str
    view: tuple[int, ...]
    shape: tuple[int, ...]
    dim: int
    units: Tensor
    places: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Return the sum over each piece, float64."""
        entries = self._entries(values).sum(dim=1, dtype=torch.float64)
        # Not index_add: its order, and so the last bit, may change from call to call on a GPU.
        return torch.cat([entries, entries.new_zeros(1)])[self.places.to(values.device)].sum(dim=1)

    def rows(self, values: Tensor) -> Tensor:
        """Return the elements of each piece."""
        if bool((self.places == self.shape[self.dim]).any()):
            raise InputError(f"{self.name}: its units differ in size, and what compares units needs equal ones; choose another saliency")
        return self._entries(values)[self.places.to(values.device)].flatten(1)

    def index(self) -> Tensor:
        """Return the number of each unit."""
        return self.units

    def expand(self, values: Tensor, elsewhere: float) -> Tensor:
        """Return for each element the value of its unit, and ``elsewhere`` for those of no unit."""
        size = self.shape[self.dim]
        entries = values.new_full((size + 1,), elsewhere)  # the last takes what places are filled up with
        entries[self.places.to(values.device)] = values[:, None].expand(self.places.shape)
        across = [size if d == self.dim else 1 for d in range(len(self.shape))]
        return entries[:size].view(across).expand(self.shape).reshape(self.view)

    def _entries(self, values: Tensor) -> Tensor:
        """Return the elements at each entry of the dimension, shape [entries, elements]."""
        return values.reshape(self.shape).movedim(self.dim, 0).reshape(self.shape[self.dim], -1)

    def protected(self, scores: Tensor) -> Tensor | None:
        """Return None: units are ranked freely."""
        return None


@dataclass(frozen=True, eq=False)
class Part:
    """What one tensor has of the pieces that are ranked together.

    Attributes:
        bound: the tensor.
        cut: its elements in pieces: those of the tensor, or of some of the units that are ranked.
    """

    bound: Bound
    cut: Grid | Slices

    def expand(self, values: Tensor, elsewhere: float = True) -> Tensor:
        """Return for each element of the tensor's view the value of its piece, and ``elsewhere`` for those of no piece."""
        device = local(self.bound.parameter).device
        mine = values[self.cut.units.to(values.device)] if isinstance(self.cut, Slices) else values
        return self.cut.expand(mine.to(device), elsewhere)

    def spread(self, values: Tensor, pieces: int) -> Tensor:
        """Return a value for each of all ranked pieces, 0 (or False) for those that the tensor has nothing of."""
        if isinstance(self.cut, Grid):
            return values
        whole = values.new_zeros(pieces)
        whole[self.cut.units.to(values.device)] = values
        return whole


@dataclass(frozen=True, eq=False)
class Ranked:
    """Pieces that are ranked, counted and kept together: those of one tensor, or the units of one dependency group.

    Attributes:
        layer: what an allocation has to know: of a group the weight that makes its units.
        granularity: the recipe's.
        parts: all tensors that share the mask.
        makers: those of them whose weights make the pieces.
        scored: those of them that the saliency looks at.
        readers: those of them that read the units of a group.
        along: those that the units of a group run along: biases, normalizations, depthwise weights.
    """

    layer: Layer
    granularity: Granularity
    parts: tuple[Part, ...]
    makers: tuple[Part, ...]
    scored: tuple[Part, ...]
    readers: tuple[Part, ...] = ()
    along: tuple[Part, ...] = ()

    @property
    def name(self) -> str:
        """Name of the tensor, or of the group."""
        return self.layer.name

    @property
    def pieces(self) -> int:
        """How many pieces there are, of a sharded tensor in all its shards."""
        return self.layer.pieces

    @property
    def processes(self) -> dist.ProcessGroup | None:
        """The processes that the pieces are spread over, or None."""
        return self.parts[0].bound.group

    @property
    def device(self) -> torch.device:
        """Where pieces are ranked."""
        return local(self.parts[0].bound.parameter).device

    @property
    def start(self) -> int:
        """Index of this rank's first piece, where pieces are single weights and may be spread over processes."""
        return self.parts[0].bound.start if self.granularity.name in ("element", "n_m") else 0

    def score(self, component: Saliency | Growth, observe: Callable[[Bound], Observation]) -> Tensor:
        """Return the score of every piece of this rank's part: of a group, the aggregate over its scored members."""
        if isinstance(component, GroupSaliency) and isinstance(self.granularity, Grouped):
            members = ([(observe(p.bound), p.cut) for p in parts] for parts in (self.makers, self.readers, self.along))
            return component.score_group(GroupObservation(self.pieces, *members)).to(self.device)
        found = [component.score(observe(part.bound), part.cut) for part in self.scored]
        if not isinstance(self.granularity, Grouped):
            return found[0]
        scores = torch.stack([p.spread(f.to(self.device, torch.float64), self.pieces) for p, f in zip(self.scored, found, strict=True)])
        present = torch.stack(
            [p.spread(torch.ones_like(f, dtype=torch.bool), self.pieces).to(self.device) for p, f in zip(self.scored, found, strict=True)]
        )
        return self.granularity.combine(scores, present)

    def active(self, pruned: Callable[[Bound], Tensor | None]) -> Tensor:
        """Return which pieces of this rank's part have an active element anywhere (bool)."""
        found: Tensor | None = None
        for part in self.parts:
            mask = pruned(part.bound)
            here = local(part.bound.parameter)
            elements = torch.ones(part.bound.here.shape, device=here.device) if mask is None else (~mask).to(torch.float32)
            mine = part.spread((part.cut(elements) > 0).to(self.device), self.pieces)
            found = mine if found is None else found | mine
        assert found is not None
        return found

    def flops(self, uses: Mapping[str, float]) -> float | Tensor:
        """Return the FLOPs of a piece in a forward pass (of a unit, in all members together): a number, or one for each unit.

        ``uses``: parameter name -> multiply-adds of each of its weights.
        """
        if not isinstance(self.granularity, Grouped):
            bound = self.parts[0].bound
            return 2.0 * uses.get(bound.name, 0.0) * bound.layout.elements / self.pieces
        total = torch.zeros(self.pieces, dtype=torch.float64, device=self.device)
        for part in self.parts:
            elements = part.cut(torch.ones(part.bound.here.shape, device=self.device))
            total += part.spread(elements, self.pieces) * (2.0 * uses.get(part.bound.name, 0.0))
        return total


def element_masks(ranked: Sequence[Ranked], keep: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the bool mask of every tensor in its view, True = active: an element stays where all pieces that it belongs to are kept."""
    masks: dict[str, Tensor] = {}
    for one, kept in zip(ranked, keep, strict=True):
        for part in one.parts:
            mask = part.expand(kept)
            name = part.bound.name
            masks[name] = masks[name] & mask if name in masks else mask
    return masks


def bounds_of(ranked: Iterable[Ranked]) -> list[Bound]:
    """Return every tensor that pieces have elements in, once."""
    return list({part.bound.name: part.bound for one in ranked for part in one.parts}.values())
