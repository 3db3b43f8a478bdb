"""Scores that look at how much can flow through a network, without data."""

import torch
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency
from niwaki.statistics import Statistic, SynapticFlow


class SynFlow(Saliency):
    """Synaptic flow: how much of all paths from inputs to outputs, each as strong as the product of its weights, goes through a piece.

    On chains without biases the scores of every layer have the same sum, so that a layer of few weights has high ones. Pruned in many
    rounds with fresh scores (the paper's 100, exponential), with a global ranking, no layer is emptied before all are; in a single round
    some are. No data are needed but the shape of an input.

    Source: Tanaka, Kunin, Yamins, Ganguli 2020.

    >>> import torch
    >>> from niwaki.saliency import Observation, SynFlow
    >>> from niwaki.statistics import SynapticFlow
    >>> seen = Observation("weight", torch.tensor([-3.0, 1.0]), statistics={SynapticFlow(): torch.tensor([1.0, 2.0])})
    >>> SynFlow().score(seen, lambda values: values)
    tensor([3., 2.], dtype=torch.float64)
    """

    name = "synflow"
    equation = "s = Σ |w| ∂R/∂|w| over the piece, R = 1ᵀ f_|w|(1)"
    source = "Tanaka et al. 2020"
    effort = "a forward and a backward pass for each round, on one input of ones"
    advice = "before training, without data, at very high sparsity; in a hundred rounds, for at once it empties layers"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The gradient of the synaptic flow."""
        return (SynapticFlow(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores."""
        return reduce((seen.of(SynapticFlow()).to(torch.float64) * seen.weight.to(torch.float64)).abs())
