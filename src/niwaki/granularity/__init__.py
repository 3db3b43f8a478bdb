"""In what pieces weights are masked: from single elements to whole channels, heads and layers.

A granularity of one tensor is a block: how far one piece reaches along each dimension of the layout's view. The view is padded to whole
blocks and split, so that a sum over the pieces and the way back from pieces to elements are the same few lines for all of them. Pieces
are numbered row-major in the weight's own dimension order.

The pieces of a grouped granularity are units of dependency groups, which have entries in many tensors. Those of ``eigenbasis`` are no
weights at all.
"""

from niwaki.granularity.base import Granularity
from niwaki.granularity.blocks import Block, Element, InputChannel, Kernel, OutputChannel, PatternNM, Vector
from niwaki.granularity.eigenbasis import Eigenbasis
from niwaki.granularity.units import Channel, Grouped, Head, Kind, WholeLayer

__all__ = [
    "Block",
    "Channel",
    "Eigenbasis",
    "Element",
    "Granularity",
    "Grouped",
    "Head",
    "InputChannel",
    "Kernel",
    "Kind",
    "OutputChannel",
    "PatternNM",
    "Vector",
    "WholeLayer",
]
