"""What components may ask to know of a tensor and only data can tell: requests, which are plain frozen records.

Equal requests are collected once, whoever asks. What a value looks like stands with each request. Values are in the layout's view, with
size 1 in dimensions that they do not depend on, or in *matrix form* ``[groups, columns]`` (see :func:`niwaki.layout.matrix`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from niwaki.layout import Layout

Source = Literal["inputs", "gradients", "steps", "model"]
"""Where a statistic comes from: what a weight reads in a forward pass; gradients of single examples or small batches; the steps of
the training itself; or a pass of its own over the model."""

Labels = Literal["given", "sampled"]
"""Targets of a loss: those of the data (empirical Fisher), or drawn from the model's own prediction (true Fisher)."""


@dataclass(frozen=True)
class Statistic:
    """Base of all requests."""

    source: ClassVar[Source]
    needs_loss: ClassVar[bool] = False
    """Whether it needs ``loss=`` besides ``data=``."""
    needs_data: ClassVar[bool] = True

    def memory(self, layout: Layout) -> int:
        """Return the bytes that it takes for one tensor while it is collected and used."""
        return 8 * layout.inputs

    def within(self, budget: int, layouts: list[Layout]) -> str:
        """Say what would fit into ``budget`` bytes for all these tensors, for an error message; empty when nothing would."""
        return ""
