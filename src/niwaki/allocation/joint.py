"""One ranking over all layers."""

from __future__ import annotations

from collections.abc import Sequence

from niwaki.allocation.base import Allocation
from niwaki.allocation.layer import Layer
from niwaki.errors import InputError


class Global(Allocation):
    """One ranking over all layers: the best scores are kept wherever they are."""

    name = "global"
    equation = "one threshold for all layers"
    source = "LeCun, Denker, Solla 1989; Lee, Ajanthan, Torr 2018 (SNIP)"
    effort = "nothing besides the ranking"
    advice = "scores that mean the same in all layers, such as changes of the loss; others want a normalization"
    joint = True

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        raise InputError(
            "allocation.global: its budgets follow from the scores of a joint selection; where budgets are needed without scores choose"
            " uniform, erdos_renyi or erdos_renyi_kernel"
        )
