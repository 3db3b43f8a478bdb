"""What a drop-and-grow update gives to each layer: sparsity moves between layers while a network trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from niwaki.allocation.base import Allocation, Evidence
from niwaki.allocation.erdos_renyi import ErdosRenyi, ErdosRenyiKernel
from niwaki.allocation.layer import Layer
from niwaki.allocation.sharing import bounded
from niwaki.allocation.uniform import Uniform
from niwaki.errors import InputError
from niwaki.saliency import Observation
from niwaki.selection import kept
from niwaki.statistics import Momentum, Statistic

MOMENTUM = Momentum(0.9)

INITIAL: dict[str, Callable[[], Allocation]] = {
    "uniform": Uniform,
    "erdos_renyi": ErdosRenyi,
    "erdos_renyi_kernel": ErdosRenyiKernel,
}


class Redistribution(Allocation):
    """Grown pieces go to the layers in proportion to how much their active weights matter.

    All layers drop the same share of what they have; what is to grow, of all layers together, is then shared anew. A layer takes no more
    than it has free places, and what exceeds that goes to the others in the same proportion. (The code of sparse momentum fills
    only 99 % of the free places and spreads the rest evenly.) The first masks have the shapes' budgets. Where the total falls below what
    the drop leaves, every layer gives up the same share.

    Attributes:
        by: of the active weights the mean absolute ``momentum`` (moving average of gradients, 0.9), ``weight`` or ``gradient`` of the step,
            or the number of ``nonzeros``; or the number of ``survivors``, the pieces that are left after the drop.
        initial: budgets of the first masks.

    Raises:
        InputError: weights or gradients that are not finite.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (10, 10)), 100) for name in "ab"]
    >>> Redistribution(by="survivors").keep(0.8, layers, evidence=Evidence(survivors=[5, 15]))
    [10, 30]
    """

    name = "redistribution"
    equation = "n_l = survivors_l + min(free_l, e m_l), m_l: mean |m|, |w| or |g|, or number of active weights; e such that sum n_l = K"
    source = "Dettmers & Zettlemoyer 2019 (sparse momentum); Mostafa & Wang 2019 (DSR: survivors)"
    effort = "a sum over the active weights"
    advice = "drop-and-grow training where layers should find their own density"

    by: Literal["momentum", "weight", "gradient", "nonzeros", "survivors"] = "momentum"
    initial: Literal["uniform", "erdos_renyi", "erdos_renyi_kernel"] = "uniform"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The moving average of the gradients, if growth is shared out by it."""
        return (MOMENTUM,) if self.by == "momentum" else ()

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        seen = set() if self.by == "survivors" else {"observe"} | ({"gradient"} if self.by == "gradient" else set())
        return frozenset({"survivors"} | seen)

    def quotas(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[float]:  # noqa: D102
        survivors = evidence.survivors
        if survivors is None:
            return INITIAL[self.initial]().quotas(sparsity, layers, final, evidence)
        grown = kept(sparsity, sum(layer.pieces for layer in layers)) - sum(survivors)
        if grown <= 0:
            return [n * (1.0 + grown / max(sum(survivors), 1)) for n in survivors]
        free = [max(limit - n, 0) for limit, n in zip(evidence.limits(layers), survivors, strict=True)]
        rates = [self._rate(i, layer.name, survivors[i], evidence) for i, layer in enumerate(layers)]
        whole = math.fsum(rates)
        shares = [rate / whole * grown if whole else grown / len(layers) for rate in rates]
        return [n + more for n, more in zip(survivors, bounded(shares, grown, free), strict=True)]

    def _rate(self, i: int, name: str, survivors: int, evidence: Evidence) -> float:
        """Return what the growth of a layer is proportional to."""
        if self.by == "survivors":
            return float(survivors)
        assert evidence.observe is not None
        values = [self._active(one) for one in evidence.observe(i)]
        if self.by == "nonzeros":
            return float(sum(int((one != 0).sum()) for one in values))
        number = sum(one.numel() for one in values)
        rate = sum(float(one.double().abs().sum()) for one in values) / number if number else 0.0
        if not math.isfinite(rate):
            raise InputError(f"allocation.redistribution: the mean absolute {self.by} of {name!r} is {rate}; look at its values")
        return rate

    def _active(self, seen: Observation) -> Tensor:
        values = seen.of(MOMENTUM) if self.by == "momentum" else seen.gradient if self.by == "gradient" else seen.weight
        if values is None:
            raise InputError(f"allocation.redistribution: {seen.name!r} has no gradient at step {seen.step}")
        return values.detach() if seen.active is None else values.detach()[seen.active.reshape(values.shape)]
