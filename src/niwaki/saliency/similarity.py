"""Scores that compare the pieces of a tensor with each other: what resembles the others can be spared."""

import torch
from torch import Tensor

from niwaki.alike import merges
from niwaki.component import REGISTRY
from niwaki.saliency.base import Observation, Reduce, Saliency
from niwaki.saliency.group import GroupObservation, GroupSaliency

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
    effort = "the weights alone; pieces² · elements operations a tensor"
    advice = "filters that others can replace, however large they are, without data"

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


class MergeCost(GroupSaliency):
    """What it costs to let another unit take over: little where the other is made alike, or where little is read of this one.

    Units merge one after the other as with the compensation ``merge``: of the pair with the least cost, j goes into i, whose outgoing
    weights become a_i + a_j. The score is the place in that order, k / n for the k-th to go, and 1 for the last. w is all that makes a
    unit, its bias and normalization too; a is all that reads it. No data are needed. Memory is O(units²).

    Source: Srinivas & Babu 2015.

    >>> import torch
    >>> from niwaki.saliency import GroupObservation, MergeCost, Observation
    >>> class Rows:  # pieces are the rows of a matrix
    ...     def __call__(self, values): return values.sum(1)
    ...     def rows(self, values): return values
    ...     def index(self): return torch.arange(3)
    >>> class Columns(Rows):
    ...     def rows(self, values): return values.T
    >>> makes = Observation("0.weight", torch.tensor([[1.0], [2.0], [1.0]]))
    >>> reads = Observation("2.weight", torch.tensor([[3.0, 4.0, 5.0]]))
    >>> (MergeCost().score_group(GroupObservation(3, [(makes, Rows())], [(reads, Columns())])) * 3).round().tolist()
    [1.0, 2.0, 3.0]
    """

    name = "merge_cost"
    equation = "s_j = k / n for the k-th to go; of the pair with the least ‖a_j‖² ‖w_i - w_j‖², j goes and a_i <- a_i + a_j"
    source = "Srinivas & Babu 2015"
    effort = "the weights alone; units² numbers, and units² · weights of one operations a group"
    advice = "small networks without data, with merge"

    def score_group(self, seen: GroupObservation) -> Tensor:
        """Return float64 scores in [0, 1], 0 for masked units; NaN where a weight is.

        Raises:
            InputError: units have different numbers of entries in a member.
        """
        made, read = seen.weights([*seen.makers, *seen.along]), seen.weights(seen.readers)
        if made.isnan().any() or read.isnan().any():
            return torch.full((seen.units,), torch.nan, dtype=torch.float64, device=made.device)
        alone = seen.active().clone()
        scores = torch.zeros(seen.units, dtype=torch.float64, device=made.device)
        gone = seen.units - int(alone.sum())
        for place, merge in enumerate(merges(made, read, alone), gone + 1):
            scores[merge.unit] = place / seen.units
        return scores.masked_fill_(alone, 1.0)


# The name of the method that brought it.
REGISTRY["saliency"]["fpgm"] = Similarity
