"""Scores that look at the weights alone, as they are and as they began."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency, at_least_float32
from niwaki.statistics import InitialWeight, Statistic


class Magnitude(Saliency):
    """Size of the weights of a piece.

    ``l1``: sum of \\|w\\|; ``l2``: square root of the sum of w²; ``max``: largest \\|w\\|. All are \\|w\\| itself where pieces are single
    weights, so that the smallest denormals keep their order. Sums are taken in float64.

    ``over: deviation`` divides by the standard deviation of the tensor's active weights. A selection ``threshold: q`` then removes what
    is below q standard deviations of its own layer, and layers compare by shape rather than by scale.

    Attributes:
        norm: of the weights of a piece.
        over: what the norm is divided by: nothing, or the standard deviation (denominator: their number) of the active weights.

    Source: Hagiwara 1993 (``l2`` of what reads a unit is its weights power), Han et al. 2015 (weights; ``deviation``); Narang et al. 2017
    and Kalchbrenner et al. 2018 (blocks, by sum or maximum); Li et al. 2017 (filters).

    >>> import torch
    >>> from niwaki.saliency import Magnitude, Observation
    >>> Magnitude().score(Observation("weight", torch.tensor([-2.0, 1.0])), lambda values: values)
    tensor([2., 1.])
    >>> Magnitude(over="deviation").score(Observation("weight", torch.tensor([-3.0, 1.0])), lambda values: values)
    tensor([1.5000, 0.5000], dtype=torch.float64)
    """

    name = "magnitude"
    equation = "s = Σ |w| (l1), √(Σ w²) (l2) or max |w| over the piece; over: deviation divides by std(w) of the tensor"
    source = "Hagiwara 1993; Han et al. 2015; Li et al. 2017"
    effort = "none: the weights as they are"
    advice = "trained networks with training after or between the cuts; the default, and hard to beat there"

    norm: Literal["l1", "l2", "max"] = "l1"
    over: Literal["nothing", "deviation"] = "nothing"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return the norm of each piece: float64, or the dtype of the weights (float32 at least) where pieces are single weights.

        A tensor whose active weights are all equal has no deviation, and keeps its norms.

        Raises:
            InputError: the largest weight of pieces of different sizes is asked for.
        """
        found = self._norm(seen, reduce)
        if self.over == "nothing":
            return found
        weight = seen.weight.to(torch.float64)
        deviation = (weight if seen.active is None else weight[seen.active]).std(correction=0)
        return found.to(torch.float64) / torch.where(deviation == 0, 1.0, deviation)

    def _norm(self, seen: Observation, reduce: Reduce) -> Tensor:
        size = at_least_float32(seen.weight).abs()
        pieces = reduce(size)
        if self.norm == "l1" or pieces.numel() == size.numel():
            return pieces
        if self.norm == "max":
            return reduce.rows(size).amax(dim=1).to(torch.float64).reshape(pieces.shape)
        return reduce(size.to(torch.float64).square()).sqrt()


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "movement": lambda final, initial: (final - initial).abs(),
    "magnitude_increase": lambda final, initial: final.abs() - initial.abs(),
    "large_final_same_sign": lambda final, initial: final * initial.sign(),
    "large_init": lambda final, initial: initial.abs(),
    "small_init": lambda final, initial: -initial.abs(),
    "small_final": lambda final, initial: -final.abs(),
}
"""Name -> score of each weight from its value now and at the beginning."""


class FromInit(Saliency):
    """Where the weights of a piece are, compared with where they began.

    ``movement``: \\|w - w_0\\|; ``magnitude_increase``: \\|w\\| - \\|w_0\\|, the best of those that were compared for finding lottery
    tickets; ``large_final_same_sign``: w sign(w_0), which ranks signs that have changed last, for masks of weights that keep only their
    initial signs; ``large_init``: \\|w_0\\|. ``small_init`` and ``small_final`` are controls: the negatives of sizes. (``large_final`` is
    ``magnitude``.) w_0 is the weight when the sparsifier was built.

    Source: Zhou, Lan, Liu, Yosinski 2019 (supermasks).

    >>> import torch
    >>> from niwaki.saliency import FromInit, Observation
    >>> from niwaki.statistics import InitialWeight
    >>> seen = Observation("weight", torch.tensor([3.0, -1.0]), statistics={InitialWeight(): torch.tensor([-1.0, -2.0])})
    >>> FromInit().score(seen, lambda values: values), FromInit(criterion="movement").score(seen, lambda values: values)
    (tensor([ 2., -1.], dtype=torch.float64), tensor([4., 1.], dtype=torch.float64))
    """

    name = "from_init"
    equation = "s = Σ |w| - |w_0| (magnitude_increase), |w - w_0| (movement), |w_0| (large_init), ... over the piece"
    source = "Zhou et al. 2019"
    effort = "a copy of the initial weights"
    advice = "lottery tickets, and to see what training has moved"
    single_field = "criterion"

    criterion: Literal["magnitude_increase", "movement", "large_final_same_sign", "large_init", "small_init", "small_final"] = (
        "magnitude_increase"
    )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The weights at the beginning."""
        return (InitialWeight(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores.

        Raises:
            InputError: the weights of the beginning are not known.
        """
        initial = seen.of(InitialWeight()).to(torch.float64)
        return reduce(CRITERIA[self.criterion](seen.weight.to(torch.float64), initial))
