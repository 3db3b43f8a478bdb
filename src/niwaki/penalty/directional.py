"""Directional pruning: sums of steps, soft-thresholded by an amount that grows."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.penalty.base import Penalized, WithStrength, soft_threshold


class Directional(WithStrength):
    """Shrink the sum of all steps, rather than the weights that the last threshold has left, by an amount that grows with the steps.

    In flat directions of the loss, where steps do not add up, the threshold wins; elsewhere it is made up for. What the threshold has
    taken from a weight is kept beside it and given back before the next one (generalized regularized dual averaging). With plain SGD
    it is the published algorithm; any other optimizer's steps are summed alike.

    Attributes:
        strength: ``c``: larger ones make sparser models, mostly early in a training.
        power: ``μ`` in (0.5, 1): larger ones make sparser models.
    """

    name = "directional"
    equation = "w_n = sign(u_n) max(|u_n| - g_n, 0), u the sum of all steps from w_0, g_n = c rate^(1/2 + μ) n^μ"
    source = "Chao, Wang, Xing, Cheng 2020 (directional pruning, gRDA)"
    effort = "one pass over the weights; memory of one number for each"
    advice = "trainings from scratch with SGD whose weights may become zero at no cost; exact zeros"
    remembers = True

    strength: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 5e-3
    apply: Literal["proximal"] = "proximal"
    power: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6

    def refresh(self, everyone: Sequence[Penalized]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return what was taken from each weight, the threshold so far, and the number of the coming step."""
        states = [dict(seen.state) or {"taken": torch.zeros_like(seen.weight), "threshold": _zero(seen)} for seen in everyone]
        return states, {"steps": everyone[0].shared.get("steps", _zero(everyone[0])) + 1.0}

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the sum of all steps, thresholded; what that takes is noted in the state."""
        n, taken, threshold = seen.shared["steps"], seen.state["taken"], seen.state["threshold"]
        threshold += self.strength * seen.ramp * rate ** (0.5 + self.power) * (n**self.power - (n - 1.0) ** self.power)
        total = seen.weight + taken
        found = soft_threshold(total, threshold.to(total.dtype))
        taken.copy_(total - found)
        return found


def _zero(seen: Penalized) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=seen.weight.device)
