"""What an allocation always knows of a weight."""

from __future__ import annotations

from dataclasses import dataclass

from niwaki.layout import Layout


@dataclass(frozen=True)
class Layer:
    """What an allocation sees of a weight.

    Attributes:
        name: canonical parameter name.
        layout: layout of the whole tensor, also where this process holds a shard.
        pieces: how many pieces the granularity cuts the whole tensor into.
    """

    name: str
    layout: Layout
    pieces: int
