"""The work of :func:`niwaki.shrink`: what can go, what has to stay, and cutting it out of a model piece by piece."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from math import gcd

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.dependency import Example, Group, Role
from niwaki.errors import InputError, NiwakiError
from niwaki.granularity import Kind
from niwaki.masks import Masks
from niwaki.removed import Removed, compose, cut, follow_shapes, is_container, named_modules, named_tensors, replay, resolve, set_attribute
from niwaki.structured import attributes as numbers
from niwaki.structured import constants, pretrained
from niwaki.structured.running import difference, expected_of, refresh, run
from niwaki.structured.snapshot import snapshot

ALONE = -1
"""The level of a group that is cut by itself; others are depths of modules in which all groups like it are cut together."""


@dataclass(frozen=True)
class Limits:
    """What a user asks for besides: a multiple of widths, units that stay, names of groups that stay, and numbers."""

    multiple: int
    minimum: int
    excluded: frozenset[str]
    attributes: dict[str, int]


@dataclass(eq=False)
class Part:
    """One dimension of one tensor with entries of a group's units (-1: of none), as :class:`niwaki.dependency.Member`, of what is left."""

    name: str
    dim: int
    units: Tensor
    role: Role

    def any(self, entries: Tensor, size: int) -> Tensor:
        """Return for every unit whether any of its entries is True: bool, ``[size]``."""
        found = torch.zeros(size, dtype=torch.bool)
        found[self.units[entries & (self.units >= 0)]] = True
        return found


@dataclass(eq=False)
class Units:
    """What is left of a group."""

    name: str
    kind: Kind
    size: int
    parts: list[Part]
    reason: str

    @property
    def path(self) -> list[str]:
        """The module that holds the layers that make the units, as parts of its name."""
        paths = [part.name.split(".")[:-2] for part in self.select("output")]
        return [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]

    def select(self, role: Role) -> list[Part]:
        """Return the dimensions with this role."""
        return [part for part in self.parts if part.role == role]

    def renumber(self, gone: Tensor) -> None:
        """Forget units whose entries were taken out."""
        left = (~gone).nonzero().flatten()
        index = torch.full((self.size + 1,), -1)  # the last place is for -1
        index[left] = torch.arange(len(left))
        for part in self.parts:
            part.units = index[part.units]
        self.size = len(left)


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the first name of each tensor by all its names."""
    first: dict[Tensor, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor, name)
    return {name: first[tensor] for name, tensor in tensors.items()}


def units_in(group: Group, tensors: Mapping[str, Tensor], first: Mapping[str, str]) -> Units:
    """Return a group to be worked on, after checking that it is one of the model.

    Args:
        group: of the model.
        tensors: of the model, by name.
        first: name -> first name of a tensor.

    Raises:
        InputError: it has a tensor, dimension or unit that the model does not have.
    """
    parts = []
    for member in group.members:
        name = first.get(member.name)
        if name is None or not 0 <= member.dim < tensors[name].ndim:
            raise InputError(f"groups: {group.name}: the model has no tensor {member.name!r} with a dimension {member.dim}")
        size = tensors[name].shape[member.dim]
        units = member.units.cpu().clone()
        if units.shape != (size,) or int(units.max()) >= group.size:
            raise InputError(
                f"groups: {group.name}: its units for {member.name!r} are {len(units)} numbers up to {int(units.max())}; expected one"
                f" for each of the {size} entries along dimension {member.dim}, below the group's size {group.size}"
            )
        parts.append(Part(name, member.dim, units, member.role))
    made = group.kind == "layer" or any(part.role == "output" for part in parts)
    return Units(group.name, group.kind, group.size, parts, group.reason or ("" if made else "no weight makes them"))


class Removal:
    """A model in evaluation mode that is made smaller in place, its masks, and what was removed so far.

    Attributes:
        removed: all of it, by the original names.
        masks: of what is left, by the names in the smaller model.
        notes: about what is left.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        masks: Masks,
        groups: Sequence[Group],
        example: Example,
        limits: Limits,
        original: nn.Module,
    ) -> None:
        self.model, self.optimizer, self.example, self.limits = model, optimizer, example, limits
        self.masks = {name: mask.cpu() for name, mask in masks.items()}
        self.notes: list[str] = []
        self.removed = Removed()
        self._reference = named_tensors(original)
        self._learn_names()
        self._groups = [units_in(group, self._tensors, self._first) for group in groups]
        self._expected = expected_of(model, example)
        self._values: constants.Values | None = None
        self._known: dict[tuple[Kind, frozenset[numbers.Key], int], frozenset[numbers.Key] | None] = {}
        self._counts: dict[str, tuple[Kind, tuple[int, int]]] = {}

    def run(self) -> None:
        """Remove until nothing more can be. What cannot be removed stays, with the reason in :attr:`notes`.

        Raises:
            NiwakiError: the model computes something else in the end.
        """
        for group in [g for g in self._groups if g.kind == "layer" and self._is_free(g)]:
            self._take_blocks(group)
        more = True
        while more:
            self._values = None
            more = self._remove([group for group in self._groups if group.kind != "layer"])
        self._tell()
        self._set_told(self._told())
        restore = self._checkpoint()
        settings = pretrained.fit(self.model, [(kind, *units) for kind, units in self._counts.values()], self._widths())
        self.removed = compose(self.removed, Removed(attributes=settings))
        wrong = self._wrong()
        if wrong and settings:  # the configuration is read as the model runs, and for something else too
            restore()
            wrong = self._wrong()
        if wrong:
            raise NiwakiError(
                f"shrink changed what the model computes: {wrong}; nothing was changed. Look at what attributes= says of its numbers"
            )

    def _wrong(self) -> str:
        """Return in what the model as it is differs from the original, in words."""
        refresh(self.model)
        try:
            return difference(run(self.model, self.example), self._expected)
        except Exception as error:  # whatever a model's own code raises when its sizes do not fit
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def _checkpoint(self) -> Callable[[], None]:
        """Return a function that takes everything back that is done from now on."""
        restore_model = snapshot(self.model, self.optimizer)
        own = ("masks", "removed", "_groups", "_counts", "_values")
        kept = {name: copy.copy(getattr(self, name)) for name in own}
        fields = [(vars(one), dict(vars(one))) for group in self._groups for one in (group, *group.parts)]

        def restore() -> None:
            restore_model()
            vars(self).update(kept)
            for now, before in fields:
                now.update(before)
            self._learn_names()

        return restore

    def _learn_names(self) -> None:
        """Note under which name each tensor is known, its first one, and the masks by these names."""
        self._tensors = named_tensors(self.model)
        self._first = first_names(self._tensors)
        self._masked = {self._first[name]: name for name in self.masks}
        self._parameters = {name for name, tensor in self._tensors.items() if isinstance(tensor, nn.Parameter)}

    # ------------------------------------------------------------------ blocks

    def _take_blocks(self, group: Units) -> None:
        """Take blocks out of their container of which all parameters are masked."""
        container = group.name.rpartition(":")[0] if group.name.endswith(":layer") else group.name
        gone = self._limited(group, self._idle(group))
        if not gone.any():
            return
        if not is_container(named_modules(self.model).get(container)):
            group.reason = f"{container!r} is no row of numbered blocks"
            return
        restore = self._checkpoint()
        kept = (~gone).nonzero().flatten().tolist()
        taken = Removed(layers={container: kept})
        replay(self.model, taken, self.optimizer)
        change = numbers.Change("layer", (group.size, len(kept)), {})
        self.removed = compose(self.removed, taken)
        self.masks = {after: mask for name, mask in self.masks.items() if (after := taken.name_after(name)) is not None}
        self._learn_names()
        for other in self._groups:
            renamed = [(part, taken.name_after(part.name)) for part in other.parts]
            other.parts = [Part(name, part.dim, part.units, part.role) for part, name in renamed if name is not None]
            other.name = taken.name_after(other.name) or other.name
        group.renumber(gone)
        self._count(group, change)
        self._groups = [other for other in self._groups if other.parts]
        path = container.split(".")
        names = {".".join(path[:depth]) for depth in range(len(path))}  # of the modules around it
        if not self._settle(change, names, ALONE):
            why = self._unsettled(group, change, names)
            restore()
            group.reason = why

    def _idle(self, group: Units) -> Tensor:
        """Return which units have entries, and no active one in any parameter."""
        return self._owned(group) & ~self._active(group, [part for part in group.parts if part.name in self._parameters])

    # ------------------------------------------------------------------ channels and heads

    def _is_free(self, group: Units) -> bool:
        return not group.reason and group.name not in self.limits.excluded

    def _remove(self, groups: Sequence[Units]) -> bool:
        """Remove the units of groups that have no effect; return whether any went.

        All groups are tried at once, so that looking at the outputs once is mostly enough. If they differ, each kind is tried, then
        each half of them, down to single groups.
        """
        gone = self._going(groups)
        if not gone:
            return False
        restore = self._checkpoint()
        try:
            self._set_told(self._told())
            for change in self._cut(gone):
                self._assume(change)
            wrong = self._wrong()
        except InputError as error:  # of a grouped convolution or normalization, by groups made by hand
            wrong = str(error)
        if not wrong:
            return True
        restore()
        if len(gone) == 1:
            return self._team_up(*gone)
        going, kinds = list(gone), dict.fromkeys(group.kind for group in gone)
        half = len(going) // 2
        parts = [[group for group in going if group.kind == kind] for kind in kinds] if len(kinds) > 1 else [going[:half], going[half:]]
        removed = [self._remove(part) for part in parts]  # of all parts, whatever came of the first
        return any(removed)

    def _team_up(self, group: Units) -> bool:
        """Remove units of a group with whatever numbers the model's modules need for it; return whether that worked.

        Groups of the same kind and size may share a number (heads of all layers, by a configuration): they are then cut together, those
        in the same module first, as many units of each as the one that loses fewest.
        """
        why = ""
        for level, team in self._teams(group):
            restore = self._checkpoint()
            try:
                change = numbers.together(self._cut(team))
                if self._settle(change, numbers.holders(change), level):
                    return True
                why = why or self._unsettled(group, change, numbers.holders(change))
            except InputError as error:
                why = why or str(error)
            restore()
        group.reason = why
        return False

    def _teams(self, group: Units) -> Iterator[tuple[int, dict[Units, Tensor]]]:
        """Yield a group alone, then with those like it in the same module, in the module around it, and so on: the depth, and what goes."""
        yield ALONE, self._going([group])
        alike = self._going([other for other in self._groups if (other.kind, other.size) == (group.kind, group.size)])
        count = min(int(out.sum()) for out in alike.values())
        alike = {other: self._keep_best(other, out, int(out.sum()) - count) for other, out in alike.items()}
        size, path = 1, group.path
        for depth in range(len(path), -1, -1):
            team = {other: out for other, out in alike.items() if other.path[:depth] == path[:depth]}
            if len(team) > size:
                size = len(team)
                yield depth, team

    def _going(self, groups: Iterable[Units]) -> dict[Units, Tensor]:
        """Return which units have no effect, of the groups that have such units and need not keep them."""
        gone = {group: self._without_effect(group) for group in groups if self._is_free(group)}
        return {group: out for group, out in gone.items() if out.any()}

    def _without_effect(self, group: Units) -> Tensor:
        """Return which units can go, such that enough stay: bool, ``[units]``."""
        readers = group.select("input")
        read = self._active(group, readers)
        gone = ~read if readers else self._idle(group)
        constant = self._constant(group) & read
        if constant.any():
            constant &= self._can_fold(group)
        return self._limited(group, (gone | constant) & self._owned(group))

    def _fold(self, group: Units, gone: Tensor) -> None:
        """Let biases take over what units are that are still read."""
        readers = group.select("input")
        constant = (gone & self._active(group, readers)).nonzero().flatten()
        for part in readers if len(constant) else ():
            values = self._values_of(part)
            if values is not None:
                constants.fold(self.model, part.name, values, torch.isin(part.units, constant).to(values.device))

    def _active(self, group: Units, parts: Iterable[Part]) -> Tensor:
        """Return which units have an active entry in any of the parts: bool, ``[units]``."""
        found = torch.zeros(group.size, dtype=torch.bool)
        for part in parts:
            found |= part.any(self._active_entries(part), group.size)
        return found

    def _active_entries(self, part: Part) -> Tensor:
        """Return which entries of a dimension have an active element: bool."""
        tensor = self._tensors[part.name]
        if part.name not in self._masked:
            return torch.ones(tensor.shape[part.dim], dtype=torch.bool)
        mask = self.masks[self._masked[part.name]]
        return mask.movedim(part.dim, 0).reshape(mask.shape[part.dim], -1).any(dim=1)

    def _owned(self, group: Units) -> Tensor:
        found = torch.zeros(group.size, dtype=torch.bool)
        for part in group.parts:
            found[part.units[part.units >= 0]] = True
        return found

    def _constant(self, group: Units) -> Tensor:
        """Return which units may be constants: nothing that makes them is active, or no normalization or depthwise weight on the way."""
        makers = group.select("output")
        found = ~self._active(group, makers) if makers else torch.zeros(group.size, dtype=torch.bool)
        for part in group.select("along"):
            if part.name in self._masked and part.name.rpartition(".")[2] == "weight":
                has = part.any(torch.ones_like(part.units, dtype=torch.bool), group.size)
                found |= has & ~self._active(group, [part])
        return found

    def _values_of(self, part: Part) -> Tensor | None:
        if self._values is None:
            weights = {(p.name, p.dim) for g in self._groups if not g.reason for p in g.select("input")}
            try:
                self._values = constants.observe(self.model, self.example, weights)
            except Exception:  # it does not run with other weights, so that nothing is known to be a constant
                self._values = {}
        found = self._values.get((part.name, part.dim))
        return found if found is not None and len(found) == len(part.units) else None

    def _can_fold(self, group: Units) -> Tensor:
        """Return which units all of their readers can take over: bool, ``[units]``."""
        can = torch.ones(group.size, dtype=torch.bool)
        for part in group.select("input"):
            values = self._values_of(part)
            takes = torch.zeros(len(part.units), dtype=torch.bool)
            if values is not None:
                bias = self._first.get(f"{part.name.rpartition('.')[0]}.bias")
                mask = self.masks[self._masked[bias]] if bias in self._masked else None
                takes = constants.takes_over(self.model, part.name, values, mask).cpu()
            can &= ~part.any(~takes & self._active_entries(part), group.size)
        return can

    def _limited(self, group: Units, gone: Tensor) -> Tensor:
        """Return which units go such that as many stay as the user wants, and at least one."""
        left = group.size - int(gone.sum())
        each = min((int(torch.bincount(part.units[part.units >= 0]).max()) for part in group.select("output")), default=1)
        step = 1 if group.kind == "layer" else self.limits.multiple // gcd(self.limits.multiple, each)
        target = min(-(-max(left, self.limits.minimum) // step) * step, group.size)
        return self._keep_best(group, gone, max(target - left, 0))

    def _keep_best(self, group: Units, gone: Tensor, count: int) -> Tensor:
        """Return which units go when some stay after all: those of the largest norm, the first of equal ones."""
        if count == 0:
            return gone
        norms = self._norms(group).masked_fill(~gone, -1.0)
        stays = norms.argsort(descending=True, stable=True)[:count]
        return gone.index_fill(0, stays, False)

    def _norms(self, group: Units) -> Tensor:
        """Return the L2 norm of each unit over all parameters, before they were masked: float64, ``[units]``."""
        squares = torch.zeros(group.size + 1, dtype=torch.float64)
        for part in group.parts:
            original = self.removed.name_before(part.name)
            if part.name in self._parameters:
                tensor = self._reference[original].detach()
                for dim, kept in self.removed.tensors.get(original, {}).items():
                    tensor = tensor.index_select(int(dim), torch.tensor(kept, device=tensor.device))
                rows = tensor.movedim(part.dim, 0).reshape(len(part.units), -1)
                squares.index_add_(0, part.units % (group.size + 1), rows.double().square().sum(dim=1).cpu())
        return squares[:-1].sqrt()

    def _cut(self, gone: Mapping[Units, Tensor]) -> list[numbers.Change]:
        """Take units out of all tensors, masks, observed constants, and groups that they have entries in; return what that did to sizes.

        Raises:
            InputError: a grouped convolution or normalization cannot lose them.
        """
        leaving: dict[tuple[str, int], Tensor] = {}
        for group, out in gone.items():
            self._fold(group, out)
            for part in group.parts:
                entries = torch.isin(part.units, out.nonzero().flatten())
                leaving[part.name, part.dim] = leaving.get((part.name, part.dim), torch.zeros_like(entries)) | entries
        own = {part: int((part.units >= 0).sum()) for group in gone for part in group.parts}
        cuts: dict[str, dict[str, list[int]]] = {}
        for (name, dim), entries in leaving.items():
            keep = (~entries).nonzero().flatten()
            if len(keep) < len(entries):
                cuts.setdefault(name, {})[str(dim)] = keep.tolist()
                self._cut_tensor(name, dim, keep)
        counts = follow_shapes(self.model, {self._tensors[name]: dimensions for name, dimensions in cuts.items()})
        self.removed = compose(self.removed, Removed(tensors=cuts, attributes=counts))
        changes = []
        for group, out in gone.items():
            widths: defaultdict[str, dict[int, int]] = defaultdict(dict)
            for part in group.parts:
                widths[part.name][own[part]] = int((part.units >= 0).sum())
                widths[part.name][len(leaving[part.name, part.dim])] = len(part.units)
            changes.append(numbers.Change(group.kind, (group.size, group.size - int(out.sum())), widths))
            group.renumber(out)
            self._count(group, changes[-1])
        return changes

    def _count(self, group: Units, change: numbers.Change) -> None:
        """Note how many units a group had in the beginning, and has now."""
        before = self._counts.get(group.name, (group.kind, change.units))[1][0]
        self._counts[group.name] = group.kind, (before, change.units[1])

    def _cut_tensor(self, name: str, dim: int, keep: Tensor) -> None:
        """Keep entries of a tensor, its slots and mask, of what was observed of it, and of the groups that it belongs to."""
        cut(self._tensors[name], dim, keep, self.optimizer)
        if name in self._masked:
            given = self._masked[name]
            self.masks[given] = self.masks[given].index_select(dim, keep)
        if self._values is not None and (name, dim) in self._values:
            values = self._values[name, dim]
            self._values[name, dim] = values[keep.to(values.device)]
        for group in self._groups:
            for part in group.parts:
                if (part.name, part.dim) == (name, dim):
                    part.units = part.units[keep]

    # ------------------------------------------------------------------ numbers that follow

    def _told(self) -> dict[str, int]:
        """Return the numbers that the user told, by the paths in the model as it is."""
        told = {self.removed.name_after(path): value for path, value in self.limits.attributes.items()}
        return {path: value for path, value in told.items() if path is not None}

    def _set_told(self, told: Mapping[str, int]) -> None:
        for path, value in told.items():
            set_attribute(self.model, path, value)
        self.removed = compose(self.removed, Removed(attributes=dict(told)))

    def _accept(self, found: Sequence[numbers.Candidate], chosen: frozenset[numbers.Key]) -> None:
        """Set the numbers that were chosen, for good."""
        numbers.choose(self.model, found, chosen)
        settings = {candidate.path: candidate.new for candidate in found if candidate.key in chosen}
        self.removed = compose(self.removed, Removed(attributes=settings))

    def _assume(self, change: numbers.Change) -> None:
        """Let the numbers follow that did for a group like this one, or else those that probably have to."""
        found = numbers.candidates(self.model, change, numbers.holders(change))
        self._accept(found, self._start(change, found, ALONE))

    def _start(self, change: numbers.Change, found: Sequence[numbers.Candidate], level: int) -> frozenset[numbers.Key]:
        keys = frozenset(candidate.key for candidate in found)
        known = self._known.get((change.kind, keys, level))
        return frozenset(candidate.key for candidate in found if candidate.likely) if known is None else known

    def _settle(self, change: numbers.Change, names: set[str], level: int) -> bool:
        """Let numbers of some modules follow such that the model computes the same; return whether any setting of them does that.

        Where a search came to nothing for a group of such modules, the next one gets a single try.
        """
        mine = {id(owner) for owner in numbers.owners(self.model, names).values()}
        self._set_told({path: value for path, value in self._told().items() if id(resolve(self.model, path)[0]) in mine})
        found = numbers.candidates(self.model, change, names)
        key = change.kind, frozenset(candidate.key for candidate in found), level
        hopeless = key in self._known and self._known[key] is None
        for chosen in islice(numbers.attempts(found, self._start(change, found, level)), 1 if hopeless else numbers.TRIALS):
            numbers.choose(self.model, found, chosen)
            if not self._wrong():
                self._known[key] = chosen
                self._accept(found, chosen)
                return True
        self._known[key] = None
        numbers.choose(self.model, found, frozenset())
        return False

    def _unsettled(self, group: Units, change: numbers.Change, names: set[str]) -> str:
        """Return what is wrong however numbers are set, and what to do about it."""
        tried = ", ".join(f"{one.path}={one.new}" for one in numbers.candidates(self.model, change, names)[:3]) or "none has such a value"
        own = "; ".join(numbers.numbers(self.model, names)) or "the modules have none"
        return (
            f"with {change.units[1]} of {change.units[0]} the model computes something else ({self._wrong()}), whatever numbers follow"
            f" ({tried}). If another one has to, say attributes={{path: value}} ({own}); if groups share one, mask as many units of each;"
            f" if none can, exclude={group.name!r} saves the trials"
        )

    def _widths(self) -> dict[int, list[int]]:
        """Return what became of the sizes of dimensions: size of the original -> sizes now, of all dimensions that were cut."""
        found: defaultdict[int, list[int]] = defaultdict(list)
        for name, dimensions in self.removed.tensors.items():
            for dimension, kept in dimensions.items():
                found[self._reference[name].shape[int(dimension)]].append(len(kept))
        return {size: list(dict.fromkeys(sizes)) for size, sizes in found.items()}

    # ------------------------------------------------------------------ what is left

    def _tell(self) -> None:
        """Note for every group how many units are masked where they are made or read, and still there."""
        for group in self._groups:
            makers, readers = group.select("output"), group.select("input")
            if group.kind == "layer":
                idle = self._idle(group)
            else:
                idle = self._owned(group) & (self._constant(group) | (~self._active(group, readers) if readers else self._idle(group)))
            count = int(idle.sum())
            if count and (makers or readers or group.kind == "layer"):
                why = group.reason or ("it is excluded" if group.name in self.limits.excluded else "")
                if not why and count == group.size:
                    why = "all of them are masked, and at least one has to stay"
                why = why or "what they are without weights cannot be folded into what reads them, or some have to stay"
                self.notes.append(f"{group.name}: {count} masked {'unit was' if count == 1 else 'units were'} not removed: {why}")
