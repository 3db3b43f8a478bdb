"""Scores that compare the pieces of a tensor with each other: what resembles the others can be spared."""

import torch
from torch import Tensor

from niwaki.component import REGISTRY
from niwaki.saliency.base import Observation, Reduce, Saliency

BLOCK = 256
"""Pieces whose distances to all others are in memory at one time."""


class Similarity(Saliency):
    """Sum of a piece's distances to all pieces of its tensor: the piece nearest to their geometric median goes first.

    Such a piece is not small but replaceable. Pieces that are wholly zero, such as masked ones, are not among those compared with.
    Distances are computed in float64 from differences, so that equal pieces are at distance zero; time is O(pieces² · elements).

    Source: He, Liu, Wang, Hu, Yang 2019 (FPGM).

    >>> import torch
    >>> from niwaki.saliency import Observation, Similarity
    >>> class Rows:  # pieces are the rows of a matrix
    ...     def __call__(self, values): return values.sum(1)
    ...     def rows(self, values): return values
    >>> Similarity().score(Observation("weight", torch.tensor([[1.0, 0.0], [4.0, 4.0], [1.0, 0.0]])), Rows())
    tensor([ 5., 10.,  5.], dtype=torch.float64)
    """

    name = "similarity"
    equation = "s_i = Σ_j ‖w_i - w_j‖ over the pieces j of the tensor"
    source = "He et al. 2019 (FPGM)"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores of the pieces.

        Raises:
            InputError: the pieces of the tensor differ in size.
        """
        rows = reduce.rows(seen.weight).to(torch.float64)
        others = rows[(rows != 0).any(dim=1)]  # NaN is not zero, so it stays and spoils every score
        blocks = torch.split(rows, BLOCK)
        distances = [torch.cdist(block, others, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1) for block in blocks]
        return torch.cat(distances).reshape(reduce(seen.weight).shape)


# The name of the method that brought it.
REGISTRY["saliency"]["fpgm"] = Similarity
