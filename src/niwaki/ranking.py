"""Which pieces of a model a recipe ranks: those of its target tensors, or the units of its dependency groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.allocation import Layer
from niwaki.binding import Bound, bind
from niwaki.calibration import first_pair
from niwaki.dependency import Example, Group, Member, find_groups
from niwaki.errors import InputError
from niwaki.granularity import Granularity, Grouped
from niwaki.layout import is_normalization, layout_of
from niwaki.masks import canonical_name, is_sharded
from niwaki.pieces import Grid, Part, Ranked, Slices, bounds_of
from niwaki.recipe import Prune, Recipe
from niwaki.saliency import Saliency
from niwaki.target import LeftOut, select_targets


def rank_targets(model: nn.Module, recipe: Recipe | Prune, groups: Sequence[Group] | None) -> tuple[list[Ranked], list[LeftOut]]:
    """Return what a recipe ranks on a model, and the parameters and groups that it leaves alone, each with the reason.

    Args:
        model: any module.
        recipe: whose target, granularity and saliency count.
        groups: the model's dependency groups; needed for granularities whose pieces are units of groups.

    Raises:
        InputError: nothing is left, or the granularity does not fit a tensor or group.
    """
    targets, left_out = select_targets(model, recipe.target)
    if isinstance(recipe.granularity, Grouped):
        assert groups is not None
        return _rank_groups(model, recipe.granularity, recipe.saliency, groups, [t.name for t in targets], left_out)
    ranked = []
    for target in targets:
        if recipe.granularity.check(target.layout, target.name):
            ranked.append(_rank_tensor(bind(target.name, target.parameter, target.layout), recipe.granularity))
        else:
            left_out.append(LeftOut(target.name, "its dimensions are not divisible by the granularity (remainder: skip)"))
    if not ranked:
        raise InputError("target: the granularity leaves every target tensor dense; choose another granularity or remainder: pad")
    return ranked, left_out


def find_groups_with(
    model: nn.Module, granularity: Grouped, example: Example | None, data: Iterable[tuple[Any, Any]] | None
) -> tuple[Sequence[Group], Iterable[tuple[Any, Any]] | None]:
    """Return the model's dependency groups, found with an example or the first batch of data; and the data, still whole.

    Raises:
        InputError: there is neither, or the model does not run on it.
    """
    if example is None and data is None:
        raise InputError(
            f"granularity: {granularity.name!r} is about dependency groups, which are found in a forward pass: pass example=, a tuple of"
            " the arguments of one, or groups="
        )
    if example is None and data is not None:
        (inputs, _), data = first_pair(data)
        example = inputs if isinstance(inputs, tuple) else (inputs,)
    assert example is not None
    return find_groups(model, example, layers="layer" in granularity.kinds), data


def _rank_tensor(bound: Bound, granularity: Granularity) -> Ranked:
    """Rank the pieces of one tensor.

    Raises:
        InputError: pieces would cross the shards of a sharded parameter.
    """
    split = len(bound.layout.shape) - len(bound.here.shape) + 1  # dimensions of the view that are sharded
    if bound.group is not None and any(size != 1 for size in granularity.block(bound.layout)[:split]):
        raise InputError(f"{bound.name}: pieces of granularity {granularity.name!r} would cross the shards of its first dimension")
    part = Part(bound, Grid(granularity, bound.here))
    return Ranked(Layer(bound.name, bound.layout, prod(granularity.grid(bound.layout))), granularity, (part,), (part,), (part,))


@dataclass(frozen=True, eq=False)
class _Tensors:
    """The model's parameters by all their names, bound once each, and which of them are scales of normalizations."""

    bound: dict[str, Bound]
    buffers: frozenset[str]
    norms: frozenset[str]

    def of(self, member: Member) -> Bound:
        """Return the parameter that a member is a dimension of."""
        return self.bound[canonical_name(member.name)]


def _tensors(model: nn.Module) -> _Tensors:
    bounds: dict[nn.Parameter, Bound] = {}
    names: dict[str, Bound] = {}
    buffers, norms = set(), set()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = canonical_name(prefix + own)
            layout = None if is_sharded(parameter) else layout_of(module, own, parameter.shape)
            if parameter not in bounds:
                bounds[parameter] = bind(name, parameter, layout)
            names[name] = bounds[parameter]
            if own == "weight" and parameter.ndim == 1 and is_normalization(module):
                norms.add(bounds[parameter].name)
        buffers |= {canonical_name(prefix + own) for own, _ in module.named_buffers(recurse=False, remove_duplicate=False)}
    return _Tensors(names, frozenset(buffers), frozenset(norms))


def _rank_groups(
    model: nn.Module,
    granularity: Grouped,
    saliency: Saliency,
    groups: Sequence[Group],
    targets: Sequence[str],
    not_targets: Sequence[LeftOut],
) -> tuple[list[Ranked], list[LeftOut]]:
    """Rank the units of all removable groups of the kinds that are asked for, whose units are made by targets alone."""
    tensors = _tensors(model)
    reasons = {one.name: one.reason for one in not_targets}
    of_targets: dict[str, str] = {}
    ranked: list[Ranked] = []
    why: list[str] = []
    for group in groups:
        if group.kind not in granularity.kinds:
            continue
        members = [m for m in group.members if _parameter(m, group, tensors)]
        makers = _makers(members, tensors)
        names = [tensors.of(maker).name for maker in makers]
        other = next((name for name in names if name not in targets), None)
        reason = group.reason or ("" if makers else "no weight makes its units")
        if not reason and other is not None:
            reason = f"its units are made by {other}, which is no target ({reasons[other]})"
        if reason:
            why.append(f"{group.name}: {reason}")
            of_targets |= dict.fromkeys(names, f"units cannot be masked: {reason}")
        else:
            ranked.append(_rank_group(group, granularity, saliency, members, makers, tensors))
    kinds = " or ".join(granularity.kinds)
    if not ranked:
        raise InputError(
            f"granularity: {granularity.name!r} finds no units to mask ({'; '.join(why) or f'the model has no groups of kind {kinds}'});"
            " name the weights that make units in target: {weights: {include: [...]}}, or choose another granularity"
        )
    taken = {bound.name for bound in bounds_of(ranked)}
    reasons = dict.fromkeys(targets, f"in no group of kind {kinds}") | of_targets | reasons
    return ranked, [LeftOut(name, reasons[name]) for name in dict.fromkeys(b.name for b in tensors.bound.values()) if name not in taken]


def _parameter(member: Member, group: Group, tensors: _Tensors) -> bool:
    """Return whether a member is a parameter rather than a buffer.

    Raises:
        InputError: it is none of the model's, has another shape, or is sharded.
    """
    bound = tensors.bound.get(canonical_name(member.name))
    if bound is None:
        if canonical_name(member.name) in tensors.buffers:
            return False
        raise InputError(f"groups: {group.name} has a member {member.name!r}, which this model does not have; find its groups anew")
    if is_sharded(bound.parameter):
        raise InputError(
            f"granularity: units of {group.name} have entries in {bound.name}, which is sharded; groups need whole tensors: mask before"
            " sharding (FSDP), or choose the granularity element"
        )
    shape = tuple(bound.parameter.shape)
    if not 0 <= member.dim < len(shape) or member.units.shape != (shape[member.dim],):
        raise InputError(
            f"groups: {group.name} has {member.units.numel()} entries in dimension {member.dim} of {bound.name}, whose shape is {shape};"
            " find the model's groups anew"
        )
    return True


def _makers(members: Sequence[Member], tensors: _Tensors) -> list[Member]:
    """Return the weights that make the units; where none does, those that they run along, such as depthwise convolutions."""
    weights = [m for m in members if tensors.of(m).parameter.ndim >= 2]
    return [m for m in weights if m.role == "output"] or [m for m in weights if m.role == "along"]


def _rank_group(
    group: Group, granularity: Grouped, saliency: Saliency, members: Sequence[Member], makers: Sequence[Member], tensors: _Tensors
) -> Ranked:
    """Rank the units of a group that own anything: not those that stand for blocks which cannot go."""
    owners = torch.cat([member.units.to("cpu") for member in members])
    present = owners[owners >= 0].bincount().nonzero().flatten()
    parts = {member: _part(member, tensors.of(member), present) for member in members}
    scored = tuple(parts[member] for member in _scored(group, saliency, members, makers, tensors))
    have = torch.stack([part.spread(torch.ones_like(part.cut.index(), dtype=torch.bool), len(present)) for part in scored])
    if saliency.scored_on == "norms" and not have.any(dim=0).all():
        raise InputError(
            f"saliency: {saliency.name!r} scores scales of normalizations, and some units of group {group.name} have none; exclude"
            f" {parts[makers[0]].bound.name} from the target, or choose another saliency"
        )
    layer = Layer(group.name, parts[makers[0]].bound.layout, len(present))
    readers = tuple(parts[m] for m in members if m.role == "input")
    along = tuple(parts[m] for m in members if m.role == "along" and m not in makers)
    return Ranked(layer, granularity, tuple(parts.values()), tuple(parts[m] for m in makers), scored, readers, along)


def _scored(group: Group, saliency: Saliency, members: Sequence[Member], makers: Sequence[Member], tensors: _Tensors) -> Sequence[Member]:
    """Return the members that a saliency looks at.

    All weights of a block read what comes in or what others of them make, so they count as its inputs.

    Raises:
        InputError: there are none.
    """
    inputs = makers if group.kind == "layer" else [m for m in members if m.role == "input"]
    scored: Sequence[Member] = {
        "outputs": makers,
        "inputs": inputs,
        "norms": [m for m in members if tensors.of(m).name in tensors.norms],
        "all": members,
    }[saliency.scored_on]
    if scored:
        return scored
    what = {"norms": "scales of a normalization", "inputs": "weights that read its units"}[saliency.scored_on]
    raise InputError(
        f"saliency: {saliency.name!r} scores {what}, and group {group.name} has none; exclude {tensors.of(makers[0]).name} from the"
        " target, or choose another saliency"
    )


def _part(member: Member, bound: Bound, present: Tensor) -> Part:
    """Return the entries of the units in one member, as pieces of its tensor; units are numbered as in ``present``."""
    owners = member.units.to("cpu")
    order = owners.argsort(stable=True)
    order = order[owners[order] >= 0]
    units, row, counts = torch.unique_consecutive(owners[order], return_inverse=True, return_counts=True)
    places = torch.full((len(units), int(counts.max()) if len(counts) else 0), len(owners))
    places[row, torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]] = order
    shape = tuple(bound.parameter.shape)
    return Part(bound, Slices(bound.name, bound.here.shape, shape, member.dim, torch.searchsorted(present, units), places))
