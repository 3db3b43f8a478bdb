"""What a number that is penalized stands for, relative to the mean of all: FLOPs, or weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.granularity import Grouped
from niwaki.pieces import Ranked
from niwaki.pull.terms import GroupTerms, OwnTerm, WeightTerm

Uses = Mapping[str, float]
"""Parameter name -> multiply-adds of each of its weights in a forward pass."""


def weigh_groups(groups: Sequence[GroupTerms], by: str, uses: Uses | None) -> None:
    """Give every group the costs of its pieces."""
    costs = [of_pieces(group.one, by, uses) for group in groups]
    mean = _mean(costs)
    for group, cost in zip(groups, costs, strict=True):
        group.costs = cost / mean


def weigh_weights(terms: Sequence[WeightTerm | OwnTerm], by: str, uses: Uses | None) -> None:
    """Give every tensor the cost of one of its weights: by parameters the same for all."""
    if by != "flops":
        return
    assert uses is not None
    each = [uses.get(term.name, 0.0) for term in terms]
    elements = sum(term.elements for term in terms)
    mean = sum(cost * term.elements for cost, term in zip(each, terms, strict=True)) / max(elements, 1)
    for term, cost in zip(terms, each, strict=True):
        term.cost = cost / mean if mean else 1.0


def weigh_gates(terms: Sequence[OwnTerm], ranked: Sequence[Ranked], by: str, uses: Uses | None) -> None:
    """Give every set of gates the costs of its pieces."""
    by_name = {one.name: one for one in ranked}
    costs = [of_pieces(by_name[term.name], by, uses) for term in terms]
    mean = _mean(costs)
    for term, cost in zip(terms, costs, strict=True):
        term.cost = cost / mean


def weigh_scales(terms: Sequence[WeightTerm], ranked: Sequence[Ranked], by: str, uses: Uses | None) -> None:
    """Give every scale the cost of the unit that it runs along; those of no unit cost nothing, as nothing can go with them.

    Raises:
        InputError: no scale runs along any unit.
    """
    found: dict[nn.Parameter, Tensor] = {}
    for one in ranked:
        cost = of_pieces(one, by, uses)
        for part in one.along:
            mine = part.expand(cost, 0.0)
            before = found.get(part.bound.parameter)
            found[part.bound.parameter] = mine if before is None else before + mine
    costs = [found.get(term.parameter, torch.zeros(term.weight.shape)) for term in terms]
    there = torch.cat([cost.flatten() for cost in costs])
    if not bool((there > 0).any()):
        raise InputError("penalty: weigh: no normalization runs along the units of a group, so that none has a cost; choices: weigh: none")
    mean = there[there > 0].mean()
    for term, cost in zip(terms, costs, strict=True):
        term.cost = cost.to(term.weight) / mean.to(term.weight)


def of_pieces(one: Ranked, by: str, uses: Uses | None) -> Tensor:
    """Return the FLOPs or the weights of each piece, float64, in the shape of the pieces."""
    ones = [torch.ones(part.bound.here.shape, dtype=torch.float64, device=one.device) for part in one.parts]
    total = torch.stack([part.spread(part.cut(each), one.pieces) for part, each in zip(one.parts, ones, strict=True)]).sum(dim=0)
    if by == "parameters":
        return total
    assert uses is not None
    flops = one.flops(uses)
    return flops.to(total) if isinstance(flops, Tensor) and isinstance(one.granularity, Grouped) else torch.full_like(total, float(flops))


def _mean(costs: Sequence[Tensor]) -> float:
    together = torch.cat([cost.flatten() for cost in costs])
    return float(together.mean()) or 1.0
