"""Streaming accumulators: what a mean, a variance or a sum over steps has to remember, and no more.

All accumulate in float64, merge with another that saw other data, and can be saved (``state_dict``: tensors and numbers).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from niwaki.errors import InputError
from niwaki.ranks import world_size


class Mean:
    """Mean of observations that arrive as sums: over all of them, over a window of the last updates, or fading exponentially.

    ``value = Σ_t d^(T-t) s_t / Σ_t d^(T-t) n_t`` for sums s_t of n_t observations: with decay d < 1 and equal n_t that is the
    bias-corrected exponential moving average.

    Args:
        decay: weight of the past at each update, in (0, 1].
        window: how many updates count; None: all.

    Raises:
        InputError: a decay or a window out of range, or both.

    >>> mean = Mean()
    >>> mean.update(torch.tensor([1.0, 5.0]), 2)
    >>> mean.update(torch.tensor([3.0, 0.0]), 2)
    >>> mean.value().tolist()
    [1.0, 1.25]
    """

    def __init__(self, *, decay: float = 1.0, window: int | None = None) -> None:
        if not 0 < decay <= 1 or (window is not None and (window < 1 or decay < 1)):
            raise InputError(f"a mean takes a decay in (0, 1] or a window of at least 1 update, got decay {decay} and window {window}")
        self.decay = decay
        self.window = window
        self._totals: deque[Tensor] = deque(maxlen=window or 1)
        self._counts: deque[float] = deque(maxlen=window or 1)

    @property
    def count(self) -> float:
        """Observations so far, each with its weight."""
        return sum(self._counts)

    def update(self, total: Tensor, count: float) -> None:
        """Take in ``count`` observations by their sum."""
        if self.window is not None or not self._totals:
            self._totals.append(total.to(torch.float64, copy=True))
            self._counts.append(float(count))
        else:
            self._totals[0].mul_(self.decay).add_(total)
            self._counts[0] = self._counts[0] * self.decay + count

    def value(self) -> Tensor:
        """Return the mean, float64.

        Raises:
            InputError: there was no observation.
        """
        if not self.count:
            raise InputError("a mean of no observations was asked for; update it first")
        total = self._totals[0]
        for more in list(self._totals)[1:]:
            total = total + more
        return total / self.count

    def merge(self, other: Mean) -> None:
        """Take in what another has seen, update by update; the result is as if each update had brought both sums.

        Raises:
            InputError: the two differ in their decay, their window, or the number of updates in it.
        """
        if (self.decay, self.window) != (other.decay, other.window) or (self._totals and len(self._totals) != len(other._totals)):
            raise InputError("only means with the same decay, window and number of updates can be merged")
        if self._totals:
            for total, theirs in zip(self._totals, other._totals, strict=True):
                total.add_(theirs)
            self._counts = deque((a + b for a, b in zip(self._counts, other._counts, strict=True)), self._counts.maxlen)
        else:
            self.load_state_dict(other.state_dict())

    def all_reduce(self) -> None:
        """Merge with those of all ranks; every rank then has the same. Each must have been updated."""
        if world_size() == 1:
            return
        for total in self._totals:
            dist.all_reduce(total)
        counts = torch.tensor(list(self._counts), dtype=torch.float64, device=self._totals[0].device)
        dist.all_reduce(counts)
        self._counts = deque(counts.tolist(), self._counts.maxlen)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: sums and numbers of observations, oldest first."""
        return {"totals": [total.clone() for total in self._totals], "counts": list(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._totals = deque((total.clone() for total in state["totals"]), self._totals.maxlen)
        self._counts = deque(state["counts"], self._counts.maxlen)


class Covariance:
    """Mean and covariance of vectors, or the variance of each entry alone, without cancellation.

    ``M ← M + M_b + δ δᵀ n n_b / (n + n_b)`` with ``δ = mean_b - mean`` (Chan, Golub, LeVeque 1979).

    Args:
        full: all entries with each other; otherwise each with itself.

    >>> variance = Covariance(full=False)
    >>> variance.update(torch.tensor([[1.0], [2.0]]))
    >>> variance.update(torch.tensor([[6.0]]))
    >>> variance.mean.item(), round(variance.value().item(), 4)
    (3.0, 4.6667)
    """

    def __init__(self, *, full: bool) -> None:
        self.full = full
        self.count = 0.0
        self.mean = torch.zeros(())
        self._scatter = torch.zeros(())

    def update(self, values: Tensor) -> None:
        """Take in observations ``[observations, entries]``."""
        if not len(values):
            return
        values = values.to(torch.float64)
        mean = values.mean(dim=0)
        apart = values - mean
        self._add(float(len(values)), mean, apart.T @ apart if self.full else apart.square().sum(dim=0))

    def value(self, *, unbiased: bool = False) -> Tensor:
        """Return ``[entries, entries]``, or ``[entries]`` when not full; the denominator is the number of observations (less one).

        Raises:
            InputError: there were too few observations.
        """
        if self.count <= unbiased:
            raise InputError(f"a variance of {int(self.count)} observations was asked for; update it first")
        return self._scatter / (self.count - unbiased)

    def merge(self, other: Covariance) -> None:
        """Take in what another has seen."""
        assert self.full == other.full
        if other.count:
            self._add(other.count, other.mean.clone(), other._scatter.clone())

    def all_reduce(self) -> None:
        """Merge with those of all ranks; every rank then has the same. Each must have been updated."""
        if world_size() == 1:
            return
        count = torch.tensor(self.count, dtype=torch.float64, device=self.mean.device)
        mean = self.mean * self.count
        dist.all_reduce(count)
        dist.all_reduce(mean)
        mean /= count
        self._scatter += self._outer(self.mean - mean) * self.count
        dist.all_reduce(self._scatter)
        self.count, self.mean = float(count), mean

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return {"count": self.count, "mean": self.mean.clone(), "scatter": self._scatter.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.count, self.mean, self._scatter = float(state["count"]), state["mean"].clone(), state["scatter"].clone()

    def _outer(self, difference: Tensor) -> Tensor:
        return torch.outer(difference, difference) if self.full else difference.square()

    def _add(self, count: float, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self._scatter = count, mean, scatter
            return
        both = self.count + count
        difference = mean - self.mean
        self._scatter += scatter
        self._scatter += self._outer(difference) * (self.count * count / both)
        self.mean = self.mean + difference * (count / both)
        self.count = both
