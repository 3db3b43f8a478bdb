"""Soft weight sharing: weights as draws from a mixture that is learned with them."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.clock import Time, TimeField
from niwaki.penalty.base import Of, Penalized, Positive, State, WithStrength

CHUNK = 1 << 16
"""Weights whose responsibilities are held at a time."""


class SoftWeightSharing(WithStrength):
    """Minus the log-likelihood of all weights under one mixture of Gaussians, whose first component stays at zero.

    Weights gather around few values, and most of them around zero. The mixture starts with means evenly over the range of the weights,
    and is fitted to them by a step of expectation and maximization from time to time; its likelihood never falls by one.

    Attributes:
        of: ``weight``, ``norm``, or ``gate``, all together.
        components: Gaussians besides the one at zero.
        zero: mixing proportion of the one at zero, which stays; None to learn it.
        floor: smallest standard deviation.
        every: the time between two steps of the mixture.
    """

    name = "soft_weight_sharing"
    equation = "-c Σ log Σ_j π_j N(w; μ_j, σ_j²), μ_0 = 0; gradient c Σ_j r_j (w - μ_j) / σ_j²"
    source = "Nowlan & Hinton 1992; Ullrich, Meeds, Welling 2017"
    effort = "one pass over the weights for each component"
    advice = "trained models that are to be stored: few values, most of them zero"
    whole = True
    remembers = True

    strength: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1e-5
    of: Of = "weight"
    apply: Literal["gradient", "decoupled"] = "gradient"
    components: Annotated[int, Field(ge=1)] = 16
    zero: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.99
    floor: Positive = 1e-3
    every: TimeField = Time(100.0, "steps")

    def refresh(self, everyone: Sequence[Penalized]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the mixture after one more step of expectation and maximization; the first one is only laid out."""
        shared = everyone[0].shared
        mixture = self._fitted(everyone, shared) if shared else self._laid_out(everyone)
        return [{} for _ in everyone], mixture

    def value(self, seen: Penalized) -> Tensor:
        """Return minus the log-likelihood of one tensor."""
        return -torch.logsumexp(_log_joint(seen.weight, seen.shared), dim=-1).sum() * self.factor(seen)

    def slope(self, seen: Penalized) -> Tensor:
        """Return how far each weight is from the components that it may belong to, over their variances."""
        mean, variance = (seen.shared[name].to(seen.weight.dtype) for name in ("mean", "variance"))
        pulls = []
        for part in torch.split(seen.weight.flatten(), CHUNK):
            belongs = torch.softmax(_log_joint(part, seen.shared), dim=-1)
            pulls.append((belongs * (part[:, None] - mean) / variance).sum(dim=-1))
        return torch.cat(pulls).view(seen.weight.shape) * self.factor(seen)

    def _laid_out(self, everyone: Sequence[Penalized]) -> dict[str, Tensor]:
        """Return means over the range of all weights, as wide as they are apart."""
        low = min(float(seen.weight.min()) for seen in everyone)
        high = max(float(seen.weight.max()) for seen in everyone)
        apart = max((high - low) / max(self.components - 1, 1), self.floor)
        others = torch.linspace(low, high, self.components, dtype=torch.float64)
        share = 0.5 if self.zero is None else self.zero
        portions = torch.full((self.components + 1,), (1.0 - share) / self.components, dtype=torch.float64)
        portions[0] = share
        mixture = {
            "mean": torch.cat([torch.zeros(1, dtype=torch.float64), others]),
            "variance": torch.full((self.components + 1,), apart**2, dtype=torch.float64),
            "portion": portions,
        }
        return {name: value.to(everyone[0].weight.device) for name, value in mixture.items()}

    def _fitted(self, everyone: Sequence[Penalized], shared: State) -> dict[str, Tensor]:
        """Return the most likely mixture, given how the last one shares out the weights."""
        mean = shared["mean"]
        sums = mean.new_zeros(2, len(mean))
        for part in _parts(everyone):
            belongs = torch.softmax(_log_joint(part, shared), dim=-1)
            sums += torch.stack([belongs.sum(0), (belongs * part[:, None]).sum(0)])
        total = sums[0].clamp(min=math.ulp(0.0))
        mean = torch.where(sums[0] > 0, sums[1] / total, mean)
        mean[0] = 0.0
        spread = torch.zeros_like(mean)
        for part in _parts(everyone):
            belongs = torch.softmax(_log_joint(part, shared), dim=-1)
            spread += (belongs * (part[:, None] - mean).square()).sum(0)
        variance = torch.where(sums[0] > 0, spread / total, shared["variance"]).clamp(min=self.floor**2)
        portion = sums[0] / sums[0].sum()
        if self.zero is not None:
            rest = sums[0][1:].sum()
            shares = (1.0 - self.zero) * sums[0][1:] / rest
            portion = torch.cat([portion.new_full((1,), self.zero), shares]) if rest > 0 else shared["portion"]
        return {"mean": mean, "variance": variance, "portion": portion}


def _log_joint(weight: Tensor, mixture: State) -> Tensor:
    """Return ``log π_j N(w; μ_j, σ_j²)``, shape [..., components]."""
    mean, variance, portion = (mixture[name].to(weight.dtype) for name in ("mean", "variance", "portion"))
    log_normal = -(weight[..., None] - mean).square() / (2.0 * variance) - 0.5 * torch.log(2.0 * math.pi * variance)
    return log_normal + torch.log(portion)


def _parts(everyone: Sequence[Penalized]) -> list[Tensor]:
    """Return all weights, flat and in float64, some at a time."""
    return [part.to(torch.float64) for seen in everyone for part in torch.split(seen.weight.flatten(), CHUNK)]
