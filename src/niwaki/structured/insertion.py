"""Adding units to a model in place: first as zeros in all that makes, carries and reads them, so that it computes the same."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.dependency import Example, Group
from niwaki.masks import Masks
from niwaki.removed import ADDED, GROUPS, Removed, compose, cut, follow_shapes, named_modules, named_tensors, rule_of, set_attribute
from niwaki.structured import attributes as numbers
from niwaki.structured import pretrained
from niwaki.structured.cutting import Part, Units, first_names, units_in
from niwaki.structured.running import difference, expected_of, refresh, run
from niwaki.structured.snapshot import snapshot


@dataclass(frozen=True, eq=False)
class Grown:
    """A group after units were added.

    Attributes:
        group: with all units.
        source: int64 ``[units]``: of an added unit the one that it was put behind, of another one itself.
    """

    group: Units
    source: Tensor

    @property
    def added(self) -> Tensor:
        """Which units were added: bool ``[units]``."""
        return self.source != torch.arange(len(self.source))

    def listings(self, *roles: str) -> Iterator[tuple[Part, bool]]:
        """Yield every dimension of a tensor that units have entries in, once, and whether it has one of some roles."""
        for place, part in enumerate(self.group.parts):
            alike = [other for other in self.group.parts if _is_same(other, part)]
            if alike[0] is self.group.parts[place]:
                yield part, any(other.role in roles for other in alike)


class Insertion:
    """A model in evaluation mode that units are added to, with its optimizer and masks.

    Attributes:
        spreads: root mean square of each tensor of the original.
        removed: all that was done, by the names and indices of the original.
        masks: of the wider model; entries of added units are those of the unit that they were put behind.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        masks: Masks,
        groups: Sequence[Group],
        example: Example,
        attributes: Mapping[str, int],
    ) -> None:
        self.model, self.optimizer, self.example = model, optimizer, example
        self.masks = {name: mask.cpu() for name, mask in masks.items()}
        self.removed = Removed()
        self.tensors = named_tensors(model)
        self.spreads = {name: float(tensor.detach().double().square().mean().sqrt()) for name, tensor in self.tensors.items()}
        first = first_names(self.tensors)
        self.masked = {first[name]: name for name in self.masks}
        self.groups = {group.name: units_in(group, self.tensors, first) for group in groups}
        self._told = dict(attributes)
        self._expected = expected_of(model, example)
        self._counts: dict[str, tuple[Any, int, int]] = {}

    def insert(self, anchors: Mapping[str, Tensor]) -> tuple[dict[str, Grown], dict[str, str]]:
        """Add a unit of zeros behind each unit that is named, if the model then computes the same.

        All groups are tried at once, then those of the same kind and size together (they may share a number), then each by itself.

        Args:
            anchors: group -> units, int64; one that is named twice gets two behind it.

        Returns:
            the groups that have grown, and why the others could not.
        """
        grown = self._tried(dict(anchors), searching=False)
        if grown is not None:
            return grown, {}
        found: dict[str, Grown] = {}
        reasons: dict[str, str] = {}
        teams: defaultdict[tuple[Any, int, int], list[str]] = defaultdict(list)
        for name, units in anchors.items():
            teams[self.groups[name].kind, self.groups[name].size, len(units)].append(name)
        for team in teams.values():
            together = self._tried({name: anchors[name] for name in team}, searching=True)
            if together is not None:
                found |= together
                continue
            for name in team if len(team) > 1 else ():
                alone = self._tried({name: anchors[name]}, searching=True)
                found |= alone or {}
            for name in team:
                if name not in found:
                    reasons[name] = (
                        f"with {len(anchors[name])} more units the model computes something else, whatever numbers of its modules follow;"
                        f" if one has to, say attributes={{path: value}}; else exclude={name!r}"
                    )
        return found, reasons

    def finish(self) -> None:
        """Let the configuration of a Hugging Face model follow where it can say the new sizes."""
        reference: defaultdict[int, list[int]] = defaultdict(list)
        for name, dimensions in self.removed.tensors.items():
            for dimension, kept in dimensions.items():
                reference[len(kept) - kept.count(ADDED)].append(self.tensors[name].shape[int(dimension)])
        restore = self.checkpoint()
        settings = pretrained.fit(self.model, list(self._counts.values()), {size: list(dict.fromkeys(s)) for size, s in reference.items()})
        self.removed = compose(self.removed, Removed(attributes=settings))
        if settings and self.wrong():  # the configuration is read as the model runs, and for something else too
            restore()

    def wrong(self) -> str:
        """Return in what the model as it is differs from the original, in words."""
        refresh(self.model)
        try:
            return difference(run(self.model, self.example), self._expected)
        except Exception as error:  # whatever a model's own code raises when its sizes do not fit
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def checkpoint(self) -> Callable[[], None]:
        """Return a function that takes everything back that is done from now on; data of tensors must be replaced, not written into."""
        restore_model = snapshot(self.model, self.optimizer)
        kept = {name: copy.copy(getattr(self, name)) for name in ("masks", "removed", "_counts")}
        fields = [(vars(one), dict(vars(one))) for group in self.groups.values() for one in (group, *group.parts)]

        def restore() -> None:
            restore_model()
            vars(self).update(kept)
            for now, before in fields:
                now.update(before)

        return restore

    # ------------------------------------------------------------------ one attempt

    def _tried(self, anchors: Mapping[str, Tensor], searching: bool) -> dict[str, Grown] | None:
        """Add units; return the groups, or None (and take it back) where the model computes something else.

        Args:
            anchors: as for :meth:`insert`.
            searching: whether to try other numbers than those that probably have to follow.
        """
        restore = self.checkpoint()
        grown, changes = self._extended(anchors)
        for change in changes:
            found = self._candidates(change, numbers.holders(change))
            self._accept(found, frozenset(candidate.key for candidate in found if candidate.likely))
        if not self.wrong():
            return grown
        restore()
        if not searching:
            return None
        grown, changes = self._extended(anchors)
        change = numbers.together(changes)
        found = self._candidates(change, numbers.holders(change))
        for chosen in islice(numbers.attempts(found, frozenset()), numbers.TRIALS):
            numbers.choose(self.model, found, chosen)
            if not self.wrong():
                self._accept(found, chosen)
                return grown
        restore()
        return None

    def _candidates(self, change: numbers.Change, names: set[str]) -> list[numbers.Candidate]:
        return [candidate for candidate in numbers.candidates(self.model, change, names) if candidate.path not in self._told]

    def _accept(self, found: Sequence[numbers.Candidate], chosen: frozenset[numbers.Key]) -> None:
        numbers.choose(self.model, found, chosen)
        settings = {candidate.path: candidate.new for candidate in found if candidate.key in chosen}
        self.removed = compose(self.removed, Removed(attributes=settings))

    def _extended(self, anchors: Mapping[str, Tensor]) -> tuple[dict[str, Grown], list[numbers.Change]]:
        """Add zeros to all tensors of groups; return the groups, and what that did to sizes."""
        parts = [(self.groups[name], part) for name in anchors for part in self.groups[name].parts]
        sizes = [(int((part.units >= 0).sum()), len(part.units)) for _, part in parts]
        before = {name: self.groups[name].size for name in anchors}
        places: dict[tuple[str, int], Tensor] = {}
        counts: dict[str, int] = {}
        grown = {name: self._extend(self.groups[name], units.cpu(), places, counts) for name, units in anchors.items()}
        for path, value in (counts | self._told).items():
            set_attribute(self.model, path, value)
        cuts: dict[str, dict[str, list[int]]] = {}
        for (name, dim), kept in places.items():
            cuts.setdefault(name, {})[str(dim)] = kept.tolist()
        follow_shapes(self.model, {self.tensors[name]: dimensions for name, dimensions in cuts.items()}, counts)
        self.removed = compose(self.removed, Removed(tensors=cuts, attributes=counts | self._told))
        widths: defaultdict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
        for (group, part), (own, whole) in zip(parts, sizes, strict=True):
            widths[group.name][part.name] |= {own: int((part.units >= 0).sum()), whole: len(part.units)}
        changes = []
        for name, size in before.items():
            group = self.groups[name]
            changes.append(numbers.Change(group.kind, (size, group.size), widths[name]))
            original = self._counts.get(name, (group.kind, size, size))[1]
            self._counts[name] = group.kind, original, group.size
        return grown, changes

    def _extend(self, group: Units, anchors: Tensor, places: dict[tuple[str, int], Tensor], counts: dict[str, int]) -> Grown:
        """Add units of zeros to one group.

        Args:
            group: brought up to date.
            anchors: units to put one behind.
            places: (tensor, dimension) -> what became of its entries, -1 for those that were added; brought up to date.
            counts: path -> number of groups of a module that has more of them now; brought up to date.
        """
        extra = torch.bincount(anchors, minlength=group.size)
        start = torch.cat([torch.zeros(1, dtype=torch.int64), (extra + 1).cumsum(0)])
        done: set[Part] = set()
        for part in group.parts:
            if part in done:
                continue
            alike = [other for other in group.parts if _is_same(other, part)]
            self._count_groups(part, extra, counts)
            index, nth = with_copies(part.units, extra)
            of = part.units[index]
            new = torch.where(of >= 0, start[of.clamp(min=0)] + nth, -1)
            self._put(part, index, nth > 0, places)
            for other in alike:
                other.units = new
            done |= set(alike)
        group.size = int(start[-1])
        source = start[:-1].repeat_interleave(extra + 1)
        return Grown(group, source)

    def _put(self, part: Part, index: Tensor, added: Tensor, places: dict[tuple[str, int], Tensor]) -> None:
        """Give a dimension new entries in its tensor, slots and mask, and in all groups that have entries in it."""
        name, dim = part.name, part.dim
        tensor = self.tensors[name]
        before = places.get((name, dim), torch.arange(tensor.shape[dim]))
        places[name, dim] = before[index].masked_fill(added, ADDED)
        cut(tensor, dim, index.masked_fill(added, ADDED), self.optimizer)
        if name in self.masked:
            given = self.masked[name]
            self.masks[given] = self.masks[given].index_select(dim, index)
        for group in self.groups.values():
            for other in group.parts:
                if (other.name, other.dim) == (name, dim):
                    other.units = other.units[index]

    def _count_groups(self, part: Part, extra: Tensor, counts: dict[str, int]) -> None:
        """Note how many groups a grouped convolution or normalization has once its weight has more entries along its first dimension."""
        path, _, own = part.name.rpartition(".")
        module: Any = named_modules(self.model)[path]
        rule = rule_of(module)
        number = GROUPS.get(rule) if rule is not None else None
        if number is None or (own, part.dim) != ("weight", 0) or getattr(module, number) == 1:
            return
        key = f"{path}.{number}".lstrip(".")
        groups = counts.get(key, getattr(module, number))
        each = len(part.units) // groups
        of = torch.arange(len(part.units)) // each
        for unit, times in enumerate(extra.tolist()):
            mine = of[part.units == unit]
            if times and len(mine) == each * len(mine.unique()):  # whole groups; else it has entries in every group
                groups += times * len(mine) // each
        counts[key] = groups


def _is_same(one: Part, other: Part) -> bool:
    """Return whether two parts say the same of a dimension, whatever their roles."""
    return (one.name, one.dim) == (other.name, other.dim) and torch.equal(one.units, other.units)


def with_copies(units: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the entries of a dimension come from once units have copies behind them, and which copy each is.

    Entries of a unit that stand together are copied together, behind themselves. That is where the copy belongs wherever the units are
    in the expression of the dimension: the outer factor of a product, the inner one, a term of a sum.

    Args:
        units: the unit of each entry, or -1.
        extra: how many copies of each unit to add, int64.

    Returns:
        for each new entry: the entry that it is or copies, and the number of the copy, 0 for what was there.

    >>> with_copies(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0]))[0].tolist()
    [0, 1, 0, 1, 2, 3]
    >>> with_copies(torch.tensor([0, 1, 0, 1, -1]), torch.tensor([0, 1]))[0].tolist()
    [0, 1, 1, 2, 3, 3, 4]
    """
    values, lengths = torch.unique_consecutive(units, return_counts=True)
    times = torch.where(values >= 0, extra[values.clamp(min=0)], 0) + 1
    start = lengths.cumsum(0) - lengths
    index, nth = [], []
    for first, length, count in zip(start.tolist(), lengths.tolist(), times.tolist(), strict=True):
        index.append(torch.arange(first, first + length).repeat(count))
        nth.append(torch.arange(count).repeat_interleave(length))
    return torch.cat(index), torch.cat(nth)
