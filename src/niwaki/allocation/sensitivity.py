"""Each layer is pruned alone, and the loss says how much it can bear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from niwaki.allocation.base import Allocation, Evidence
from niwaki.allocation.layer import Layer
from niwaki.allocation.sharing import solved
from niwaki.component import Fraction
from niwaki.errors import InputError
from niwaki.selection import kept

Curve = list[tuple[float, float]]
"""Sparsity of one layer, and by how much the loss is then higher than with all that is active; both never fall."""


class Sensitivity(Allocation):
    """Every layer is as sparse as one common increase of the loss allows, if it were pruned alone.

    Curves are made increasing by their running maximum, and interpolated between what was measured; :meth:`curves` returns them. The
    increase is what the total asks for. Layers that do not matter by themselves may matter together, which the scan does not see. It takes
    a pass over the data for each layer and sparsity, at every update of the masks.

    Attributes:
        sparsities: at which each layer is tried; a single piece is tried besides.

    Raises:
        InputError: the loss is not finite with all that is active.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (1, 100)), 100) for name in "ab"]
    >>> loss = lambda counts: 1.0 + (100 - counts[0]) / 100 + 3 * (100 - counts[1]) / 100
    >>> Sensitivity().keep(0.4, layers, evidence=Evidence(loss=loss))  # increases of 0.6 and 3 * 0.2
    [40, 80]
    """

    name = "sensitivity"
    equation = "s_l = largest s with L(layer l at s, others whole) - L ≤ δ, δ such that sum s_l N_l = S sum N_l"
    source = "Han, Pool, Tran, Dally 2015; Li, Kadav, Durdanovic, Samet, Graf 2017"
    effort = "a pass over the data for each layer and sparsity, at every update"
    advice = "one update of a trained network; its curves tell which layers are fragile"

    sparsities: Annotated[list[Fraction], Field(min_length=1)] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"loss"})

    def quotas(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[float]:  # noqa: D102
        curves = list(self.curves(layers, evidence).values())
        total = kept(sparsity, sum(layer.pieces for layer in layers))

        def quotas_at(increase: float) -> list[float]:
            return [(1.0 - bearable(curve, increase)) * layer.pieces for curve, layer in zip(curves, layers, strict=True)]

        highest = max(increase for curve in curves for _, increase in curve if increase < math.inf)
        fewest = quotas_at(highest)
        if math.fsum(fewest) > total:
            evidence.tell("sensitivity: the loss is finite for no budgets so small; all layers are cut beyond that by the same factor")
            return [quota * total / math.fsum(fewest) for quota in fewest]
        quotas = solved(quotas_at, -1.0, highest, total)
        density = [quota / layer.pieces for quota, layer in zip(quotas, layers, strict=True)]
        order = sorted(range(len(layers)), key=density.__getitem__)
        evidence.tell(
            f"sensitivity: of {len(layers)} layers {layers[order[0]].name} bears most (density {density[order[0]]:.3g}), and"
            f" {layers[order[-1]].name} least ({density[order[-1]]:.3g})"
        )
        return quotas

    def curves(self, layers: Sequence[Layer], evidence: Evidence) -> dict[str, Curve]:
        """Return the curve of every layer, by name; an increase that is not finite counts as infinite.

        Raises:
            InputError: the loss is not finite with all that is active.
        """
        assert evidence.loss is not None
        limits = evidence.limits(layers)
        base = float(evidence.loss(limits))
        if not math.isfinite(base):
            raise InputError(f"allocation.sensitivity: the loss is {base} before anything is pruned; look at the model and its data")
        curves = {}
        for i, (layer, limit) in enumerate(zip(layers, limits, strict=True)):
            tried = {min(kept(s, layer.pieces), limit) for s in self.sparsities} | {1}
            curve: Curve = [(1.0 - limit / layer.pieces, 0.0)]
            for n in sorted((n for n in tried if 0 < n < limit), reverse=True):
                loss = float(evidence.loss([*limits[:i], n, *limits[i + 1 :]]))
                increase = loss - base if math.isfinite(loss) else math.inf
                curve.append((1.0 - n / layer.pieces, max(increase, curve[-1][1])))
            curves[layer.name] = curve
        return curves


def bearable(curve: Curve, increase: float) -> float:
    """Return the largest sparsity at which a curve is at most at an increase, interpolated; the first one below all increases.

    >>> curve = [(0.0, 0.0), (0.5, 1.0), (0.75, math.inf)]
    >>> bearable(curve, 0.5), bearable(curve, 2.0)
    (0.25, 0.5)
    """
    finite = [(s, d) for s, d in curve if d < math.inf]
    last = sum(d <= increase for _, d in finite) - 1
    if last < 0 or last + 1 == len(finite):
        return finite[last if last > 0 else 0][0]
    (s, d), (above, more) = finite[last : last + 2]
    return float(np.interp(increase, [d, more], [s, above]))
