"""Reordering the channels of a model, so that an N:M pattern keeps more of the weights that read them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from niwaki.component import build
from niwaki.dependency import Example, Group, Member, find_groups
from niwaki.errors import InputError, did_you_mean
from niwaki.granularity import Granularity, PatternNM
from niwaki.layerwise.permutation import Reading, best_order, kept_score
from niwaki.layout import layout_of
from niwaki.removed import named_modules, named_tensors
from niwaki.structured.running import difference, evaluating, expected_of, run


@dataclass(frozen=True)
class Permuted:
    """What :func:`permute` returns.

    Attributes:
        model: computes the same, with its channels in another order.
        orders: dependency group -> which unit came to each position.
        kept: tensor -> share of its scores that the pattern keeps, before and after.
        notes: groups that stayed as they were, and why.
    """

    model: nn.Module
    orders: dict[str, list[int]]
    kept: dict[str, tuple[float, float]]
    notes: list[str]


@torch.no_grad()
def permute(
    model: nn.Module,
    pattern: str | Granularity,
    example: Example,
    *,
    groups: Sequence[Group] | None = None,
    readers: Sequence[str] = ("*",),
    scores: Mapping[str, Tensor] | None = None,
    restarts: int = 2,
    seed: int = 0,
) -> Permuted:
    """Return a copy of a model that computes the same, with channels in an order in which an N:M pattern keeps more.

    Units of a dependency group are exchangeable: they are reordered in all tensors that make, carry or read them. Orders are searched for
    the sum of the scores that the pattern keeps in all weights that read the group, which never falls. Outputs on the example are
    compared after each group; where the order of units means something that cannot be seen in the model, the group stays as it was.

    Args:
        model: left as it was.
        pattern: such as ``2:4``, along the inputs.
        example: arguments of a forward pass.
        groups: the model's dependency groups; None to find them.
        readers: globs of the weights that the pattern is for.
        scores: parameter -> score of each weight, in the parameter's shape and not negative; None: their magnitudes.
        restarts: how often the search is repeated from a mixed order.
        seed: of the search.

    Raises:
        InputError: another granularity, readers that do not exist, scores of another shape, or a model that does not run.

    Source: Pool & Yu 2021.

    >>> model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> model[2].weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    >>> permute(model, "1:2", torch.ones(1, 1)).kept["2.weight"]
    (0.6, 0.7)
    """
    granularity = build("granularity", pattern)
    if not isinstance(granularity, PatternNM) or granularity.dimension != "input":
        raise InputError(f"pattern: an N:M pattern along the inputs is needed, such as 2:4, got {pattern!r}")
    n, m = granularity.n, granularity.m
    groups = find_groups(model, example) if groups is None else groups
    work = copy.deepcopy(model)
    tensors = named_tensors(work)
    weights = _weights(work, tensors, readers, scores)
    before = {name: _kept(values, n, m) for name, values in weights.items()}
    orders: dict[str, list[int]] = {}
    notes: list[str] = []
    with evaluating(work):
        expected = expected_of(work, example)
        for group in groups:
            if not group.removable or group.kind == "layer":
                continue
            readings = [
                r for member in group.read_by() if member.name in weights for r in _readings(member, group, weights[member.name], m)
            ]
            if not readings:
                continue
            moves = _moves(group, tensors)
            if moves is None:
                notes.append(f"{group.name} stays in its order: its units have different numbers of entries")
                continue
            order = best_order(readings, n, m, restarts=restarts, seed=seed)
            if torch.equal(order, torch.arange(group.size)):
                continue
            read = {member.name for member in group.read_by()} & set(weights)
            was = sum(_kept(weights[name], n, m) for name in read)
            _reorder(moves, order, tensors, weights)
            reason = difference(run(work, example), expected)
            if sum(_kept(weights[name], n, m) for name in read) < was:
                reason = "weights that read several entries of a unit would lose more than others gain"
            if reason:
                _reorder(moves, order.argsort(), tensors, weights)
                notes.append(f"{group.name} stays in its order: {reason}")
            else:
                orders[group.name] = order.tolist()
    kept = {name: (_share(before[name], values), _share(_kept(values, n, m), values)) for name, values in weights.items()}
    return Permuted(work, orders, kept, notes)


@dataclass(eq=False)
class _Weight:
    """Scores of a weight, with the inputs last: ``[rows, columns]`` float64; and which dimension of the parameter they are."""

    scores: Tensor
    dim: int
    sizes: tuple[int, ...]


def _weights(
    model: nn.Module, tensors: Mapping[str, Tensor], readers: Sequence[str], scores: Mapping[str, Tensor] | None
) -> dict[str, _Weight]:
    """Return the scores of all weights that N:M is for."""
    found: dict[str, _Weight] = {}
    for path, module in named_modules(model).items():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            layout = layout_of(module, own, parameter.shape)
            if layout is None or layout.embedding or "group" in layout.roles or not any(fnmatchcase(name, glob) for glob in readers):
                continue
            values = parameter.detach().abs() if scores is None else scores.get(name)
            if values is None:
                continue
            if values.shape != parameter.shape:
                raise InputError(f"scores: those of {name!r} have shape {tuple(values.shape)}, and the weight {tuple(parameter.shape)}")
            dim = layout.roles.index("input") - ("stack" in layout.roles)
            moved = values.cpu().to(torch.float64).movedim(dim, -1)
            found[name] = _Weight(moved.reshape(-1, moved.shape[-1]), dim, tuple(moved.shape[:-1]))
    for glob in readers:
        if not any(fnmatchcase(name, glob) for name in found):
            raise InputError(f"readers: {glob!r} matches no weight that has inputs; {did_you_mean(glob, list(tensors))}")
    return found


def _kept(weight: _Weight, n: int, m: int) -> float:
    return kept_score(weight.scores, n, m)


def _share(kept: float, weight: _Weight) -> float:
    return kept / max(float(weight.scores.sum()), torch.finfo(torch.float64).tiny)


def _places(member: Member, group: Group) -> Tensor | None:
    """Return the entries of every unit: ``[units, entries of one]``; None where their numbers differ."""
    counts = torch.bincount(member.units[member.units >= 0], minlength=group.size)
    if counts.min() != counts.max():
        return None
    order = member.units.argsort(stable=True)
    return order[member.units[order] >= 0].view(group.size, -1)


def _readings(member: Member, group: Group, weight: _Weight, m: int) -> list[Reading]:
    """Return what a member's weight reads of the units; nothing where groups of M hold several entries of a unit.

    Where units have several entries, apart from each other, such as one in every head, each is read by itself.
    """
    places = _places(member, group)
    if places is None or member.dim != weight.dim:
        return []
    taken = [set((one // m).tolist()) for one in places.T]
    if len(set().union(*taken)) < sum(len(one) for one in taken):
        return []
    return [Reading(weight.scores, one) for one in places.T.contiguous()]


def _moves(group: Group, tensors: Mapping[str, Tensor]) -> list[tuple[Member, Tensor]] | None:
    """Return every dimension of a tensor that units have entries in, once, and these entries; None where units differ in their number."""
    moves: dict[tuple[int, int], tuple[Member, Tensor]] = {}
    for member in group.members:
        places = _places(member, group)
        if places is None:
            return None
        moves[id(tensors[member.name]), member.dim] = member, places
    return list(moves.values())


def _reorder(moves: Sequence[tuple[Member, Tensor]], order: Tensor, tensors: Mapping[str, Tensor], weights: Mapping[str, _Weight]) -> None:
    """Reorder the units of a group in all its tensors, and the scores with them."""
    for member, places in moves:
        index = torch.arange(len(member.units))
        index[places] = places[order]
        tensor = tensors[member.name]
        tensor.copy_(tensor.index_select(member.dim, index.to(tensor.device)))
        for name, weight in weights.items():
            if tensors[name] is tensor:
                _move(weight, member.dim, index)


def _move(weight: _Weight, dim: int, index: Tensor) -> None:
    """Reorder scores along a dimension of the parameter."""
    if dim == weight.dim:
        weight.scores = weight.scores[:, index]
    else:
        rows = dim - (dim > weight.dim)
        weight.scores = weight.scores.view(*weight.sizes, -1).index_select(rows, index).reshape(weight.scores.shape)
