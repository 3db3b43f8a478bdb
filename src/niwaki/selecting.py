"""How scores and a count become a mask: the slot ``selection``.

The exact algorithm behind a count, over many tensors and processes, is :mod:`niwaki.selection`.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from niwaki.component import Component
from niwaki.errors import InputError

Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Selection(Component):
    """Base of the slot ``selection``: how scores and a count become a mask."""

    slot = "selection"

    counted: ClassVar[bool] = True
    """Whether it keeps as many pieces as the recipe's sparsity says, rather than deciding itself how many."""


class TopK(Selection):
    """Keep exactly as many pieces as asked, the best scored; equal scores keep the lower (parameter order, flat index)."""

    name = "top_k"
    equation = "M = 1 for the round((1 - S) N) largest scores, else 0"
    source = "Hagiwara 1993; Han, Pool, Tran, Dally 2015; tie rule of this library"
    effort = "a few passes over the scores"
    advice = "the default: the sparsity is met exactly"


class Threshold(Selection):
    """Keep the pieces whose score reaches a value, however many they are; one piece a tensor or group stays.

    How sparse the model gets is decided by what the scores become, so the recipe has no sparsity, and no allocation.

    Attributes:
        value: the lowest score that is kept.
    """

    name = "threshold"
    equation = "M = 1 where s >= value, else 0"
    source = "Wen, Wu, Wang, Chen, Li 2016 (SSL); Lym et al. 2019 (PruneTrain)"
    effort = "one pass over the scores"
    advice = "scores in a unit that means something, such as standard deviations, or norms that a penalty has brought to zero"
    counted = False
    single_field = "value"

    value: Finite


class Hysteresis(Selection):
    """Mask what falls below a low value, bring back what reaches a high one, and leave what is between as it is.

    The two values are multiples of ``t = max(0, mean + rate * deviation)`` of the scores of each tensor that are not zero, as they are at
    the first update. An update of a tensor happens by chance, which falls over the run. How sparse the model gets is decided by what
    the scores become, so the recipe has no sparsity, and no allocation; one piece a tensor stays.

    Attributes:
        rate: ``c``, how many standard deviations above the mean the middle is.
        low: share of the middle below which a piece is masked, at least 0.
        high: share of the middle at which it comes back, at least ``low``.
        gamma: how fast the chance of an update falls with the steps taken, at least 0.
        power: with which power, at least 0.

    >>> selection = Hysteresis(low=0.5, high=1.5)
    >>> scores, before = torch.tensor([0.1, 1.0, 1.0, 2.0]), torch.tensor([True, True, False, False])
    >>> selection.keep(scores, before, middle=1.0)
    tensor([False,  True, False,  True])
    """

    name = "hysteresis"
    equation = "M = 0 where s < a, 1 where s >= b, else as before; a = low t, b = high t; updated with chance (1 + γ step)^-power"
    source = "Guo, Yao, Chen 2016 (dynamic network surgery)"
    effort = "one pass over the scores"
    advice = "dense weights behind masks (relaxation: latent), where masks should not flicker and the sparsity may follow from the weights"
    counted = False

    rate: Finite = 0.0
    low: NotNegative = 0.9
    high: NotNegative = 1.1
    gamma: NotNegative = 0.0
    power: NotNegative = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise InputError(f"low: {self.low!r} must not be above high, {self.high!r}")
        return self

    def middle(self, number: float, total: float, squares: float) -> float:
        """Return ``t`` from the number of scores that are not zero, their sum and the sum of their squares."""
        if not number:
            return 0.0
        mean = total / number
        return max(0.0, mean + self.rate * math.sqrt(max(squares / number - mean * mean, 0.0)))

    def keep(self, scores: Tensor, before: Tensor, middle: float) -> Tensor:
        """Return which pieces are kept (bool), given those that were ``before``."""
        return (scores >= self.high * middle) | (before & (scores >= self.low * middle))

    def chance(self, step: int) -> float:
        """Return the probability of an update after so many steps."""
        return math.pow(1.0 + self.gamma * step, -self.power)


class Drawn(Selection):
    """What selections by chance have in common. A base class, itself not registered.

    Attributes:
        weights: what chances are in proportion to: the scores themselves (``score``, none may be negative), or their exponential
            (``exponential``, for learned scores that are logits). They are taken to the power of 1 / temperature.
        temperature: ``T``, above 0: towards 0 the best scores are certain, towards infinity all are alike.
    """

    weights: Literal["score", "exponential"] = "score"
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0

    def log_weights(self, scores: Tensor, name: str) -> Tensor:
        """Return the logarithms of the weights, float64; ``name`` of the tensor is for errors.

        Raises:
            InputError: a NaN, or a negative score where chances are in proportion to scores.
        """
        values = scores.to(torch.float64)
        if bool(values.isnan().any()):
            raise InputError(f"{name}: a score is NaN; its weights or statistics are not finite")
        if self.weights == "exponential":
            return values / self.temperature
        if bool((values < 0).any()):
            raise InputError(
                f"selection.{self.name}: a score of {name} is negative, and a chance cannot be; choose weights: exponential, or another"
                " saliency"
            )
        return values.log() / self.temperature


class Gumbel(Drawn):
    """Draw exactly as many pieces as asked without replacement, with chances by their scores.

    One piece after the other is drawn from those that are left, with chances in proportion to their weights. Pieces of weight 0 come last,
    by index.
    """

    name = "gumbel"
    equation = "M = 1 for the K largest of log v - log(-log u), u uniform in [0, 1); v = s^(1/T) or exp(s/T)"
    source = "Gumbel 1954; Kool, van Hoof, Welling 2019 (top-k without replacement)"
    effort = "a random number for each piece, and float64 scores"
    advice = "exploring masks while training dense weights behind them; random baselines that still follow a score"

    def keys(self, scores: Tensor, numbers: Tensor, name: str) -> Tensor:
        """Return what the largest are kept of; ``numbers`` are uniform in [0, 1)."""
        return self.log_weights(scores, name) - (-numbers.log()).log()


class Bernoulli(Drawn):
    """Draw every piece by itself, with a chance by its score; as many as asked are kept on average.

    Chances are in proportion to the weights, but never above 1, and add up to the count that the sparsity asks for. A tensor of which
    nothing is drawn keeps the piece that came nearest.
    """

    name = "bernoulli"
    equation = "M = 1 where u < p, p = min(1, e v), e such that sum p = K; v = s^(1/T) or exp(s/T), u uniform in [0, 1)"
    source = "Srinivas, Subramanya, Babu 2017 (training sparse networks); Hájek 1964 (Poisson sampling)"
    effort = "a sort of the scores in float64"
    advice = "masks whose pieces must be independent of each other; the count is met on average only"

    def chances(self, log_weights: Tensor, keep: int) -> Tensor:
        """Return the probability of each piece, of a vector; ``keep`` of them are kept on average.

        >>> Bernoulli().chances(torch.tensor([8.0, 1.0, 1.0]).log(), 2).tolist()
        [1.0, 0.5, 0.5]
        """
        if not len(log_weights):
            return log_weights
        top = log_weights.max()
        weights = (log_weights - top).exp() if bool(top.isfinite()) else (log_weights == torch.inf).to(torch.float64)
        some = int((weights > 0).sum())
        if keep >= some:  # what has no weight shares what is left
            rest = (keep - some) / max(len(weights) - some, 1)
            return torch.where(weights > 0, 1.0, rest).to(torch.float64)
        order = weights.sort(descending=True).values
        below = order.flip(0).cumsum(0).flip(0)
        certain = torch.arange(len(order), device=order.device)
        scales = (keep - certain) / below
        first = int((scales * order <= 1.0).nonzero()[0])  # as many are certain as must be
        return (weights * scales[first]).clamp(max=1.0)
