"""Pieces with entries in many tensors: the units of dependency groups, which are channels, heads or whole layers."""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from niwaki.component import REGISTRY
from niwaki.errors import InputError
from niwaki.granularity.base import Granularity

Kind = Literal["channel", "channel_group", "head", "query_head", "head_dim", "layer"]
"""What the units of a dependency group are. ``channel``: channels, neurons, hidden units. ``channel_group``: all channels of a group of a
grouped convolution, where those inside can be removed too. ``head``: heads of attention, with their keys and values. ``query_head``: one
query head of each key head. ``head_dim``: dimensions inside heads. ``layer``: whole residual blocks."""


class Grouped(Granularity):
    """Units of dependency groups: channels, heads or layers, each masked in all tensors at once that it has entries in.

    A unit owns the weights that make it, those that read it, and its biases and normalization parameters; all of them share one mask.
    So a masked unit contributes exactly nothing, and can be taken out of the model.

    The saliency scores the members it is meant for (most: the weights that make the unit) one by one; ``aggregate`` makes one score of
    a unit of them. A member in which a unit has no entries does not count for it.

    Attributes:
        kinds: of the groups whose units are masked; layers contain channels and heads, so they are ranked by themselves.
        aggregate: of the scores of a unit in the scored members: their ``sum``, ``mean``, ``l2`` norm or ``max``.

    >>> import torch
    >>> scores, present = torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> [Grouped(aggregate=how).combine(scores, present).tolist() for how in ("sum", "mean", "l2", "max")]
    [[7.0, 1.0], [3.5, 1.0], [5.0, 1.0], [4.0, 1.0]]
    """

    name = "group"
    equation = "piece = one unit of a dependency group, in all tensors that it has entries in"
    source = "Fang, Ma, Song, Mi, Wang 2023 (dependency groups)"

    kinds: tuple[Kind, ...] = Field(default=("channel", "head"), min_length=1)
    aggregate: Literal["sum", "mean", "l2", "max"] = "sum"

    @model_validator(mode="after")
    def _layers_alone(self) -> Self:
        if "layer" in self.kinds and len(set(self.kinds)) > 1:
            raise InputError(f"kinds: a layer contains units of other kinds, so 'layer' stands alone, got {', '.join(self.kinds)}")
        return self

    def combine(self, scores: Tensor, present: Tensor) -> Tensor:
        """Return one float64 score for each unit; 0 for one that no scored member has entries of.

        Args:
            scores: of the units in each scored member, shape ``[members, units]``.
            present: bool, where the member has entries of the unit.
        """
        scores = scores.to(torch.float64).where(present, 0.0)
        if self.aggregate == "max":
            return scores.where(present, -torch.inf).amax(dim=0).where(present.any(dim=0), 0.0)
        if self.aggregate == "l2":
            return scores.square().sum(dim=0).sqrt()
        return scores.sum(dim=0) / (present.sum(dim=0).clamp(min=1) if self.aggregate == "mean" else 1)


class Channel(Grouped):
    """Whole channels: filters of convolutions, neurons of linear layers, hidden units of recurrent ones, with all that belongs to them.

    Attributes:
        aggregate: of the scores of a unit in the scored members: their ``sum``, ``mean``, ``l2`` norm or ``max``.
    """

    name = "channel"
    equation = "piece = one channel, in all tensors that make, carry or read it"
    source = "Li et al. 2017 (filters); Wen et al. 2016"

    kinds: tuple[Literal["channel"], ...] = ("channel",)


class Head(Grouped):
    """Whole attention heads: their rows of the query, key and value projections and their columns of the output projection.

    Attributes:
        aggregate: of the scores of a unit in the scored members: their ``sum``, ``mean``, ``l2`` norm or ``max``.
    """

    name = "head"
    equation = "piece = one attention head, in all tensors that make or read it"
    source = "Michel, Levy, Neubig 2019; Voita et al. 2019"

    kinds: tuple[Literal["head"], ...] = ("head",)


class WholeLayer(Grouped):
    """Whole residual blocks, which then only pass on what comes in.

    Attributes:
        aggregate: of the scores of a unit in the scored members: their ``sum``, ``mean``, ``l2`` norm or ``max``.
    """

    name = "layer"
    equation = "piece = all parameters of one residual block"
    source = "Fan, Grave, Joulin 2020 (LayerDrop)"

    kinds: tuple[Literal["layer"], ...] = ("layer",)


# The field's other name for the same thing.
REGISTRY["granularity"].update(filter=Channel)
