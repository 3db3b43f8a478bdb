"""A learned threshold (STR)."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.layout import Layout
from niwaki.relaxation.base import Relaxation

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
    decides = True
    has_scores = True

    gate: Literal["sigmoid", "exponential"] = "sigmoid"
    initial: Annotated[float, Field(allow_inf_nan=False)] = -3200.0
    per: Literal["tensor", "output_channel"] = "tensor"
    weight_decay: Literal["inherit"] | Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = "inherit"

    def parameters(self, weight: Tensor, layout: Layout, name: str, seed: int) -> dict[str, Tensor]:  # noqa: D102
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape: tuple[int, ...] = ()
        if self.per == "output_channel":
            kept = ("group", "output") if layout.shared_stack else ("stack", "group", "output")
            shape = tuple(n if role in kept else 1 for role, n in zip(layout.roles, layout.shape, strict=True))
        return {"threshold": torch.full(shape, self.initial, dtype=dtype, device=weight.device)}

    def _threshold(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return GATES[self.gate](own["threshold"]).to(weight.dtype)

    def _shrink(self, weight: Tensor, threshold: Tensor) -> Tensor:
        return torch.sign(weight) * torch.relu(weight.abs() - threshold)

    def publish(self, weight: Tensor, own: Mapping[str, Tensor], keep: Tensor) -> Tensor:  # noqa: D102
        published = self._shrink(weight, self._threshold(weight, own))
        return published.masked_fill_((published == 0) | ~keep, 0.0)  # also turns -0.0 into 0.0

    def pull_back(self, weight: Tensor, own: Mapping[str, Tensor], gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: D102
        with torch.enable_grad():
            w = weight.detach().requires_grad_()
            s = own["threshold"].detach().requires_grad_()
            published = self._shrink(w, self._threshold(w, {"threshold": s}))
            for_weight, for_threshold = torch.autograd.grad(published, (w, s), gradient)
        return for_weight, {"threshold": for_threshold}

    def score(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return weight.abs() - self._threshold(weight, own)

    def group_options(self, group: Mapping[str, object]) -> dict[str, object]:  # noqa: D102
        return {} if self.weight_decay == "inherit" else {"weight_decay": self.weight_decay}
