"""Scores that add up what training has done to the weights, step by step, since the sparsifier was attached."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency
from niwaki.statistics import InitialWeight, Movement, PathSensitivity, Statistic, WeightChange


class AccumulatedMovement(Saliency):
    """Whether training has moved a weight away from zero, or towards it, summed over the steps.

    It is the score that movement pruning learns with the straight-through estimator, for a learning rate of 1 and a dense forward pass.
    For transfer learning it beats the size of weights, which pretraining made.

    Source: Sanh, Wolf, Rush 2020.

    >>> import torch
    >>> from niwaki.saliency import AccumulatedMovement, Observation
    >>> from niwaki.statistics import Movement
    >>> seen = Observation("weight", torch.zeros(2), statistics={Movement(): torch.tensor([2.0, -1.0])})
    >>> AccumulatedMovement().score(seen, lambda values: values.sum())
    tensor(1., dtype=torch.float64)

    Attributes:
        decay: of earlier steps (0.8 in skeletonization, with units: Mozer & Smolensky 1988); None: all steps count alike.
    """

    name = "accumulated_movement"
    equation = "s = -Σ_t g_t w_t, or s <- d s - (1 - d) g_t w_t, summed over the piece"
    source = "Sanh et al. 2020"
    effort = "a number for each weight, added to at every step"
    advice = "fine-tuning, where large pretrained weights may matter little for the new task"

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The movement of each weight."""
        return (Movement(self.decay),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores."""
        return reduce(seen.of(Movement(self.decay)).to(torch.float64))


class TotalChange(Saliency):
    """How far training has moved a weight altogether, there and back: what hardly moved was not needed for the task.

    Source: Hoefler, Alistarh, Ben-Nun, Dryden, Peste 2021, section 3.4 (total weight change); Golub, Lemieux, Lis 2019.

    >>> import torch
    >>> from niwaki.saliency import Observation, TotalChange
    >>> from niwaki.statistics import WeightChange
    >>> seen = Observation("weight", torch.zeros(2), statistics={WeightChange(): torch.tensor([2.0, 1.0])})
    >>> TotalChange().score(seen, lambda values: values)
    tensor([2., 1.], dtype=torch.float64)
    """

    name = "weight_change"
    equation = "s = Σ_t |w_(t+1) - w_t|, summed over the piece"
    source = "Hoefler et al. 2021"
    effort = "two numbers for each weight, added to at every step"
    advice = "transfer to another task, where what does not move is not needed"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The path that each weight has covered."""
        return (WeightChange(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores."""
        return reduce(seen.of(WeightChange()).to(torch.float64))


class Karnin(Saliency):
    """Rise of the loss when a weight is removed, extrapolated from what the weight's own path has done to it.

    The path from w_0 to w has lowered the loss by about -Σ g Δw; that from 0 to w is w / (w - w_0) times as long. A weight that is where
    it began has no such path, and the score 0, as has a weight that is zero.

    Source: Karnin 1990.

    >>> import torch
    >>> from niwaki.saliency import Karnin, Observation
    >>> from niwaki.statistics import InitialWeight, PathSensitivity
    >>> known = {PathSensitivity(): torch.tensor([-1.0, -2.0]), InitialWeight(): torch.tensor([1.0, 5.0])}
    >>> Karnin().score(Observation("weight", torch.tensor([3.0, 5.0]), statistics=known), lambda values: values)
    tensor([1.5000, 0.0000], dtype=torch.float64)
    """

    name = "karnin"
    equation = "s = -Σ_t g_t (w_(t+1) - w_t) · w / (w - w_0), summed over the piece"
    source = "Karnin 1990"
    effort = "four numbers for each weight, added to at every step"
    advice = "the end of a training that was watched from the start, without a pass over data"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What the path of each weight has done, and where it began."""
        return (PathSensitivity(), InitialWeight())

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores, which are negative where moving the weight has raised the loss."""
        weight = seen.weight.to(torch.float64)
        way = weight - seen.of(InitialWeight()).to(torch.float64)
        ratio = torch.where(way == 0.0, 0.0, weight / torch.where(way == 0.0, 1.0, way))
        return reduce(-seen.of(PathSensitivity()).to(torch.float64) * ratio)
