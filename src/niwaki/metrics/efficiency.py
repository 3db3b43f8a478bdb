"""How much accuracy a model gets out of its parameters, and how that changes with sparsity.

Accuracies are shares in [0, 1]. The raw accuracy and the number of active parameters belong beside every number from here: one ratio of
the two cannot say whether a model is good or merely small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from niwaki.errors import InputError, did_you_mean

MILLION = 1_000_000

EPSILONS = (0.01, 0.05)
"""Losses of accuracy for which slack is told: 1 and 5 points."""

TOLERANCE = 0.01
"""Loss of accuracy, 1 point, beyond which a model counts as collapsed (region C of Occam's hill)."""

NOISE = 2.0
"""Standard errors that a difference must exceed to count as a loss: about 95 % of differences that are chance alone stay within."""

_ROUNDING = 1e-9

ACCURACY_DENSITY = "top-1 accuracy in per cent / million active parameters (Bianco et al. 2018)"


def odds(accuracy: float) -> float:
    """Right answers per wrong one, ``a / (1 - a)``; infinite when all are right."""
    return math.inf if accuracy == 1 else accuracy / (1 - accuracy)


def bits(accuracy: float) -> float:
    """How often the error was halved, ``-log2(1 - a)``: 1 at 50 %, 2 at 75 %; infinite when all are right."""
    return math.inf if accuracy == 1 else -math.log2(1 - accuracy)


def identity(accuracy: float) -> float:
    """The accuracy itself: every point is as hard as any other."""
    return accuracy


HARDNESS: Mapping[str, Callable[[float], float]] = {"odds": odds, "bits": bits, "identity": identity}
"""Functions that say how hard an accuracy is to reach: the last points are harder than the first."""

EQUATIONS: Mapping[str, str] = {"odds": "a / (1 - a)", "bits": "-log2(1 - a)", "identity": "a"}
"""The same in words."""


def accuracy_density(accuracy: float, active_parameters: int) -> float:
    """Return top-1 accuracy in per cent for each million of active parameters: ``100 a / (active / 10^6)``.

    Raises:
        InputError: an accuracy outside [0, 1], or no active parameter.

    Source: Bianco, Cadene, Celona & Napoletano 2018, with active parameters in place of all.

    >>> accuracy_density(0.76, 25_600_000)
    2.96875
    """
    return 100 * parameter_efficiency(accuracy, active_parameters, identity)


def parameter_efficiency(accuracy: float, active_parameters: int, hardness: str | Callable[[float], float] = "odds") -> float:
    """Return the hardness of an accuracy for each million of active parameters: ``h(a) / (active / 10^6)``.

    Plain accuracy density rewards tiny, weak models, since the first points of accuracy are cheap. A hardness function first maps the
    accuracy to what reaching it is worth.

    Args:
        accuracy: share of right answers.
        active_parameters: elements of all parameters that are not masked.
        hardness: a name in ``HARDNESS``, or any function of the accuracy.

    Raises:
        InputError: an accuracy outside [0, 1], no active parameter, or an unknown name.

    Source: Hoefler et al. 2021, hardness-normalized parameter efficiency; the hardness function is the user's choice.

    >>> parameter_efficiency(0.75, 2_000_000, "odds"), parameter_efficiency(0.75, 2_000_000, "bits")
    (1.5, 1.0)
    """
    if active_parameters < 1:
        raise InputError(f"efficiency: needs at least one active parameter, got {active_parameters}")
    if isinstance(hardness, str):
        if hardness not in HARDNESS:
            raise InputError(f"hardness: there is no {hardness!r}; {did_you_mean(hardness, HARDNESS)}")
        hardness = HARDNESS[hardness]
    return hardness(_checked(accuracy)) / (active_parameters / MILLION)


def slack(runs: Sequence[tuple[float, float]], dense_accuracy: float, epsilon: float) -> float:
    """Return the share of the parameters that can go for at most ``epsilon`` of accuracy: ``1 - nnz_min(epsilon) / n``.

    ``n`` is the number of all parameters, and ``nnz_min`` the smallest number of active ones among the runs with
    ``accuracy >= dense_accuracy - epsilon``, so this is the largest sparsity of all parameters among these; 0 when none of them is that
    accurate (the dense model always is).

    Args:
        runs: (sparsity of all parameters, accuracy) of each, with several seeds the mean accuracy at a sparsity.
        dense_accuracy: of the model that nothing was removed from.
        epsilon: loss of accuracy that is accepted: 0.01 is one point.

    Raises:
        InputError: a sparsity or accuracy outside [0, 1], or a negative ``epsilon``.

    Source: Hoefler et al. 2021, parameter slack.

    >>> slack([(0.5, 0.91), (0.9, 0.895), (0.98, 0.7)], dense_accuracy=0.90, epsilon=0.01)
    0.9
    """
    if epsilon < 0:
        raise InputError(f"slack: epsilon must be at least 0, got {epsilon}")
    least = _checked(dense_accuracy) - epsilon - _ROUNDING
    return max((_checked(sparsity, "sparsity") for sparsity, accuracy in runs if _checked(accuracy) >= least), default=0.0)


@dataclass(frozen=True)
class Regions:
    """The three regions of Occam's hill, from ``regions``.

    Attributes:
        letters: the region, ``A``, ``B`` or ``C``, of each sparsity, in the order they were given.
        fitted: the non-increasing fit to the accuracies, in the same order.
        a_ends: where A ends: midway between its last measured sparsity and the next one; None when nothing was measured beyond it.
        c_begins: where C begins, likewise; None when no measured sparsity is in it.
    """

    letters: tuple[str, ...]
    fitted: tuple[float, ...]
    a_ends: float | None
    c_begins: float | None


def regions(
    sparsities: Sequence[float],
    means: Sequence[float],
    standard_errors: Sequence[float] | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> Regions:
    """Divide sparsities into the three regions of Occam's hill by the accuracy there.

    First a curve that never rises is fitted to the mean accuracies over increasing sparsity (least squares; pool adjacent violators), so
    that one lucky seed does not cut a region in two: a rise at low sparsity is pooled with the dense model, to a level above it. Then

    - **A**, as good as dense or better: up to the first sparsity at which the fit is below the dense mean by more than chance explains,
      ``2 sqrt(SE² + SE_dense²)``, or by more than ``tolerance`` where that is less;
    - **B**, slightly worse: after A, while the fit is at most ``tolerance`` below the dense mean;
    - **C**, collapse: the rest.

    Args:
        sparsities: each once, in any order; 0 stands for the dense model and must be there.
        means: mean accuracy over the seeds at each sparsity.
        standard_errors: of these means (standard deviation / sqrt(seeds)); zeros when left out, as with one seed.
        tolerance: loss of accuracy at which C begins: 0.01 is one point.

    Raises:
        InputError: lengths that differ, a sparsity twice or none that is 0, or a number outside its range.

    Source: Hoefler et al. 2021, figure 4, for the regions (after Rasmussen & Ghahramani 2001, for the name); Ayer et al. 1955, for the fit.

    >>> regions([0, 0.5, 0.9, 0.95, 0.99], [0.90, 0.91, 0.895, 0.87, 0.5]).letters
    ('A', 'A', 'B', 'C', 'C')
    """
    errors = [0.0] * len(means) if standard_errors is None else standard_errors
    if not len(sparsities) == len(means) == len(errors):
        raise InputError(
            f"regions: {len(sparsities)} sparsities need as many means and standard errors, got {len(means)} and {len(errors)}"
        )
    if len(set(sparsities)) != len(sparsities):
        raise InputError("regions: a sparsity is given twice; give each once, with the mean over its seeds")
    if 0 not in sparsities:
        raise InputError("regions: the dense model is missing; give its accuracy at sparsity 0")
    if tolerance < 0 or not all(math.isfinite(error) and error >= 0 for error in errors):
        raise InputError("regions: the tolerance and the standard errors must be finite and at least 0")
    order = sorted(range(len(sparsities)), key=lambda i: _checked(sparsities[i], "sparsity"))
    dense, dense_error = means[order[0]], errors[order[0]]
    fit = _non_increasing([_checked(means[i]) for i in order])
    letters = []
    for value, error in zip(fit, (errors[i] for i in order), strict=True):
        noise = min(NOISE * math.hypot(error, dense_error), tolerance)
        if value < dense - tolerance - _ROUNDING:
            letters.append("C")
        elif "B" in letters or value < dense - noise - _ROUNDING:
            letters.append("B")
        else:
            letters.append("A")
    place = {i: position for position, i in enumerate(order)}
    middles = {
        (first, second): (sparsities[i] + sparsities[j]) / 2
        for (i, j), (first, second) in zip(pairwise(order), pairwise(letters), strict=True)
        if first != second
    }
    return Regions(
        letters=tuple(letters[place[i]] for i in range(len(order))),
        fitted=tuple(fit[place[i]] for i in range(len(order))),
        a_ends=next((middle for (first, _), middle in middles.items() if first == "A"), None),
        c_begins=next((middle for (_, second), middle in middles.items() if second == "C"), None),
    )


def _non_increasing(values: Sequence[float]) -> list[float]:
    """Return the non-increasing sequence nearest to ``values`` in least squares: neighbours that rise are replaced by their mean."""
    blocks: list[tuple[float, int]] = []  # sum and length
    for value in values:
        total, length = value, 1
        while blocks and blocks[-1][0] * length < total * blocks[-1][1]:
            before, count = blocks.pop()
            total, length = total + before, length + count
        blocks.append((total, length))
    return [total / length for total, length in blocks for _ in range(length)]


def _checked(value: float, what: str = "accuracy") -> float:
    if not 0 <= value <= 1:
        raise InputError(f"{what}: must be a share in [0, 1], got {value}")
    return value
