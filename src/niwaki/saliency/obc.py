"""The exact greedy optimal brain surgeon of a layer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from niwaki.layerwise.exact import exact
from niwaki.layerwise.moments import Moments
from niwaki.layerwise.sparsegpt import Pattern
from niwaki.saliency.solved import Solved


class OBC(Solved):
    """Removes one weight of a row after the other, always the one that costs least, with the optimal update of all others.

    Each removal is exact: the weights are those with the least error that the row's support allows. How many go from a row follows from
    the costs over all rows, or is the same for each (``per: row``). Over all rows, the one goes on that costs least next, as the paper
    says; its code sorts all costs, although those of a row may fall, and leaves a larger error. Counts are exact; where H is singular,
    damping is raised and told (the published code adds the identity).

    Attributes:
        damping: added to the diagonal of H, as a share of its mean.
        per: what the count is shared over by cost: the ``tensor``, or each ``row`` has the same.

    Source: Frantar & Alistarh 2022 (optimal brain compression, ExactOBS).

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> from niwaki.saliency import Observation
    >>> from niwaki.statistics import InputGram
    >>> gram = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
    >>> layout = Layout(("output", "input"), (1, 2))
    >>> seen = Observation("fc.weight", torch.tensor([[1.0, 2.0]]), layout=layout, statistics={InputGram(): gram})
    >>> OBC().solve(seen, 1, None).weight
    tensor([[0.0000, 2.9000]])
    """

    name = "obc"
    equation = "s_q = w_q² / [H⁻¹]_qq; w -= w_q H⁻¹ e_q / [H⁻¹]_qq; H⁻¹ -= H⁻¹ e_q e_qᵀ H⁻¹ / [H⁻¹]_qq; row by row, H = E[x xᵀ]"
    source = "Frantar & Alistarh 2022"
    effort = "forward passes only; columns² numbers, and rows · columns³ / 3 multiply-adds a tensor in a bounded number of rows at a time"
    advice = "pretrained layers of up to some thousand inputs: the least error of the layer-wise methods"

    damping: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    per: Literal["tensor", "row"] = "tensor"

    def _choose(self, weight: Tensor, found: Moments, active: Tensor, keep: int, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
        return exact(weight, found, active, keep, pattern, per=self.per)
