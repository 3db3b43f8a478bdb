"""Connectivity as a random walk of dense weights."""

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from niwaki.counter import key, normal, uniform
from niwaki.layout import Layout
from niwaki.relaxation.base import Moment, Relaxation

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class SoftRewiring(Relaxation):
    """Weights keep the sign that they were born with: those on the other side of zero are masked, and walk at random until they are back.

    Every weight ``w = s θ`` has a random sign ``s`` for good, a hash of the seed, its tensor and its index. Where θ is positive, it learns
    and is pulled to zero; everywhere noise moves it, and masked weights are reflected by nothing but kept above a floor. The floor is where
    the walk alone would leave a share ``density`` of all weights active. At the beginning that share is: with the sizes of the first
    weights, and the others uniformly between the floor and zero.

    The strength decides how sparse the model gets. Momentum and weight decay of the optimizer move masked weights too; the original has
    neither.

    Attributes:
        density: share of active weights at the beginning, and under the walk alone, in (0, 1).
        strength: ``α`` of the pull of active weights to zero, above 0.
        temperature: ``T`` of the noise, above 0; with the learning rate η its variance is 2 η T.

    >>> SoftRewiring(density=0.25, strength=0.5, temperature=0.1).floor
    -0.6000000000000001
    """

    name = "soft_rewiring"
    equation = "w = s max(θ, 0); θ <- max(floor, θ - η dL/dθ - η α 1[θ > 0] + √(2 η T) N(0, 1)), floor = -(1 - p) / p T / α"
    source = "Bellec, Kappel, Maass, Legenstein 2018 (soft DEEP R)"
    effort = "a dense latent weight, and a normal number for each at every step"
    advice = "plain gradient descent, where the number of connections may float"
    decides = True

    density: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    strength: Positive = 1e-5
    temperature: Positive = 2.5e-12

    @property
    def floor(self) -> float:
        """The lowest θ."""
        return -(1.0 - self.density) / self.density * self.temperature / self.strength

    def initial_latent(self, weight: Tensor, layout: Layout, moment: Moment) -> Tensor:
        """Return ``s θ`` at the beginning."""
        numbers = self._numbers("density", weight, moment)
        masked = self._numbers("floor", weight, moment) * self.floor
        return (weight.abs().where(numbers < self.density, masked.to(weight.dtype))) * _signs(weight, moment)

    def relax(self, weight: Tensor, own: Mapping[str, Tensor], moment: Moment) -> Tensor:
        """Return the weights that have the sign of their connection, and zero for the others."""
        return weight.where(weight.detach() * _signs(weight, moment) > 0, 0.0)

    def moved(self, weight: Tensor, moment: Moment, rate: float) -> Tensor:
        """Return the latent weights after a step with pull and noise; ``rate`` is the learning rate."""
        signs = _signs(weight, moment)
        theta = weight * signs
        numbers = normal(key(moment.seed, moment.step, f"rewiring {moment.name}"), moment.start, weight.numel(), weight.device)
        noise = (numbers.view(weight.shape) * math.sqrt(2.0 * rate * self.temperature)).to(weight.dtype)
        return (theta - rate * self.strength * (theta > 0) + noise).clamp(min=self.floor) * signs

    def _numbers(self, what: str, weight: Tensor, moment: Moment) -> Tensor:
        stream = key(moment.seed, 0, f"{what} {moment.name}")
        return uniform(stream, moment.start, weight.numel(), weight.device).view(weight.shape)


def _signs(weight: Tensor, moment: Moment) -> Tensor:
    """Return the sign of every connection, 1 or -1."""
    numbers = uniform(key(moment.seed, 0, f"sign {moment.name}"), moment.start, weight.numel(), weight.device).view(weight.shape)
    return torch.where(numbers < 0.5, -1.0, 1.0).to(weight.dtype)
