"""Scores that training itself learned."""

import torch
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency, at_least_float32


class Score(Saliency):
    """The score that the relaxation learns for each weight, summed over the piece.

    Source: Sanh et al. 2020 (movement pruning).

    >>> import torch
    >>> from niwaki.saliency import Observation, Score
    >>> Score().score(Observation("weight", torch.zeros(2), score=torch.tensor([-1.0, 2.0])), lambda values: values)
    tensor([-1.,  2.])
    """

    name = "score"
    equation = "s = Σ learned score over the piece"
    source = "Sanh et al. 2020"
    effort = "a trained number for each weight"
    advice = "fine-tuning of pretrained models, with a relaxation that learns scores"
    needs = frozenset({"score"})

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores, or the dtype of the learned ones (float32 at least) where pieces are single weights.

        Raises:
            InputError: no relaxation learns a score for the tensor.
        """
        return reduce(at_least_float32(self._needed(seen.score, seen, "learned score (a relaxation that learns one is needed)")))


class SignalToNoise(Score):
    """The squared mean of each weight over its variance, which a variational relaxation learns; summed over the piece.

    Of single weights the order is that of ``score``, its logarithm; of larger pieces one clear weight outweighs many noisy ones.

    >>> import torch
    >>> from niwaki.saliency import Observation, SignalToNoise
    >>> SignalToNoise().score(Observation("weight", torch.zeros(2), score=torch.tensor([0.0, 2.0])), lambda values: values.sum())
    tensor(8.3891, dtype=torch.float64)
    """

    name = "signal_to_noise"
    equation = "s = Σ θ² / σ² over the piece"
    source = "Molchanov, Ashukha, Vetrov 2017; Graves 2011"
    effort = "a trained number for each weight"
    advice = "final cuts of variational relaxations, to whole pieces"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores.

        Raises:
            InputError: no relaxation learns a score for the tensor.
        """
        return reduce(torch.exp(self._needed(seen.score, seen, "learned score (a variational relaxation is needed)").double()))
