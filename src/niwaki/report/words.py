"""How numbers read: values with their units, changes, and means over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from niwaki.metrics.units import NOTHING, plain, scaled
from niwaki.training.record import Measure

_COSTS = {"bytes": ("smaller", "larger"), "bits": ("smaller", "larger"), "FLOPs": ("fewer", "more"), "milliseconds": ("faster", "slower")}

_LITTLE = 1.1
"""Factors below it need two digits to say something."""


def tick(value: float) -> str:
    """Return a round number as it stands on an axis.

    >>> tick(0), tick(0.05), tick(20000), tick(-1500000)
    ('0', '0.05', '20 k', '-1.5 M')
    """
    if abs(value) < 1000:
        return f"{value:g}"
    digits, prefix = scaled(abs(value)).split(" ")
    return f"{'-' if value < 0 else ''}{float(digits):g} {prefix}"


def change(measure: Measure) -> str:
    """Say how the sparse model differs from the dense one: in points for shares, as a factor for costs; "" where neither says much.

    A cost whose factor rounds to 1.00 is "the same".
    """
    if measure.dense is None or measure.sparse is None:
        return ""
    if measure.unit == "share" and measure.higher_is_better is not None:
        return points(measure.sparse - measure.dense)
    if measure.unit in _COSTS and measure.sparse and measure.dense:
        factor = max(measure.dense / measure.sparse, measure.sparse / measure.dense)
        digits = 2 if measure.unit == "milliseconds" or factor < _LITTLE else 1  # times often differ by little
        told = f"{factor:.{digits}f}"
        less, more = _COSTS[measure.unit]
        return "the same" if told == "1.00" else f"{told}× {less if measure.dense > measure.sparse else more}"
    if measure.unit == "number" and measure.higher_is_better is not None:
        return plain(measure.sparse - measure.dense, "+")
    return ""


def points(difference: float) -> str:
    """Return a difference of two shares in percentage points.

    >>> points(-0.005)
    '-0.50 points'
    """
    return f"{100 * difference:+.2f} points"


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation, with n - 1 in the denominator; None for fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def difference(values: Sequence[float], unit: str) -> str:
    """Return the mean of differences ± their standard deviation; shares in points.

    >>> difference([-0.01, -0.03], "share"), difference([0.25], "number"), difference([], "number")
    ('-2.00 ± 1.41 points', '+0.2500', '-')
    """
    if not values:
        return NOTHING
    around = deviation(values)
    if unit == "share":
        return f"{100 * fmean(values):+.2f}{'' if around is None else f' ± {100 * around:.2f}'} points"
    return plain(fmean(values), "+") + ("" if around is None else f" ± {plain(around)}")
