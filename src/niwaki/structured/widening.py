"""Making a model wider: units are added to its dependency groups, in such a way that it computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.addition import Addition, Bridging, Copy
from niwaki.component import build
from niwaki.counter import key
from niwaki.dependency import Example, Group, find_groups
from niwaki.errors import InputError, NiwakiError, did_you_mean
from niwaki.masks import Masks, is_sharded
from niwaki.removed import Removed, named_tensors, replay, resolve
from niwaki.structured import newcomers
from niwaki.structured.insertion import Grown, Insertion
from niwaki.structured.running import evaluating, refresh

Wanted = Mapping[str, int | Sequence[int]]
"""Group -> how many units to add, or which units to copy."""


@dataclass(frozen=True)
class Wider:
    """What :func:`widen`, ``uniform`` and ``grow_best`` return.

    Attributes:
        model: the wider model.
        removed: what was done to it; :func:`niwaki.structured.replay` and :func:`niwaki.save` take it.
        masks: extended: of a copy those of the unit that it copies, and new units are active.
        widths: group -> units now, of the groups that were widened.
        notes: sentences about groups that could not be widened, and about initial values.
        optimizer: for the wider model, with the state of the given one, fresh for what was added; None without one.
    """

    model: nn.Module
    removed: Removed
    masks: Masks
    widths: dict[str, int]
    notes: list[str]
    optimizer: Optimizer | None = None


def widen(
    model: nn.Module,
    example: Example,
    added: Wanted,
    *,
    by: str | Mapping[str, Any] | Addition = "split",
    scores: Mapping[str, Tensor] | None = None,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    groups: Sequence[Group] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    optimizer: Optimizer | None = None,
    in_place: bool = False,
    attributes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Wider:
    """Return a model with more units in some of its dependency groups, after checking that it computes the same.

    Every tensor that makes, carries or reads units gets entries for those that are added: weights, biases, normalizations and their
    statistics, depthwise weights, all that is summed in a residual network. Numbers that no shape tells, such as ``num_heads``, follow.
    Copies stand behind the unit that they copy, new units last. Only ``bridging``, and a perturbation of copies by ``O(ε²)``, change the
    function; all else is compared on the example before they do.

    Args:
        model: stays as it is, unless ``in_place``.
        example: arguments of a forward pass: a tuple, a mapping of named ones, or the only one.
        added: group -> how many units, or (of copies) which units to copy, each as often as it is named.
        by: ``split``, ``copy``, ``new`` or ``bridging``, with settings: ``{"split": {"perturbation": 0.1}}``.
        scores: group -> one for each unit, for ``split``: the highest are split; None for ``(Σ w dL/dw)²`` of what makes a unit.
        data: batches ``(inputs, targets)``, for ``bridging`` and for ``split`` without scores.
        loss: ``loss(outputs, targets)``, likewise.
        groups: the model's dependency groups; None to find them.
        masks: of the model; masked weights count as zero.
        optimizer: of the model; its slots get fresh entries, and it (or with a copy of the model, its copy) goes on with the wider one.
        in_place: make the model itself, and its optimizer, wider. Its parameters stay the objects that they are.
        attributes: numbers that cannot be found out: path -> value afterwards.
        seed: of what is random.

    Raises:
        InputError: a group that does not exist or cannot have more units, or what the addition needs is not there; nothing was changed.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> wider = widen(model, torch.ones(1, 3), {"0": [1]}, by="copy")
    >>> wider.model[0].weight.shape, wider.removed.tensors["0.bias"]
    (torch.Size([3, 3]), {'0': [0, 1, -1]})
    """
    how = addition_of(by)
    groups = prepared(model, example, groups)
    made = Widening(model, example, how, groups, masks, optimizer, attributes)
    made.add(units_to_add(added, groups, how), scores, data, loss, seed)
    if made.reasons:
        raise InputError("added: " + "; ".join(f"{name}: {why}" for name, why in made.reasons.items()))
    return wider(made.work, made.given, made.widths, made.notes, in_place, model, optimizer)


class Widening:
    """A copy of a model that gets units.

    Attributes:
        reasons: group -> why it could not have more; nothing was added to any group then.
        notes: about initial values.
    """

    @property
    def widths(self) -> dict[str, int]:
        """Units now, of the groups that were widened."""
        return {name: one.group.size for name, one in self.grown.items()}

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        how: Addition,
        groups: Sequence[Group],
        masks: Mapping[str, Tensor] | None,
        optimizer: Optimizer | None,
        attributes: Mapping[str, int] | None,
    ) -> None:
        self.given, self.how = Masks(masks or {}), how
        self.work = copied(model, example, groups, self.given, optimizer, attributes)
        self.reasons: dict[str, str] = {}
        self.notes: list[str] = []
        self.grown: dict[str, Grown] = {}

    @torch.no_grad()
    def add(
        self,
        wanted: Mapping[str, Tensor | int],
        scores: Mapping[str, Tensor] | None,
        data: Iterable[tuple[Any, Any]] | None,
        loss: Callable[[Any, Any], Tensor] | None,
        seed: int,
    ) -> None:
        """Add units, copies of those that are named or (a number) of those that the addition chooses."""
        work = self.work
        batches = None if data is None else list(data)
        with evaluating(work.model):
            anchors = self._chosen(wanted, scores, batches, loss, seed)
            restore = work.checkpoint()
            self.grown, self.reasons = work.insert(anchors)
            if not self.reasons:
                self._fill(seed, batches, loss)
            if self.reasons:
                restore()
            else:
                work.finish()

    def _chosen(
        self,
        wanted: Mapping[str, Tensor | int],
        scores: Mapping[str, Tensor] | None,
        data: newcomers.Batches | None,
        loss: newcomers.Loss | None,
        seed: int,
    ) -> dict[str, Tensor]:
        """Return the units that others are put behind: those to copy, or the last one."""
        work, how = self.work, self.how
        counted = [name for name, units in wanted.items() if isinstance(units, int)]
        scores = dict(scores or {})
        missing = [name for name in counted if name not in scores] if "scores" in how.needs else []
        if (missing or "gradient" in how.needs) and (data is None or loss is None):
            wanted_for = f" for the scores of {missing[0]}" if missing else ""
            raise InputError(f"by: {how.name!r} looks at gradients{wanted_for}; give data= and loss=")
        if missing and data is not None and loss is not None:
            scores |= newcomers.pull_on_units(work, missing, newcomers.gradients(work.model, data, loss))
        found = {}
        for name, units in wanted.items():
            size = work.groups[name].size
            if not isinstance(units, int):
                found[name] = units
            elif not how.copies:
                found[name] = torch.full((units,), size - 1)
            else:
                score = scores.get(name)
                if score is not None and score.shape != (size,):
                    raise InputError(f"scores: {name} has {size} units, and scores of shape {list(score.shape)}")
                found[name] = how.sources(size, units, None if score is None else score.cpu(), key(seed, 0, f"units of {name}"))
        return found

    def _fill(self, seed: int, data: newcomers.Batches | None, loss: newcomers.Loss | None) -> None:
        """Make of zeros what the addition says, and note which groups then change what the model computes."""
        work, how = self.work, self.how
        restore = work.checkpoint()
        self._preserving(self.grown, seed)
        if work.wrong():
            restore()
            for name, one in self.grown.items():
                self._preserving({name: one}, seed)
                if wrong := work.wrong():
                    self.reasons[name] = f"its units cannot be added by {how.name!r} without a change of what the model computes ({wrong})"
                restore()
            if not self.reasons:
                raise NiwakiError(f"widening changed what the model computes ({work.wrong()}); nothing was changed")
            return
        if isinstance(how, Copy):
            newcomers.perturb(work, self.grown.values(), how.perturbation, seed)
        elif isinstance(how, Bridging) and data is not None and loss is not None:
            newcomers.bridge(work, self.grown.values(), how, data, loss, seed)

    def _preserving(self, grown: Mapping[str, Grown], seed: int) -> None:
        if self.how.copies:
            newcomers.copy_units(self.work, grown.values())
        else:
            self.notes = newcomers.make_new(self.work, grown.values(), seed)


def wider(
    work: Insertion, given: Masks, widths: dict[str, int], notes: list[str], in_place: bool, model: nn.Module, optimizer: Optimizer | None
) -> Wider:
    """Return the wider copy that was worked on, or make the model itself as wide."""
    refresh(work.model)
    masks = Masks({name: mask.to(given[name].device) for name, mask in work.masks.items()})
    if not in_place:
        return Wider(work.model, work.removed, masks, widths, notes, work.optimizer)
    replay(model, work.removed, optimizer)
    with torch.no_grad():
        new = named_tensors(work.model)
        for name, tensor in named_tensors(model).items():
            tensor.copy_(new[name])
    refresh(model)
    return Wider(model, work.removed, masks, widths, notes, optimizer)


def copied(
    model: nn.Module,
    example: Example,
    groups: Sequence[Group],
    masks: Masks,
    optimizer: Optimizer | None,
    attributes: Mapping[str, int] | None,
) -> Insertion:
    """Return a masked copy of a model, and of its optimizer, to add units to.

    Raises:
        InputError: masks, groups or a path that do not fit the model.
    """
    for path in attributes or {}:
        resolve(model, path)
    refresh(model)
    work, own = copy.deepcopy((model, optimizer))
    masks.apply_(work)
    with evaluating(work), torch.no_grad():
        return Insertion(work, own, masks, groups, example, attributes or {})


def addition_of(by: str | Mapping[str, Any] | Addition) -> Addition:
    """Return the addition that a user names."""
    how = build("addition", by)
    assert isinstance(how, Addition)
    return how


def prepared(model: nn.Module, example: Example, groups: Sequence[Group] | None) -> Sequence[Group]:
    """Return the dependency groups of a model that can be worked on.

    Raises:
        InputError: it is sharded.
    """
    sharded = next((name for name, tensor in named_tensors(model).items() if is_sharded(tensor)), None)
    if sharded is not None:
        raise InputError(f"model: {sharded!r} is sharded; widen the whole model, and shard the wider one")
    refresh(model)
    return find_groups(model, example) if groups is None else groups


def why_not(group: Group) -> str:
    """Return why units cannot be added to a group whatever they are; empty where they can."""
    if group.kind == "layer":
        return "its units are whole blocks"
    if group.reason or (group.read_by() and not group.summed):
        return group.reason
    what = "something that is no weight sums over its units" if group.summed else "no weight reads its units"
    return f"{what}, so that none could be added without an effect"


def units_to_add(added: Wanted, groups: Sequence[Group], how: Addition) -> dict[str, Tensor | int]:
    """Return how many units to add to groups, or which to copy, after checking it."""
    named = {group.name: group for group in groups}
    found: dict[str, Tensor | int] = {}
    for name, units in added.items():
        if name not in named:
            raise InputError(f"added: no group is called {name!r}; {did_you_mean(name, named)}")
        why = why_not(named[name])
        if why:
            raise InputError(f"added: {name} cannot have more units: {why}")
        if isinstance(units, int):
            if units < 1:
                raise InputError(f"added: {name}: {units} is no number of units to add; give at least 1")
            found[name] = units
            continue
        size = named[name].size
        if not how.copies or not units or any(not 0 <= unit < size for unit in units):
            got = f"got {list(units)} for {how.name!r}"
            raise InputError(f"added: {name}: give how many units to add, or (of copies) which of 0 to {size - 1} to copy; {got}")
        found[name] = torch.tensor(list(units))
    return found
