"""Making all widths of a model larger by one factor, to a budget of FLOPs if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.addition import Addition
from niwaki.dependency import Example, Group
from niwaki.errors import InputError
from niwaki.granularity import Kind
from niwaki.structured.costs import FlopCost
from niwaki.structured.removal import excluded
from niwaki.structured.widening import Widening, Wider, addition_of, prepared, units_to_add, why_not, wider

BISECTIONS = 60
"""Of the factor of the widths: to the last bit."""

LARGEST_FACTOR = 2.0**20

ROUNDING = 1e-12
"""By which FLOPs that are added up in floating point may be above a budget, as a share."""


def uniform(
    model: nn.Module,
    example: Example,
    *,
    factor: float | None = None,
    flops: float | None = None,
    by: str | Mapping[str, Any] | Addition = "split",
    kinds: Sequence[Kind] = ("channel", "head"),
    exclude: str | Sequence[str] = (),
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
    """Return a model with the widths of all its dependency groups multiplied by one factor: MorphNet's expansion.

    Widths become ``round(factor · width)``, never fewer than they are. With a budget of FLOPs the factor is the largest whose forward
    FLOPs are within it, found by bisection; groups that have room for another unit then get it, in the order of the model. Groups that
    cannot have more units stay as they are, and ``notes`` says why.

    Args:
        model: stays as it is, unless ``in_place``.
        example: arguments of a forward pass.
        factor: at least 1; or
        flops: budget, as a share of the FLOPs of the model as it is; at least 1.
        by: as for :func:`widen`.
        kinds: of groups that are widened.
        exclude: globs of groups or tensors that stay as they are.
        scores: as for :func:`widen`, as all that follow.

    Raises:
        InputError: neither or both of factor and budget, one below 1, or no group that could be widened.

    Source: Gordon, Eban, Nachum, Chen, Wu, Yang, Choi 2018 (MorphNet), step 3 of algorithm 1.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> uniform(model, torch.ones(1, 3), factor=1.5, by="new").model[0].out_features
    6
    """
    how = addition_of(by)
    for name, value in (("factor", factor), ("flops", flops)):
        if value is not None and not 1.0 <= value < float("inf"):
            raise InputError(f"{name}: must be at least 1 (of what the model is now), got {value!r}; niwaki.shrink makes models smaller")
    if (factor is None) == (flops is None):
        raise InputError("uniform: give a factor of the widths, or a budget of flops")
    groups = prepared(model, example, groups)
    kept = excluded(groups, [exclude] if isinstance(exclude, str) else list(exclude))
    chosen = [g for g in groups if g.kind in kinds and g.name not in kept and not why_not(g)]
    if not chosen:
        raise InputError(f"uniform: the model has no group of kind {', '.join(kinds)} that could have more units; see find_groups")
    notes: list[str] = []
    batches = None if data is None else list(data)
    while chosen:
        widths = _times(chosen, factor) if factor is not None else _within(model, chosen, example, flops or 1.0)
        more = {g.name: width - g.size for g, width in zip(chosen, widths, strict=True) if width > g.size}
        made = Widening(model, example, how, groups, masks, optimizer, attributes)
        made.add(units_to_add(more, groups, how), scores, batches, loss, seed)
        if not made.reasons:
            break
        notes += [f"{name} is not wider: {why}" for name, why in made.reasons.items()]
        chosen = [group for group in chosen if group.name not in made.reasons]
    if not chosen:
        raise InputError(f"uniform: {notes[0]}")
    made.notes[:0] = notes if more else [*notes, "no group is wider: there is no room for another unit of each"]
    return wider(made.work, made.given, made.widths, made.notes, in_place, model, optimizer)


def _times(groups: Sequence[Group], factor: float) -> list[int]:
    return [max(group.size, int(factor * group.size + 0.5)) for group in groups]


def _within(model: nn.Module, groups: Sequence[Group], example: Example, budget: float) -> list[int]:
    """Return the widths by the largest factor whose FLOPs are within a budget; then one unit more for each group where that still fits.

    Groups of equal width grow at the same factor: with that last step the budget is met to about one unit of one group.
    """
    cost = FlopCost.of(model, groups, example)

    def fits(widths: Sequence[int]) -> bool:
        return float(cost(np.array([widths], dtype=np.int64))[0]) <= budget * (1 + ROUNDING)

    low, high = 1.0, 2.0
    while fits(_times(groups, high)) and high < LARGEST_FACTOR:
        low, high = high, 2.0 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if fits(_times(groups, middle)) else (low, middle)
    widths = _times(groups, low)
    for place in range(len(groups)):
        more = [width + (at == place) for at, width in enumerate(widths)]
        widths = more if fits(more) else widths
    return widths
