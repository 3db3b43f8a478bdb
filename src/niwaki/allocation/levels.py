"""The cheapest level for every layer by dynamic programming: errors add up, costs add up, a budget bounds the costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from niwaki.allocation.costs import Cost


def cheapest(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """Return the level of every layer with the least sum of errors whose costs are at most the budget together.

    The optimum, in time O(layers · levels · budget) and memory O((layers + levels) · budget); None where the cheapest levels cost more.

    Args:
        errors: of each level of each layer.
        costs: the same, whole numbers, at least 0.
        budget: at most this.

    Source: Frantar & Alistarh 2022 (SPDY); the multiple-choice knapsack problem.

    >>> cheapest([[0.0, 1.0, 5.0], [0.0, 3.0, 4.0]], [[4, 2, 0], [4, 2, 0]], 4)
    [1, 1]
    """
    # least[b]: least sum of errors of the layers so far with costs of at most b.
    least: NDArray[np.float64] = np.zeros(budget + 1)
    chosen: list[NDArray[np.int16]] = []
    for own_errors, own_costs in zip(errors, costs, strict=True):
        table = np.full((len(own_costs), budget + 1), np.inf)
        for level, (error, cost) in enumerate(zip(own_errors, own_costs, strict=True)):
            if cost <= budget:
                table[level, cost:] = least[: budget + 1 - cost] + error
        best = table.argmin(axis=0)
        chosen.append(best.astype(np.int16))
        least = np.take_along_axis(table, best[None], axis=0)[0]
    if not math.isfinite(least[budget]):
        return None
    levels = []
    for own_costs, best in zip(reversed(costs), reversed(chosen), strict=True):
        level = int(best[budget])
        levels.append(level)
        budget -= own_costs[level]
    return levels[::-1]


def in_steps(costs: Sequence[Sequence[float]], budget: float, steps: int) -> tuple[list[list[int]], int]:
    """Return costs in whole steps, rounded up so that what fits in steps fits, and the budget in steps.

    Whole numbers up to ``steps`` stay what they are.

    >>> in_steps([[0.0, 0.25], [0.5, 1.0]], 1.0, 8)
    ([[0, 2], [4, 8]], 8)
    """
    whole = all(float(cost).is_integer() for own in costs for cost in own) and 0 <= budget <= steps
    unit = 1.0 if whole else budget / steps
    if unit <= 0.0:
        return [[0 if cost <= 0 else 1 for cost in own] for own in costs], 0
    return [[max(math.ceil(cost / unit - 1e-9), 0) for cost in own] for own in costs], math.floor(budget) if whole else steps


def densities(count: int) -> list[float]:
    """Return the densities of levels: each keeps the same share of what the one before it keeps, from 1 to 1 %.

    >>> [round(d, 3) for d in densities(3)]
    [1.0, 0.1, 0.01]
    """
    return [0.01 ** (level / max(count - 1, 1)) for level in range(count)]


def filled(counts: Sequence[int], limits: Sequence[int], fits: Callable[[Sequence[int]], bool]) -> list[int]:
    """Return counts that are raised towards the limits, all by the same share of their room, as far as they fit.

    >>> filled([2, 0], [10, 4], lambda counts: sum(counts) <= 8)
    [6, 2]
    """

    def at(share: float) -> list[int]:
        return [n + math.floor(share * (limit - n)) for n, limit in zip(counts, limits, strict=True)]

    if fits(limits):
        return list(limits)
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low)


def within(cost: Cost, goal: float, choose: Callable[[float], list[int]]) -> list[int]:
    """Return the choice for the largest additive goal whose whole cost is at most ``goal``.

    Args:
        cost: whose layers' own costs may not add up to the whole.
        goal: of the whole cost, at least that of the cheapest choice.
        choose: goal of the additive cost -> counts.
    """
    counts = choose(goal)
    if cost.whole is None or cost.whole(counts) <= goal:
        return counts
    low, high = goal - 2.0 * cost.dense, goal  # the sum of what units cost by themselves can be far off
    best = choose(low)
    for _ in range(30):
        middle = (low + high) / 2
        counts = choose(middle)
        if cost.whole(counts) <= goal:
            best, low = counts, middle
        else:
            high = middle
    return best
