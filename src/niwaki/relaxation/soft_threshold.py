"""A learned threshold (STR)."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.layout import Layout
from niwaki.relaxation.base import Moment, Relaxation
from niwaki.relaxation.thresholds import threshold_shape

GATES = {"sigmoid": torch.sigmoid, "exponential": torch.exp}


class SoftThreshold(Relaxation):
    """Shrink every weight by a threshold that is learned with the weights; what does not exceed it is pruned.

    The mask is where the published weight is not zero, so how sparse the model gets is decided by weight decay on the threshold's
    parameter *s*, not by a target. With the sigmoid gate and ``initial: -3200`` the gate and its derivative are exactly zero at
    first, and only weight decay moves *s*: it must be in a group with weight decay, and is kept in at least float32.

    Attributes:
        gate: ``g``, ``sigmoid`` or ``exponential``.
        initial: initial value of *s*.
        per: one *s* for each ``tensor`` or for each ``output_channel``.
        weight_decay: of *s*: ``inherit`` takes the weights' own, a number sets it.
    """

    name = "soft_threshold"
    equation = "published = sign(w) * relu(|w| - g(s)); dL/ds = -g'(s) * sum sign(w) [|w| > g(s)] dL/dpublished"
    source = "Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade, Farhadi 2020 (STR)"
    effort = "a number for each tensor; a second copy of the weights"
    advice = "long trainings whose layers are to find their own sparsity"
    decides = True
    has_scores = True

    gate: Literal["sigmoid", "exponential"] = "sigmoid"
    initial: Annotated[float, Field(allow_inf_nan=False)] = -3200.0
    per: Literal["tensor", "output_channel"] = "tensor"
    weight_decay: Literal["inherit"] | Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = "inherit"

    def parameters(self, weight: Tensor, layout: Layout, name: str, seed: int) -> dict[str, Tensor]:  # noqa: D102
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {"threshold": torch.full(threshold_shape(self.per, layout), self.initial, dtype=dtype, device=weight.device)}

    def _threshold(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return GATES[self.gate](own["threshold"]).to(weight.dtype)

    def _shrink(self, weight: Tensor, threshold: Tensor) -> Tensor:
        return torch.sign(weight) * torch.relu(weight.abs() - threshold)

    def relax(self, weight: Tensor, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        return self._shrink(weight, self._threshold(weight, own))

    def score(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return weight.abs() - self._threshold(weight, own)

    def group_options(self, group: Mapping[str, object]) -> dict[str, object]:  # noqa: D102
        return {} if self.weight_decay == "inherit" else {"weight_decay": self.weight_decay}
