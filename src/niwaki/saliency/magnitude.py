"""Scores that look at the weights alone."""

from typing import Literal

import torch
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency, at_least_float32


class Magnitude(Saliency):
    """Size of the weights of a piece.

    ``l1``: sum of \\|w\\|; ``l2``: square root of the sum of w². Both are \\|w\\| itself where pieces are single weights, so that the
    smallest denormals keep their order. Sums are taken in float64.

    Source: Hagiwara 1993, Han et al. 2015 (weights); Narang et al. 2017 (blocks); Li et al. 2017 (filters).

    >>> import torch
    >>> from niwaki.saliency import Magnitude, Observation
    >>> Magnitude().score(Observation("weight", torch.tensor([-2.0, 1.0])), lambda values: values)
    tensor([2., 1.])
    """

    name = "magnitude"
    equation = "s = Σ |w| (l1) or √(Σ w²) (l2) over the piece"
    source = "Hagiwara 1993; Han et al. 2015; Li et al. 2017"

    norm: Literal["l1", "l2"] = "l1"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return the norm of each piece: float64, or the dtype of the weights (float32 at least) where pieces are single weights."""
        size = at_least_float32(seen.weight).abs()
        pieces = reduce(size)
        if self.norm == "l1" or pieces.numel() == size.numel():
            return pieces
        return reduce(size.to(torch.float64).square()).sqrt()
