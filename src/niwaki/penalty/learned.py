"""What only a relaxation can say: how probably weights and gates are active, what their posterior costs, where their thresholds are."""

from typing import Literal

import torch
from torch import Tensor

from niwaki.penalty.base import NotNegative, Penalized, Weigh, WithStrength


class ExpectedL0(WithStrength):
    """Sum of the probabilities of being active: how many weights or pieces the relaxation expects to keep.

    Of hard concrete gates it is ``Σ σ(log α - β log(-γ / ζ))``, of a learned threshold the soft count of the weights above it. It is a
    number of gates, so that strengths are those of papers that add it to the mean loss without dividing it.

    Attributes:
        of: ``gate``: single weights or pieces, as the relaxation and the recipe's granularity say.
        weigh: multiply the strength by what a gate stands for, relative to the mean: ``flops`` by its FLOPs, ``parameters`` by its weights.
    """

    name = "expected_l0"
    equation = "c Σ P(active)"
    source = "Louizos, Welling, Kingma 2018; Azarian, Bhalgat, Lee, Blankevoort 2020 (LTP, soft L0)"
    effort = "one pass over the gates"
    advice = "relaxations with gates or soft thresholds; augmented_lagrangian where a sparsity is to be met"

    apply: Literal["gradient"] = "gradient"
    of: Literal["gate"] = "gate"
    weigh: Weigh = "none"

    @property
    def reads(self) -> str:
        """The probabilities of being active."""
        return "active"

    def value(self, seen: Penalized) -> Tensor:
        """Return the sum."""
        return (seen.weight * self.factor(seen)).sum()

    def slope(self, seen: Penalized) -> Tensor:
        """Return the strength of each."""
        return torch.ones_like(seen.weight) * self.factor(seen)


class KL(WithStrength):
    """The Kullback-Leibler divergence of the posterior of all weights or gates from their prior.

    The evidence bound of a mean loss over N examples has strength 1 / N. It is hard to train from the start: ``begin`` and ``end``
    warm it up.
    """

    name = "kl"
    equation = "c Σ KL(posterior ‖ prior); c = 1 / N for a mean loss over N examples"
    source = "Kingma, Salimans, Welling 2015; Molchanov, Ashukha, Vetrov 2017; Sønderby et al. 2016 (warm-up)"
    effort = "one pass over the weights"
    advice = "variational relaxations, from a trained model or with a warm-up over the first third of the run"

    apply: Literal["gradient"] = "gradient"

    @property
    def reads(self) -> str:
        """The divergences."""
        return "divergence"

    def value(self, seen: Penalized) -> Tensor:
        """Return the sum."""
        return (seen.weight * self.factor(seen)).sum()

    def slope(self, seen: Penalized) -> Tensor:
        """Return the strength of each."""
        return torch.ones_like(seen.weight) * self.factor(seen)


class LowThreshold(WithStrength):
    """A price on low thresholds, so that thresholds that are learned rise: ``exp(-t)`` of each, which falls as they do."""

    name = "threshold"
    equation = "c Σ exp(-t) over the thresholds t"
    source = "Liu, Xu, Shi, Cheung, So 2020 (dynamic sparse training)"
    effort = "a pass over the thresholds"
    advice = "relaxations that learn a threshold for each row or tensor"

    apply: Literal["gradient"] = "gradient"
    strength: NotNegative = 1e-6

    @property
    def reads(self) -> str:
        """The thresholds."""
        return "threshold"

    def value(self, seen: Penalized) -> Tensor:
        """Return the sum of the prices."""
        return (torch.exp(-seen.weight) * self.factor(seen)).sum()

    def slope(self, seen: Penalized) -> Tensor:
        """Return the derivative of the price of each."""
        return -torch.exp(-seen.weight) * self.factor(seen)
