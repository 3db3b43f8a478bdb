"""Budgets from a layer's place in the network: rules of thumb for the first and the last layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from niwaki.allocation.base import Allocation
from niwaki.allocation.layer import Layer
from niwaki.allocation.sharing import capped_proportional
from niwaki.errors import InputError

Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]


class UniformPlus(Allocation):
    """The first convolution stays dense, the last layer keeps at least a fifth, and the others share the rest uniformly.

    First and last are those of the targets; by default a target leaves the network's own first convolution and last layer out, so
    name them in ``target`` for this rule. A network without convolutions has no layer that stays dense. It costs nothing.

    Attributes:
        last: density below which the last layer does not fall.

    Raises:
        InputError: a sparsity at which these two layers alone keep too much.

    >>> from niwaki.layout import Layout
    >>> convolution = Layer("a", Layout(("output", "input", "kernel"), (2, 5, 1)), 10)
    >>> linear = [Layer(name, Layout(("output", "input"), (5, 10)), 50) for name in "bc"]
    >>> UniformPlus().keep(0.75, [convolution, *linear])
    [10, 8, 10]
    """

    name = "uniform_plus"
    equation = "p_first = 1, p_last = max(p, 0.2), p_l = p such that sum p_l N_l = (1 - S) sum N_l"
    source = "Gale, Elsen, Hooker 2019; Lee, Park, Mo, Ahn, Shin 2021"
    effort = "nothing"
    advice = "the strong baseline of magnitude pruning"

    last: Share = 0.2

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        pieces = [layer.pieces for layer in layers]
        budget = (1.0 - sparsity) * sum(pieces)
        first = next((i for i, layer in enumerate(layers) if layer.layout.kernel), None)
        fixed = {} if first is None else {first: 1.0}
        end = len(layers) - 1
        density = _rest(budget, pieces, fixed)
        if end not in fixed and density < self.last:
            fixed[end] = self.last
            density = _rest(budget, pieces, fixed)
        if not 0.0 <= density <= 1.0:
            lowest = sum(share * pieces[i] for i, share in fixed.items()) / sum(pieces)
            raise InputError(
                f"allocation.uniform_plus: the first convolution and {self.last:g} of the last layer are {lowest:.4g} of all pieces, more"
                f" than sparsity {sparsity:g} leaves; choose a lower sparsity, or uniform"
            )
        return [fixed.get(i, density) for i in range(len(layers))]


def _rest(budget: float, pieces: Sequence[int], fixed: dict[int, float]) -> float:
    """Return the density of the layers whose density is not fixed; where none is left, 0 if the fixed ones are within the budget."""
    left = budget - sum(share * pieces[i] for i, share in fixed.items())
    free = sum(n for i, n in enumerate(pieces) if i not in fixed)
    return left / free if free else (0.0 if left >= -0.5 else -1.0)


class SmartRatio(Allocation):
    """The density falls with depth, as a quadratic, and the last layer has one of its own.

    Layers that would need more than all their pieces become dense, and the others are solved anew. Depth is the order of parameters.
    On the way to the recipe's sparsity every layer is at the same fraction of its own. It costs nothing, and needs no weights: meant for
    masks drawn at random before training.

    Attributes:
        last: density of the last layer of the targets; None: as the others.

    Raises:
        InputError: a sparsity at which the last layer alone keeps too much.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (10, 10)), 100) for name in "abcd"]
    >>> SmartRatio().keep(0.8, layers)
    [26, 16, 8, 30]
    """

    name = "smart_ratio"
    equation = "p_l = min(1, e ((L-l+1)² + (L-l+1))), l = 1 ... L-1; p_L = 0.3; e such that sum p_l N_l = (1 - S) sum N_l"
    source = "Su, Chen, Cai, Wu, Gao, Wang, Lee 2020 (random tickets)"
    effort = "nothing"
    advice = "random masks before training"

    last: Share | None = 0.3

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        pieces = [layer.pieces for layer in layers]
        depth = len(layers)
        rates = [float((depth - at) ** 2 + (depth - at)) for at in range(depth)]
        if self.last is None or depth == 1:
            ends = capped_proportional(rates, pieces, 1.0 - final)
        else:
            budget, before = (1.0 - final) * sum(pieces), sum(pieces[:-1])
            if self.last * pieces[-1] > budget + 0.5:
                raise InputError(
                    f"allocation.smart_ratio: {self.last:g} of {layers[-1].name!r} is {self.last * pieces[-1] / sum(pieces):.4g} of all"
                    f" pieces, more than sparsity {final:g} leaves; set last: null, or a smaller density"
                )
            others = min(max((budget - self.last * pieces[-1]) / before, 0.0), 1.0)
            ends = [*capped_proportional(rates[:-1], pieces[:-1], others), min((budget - others * before) / pieces[-1], 1.0)]
        stage = sparsity / final if final else 0.0
        return [max(1.0 - stage * (1.0 - density), 0.0) for density in ends]
