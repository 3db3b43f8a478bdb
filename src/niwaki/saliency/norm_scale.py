"""Scores that read the normalization behind a channel."""

from typing import ClassVar

from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency, Scored, at_least_float32


class NormScale(Saliency):
    """Size of the scale by which a normalization multiplies the channel.

    It means something where a penalty has pushed the scales that are not needed towards zero (network slimming), and where the
    normalization has no other way to scale the channel. Of a target of norm scales themselves it is the magnitude.

    Source: Liu, Li, Shen, Huang, Yan, Zhang 2017 (network slimming).

    >>> import torch
    >>> from niwaki.saliency import NormScale, Observation
    >>> NormScale().score(Observation("bn.weight", torch.tensor([-2.0, 1.0])), lambda values: values)
    tensor([2., 1.])
    """

    name = "norm_scale"
    equation = "s = |scale|"
    source = "Liu et al. 2017"
    effort = "none: the scales as they are"
    advice = "channels behind normalizations, after training with an L1 penalty on the scales"
    scored_on: ClassVar[Scored] = "norms"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return the sum of the scales' sizes over the piece: float64, or float32 at least where pieces are single scales."""
        return reduce(at_least_float32(seen.weight).abs())
