"""Optimal brain surgery column by column, for large layers."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from niwaki.layerwise.moments import Moments
from niwaki.layerwise.sparsegpt import Pattern, sparsegpt
from niwaki.saliency.solved import Solved


class SparseGPT(Solved):
    """Prunes columns in order; the columns behind take over what is lost, as the optimal brain surgeon does with all before them held.

    The mask is chosen for ``mask_block`` columns at a time over all rows, by ``w_j² / [H_(j:)⁻¹]_jj`` with the weights as they are by
    then; each block keeps the same share. N:M: the best N of each group, when it is reached. Counts are exact, equal scores keep the
    lower index, and a short last group of N:M keeps N (the published code removes one weight more a block, and all of a short group).

    Attributes:
        damping: added to the diagonal of H, as a share of its mean.
        block: columns whose effect on those behind is applied at once; changes speed, and nothing else.
        mask_block: columns whose mask is chosen at once.
        update: whether the weights that stay get the new values; if not, only the mask is used.

    Source: Frantar & Alistarh 2023.

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> from niwaki.saliency import Observation
    >>> from niwaki.statistics import InputGram
    >>> gram = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
    >>> layout = Layout(("output", "input"), (1, 2))
    >>> seen = Observation("fc.weight", torch.tensor([[1.0, 1.0]]), layout=layout, statistics={InputGram(): gram})
    >>> SparseGPT(damping=0).solve(seen, 1, None).weight
    tensor([[0.0000, 1.9000]])
    """

    name = "sparsegpt"
    equation = "s_j = w_j² / [H_(j:)⁻¹]_jj; w_k -= w_j [H_(j:)⁻¹]_jk / [H_(j:)⁻¹]_jj for k > j; H = E[x xᵀ]"
    source = "Frantar & Alistarh 2023"
    effort = "forward passes only; columns² numbers and columns³ + rows · columns² operations a tensor"
    advice = "large pretrained networks without training after; where time allows, obc leaves a smaller error"

    damping: float = Field(default=0.01, ge=0.0, allow_inf_nan=False)
    block: int = Field(default=128, ge=1)
    mask_block: int = Field(default=128, ge=1)
    update: bool = True

    def _choose(self, weight: Tensor, found: Moments, active: Tensor, keep: int, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
        stays, new = sparsegpt(weight, found, active, keep, pattern, block=self.block, mask_block=self.mask_block)
        return stays, new if self.update else weight.masked_fill(~stays, 0.0)
