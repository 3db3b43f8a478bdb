"""Coresets of units or weights: how likely each is drawn, and what a drawn one stands for.

A sample without replacement, drawn one after the other with probabilities proportional to p, is the m largest of ``ln p_j + G_j`` with
Gumbel noise G. What was drawn is weighted so that every sum over all has the right expectation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sensitivities(weight: Tensor, activity: Tensor) -> Tensor:
    """Return how large each unit's part of the input of any reader can be: ``max_x max_o |w_oj| a_j(x) / Σ_k |w_ok| a_k(x)``.

    Args:
        weight: ``[units, outputs]``, what each output reads of each unit.
        activity: ``[cases, units]``: sizes of activations, for each example; or one bound for all.
    """
    return edges(weight, activity).amax(dim=1)


def edges(weight: Tensor, activity: Tensor) -> Tensor:
    """Return how large each weight's part of the sum that it is in can be: ``max_x |w_oj| a_j(x) / Σ_k |w_ok| a_k(x)``, float64.

    Args:
        weight: ``[inputs, outputs]``.
        activity: ``[cases, inputs]``.

    >>> edges(torch.tensor([[1.0], [-3.0]]), torch.tensor([[1.0, 1.0], [6.0, 2.0]])).tolist()
    [[0.5], [0.75]]
    """
    size = weight.to(torch.float64).abs()
    largest = torch.zeros_like(size)
    for case in activity.to(torch.float64).abs():
        parts = size * case[:, None]
        total = parts.sum(dim=0)
        largest = torch.maximum(largest, parts / torch.where(total > 0, total, 1.0))
    return largest


def representation(likely: Tensor, drawn: Tensor) -> Tensor:
    """Return by what each drawn one is multiplied so that sums are right on average: ``P(S | j first) / P(S)`` of the drawn set S.

    These are Murthy's weights (1957): for any y, the expectation of ``Σ_S weight_j y_j`` over samples S is exactly ``Σ_j y_j``. With
    exponential clocks of rates p, ``P(S) = ∫ r e^(-r t) Π_S (1 - e^(-p_i t)) dt``, r the rates of those not drawn together, and in
    ``P(S | j first)`` the factor of j is missing.

    Args:
        likely: p, not negative, float64, of any shape and sum.
        drawn: which were drawn, bool.

    Returns:
        float64, 1 where not drawn; and everywhere where nothing likely was left out.

    Source: Murthy 1957; Kool, van Hoof, Welling 2020 (the integral).

    >>> representation(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([True, False, False]))  # of a single draw: 1 / p
    tensor([2.0000, 1.0000, 1.0000], dtype=torch.float64)
    """
    likely = likely.to(torch.float64)
    weights = torch.ones_like(likely)
    rest = float(likely[~drawn].sum())
    rates = likely[drawn]
    if rest <= 0.0 or not (rates > 0).any():
        return weights
    rates = rates / rest  # the time is measured in mean waiting times for one that was not drawn
    possible = rates[rates > 0]
    # The integrand over the logarithm of time is smooth and falls off on both sides, where sums of equal steps are exact to rounding.
    low, high = -46.0 - float(possible.max().log().clamp(min=0.0)), 7.0
    for _ in range(3):  # coarse, to find where it matters, then fine
        log_time = torch.linspace(low, high, STEPS, dtype=torch.float64, device=likely.device)
        log_set = log_time - log_time.exp()
        for part in torch.split(possible, CHUNK):
            log_set += _log_arrived(part, log_time).sum(dim=0)
        high_enough = log_time[log_set > log_set.max() - 60.0]
        step = (high - low) / (STEPS - 1)
        low, high = float(high_enough.min()) - step, float(high_enough.max()) + step
    share = (log_set - log_set.logsumexp(dim=0)).exp()
    found = [(share * (-_log_arrived(part, log_time)).exp()).sum(dim=1) for part in torch.split(possible, CHUNK)]
    inside = torch.ones_like(rates)
    inside[rates > 0] = torch.cat(found)
    weights[drawn] = inside
    return weights


STEPS = 401
"""Points at which an integral over time is summed."""
CHUNK = 4096
"""Weights whose arrivals are in memory together."""


def _log_arrived(rates: Tensor, log_time: Tensor) -> Tensor:
    """Return ``ln (1 - e^(-p t))``, ``[rates, times]``."""
    return (-(-(rates[:, None] * log_time.exp())).expm1()).log()
