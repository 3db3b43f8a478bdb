"""Choosing which units of a model to keep so that a budget of FLOPs or latency is met at the least loss of score.

Within a group the units with the highest scores stay, so only the width of every group is to be found: the widths with the least sum of
lost scores whose cost is within the budget. That is a knapsack whose weights depend on each other (a channel costs less once its
neighbours' are gone); it is solved by taking out, again and again, what loses the least score for what it saves, and then by exchanges
between two groups while one makes it better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from niwaki.clock import Clock
from niwaki.collecting import Statistics
from niwaki.dependency import Example, Group, find_groups
from niwaki.errors import InputError, NiwakiError, did_you_mean
from niwaki.masked import MaskedTensor
from niwaki.masks import Masks
from niwaki.pieces import bounds_of
from niwaki.ranking import rank_targets
from niwaki.recipe import Recipe
from niwaki.selector import Selector, reads_gradient
from niwaki.structured.costs import Cost, FlopCost, LatencyCost, choices, timed, unit_masks, with_widths
from niwaki.structured.removal import shrink

EXCHANGES = 20_000
"""Exchanges between two groups that are looked at in one round."""

ROUNDS = 15
"""Times that a latency is measured; medians count."""

AHEAD = 8
"""Smaller widths of a group that are looked at in one step: the next may save nothing where a later one does."""

ROUNDING = 1e-12

FLOPS_TOLERANCE = 1e-6
"""By which the FLOPs of the smaller model may be above what was computed, as a share."""

CORRECTIONS = 10
"""Models that are made and measured until a latency is met."""


@dataclass(frozen=True)
class Found:
    """What a search has chosen.

    Attributes:
        kept: group -> bool, one for each unit.
        masks: of the units that go; :func:`niwaki.shrink` takes them out.
        cost: what is left of the budget's cost, as a share of the whole model's: FLOPs counted, latency measured.
        lost: summed score of the units that go.
    """

    kept: dict[str, Tensor]
    masks: Masks
    cost: float
    lost: float

    @property
    def widths(self) -> dict[str, int]:
        """Units that stay, group by group."""
        return {name: int(kept.sum()) for name, kept in self.kept.items()}


def search(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    example: Example,
    *,
    flops: float | None = None,
    latency: float | None = None,
    groups: Sequence[Group] | None = None,
    round_to: int = 1,
    minimum: int = 1,
    table: LatencyCost | None = None,
    tolerance: float = 0.02,
) -> Found:
    """Return the units to keep so that a budget is met: those with the least summed score are given up.

    The FLOPs of the result are at most the budget, and as near as whole units allow. A latency is first met by a table, in which savings
    add up, then the smaller model is made and timed beside the whole one, and the budget by the table is corrected until the measured
    ratio is at most the budget and at least the budget less ``tolerance`` (or the nearest below that the widths in the table allow).

    Args:
        model: left as it was.
        scores: group -> one score for each unit, higher: keep; comparable between groups. :func:`unit_scores` makes them of any
            saliency. Groups without scores stay whole.
        example: arguments of a forward pass; the latency is that of this one, so its batch matters.
        flops: budget, as a share of the whole model's FLOPs; or
        latency: budget, as a share of the whole model's time.
        groups: the model's dependency groups; None to find them.
        round_to: widths that are less than whole are multiples of this.
        minimum: units that stay in every group.
        table: of latencies, to choose by; None to measure one now.
        tolerance: by which the latency may fall short of the budget, as a share of the whole model's time.

    Raises:
        InputError: a budget that no widths can meet (it names the lowest that can be), or scores that do not fit the groups.
        NiwakiError: units that were chosen cannot be taken out, or no model that was made met the latency; it names the lowest measured.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> found = search(model, {"0": torch.tensor([0.1, 3.0, 0.2, 2.0])}, torch.ones(1, 8), flops=0.5)
    >>> found.kept["0"], found.cost, round(found.lost, 3)
    (tensor([False,  True, False,  True]), 0.5, 0.3)
    """
    if (flops is None) == (latency is None):
        raise InputError("search: give one budget, flops= or latency=, as a share of the whole model's, such as flops=0.5")
    budget = flops if flops is not None else latency
    assert budget is not None
    if not 0 < budget <= 1 or round_to < 1 or minimum < 1:
        raise InputError(
            f"search: a budget is in (0, 1], and round_to and minimum are at least 1; got {budget:g}, {round_to} and {minimum}"
        )
    groups = find_groups(model, example) if groups is None else groups
    chosen = _with_scores(groups, scores)
    lost = [_lost(scores[group.name]) for group in chosen]

    def found(widths: Sequence[int], cost: float) -> Found:
        kept = {group.name: best(scores[group.name], width) for group, width in zip(chosen, widths, strict=True)}
        total = sum(float(own[-1 - width]) for own, width in zip(lost, widths, strict=True))
        return Found(kept, unit_masks(model, groups, kept), cost, total)

    if flops is not None:
        cost: Cost = FlopCost.of(model, chosen, example)
        widths = cheapest(lost, [choices(group.size, round_to, minimum) for group in chosen], cost, flops)
        result = found(widths, float(cost(np.array([widths]))[0]))
        _require_removable(model, result, groups, example)
        return result
    table = LatencyCost.measure(model, chosen, example, rounds=ROUNDS, round_to=round_to, minimum=minimum) if table is None else table
    allowed = [set(choices(group.size, round_to, minimum)) for group in chosen]
    options = [[width for width in table.widths(group) if width in own] for group, own in zip(chosen, allowed, strict=True)]

    def measured(widths: Sequence[int]) -> float:
        kept = found(widths, 0.0).kept
        seconds = timed({"whole": model, "smaller": with_widths(model, groups, kept, example)}, example, ROUNDS)
        return seconds["smaller"] / seconds["whole"]

    widths, ratio = _corrected(partial(cheapest, lost, options, table.over(chosen)), measured, budget, tolerance)
    return found(widths, ratio)


def unit_scores(
    model: nn.Module,
    recipe: Recipe,
    groups: Sequence[Group],
    *,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the normalized scores that a recipe gives the units of its target groups: group -> float64, one for each unit.

    Args:
        model: left as it was.
        recipe: whose granularity (such as ``channel``), target, saliency and normalization count. Where scores of different layers
            mean different things, as norms do, ``normalization: layer_l2`` makes them comparable.
        groups: the model's dependency groups.
        data: batches ``(inputs, targets)``, for scores that need them.
        loss: ``loss(outputs, targets)``, for scores that need gradients.
        seed: of random scores.

    Raises:
        InputError: the recipe ranks no groups, or needs data or a loss.

    >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> model[2].weight.data = torch.tensor([[1.0, 2.0], [0.0, 1.0], [5.0, 0.0]])
    >>> unit_scores(model, Recipe(granularity="channel", sparsity=0.5), find_groups(model, torch.ones(1, 1)))["2"]
    tensor([3., 1., 5.], dtype=torch.float64)
    """
    if "gradient" in recipe.saliency.needs and (data is None or loss is None):
        raise InputError(f"saliency: {recipe.saliency.name!r} needs data= and loss= to collect gradients from")
    ranked, _ = rank_targets(model, recipe, groups)
    if any(one.name not in {group.name for group in groups} for one in ranked):
        raise InputError(f"granularity: {recipe.granularity.name!r} ranks tensors, not units of groups; choices: channel, head, group")
    statistics = Statistics(model, recipe, data, loss, seed)
    tensors = {bound.name: MaskedTensor(bound, recipe, seed) for bound in bounds_of(ranked)}
    selector = Selector(recipe, ranked, tensors, statistics, Clock(1), seed, lambda _: None, given=False)
    with statistics.gradients() if reads_gradient(recipe.saliency) else nullcontext(), torch.no_grad():
        return {one.name: score.to(torch.float64) for one, score in zip(ranked, selector.scores(), strict=True)}


def cheapest(lost: Sequence[NDArray[np.float64]], widths: Sequence[Sequence[int]], cost: Cost, budget: float) -> list[int]:
    """Return the width of every group with the least sum of lost scores whose cost is at most the budget, as far as exchanges find it.

    Args:
        lost: for each group, the summed score that is lost when 0, 1, 2, ... units go.
        widths: for each group, the widths that it may have, decreasing, the whole first.
        cost: of widths.
        budget: at most this.

    Raises:
        InputError: the budget is below the cost of the smallest widths; it names the lowest cost.

    >>> lost = [np.array([0.0, 1.0, 3.0]), np.array([0.0, 2.0, 5.0])]
    >>> cheapest(lost, [[2, 1], [2, 1]], lambda widths: widths.sum(axis=1) / 4, 0.75)
    [1, 2]
    """
    loss = [table[-1 - np.array(allowed)] for table, allowed in zip(lost, widths, strict=True)]
    allowed = [np.array(one) for one in widths]
    at = _exchanged(_taken_out(allowed, loss, cost, budget), allowed, loss, cost, budget)
    return [int(one[place]) for one, place in zip(allowed, at, strict=True)]


def _taken_out(widths: list[NDArray[np.int64]], loss: list[NDArray[np.float64]], cost: Cost, budget: float) -> NDArray[np.int64]:
    """Go from whole groups to smaller ones, always by what loses the least score for what it saves; return the places in ``widths``."""
    at = np.zeros(len(widths), dtype=np.int64)
    now = float(_costs(widths, at[None], cost)[0])
    while now > budget + ROUNDING:
        steps = _moved(at, [(g, p) for g, w in enumerate(widths) for p in range(at[g] + 1, min(at[g] + 1 + AHEAD, len(w)))])
        costs = _costs(widths, steps, cost)
        saves = now - costs > 0
        if not saves.any():
            raise InputError(
                f"search: the budget is {budget:.4g} of the whole model's cost, and the lowest that the widths allow is {now:.4g}"
            )
        more = _losses(loss, steps) - _losses(loss, at[None])
        price = np.divide(more, now - costs, out=np.full(len(steps), np.inf), where=saves)
        best = int(price.argmin())
        at, now = steps[best], float(costs[best])
    return at


def _exchanged(
    at: NDArray[np.int64], widths: list[NDArray[np.int64]], loss: list[NDArray[np.float64]], cost: Cost, budget: float
) -> NDArray[np.int64]:
    """Give units back to a group, if need be for units of another one, while that is within the budget and loses less score."""
    reach = max(1, int(EXCHANGES**0.5) // max(len(widths), 1))
    while True:
        up = [(g, p) for g in range(len(widths)) for p in range(max(0, at[g] - reach), at[g])]
        down = [(g, p) for g, w in enumerate(widths) for p in range(at[g] + 1, min(at[g] + 1 + reach, len(w)))]
        pairs = [(one, other) for one in up for other in down if one[0] != other[0]]
        moved = np.concatenate([_moved(at, up), _moved(_moved(at, [one for one, _ in pairs]), [other for _, other in pairs])])
        gain = float(_losses(loss, at[None])[0]) - _losses(loss, moved)
        moved, gain = moved[gain > ROUNDING], gain[gain > ROUNDING]
        fits = _costs(widths, moved, cost) <= budget + ROUNDING
        if not fits.any():
            return at
        at = moved[fits][gain[fits].argmax()]


def _moved(at: NDArray[np.int64], places: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return one choice for each ``(group, place)``: ``at`` (one choice, or as many) with that group at that place."""
    rows = np.broadcast_to(at, (len(places), at.shape[-1])).copy()
    if places:
        rows[np.arange(len(places)), [g for g, _ in places]] = [p for _, p in places]
    return rows


def _costs(widths: Sequence[NDArray[np.int64]], at: NDArray[np.int64], cost: Cost) -> NDArray[np.float64]:
    return cost(np.stack([allowed[at[:, g]] for g, allowed in enumerate(widths)], axis=1))


def _losses(loss: Sequence[NDArray[np.float64]], at: NDArray[np.int64]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.sum([table[at[:, g]] for g, table in enumerate(loss)], axis=0, dtype=np.float64)
    return total


def _corrected(
    widths_for: Callable[[float], list[int]], measured: Callable[[Sequence[int]], float], goal: float, tolerance: float
) -> tuple[list[int], float]:
    """Return the widths with the largest measured cost within the goal, and that cost.

    What is bisected is the budget that the widths are chosen for.
    """
    best: tuple[list[int], float] | None = None
    seen: dict[tuple[int, ...], float] = {}
    low, high, budget = 0.0, 1.0, goal
    for _ in range(CORRECTIONS):
        try:
            widths = widths_for(budget)
        except InputError:
            if not seen:
                raise
            low, budget = budget, (budget + high) / 2  # so little cannot be asked for
            continue
        if tuple(widths) in seen:
            break
        ratio = seen[tuple(widths)] = measured(widths)
        if ratio <= goal and (best is None or ratio > best[1]):
            best = widths, ratio
        if goal - tolerance <= ratio <= goal:
            break
        if ratio > goal:
            high = min(high, budget)
        else:
            low = max(low, budget)
        guess = budget * (goal - tolerance / 2) / ratio
        budget = guess if low < guess < high else (low + high) / 2
    if best is None:
        raise NiwakiError(
            f"search: the budget is {goal:.4g} of the whole model's latency, and the lowest that was measured is {min(seen.values()):.4g};"
            " give a larger budget, or allow smaller widths"
        )
    return best


def _require_removable(model: nn.Module, result: Found, groups: Sequence[Group], example: Example) -> None:
    """Raise NiwakiError when what goes cannot be taken out of the model, so that its FLOPs would not be saved."""
    smaller = shrink(model, result.masks, example, groups=groups)
    shares = [FlopCost.of(one, [], example).dense for one in (smaller.model, model)]
    if shares[0] > (result.cost + FLOPS_TOLERANCE) * shares[1]:
        why = "; ".join(smaller.notes) or "some masked units are not removed"
        raise NiwakiError(f"search: the smaller model has {shares[0] / shares[1]:.4g} of the FLOPs, not {result.cost:.4g}: {why}")


def _with_scores(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> list[Group]:
    """Return the groups that have scores.

    Raises:
        InputError: scores that do not fit the groups.
    """
    named = {group.name: group for group in groups}
    for name, values in scores.items():
        if name not in named:
            raise InputError(f"scores: no group is called {name!r}; {did_you_mean(name, named)}")
        if not named[name].removable:
            raise InputError(f"scores: no unit of {name} can be removed: {named[name].reason}")
        if tuple(values.shape) != (named[name].size,):
            raise InputError(f"scores: {name} has {named[name].size} units, and scores of shape {list(values.shape)} were given")
        if not values.isfinite().all():
            raise InputError(f"scores: {name} has scores that are not finite")
    if not scores:
        raise InputError("scores: none were given; unit_scores makes them of a recipe")
    return [group for group in groups if group.name in scores]


def best(scores: Tensor, width: int) -> Tensor:
    """Return which units are among the ``width`` with the highest scores (bool); of equal ones the first stay.

    >>> best(torch.tensor([1.0, 3.0, 1.0]), 2)
    tensor([ True,  True, False])
    """
    order = scores.detach().to("cpu", torch.float64).argsort(descending=True, stable=True)
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:width]] = True
    return kept


def _lost(scores: Tensor) -> NDArray[np.float64]:
    """Return the summed score that is lost when 0, 1, 2, ... of the worst units go."""
    return np.concatenate([[0.0], np.cumsum(np.sort(scores.detach().to("cpu", torch.float64).numpy()))])
