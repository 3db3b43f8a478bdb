"""Penalties that meet a constraint: multipliers that rise while it is broken, and copies of the weights that keep it."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.clock import Time, TimeField
from niwaki.component import Fraction
from niwaki.penalty.base import NotNegative, Penalized, Positive, Single, Weigh, soft_threshold
from niwaki.selection import kept, select


class AugmentedLagrangian(Single):
    """Meet a sparsity: a price on what the relaxation expects to keep, which rises while that is too much and falls while it is too little.

    The expected sparsity is ``ŝ = 1 - Σ k P(active) / Σ k``, with ``k`` the weights of a gate. The loss gains
    ``λ (ŝ - s) + φ (ŝ - s)²``; the model descends it while ``λ`` and ``φ`` ascend it at a rate of their own. With ``end``, the sparsity
    that is asked for grows from 0.

    Attributes:
        sparsity: the one to meet, in [0, 1).
        of: ``gate``: single weights or pieces, as the relaxation and the recipe's granularity say.
        rate: length of the multipliers' steps.
        weigh: what ``k`` counts: ``parameters`` the weights of a gate, ``flops`` their FLOPs, ``none`` the gates.
    """

    name = "augmented_lagrangian"
    equation = "λ (ŝ - s) + φ (ŝ - s)²; λ += rate (ŝ - s), φ += rate (ŝ - s)² after each step"
    source = "Wang, Wohlwend, Lei 2020 (FLOP); Cotter et al. 2019"
    effort = "one pass over the gates"
    advice = "gates whose sparsity has to be a given one without a search for a strength"
    whole = True
    remembers = True

    sparsity: Fraction
    apply: Literal["gradient"] = "gradient"
    of: Literal["gate"] = "gate"
    rate: Positive = 1.0
    weigh: Weigh = "parameters"

    @property
    def reads(self) -> str:
        """The probabilities of being active."""
        return "active"

    def refresh(self, everyone: Sequence[Penalized]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the slope of the penalty now, and the multipliers for the next step."""
        weights = [torch.as_tensor(seen.cost, dtype=torch.float64).expand(seen.weight.shape) for seen in everyone]
        total = torch.stack([k.sum() for k in weights]).sum()
        active = torch.stack([(seen.weight.to(torch.float64) * k).sum() for seen, k in zip(everyone, weights, strict=True)]).sum()
        missed = (1.0 - active / total) - self.sparsity * everyone[0].ramp
        zero = torch.zeros((), dtype=torch.float64, device=missed.device)
        if everyone[0].ramp == 0.0:
            return [{} for _ in everyone], {"linear": zero, "quadratic": zero, "slope": zero}
        linear, quadratic = (everyone[0].shared.get(name, zero) for name in ("linear", "quadratic"))
        slope = (linear + 2.0 * quadratic * missed) / total
        return [{} for _ in everyone], {
            "linear": linear + self.rate * missed,
            "quadratic": quadratic + self.rate * missed.square(),
            "slope": slope,
        }

    def slope(self, seen: Penalized) -> Tensor:
        """Return the derivative by each probability."""
        return -torch.ones_like(seen.weight) * (seen.shared["slope"] * seen.cost)

    def value(self, seen: Penalized) -> Tensor:
        """Return a sum over one tensor that has the same derivative as the penalty of all."""
        return -(seen.weight * (seen.shared["slope"] * seen.cost)).sum()


class LearningCompression(Single):
    """Draw weights to a compressed copy of themselves, ever more strongly, until both are the same.

    From time to time the copy ``θ`` is made anew by compressing the weights (less what the multipliers have gathered), and ``μ`` grows by a
    factor. ``top_k`` keeps the recipe's share of all weights together, exactly; ``soft_threshold`` shrinks all by ``price / μ``.

    Attributes:
        compress: ``top_k`` or ``soft_threshold``.
        price: of the sum of sizes, for ``soft_threshold``.
        initial: ``μ`` at first.
        factor: of ``μ`` at every compression.
        multipliers: whether differences are gathered (augmented Lagrangian), or only ``μ`` grows (quadratic penalty).
        every: the time between two compressions.
    """

    name = "learning_compression"
    equation = "μ / 2 ‖w - θ - λ / μ‖²: gradient μ (w - θ) - λ; every so often θ = C(w - λ / μ), λ -= μ (w - θ), μ *= a"
    source = "Carreira-Perpiñán & Idelbayev 2018 (LC algorithm)"
    effort = "one pass over the weights; memory of two numbers for each; a selection each time"
    advice = "trained models; saliency magnitude, allocation global, schedule {one_shot: {at: 1 run}} cuts what is then zero"
    whole = True
    remembers = True

    apply: Literal["gradient", "proximal", "decoupled"] = "gradient"
    compress: Literal["top_k", "soft_threshold"] = "top_k"
    price: NotNegative = 1e-4
    initial: Positive = 1e-3
    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 1.1
    multipliers: bool = True
    every: TimeField = Time(1.0, "epochs")

    def refresh(self, everyone: Sequence[Penalized]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the compressed copies and multipliers of all tensors, and the strength from now on."""
        first = not everyone[0].shared or everyone[0].ramp == 0.0  # nothing has been drawn to a copy yet
        mu = torch.tensor(self.initial, dtype=torch.float64) if first else everyone[0].shared["mu"]
        held = [seen.state.get("multiplier", torch.zeros_like(seen.weight)) for seen in everyone]
        copies = self._compressed([seen.weight - one / mu.to(one) for seen, one in zip(everyone, held, strict=True)], float(mu), everyone)
        if self.multipliers and not first:
            held = [one - mu.to(one) * (seen.weight - copy) for seen, one, copy in zip(everyone, held, copies, strict=True)]
        states = [{"copy": copy, "multiplier": one} for copy, one in zip(copies, held, strict=True)]
        return states, {"mu": mu if first else mu * self.factor}

    def value(self, seen: Penalized) -> Tensor:
        """Return the quadratic, with the multiplier's term multiplied out."""
        apart, mu = seen.weight - seen.state["copy"], seen.shared["mu"].to(seen.weight)
        return ((mu / 2.0 * apart.square() - seen.state["multiplier"] * apart) * seen.ramp).sum()

    def slope(self, seen: Penalized) -> Tensor:
        """Return ``μ (w - θ) - λ``."""
        mu = seen.shared["mu"].to(seen.weight)
        return (mu * (seen.weight - seen.state["copy"]) - seen.state["multiplier"]) * seen.ramp

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the mean of the weight and the copy, that by ``rate μ``."""
        mu = seen.shared["mu"].to(seen.weight) * (rate * seen.ramp)
        return (seen.weight + mu * seen.state["copy"] + rate * seen.ramp * seen.state["multiplier"]) / (1.0 + mu)

    def _compressed(self, weights: list[Tensor], mu: float, everyone: Sequence[Penalized]) -> list[Tensor]:
        if self.compress == "soft_threshold":
            return [soft_threshold(weight, self.price / mu) for weight in weights]
        count = kept(1.0 - everyone[0].density, sum(weight.numel() for weight in weights))
        masks = select([weight.abs() for weight in weights], count)
        return [weight.masked_fill(~mask, 0.0) for weight, mask in zip(weights, masks, strict=True)]
