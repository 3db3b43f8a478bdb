"""Every layer, or every output, has the sparsity of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from niwaki.allocation.base import Allocation
from niwaki.allocation.layer import Layer


class Uniform(Allocation):
    """Every layer has the sparsity of the whole.

    Attributes:
        per: what is given the sparsity: each ``tensor``, or each ``row``, the weights of one output; the first rows of a tensor keep one
            more where the count does not divide.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer("a", Layout(("output", "input"), (3, 5)), 15), Layer("b", Layout(("output", "input"), (2, 3)), 6)]
    >>> Uniform().keep(0.5, layers)
    [7, 3]
    """

    name = "uniform"
    equation = "s_l = S"
    source = "the usual baseline; Zhu & Gupta 2017; of rows: Sun et al. 2024 (Wanda)"
    effort = "nothing"
    advice = "the baseline; layers that matter more than others, such as the first and the last, are better left out of the target"

    per: Literal["tensor", "row"] = "tensor"

    @property
    def by_row(self) -> bool:  # noqa: D102
        return self.per == "row"

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        return [1.0 - sparsity] * len(layers)
