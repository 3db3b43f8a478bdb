"""Whole numbers from shares: exact totals, limits, and no empty layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from niwaki.allocation.layer import Layer
from niwaki.errors import InputError

STEPS = 200
"""Halvings of an interval at most: more than between most neighbours among the float64 numbers of one."""


def capped_proportional(rates: Sequence[float], pieces: Sequence[int], density: float) -> list[float]:
    """Return ``p_l = min(1, e * rate_l)`` with the ``e`` that solves ``sum p_l * pieces_l = density * sum pieces_l``.

    Layers above 1 are fixed at 1 and ``e`` is solved for the others, until none is above 1. As ``e`` only grows in that loop, a
    layer that was fixed once stays so in the solution.

    Args:
        rates: positive, one a layer.
        pieces: one a layer.
        density: in (0, 1].

    >>> capped_proportional([1.0, 3.0], [10, 10], 0.5)
    [0.25, 0.75]
    >>> capped_proportional([1.0, 3.0], [10, 10], 0.75)
    [0.5, 1.0]
    """
    budget = density * sum(pieces)
    free = list(range(len(rates)))
    result = [1.0] * len(rates)
    while free:
        left = budget - (sum(pieces) - sum(pieces[i] for i in free))
        weight = math.fsum(rates[i] * pieces[i] for i in free)
        scale = left / weight if weight else 0.0
        below = [i for i in free if scale * rates[i] < 1.0]
        if len(below) == len(free):
            for i in free:
                result[i] = max(scale * rates[i], 0.0)
            break
        free = below
    return result


def largest_remainder(quotas: Sequence[float], total: int, limits: Sequence[int]) -> list[int]:
    """Return whole numbers that sum to ``total``: each quota rounded down, the rest to the largest remainders (ties: lower index).

    Args:
        quotas: non-negative; they sum to ``total`` within one for each entry.
        total: the sum of the result.
        limits: upper bounds of the results.

    Raises:
        InputError: ``total`` is negative or above the sum of the limits, or far from the sum of the quotas.

    Source: Hamilton 1792 (apportionment of seats).

    >>> largest_remainder([2.5, 2.5, 1.0], 6, [9, 9, 9])
    [3, 2, 1]
    """
    bounded = [min(max(quota, 0.0), float(limit)) for quota, limit in zip(quotas, limits, strict=True)]
    if not 0 <= total <= sum(limits) or not abs(math.fsum(bounded) - total) <= len(bounded):
        raise InputError(f"cannot share {total} pieces by quotas that sum to {math.fsum(quotas):.6g} with room for {sum(limits)}")
    counts = [math.floor(quota) for quota in bounded]
    order = sorted(range(len(counts)), key=lambda i: counts[i] - bounded[i])
    missing = total - sum(counts)
    while missing:
        sign = 1 if missing > 0 else -1
        for i in order if sign > 0 else reversed(order):
            if missing and 0 <= counts[i] + sign <= limits[i]:
                counts[i] += sign
                missing -= sign
    return counts


def bounded(quotas: Sequence[float], total: int, limits: Sequence[int]) -> list[float]:
    """Return quotas that no limit cuts, with the sum ``total``: what exceeds a limit goes to the others in proportion to theirs.

    Quotas within the limits are returned as they are. Where the others have quota 0, it goes to them by the room that they have.

    >>> bounded([6.0, 2.0, 1.0], 9, [3, 9, 9])
    [3.0, 4.0, 2.0]
    >>> bounded([6.0, 0.0], 6, [3, 9])
    [3.0, 3.0]
    """
    if all(quota <= limit for quota, limit in zip(quotas, limits, strict=True)) or total > sum(limits):
        return list(quotas)
    rates = [quota / limit if limit else 0.0 for quota, limit in zip(quotas, limits, strict=True)]
    wanted = [i for i, rate in enumerate(rates) if rate > 0.0]
    result = [0.0] * len(rates)
    room = sum(limits[i] for i in wanted)
    if room:
        shares = capped_proportional([rates[i] for i in wanted], [limits[i] for i in wanted], min(total / room, 1.0))
        for i, share in zip(wanted, shares, strict=True):
            result[i] = share * limits[i]
    left = total - math.fsum(result)
    free = sum(limits) - room
    if left > 0 and free:
        result = [left * limit / free if rate == 0.0 else value for value, rate, limit in zip(result, rates, limits, strict=True)]
    return result


def solved(quotas_at: Callable[[float], Sequence[float]], low: float, high: float, total: float) -> list[float]:
    """Return the quotas at the level where their sum falls to ``total``; where it falls in a jump there, those between its two sides.

    Args:
        quotas_at: level -> quotas, none of which rises with the level.
        low: level at which the sum is at least ``total``.
        high: level at which it is at most that.
        total: sum of the result.

    >>> solved(lambda x: [4.0 - x, 6.0 if x < 1 else 2.0], 0.0, 4.0, 7.0)
    [3.0, 4.0]
    """
    above, below = quotas_at(low), quotas_at(high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        quotas = quotas_at(middle)
        if math.fsum(quotas) >= total:
            low, above = middle, quotas
        else:
            high, below = middle, quotas
    more, less = math.fsum(above), math.fsum(below)
    share = 1.0 if more <= less else min(max((total - less) / (more - less), 0.0), 1.0)
    return [b + share * (a - b) for a, b in zip(above, below, strict=True)]


def row_counts(total: int, rows: int, limits: Sequence[int] | None = None) -> list[int]:
    """Return how many pieces each row keeps: as equal as whole numbers can be, the first rows one more.

    Args:
        total: of all rows.
        rows: how many there are.
        limits: most that each row may keep; what a row cannot take goes to the others, again as equally as possible.

    Raises:
        InputError: the limits leave no room for ``total``.

    >>> row_counts(7, 3)
    [3, 2, 2]
    >>> row_counts(7, 3, [1, 9, 9])
    [1, 3, 3]
    """
    if limits is None:
        return [total // rows + (row < total % rows) for row in range(rows)]
    if not 0 <= total <= sum(limits):
        raise InputError(f"cannot share {total} pieces among rows with room for {sum(limits)}")
    low, high = 0, total + 1  # what rows have that are not full: the largest number that all of them can have
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(min(limit, middle) for limit in limits) <= total else (low, middle)
    counts = [min(limit, low) for limit in limits]
    left = total - sum(counts)
    more = [row for row, limit in enumerate(limits) if limit > low][:left]
    return [n + (row in more) for row, n in enumerate(counts)]


def guard(keep: Sequence[int], layers: Sequence[Layer], minimum: int = 1) -> tuple[list[int], list[str]]:
    """Raise every layer to at least ``minimum`` pieces, at the cost of the others in proportion to what they can spare.

    A layer with fewer pieces than ``minimum`` keeps them all. The total is unchanged unless the others cannot spare enough; then
    it is as small as the minimum allows.

    Args:
        keep: pieces kept by each layer.
        layers: the layers.
        minimum: pieces that no layer goes below.

    Returns:
        the new counts, and the names of the layers that were raised.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (3, 4)), 12) for name in "abc"]
    >>> guard([9, 0, 3], layers)
    ([8, 1, 3], ['b'])
    """
    floors = [min(minimum, layer.pieces) for layer in layers]
    missing = sum(max(low - n, 0) for low, n in zip(floors, keep, strict=True))
    spare = [max(n - low, 0) for low, n in zip(floors, keep, strict=True)]
    available = sum(spare)
    given = [0] * len(spare)
    if missing and available:
        share = min(missing / available, 1.0)
        given = largest_remainder([n * share for n in spare], min(missing, available), spare)
    raised = [layer.name for low, n, layer in zip(floors, keep, layers, strict=True) if n < low]
    return [max(n, low) - out for low, n, out in zip(floors, keep, given, strict=True)], raised
