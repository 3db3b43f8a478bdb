"""Scores that look at what units do on data, without gradients."""

from typing import ClassVar

import torch
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency, Scored


class Activity(Saliency):
    """Mean size of a unit's activations over the data, as the weights that read the unit see them.

    The activations are those behind the non-linearity, normalization and pooling, at the input of the next layer. Where a unit has
    several inputs there (positions of a flattened map, entries of a head), the mean is over them too.

    Source: Molchanov, Tyree, Karras, Aila, Kautz 2017 (as a baseline); Tan, Motani 2020 (DropNet).

    >>> import torch
    >>> from niwaki.saliency import Activity, Observation
    >>> seen = Observation("fc.weight", torch.zeros(5, 3), activity=torch.tensor([[0.5, 0.0, 2.0]]))
    >>> Activity().score(seen, lambda values: values.sum(0))  # pieces are the columns
    tensor([0.5000, 0.0000, 2.0000], dtype=torch.float64)
    """

    name = "activity"
    equation = "s = mean |x| over the data and the entries of the unit"
    source = "Molchanov et al. 2017; Tan & Motani 2020 (DropNet)"
    needs = frozenset({"activity"})
    scored_on: ClassVar[Scored] = "inputs"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores; zero for a unit that this weight does not read.

        Raises:
            InputError: no activity was collected for the tensor.
        """
        activity = self._needed(seen.activity, seen, "activity").to(torch.float64)
        total = reduce(activity.expand(seen.weight.shape))
        entries = reduce(torch.ones((), dtype=torch.float64, device=activity.device).expand(seen.weight.shape))
        return total / entries.clamp(min=1.0)
