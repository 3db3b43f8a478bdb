"""Growth and removal by a random walk: deep rewiring."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from niwaki.counter import key, normal, uniform
from niwaki.growth.base import DropAndGrow
from niwaki.growth.initial_value import Total
from niwaki.growth.random import random_score

if TYPE_CHECKING:
    from niwaki.saliency import Observation


class Rewiring(DropAndGrow):
    """Weights keep the sign that they were born with: one that crosses zero goes, and another comes in its place at random.

    Every connection has a random sign for good, a hash of the seed, its tensor and its index, which the first weights are given too. After
    every step active weights are pulled to zero and move by Gaussian noise; those that then have the other sign are dropped, and as many
    others, each with the same chance (those just dropped too), begin at ``start`` with their own sign. With plain gradient descent this
    samples networks of a fixed number of connections; momentum makes weights cross that have just been turned around.

    Attributes:
        strength: ``α`` of the pull to zero, at least 0.
        temperature: ``T`` of the noise, at least 0; with the learning rate η its variance is 2 η T.
        start: size of new weights, above 0.
    """

    name = "rewiring"
    equation = "w = s θ; θ <- θ - η (dL/dθ + α) + √(2 η T) N(0, 1) where active; dropped where θ <= 0, grown at θ = start"
    source = "Bellec, Kappel, Maass, Legenstein 2018 (DEEP R)"
    effort = "a normal number for each weight at every step"
    advice = "plain gradient descent at very high sparsity; sampling of networks of a fixed size"
    at_once = True

    strength: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1e-5
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 2.5e-11
    start: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-12

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        return random_score(seen, reduce)

    def stays(self, seen: Observation) -> Tensor:
        """Return where weights have the sign of their connection; before the first step they are yet to be given it."""
        return super().stays(seen) if seen.step == 0 else seen.weight * _signs(seen) > 0

    def first(self, seen: Observation) -> Tensor | None:
        """Return the weights with the signs of their connections."""
        return seen.weight.abs() * _signs(seen)

    def grown(self, seen: Observation, new: Tensor, total: Total) -> Tensor | None:
        """Return the weights with new ones at ``start``, with the signs of their connections."""
        return (_signs(seen) * self.start).where(new, seen.weight)

    def moved(self, seen: Observation, rate: float) -> Tensor:
        """Return the weights after a step, pulled and with noise; ``rate`` is the learning rate, ``seen.step`` the steps taken."""
        weight = seen.weight
        numbers = normal(key(seen.seed, seen.step, f"rewiring {seen.name}"), seen.start, weight.numel(), weight.device)
        noise = numbers.view(weight.shape) * math.sqrt(2.0 * rate * self.temperature)
        change = (noise - rate * self.strength).to(weight.dtype) * _signs(seen)
        return weight + (change if seen.active is None else change.masked_fill(~seen.active, 0.0))


def _signs(seen: Observation) -> Tensor:
    """Return the sign of every connection, 1 or -1."""
    weight = seen.weight
    numbers = uniform(key(seen.seed, 0, f"sign {seen.name}"), seen.start, weight.numel(), weight.device).view(weight.shape)
    return torch.where(numbers < 0.5, -1.0, 1.0).to(weight.dtype)
