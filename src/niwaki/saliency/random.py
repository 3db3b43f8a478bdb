"""Scores by chance: the baseline that every other score must beat."""

import torch
from torch import Tensor

from niwaki import counter
from niwaki.saliency.base import Observation, Reduce, Saliency


class Random(Saliency):
    """Uniform random numbers, one for each piece.

    They depend on seed, step, name and index of the piece alone: replicas agree, and shards of single weights agree with the whole.

    Source: Mittal et al. 2018 (as a baseline).

    >>> import torch
    >>> from niwaki.saliency import Observation, Random
    >>> Random().score(Observation("weight", torch.zeros(2)), lambda values: values).shape
    torch.Size([2])
    """

    name = "random"
    equation = "s = uniform in [0, 1)"
    source = "Mittal et al. 2018"
    effort = "none"
    advice = "the baseline that every criterion has to beat at equal training, and masks before training"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 numbers in [0, 1)."""
        pieces = reduce(torch.empty(seen.weight.shape, device="meta"))  # only the shape matters
        start = seen.start if pieces.numel() == seen.weight.numel() else 0
        stream = counter.key(seen.seed, seen.step, seen.name)
        return counter.uniform(stream, start, pieces.numel(), seen.weight.device).reshape(pieces.shape)
