"""Thresholds of the weights' size that are learned with the weights, by derivatives that a step does not have."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.layout import Layout
from niwaki.relaxation.base import LearnsOwn, Moment


class LearnedThreshold(LearnsOwn):
    """A learned threshold for each tensor or each of its outputs. A base class, itself not registered.

    Attributes:
        per: one threshold for each ``tensor`` or for each ``output_channel``.
        initial: initial threshold.
    """

    decides = True
    has_scores = True

    per: Literal["tensor", "output_channel"] = "tensor"
    initial: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0

    def parameters(self, weight: Tensor, layout: Layout, name: str, seed: int) -> dict[str, Tensor]:  # noqa: D102
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {"threshold": torch.full(threshold_shape(self.per, layout), self.initial, dtype=dtype, device=weight.device)}

    def score(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return weight.abs() - own["threshold"].to(weight.dtype)


def threshold_shape(per: str, layout: Layout) -> tuple[int, ...]:
    """Return the shape of the thresholds, which broadcasts against the layout's view."""
    if per == "tensor":
        return ()
    kept = ("group", "output") if layout.shared_stack else ("stack", "group", "output")
    return tuple(n if role in kept else 1 for role, n in zip(layout.roles, layout.shape, strict=True))


class _LongTailedStep(torch.autograd.Function):
    """``[x > 0]`` with the derivative ``2 - 4 |x|`` to 0.4, then 0.4 to 1, then 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        size = x.abs()
        slope = (2.0 - 4.0 * size).where(size <= 0.4, 0.4).where(size <= 1.0, 0.0)
        pulled: Tensor = gradients[0] * slope
        return pulled


class DynamicThreshold(LearnedThreshold):
    """Weights below a learned threshold are masked; they go on learning, and may come back.

    The step's derivative is replaced by a long-tailed one, so that threshold and weights both learn from what the mask does. A penalty
    on low thresholds (``penalty: threshold``) raises them.

    >>> import torch
    >>> w = torch.tensor([-0.5, 0.1, 0.3])
    >>> DynamicThreshold().relax(w, {"threshold": torch.tensor(0.2)}, Moment("w"))
    tensor([-0.5000,  0.0000,  0.3000])
    """

    name = "dynamic_threshold"
    equation = "published = w [|w| > t]; d[x > 0]/dx := 2 - 4 |x| for |x| <= 0.4, 0.4 for |x| <= 1, else 0"
    source = "Liu, Xu, Shi, Cheung, So 2020 (dynamic sparse training)"
    effort = "a threshold for each output; dense training"
    advice = "sparsities of layers and outputs that are found by training"

    per: Literal["tensor", "output_channel"] = "output_channel"

    def relax(self, weight: Tensor, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        step: Tensor = _LongTailedStep.apply(weight.abs() - own["threshold"].to(weight.dtype))  # type: ignore[no-untyped-call]
        return weight * step


class SigmoidThreshold(LearnedThreshold):
    """Weights are multiplied by a sigmoid of how far their square is above a learned threshold.

    Evaluation keeps those above it, whole. The number of weights above it, softly counted, is what ``penalty: expected_l0`` lowers.

    Attributes:
        per: one threshold for each ``tensor`` or for each ``output_channel``.
        initial: initial threshold, of the squared weight.
        temperature: width of the sigmoid, in units of the variance of the tensor's weights at each step.
    """

    name = "sigmoid_threshold"
    equation = "published = w σ((w² - t) / T), T = temperature var(w); in the end w [w² > t]; soft count Σ σ((w² - t) / T)"
    source = "Azarian, Bhalgat, Lee, Blankevoort 2020 (LTP)"
    effort = "a threshold for each tensor; dense training"
    advice = "trained networks that are pruned in a few epochs"

    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-3

    @property
    def mode_differs(self) -> bool:
        """True: training sees a sigmoid, evaluation a step."""
        return True

    def _soft(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        width = self.temperature * weight.detach().var(correction=0).clamp(min=torch.finfo(weight.dtype).tiny)
        return torch.sigmoid((weight.square() - own["threshold"].to(weight.dtype)) / width)

    def relax(self, weight: Tensor, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        if moment.evaluating:
            return weight * (weight.square() > own["threshold"]).to(weight.dtype)
        return weight * self._soft(weight, own)

    def expected_active(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return self._soft(weight, own)

    def score(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return weight.square() - own["threshold"].to(weight.dtype)


class SmoothThreshold(LearnedThreshold):
    """Weights beyond a learned threshold pass, the others are pulled towards zero by a smooth function.

    Attributes:
        per: one threshold for each ``tensor`` or for each ``output_channel``.
        initial: initial threshold.
        sharpness: ``β``; the larger, the more the function is a step at the threshold.
    """

    name = "smooth_threshold"
    equation = "published = relu(w - t) + t σ(β (w - t)) - relu(-w - t) - t σ(β (-w - t)); in the end w [|w| > t]"
    source = "Manessi, Rozza, Bianco, Napoletano, Schettini 2018"
    effort = "a threshold for each tensor; dense training"
    advice = "thresholds that are to learn by plain gradients"

    sharpness: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 100.0

    @property
    def mode_differs(self) -> bool:
        """True: training sees a smooth function, evaluation a step."""
        return True

    def relax(self, weight: Tensor, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        t = own["threshold"].to(weight.dtype)
        if moment.evaluating:
            return weight * (weight.abs() > t).to(weight.dtype)
        above, below = weight - t, -weight - t
        up = torch.relu(above) + t * torch.sigmoid(self.sharpness * above)
        return up - torch.relu(below) - t * torch.sigmoid(self.sharpness * below)
