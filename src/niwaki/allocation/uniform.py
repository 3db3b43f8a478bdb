"""Every layer, or every output, has the sparsity of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from niwaki.allocation.base import Allocation
from niwaki.allocation.layer import Layer


class Uniform(Allocation):
    """Every layer has the sparsity of the whole.

    Attributes:
        per: what is given the sparsity: each ``tensor``, or each ``row``, the weights of one output; the first rows of a tensor keep one
            more where the count does not divide. While weights are exchanged, a tensor drops its lowest, and every row grows back to its
            count (constant fan-in).
        ablation: of rows while weights are exchanged: a row with fewer salient weights than this share of its count, and at least one,
            loses all of them to the others. Salient are the weights that a drop leaves, and as many as grow of those that would first.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer("a", Layout(("output", "input"), (3, 5)), 15), Layer("b", Layout(("output", "input"), (2, 3)), 6)]
    >>> Uniform().keep(0.5, layers)
    [7, 3]
    """

    name = "uniform"
    equation = "s_l = S"
    source = "the usual baseline; Zhu & Gupta 2017; of rows: Sun et al. 2024 (Wanda); Lasby et al. 2024 (SRigL)"
    effort = "nothing"
    advice = "the baseline; layers that matter more than others, such as the first and the last, are better left out of the target"

    per: Literal["tensor", "row"] = "tensor"
    ablation: Annotated[float, Field(ge=0.0, le=1.0)] | None = None

    @property
    def by_row(self) -> bool:  # noqa: D102
        return self.per == "row"

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        return [1.0 - sparsity] * len(layers)
