"""Whether the examples agree that a weight is not zero."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency
from niwaki.statistics import GradientMean, GradientSquare, Statistic


class TStatistic(Saliency):
    """How far a weight is from zero after a step, against how much the examples disagree about that step.

    The published statistic is the logarithm of this ratio, which ranks alike. A weight that is zero, and that no example moves, has the
    score 0; one that no two examples disagree about is infinite.

    Source: Finnoff, Hergert, Zimmermann 1993.

    >>> import torch
    >>> from niwaki.saliency import Observation, TStatistic
    >>> from niwaki.statistics import GradientMean, GradientSquare
    >>> known = {GradientMean(): torch.tensor([1.0, 0.0]), GradientSquare(): torch.tensor([5.0, 1.0])}
    >>> seen = Observation("weight", torch.tensor([2.1, 0.4]), statistics=known)
    >>> TStatistic(learning_rate=0.1).score(seen, lambda values: values).round(decimals=6)
    tensor([10.,  4.], dtype=torch.float64)

    Attributes:
        learning_rate: ``eta`` of the step.
        gradients: how many examples; None: all of the data.
    """

    name = "t_statistic"
    equation = "s = |w - η E[g]| / (η √(E[g²] - E[g]²)), over the gradients g of single examples, summed over the piece"
    source = "Finnoff et al. 1993; Prechelt 1997"
    effort = "a backward pass for each example, two numbers for each weight"
    advice = "weights that may be zero by chance, in small networks that overfit; at any time of a training"

    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.01
    gradients: Annotated[int, Field(ge=2)] | None = None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Mean and mean square of the gradients of single examples."""
        return (GradientMean(gradients=self.gradients), GradientSquare(gradients=self.gradients))

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores."""
        mean, square = (seen.of(request).to(torch.float64) for request in self.statistics)
        spread = (square - mean.square()).clamp_min(0.0).sqrt()
        distance = (seen.weight.to(torch.float64) - self.learning_rate * mean).abs()
        return reduce(torch.where(distance == 0.0, 0.0, distance / (self.learning_rate * spread)))
