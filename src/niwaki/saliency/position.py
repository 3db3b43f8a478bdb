"""Scores that look at nothing but where a piece stands."""

import torch
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency


class Position(Saliency):
    """Removes evenly spaced pieces, whatever they hold: half of them are every other one, a quarter every fourth.

    Pieces are ranked by the van der Corput sequence, of which every beginning is spread evenly: the bits of the index behind the binary
    point, in reverse order. Fewer than half are removed at about equal distances. The first piece stays longest.

    Source: Fan, Grave, Joulin 2020 (LayerDrop's "every other").

    >>> import torch
    >>> from niwaki.saliency import Observation, Position
    >>> class Six:
    ...     def index(self): return torch.arange(6)
    >>> Position().score(Observation("blocks", torch.zeros(6)), Six())  # 3 goes first, then 5, then 1
    tensor([1.0000, 0.5000, 0.7500, 0.2500, 0.8750, 0.3750], dtype=torch.float64)
    """

    name = "position"
    equation = "s_i = 1 - Σ_b bit_b(i) 2^-(b+1)"
    source = "Fan et al. 2020 (every other); van der Corput 1935"
    effort = "none"
    advice = "blocks of networks that were trained to do without some of them"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores in (0, 1], the same for any content."""
        index = reduce.index().to(seen.weight.device)
        score = torch.ones(index.shape, dtype=torch.float64, device=index.device)
        for bit in range(int(index.max()).bit_length()):
            score -= (index >> bit & 1) * 2.0 ** -(bit + 1)
        return score
