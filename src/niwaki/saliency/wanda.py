"""Weights times the size of what they read."""

from __future__ import annotations

from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency, at_least_float32
from niwaki.statistics import InputSquare, Statistic


class Wanda(Saliency):
    """Size of a weight times the root mean square of what it reads.

    Rows (outputs) are ranked by themselves in the paper: ``allocation: {uniform: {per: row}}``. It is the diagonal form of the optimal
    brain surgeon for one layer, ``√(w² H_jj)``.

    Source: Sun, Liu, Bair, Kolter 2024 (Wanda).

    >>> import torch
    >>> seen = Observation("fc.weight", torch.tensor([[3.0, -1.0]]), statistics={InputSquare(): torch.tensor([[1.0, 16.0]])})
    >>> Wanda().score(seen, lambda values: values)
    tensor([[3., 4.]])
    """

    name = "wanda"
    equation = "s = |w_ij| √(E x_j²)"
    source = "Sun, Liu, Bair, Kolter 2024"
    effort = "forward passes only; one number a column"
    advice = "large pretrained networks at half of the weights or N:M, when weights are not to change"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Mean square of each column that a weight reads."""
        return (InputSquare(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return the sum over each piece; NaN where the data or weights are."""
        return reduce(at_least_float32(seen.weight).abs() * seen.of(InputSquare()).sqrt())
