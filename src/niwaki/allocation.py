"""How many pieces each layer keeps, so that all layers together keep exactly what the sparsity asks for.

An allocation gives every layer a density; pieces are whole, so the quotas ``density * pieces`` become counts by the largest
remainder. Numbers are Python floats (float64) throughout: float32 counts are wrong from 2^24 pieces on, and often before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from niwaki.component import Component, Fraction
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.selection import kept


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


class Allocation(Component):
    """Base of the slot ``allocation``."""

    slot = "allocation"

    joint: ClassVar[bool] = False
    """Whether one ranking over all layers decides, so that budgets follow from the scores instead of ``keep``."""

    def keep(self, sparsity: float, layers: Sequence[Layer], final: float | None = None) -> list[int]:
        """Return how many pieces each layer keeps; together ``kept(sparsity, all pieces)``.

        Args:
            sparsity: in [0, 1), of all layers together.
            layers: in parameter order.
            final: the recipe's sparsity, of which ``sparsity`` may be a stage on the way; by default ``sparsity`` itself.

        Raises:
            InputError: a sparsity outside [0, 1), or one that the allocation cannot give to these layers.
        """
        final = sparsity if final is None else final
        for value in (sparsity, final):
            if not 0.0 <= value < 1.0:
                raise InputError(f"allocation.{self.name}: sparsity must be in [0, 1), got {value!r}")
        pieces = [layer.pieces for layer in layers]
        if sparsity == final == 0.0 or not layers:
            return pieces
        densities = self.densities(sparsity, layers, final)
        quotas = [density * n for density, n in zip(densities, pieces, strict=True)]
        return largest_remainder(quotas, kept(sparsity, sum(pieces)), pieces)

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:
        """Return the share of its pieces that each layer keeps, in [0, 1], with ``sum density * pieces = (1 - sparsity) * all pieces``."""
        raise NotImplementedError


class Uniform(Allocation):
    """Every layer has the sparsity of the whole.

    Attributes:
        per: what is given the sparsity: each ``tensor``.

    >>> layers = [Layer("a", Layout(("output", "input"), (3, 5)), 15), Layer("b", Layout(("output", "input"), (2, 3)), 6)]
    >>> Uniform().keep(0.5, layers)
    [7, 3]
    """

    name = "uniform"
    equation = "s_l = S"
    source = "the usual baseline; Zhu & Gupta 2017"

    per: Literal["tensor"] = "tensor"

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        return [1.0 - sparsity] * len(layers)


class Global(Allocation):
    """One ranking over all layers: the best scores are kept wherever they are."""

    name = "global"
    equation = "one threshold for all layers"
    source = "LeCun, Denker, Solla 1989; Lee, Ajanthan, Torr 2018 (SNIP)"
    joint = True

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        raise InputError(
            "allocation.global: its budgets follow from the scores of a joint selection; where budgets are needed without scores choose"
            " uniform, erdos_renyi or erdos_renyi_kernel"
        )


class ErdosRenyi(Allocation):
    """Narrow layers stay denser: the connections that a layer keeps grow with its inputs plus outputs.

    ``n_out`` counts all outputs of the weight, ``n_in`` the inputs that one output sees: the weight's own fan, so that
    ``n_in * n_out * prod(kernel)`` is always the number of its elements, also for grouped and depthwise convolutions (``n_in`` = input
    channels / groups) and stacked matrices (``n_out`` = all gates). A layer that would need more than all its pieces becomes
    dense, and the rest is solved anew, until none does.

    >>> layers = [Layer("a", Layout(("output", "input"), (10, 90)), 900), Layer("b", Layout(("output", "input"), (10, 10)), 100)]
    >>> ErdosRenyi().keep(0.88, layers)
    [100, 20]
    """

    name = "erdos_renyi"
    equation = "p_l = min(1, e (n_in + n_out) / (n_in n_out)), e such that sum p_l N_l = (1 - S) sum N_l"
    source = "Mocanu et al. 2018 (SET)"

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        return capped_proportional([self.rate(layer.layout) for layer in layers], [layer.pieces for layer in layers], 1.0 - sparsity)

    def rate(self, layout: Layout) -> float:
        """Return what the density of a layer is proportional to."""
        outputs, inputs = layout.outputs, layout.size("input")
        return (inputs + outputs) / (inputs * outputs)


class ErdosRenyiKernel(ErdosRenyi):
    """Erdős-Rényi that also counts the kernel's sizes, so that large kernels are sparser than pointwise ones.

    Fans and the dense-layer loop as for ``erdos_renyi``. On ResNet-50 it costs about twice the FLOPs of ``uniform`` at equal sparsity.

    Attributes:
        power: exponent of the rate, above 0; below 1 the budgets come closer to uniform.
    """

    name = "erdos_renyi_kernel"
    equation = "p_l = min(1, e ((n_in + n_out + sum k) / (n_in n_out prod k))^power), e such that sum p_l N_l = (1 - S) sum N_l"
    source = "Evci, Gale, Menick, Castro, Elsen 2020 (RigL)"

    power: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0

    def rate(self, layout: Layout) -> float:  # noqa: D102
        return float(((layout.size("input") + layout.outputs + sum(layout.kernel)) / layout.elements) ** self.power)


class Explicit(Allocation):
    """A map from layer names to sparsities; layers that it does not name share what is left, each at the same sparsity.

    Patterns are shell globs over canonical parameter names, such as ``layer1.*.weight``; where several match, the first written
    counts. The map gives the sparsities at the end of the schedule. On the way there every layer, named or not, is at the same
    fraction of its own: at sparsity ``S_t`` of ``S`` a layer has ``s_l S_t / S``, so the total holds at every stage.

    Attributes:
        layers: glob -> sparsity in [0, 1).

    Raises:
        InputError: a pattern that decides no layer; unnamed layers that would need a sparsity outside [0, 1); a map that names all
            layers and whose total is not the sparsity that was asked for.

    >>> layers = [Layer("a", Layout(("output", "input"), (4, 5)), 20), Layer("b", Layout(("output", "input"), (8, 10)), 80)]
    >>> Explicit(layers={"a": 0.25}).keep(0.75, layers)
    [15, 10]
    >>> Explicit(layers={"a": 0.25}).keep(0.375, layers, final=0.75)
    [17, 45]
    """

    name = "explicit"
    equation = "s_l given for named layers; s_rest = (S N - sum_named s_l N_l) / N_rest"
    source = "Gale, Elsen, Hooker 2019 (first convolution dense, last layer at most 80 % sparse)"

    single_field = "layers"

    layers: Annotated[dict[str, Fraction], Field(min_length=1)]

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        named = self._named(layers)
        total = sum(layer.pieces for layer in layers)
        rest = sum(layer.pieces for layer, s in zip(layers, named, strict=True) if s is None)
        pruned = math.fsum(s * layer.pieces for layer, s in zip(layers, named, strict=True) if s is not None)
        if rest == 0:
            if abs(pruned - final * total) > 0.5:
                raise InputError(
                    f"allocation.explicit: the map names all layers and amounts to sparsity {pruned / total!r}, but {final!r} is asked for;"
                    " ask for that, or leave a layer unnamed to make up the difference"
                )
            final = pruned / total
        others = (final * total - pruned) / rest if rest else 0.0
        # Half a piece of slack: a map that prunes exactly the total leaves the others dense, give or take rounding.
        if others * rest < -0.5 or others >= 1.0:
            reach = f"between {max(pruned / total, 0.0)!r} and {(pruned + rest) / total!r} (exclusive)"
            raise InputError(
                f"allocation.explicit: with the sparsities of the named layers the total can be {reach}, but {final!r} is asked for"
            )
        stage = sparsity / final if final else 0.0
        sparsities = [stage * (max(others, 0.0) if s is None else s) for s in named]
        worst = max(range(len(layers)), key=sparsities.__getitem__)
        if sparsities[worst] * layers[worst].pieces > layers[worst].pieces + 0.5:
            raise InputError(
                f"allocation.explicit: the map is for sparsity {final!r}; at {sparsity!r} {layers[worst].name!r} would need"
                f" {sparsities[worst]!r}, above 1"
            )
        return [1.0 - s for s in sparsities]

    def _named(self, layers: Sequence[Layer]) -> list[float | None]:
        """Return the sparsity that the map gives to each layer, None where it is silent."""
        decided: list[float | None] = [None] * len(layers)
        for pattern, value in self.layers.items():
            matches = [i for i, layer in enumerate(layers) if fnmatchcase(layer.name, pattern)]
            if not matches:
                nearest = get_close_matches(pattern, [layer.name for layer in layers], n=3, cutoff=0.0)
                raise InputError(f"allocation.explicit.layers: {pattern!r} matches no layer; the nearest names: {', '.join(nearest)}")
            new = [i for i in matches if decided[i] is None]
            if not new:
                raise InputError(
                    f"allocation.explicit.layers: {pattern!r} decides no layer, because earlier patterns name all that it matches;"
                    " write it before them"
                )
            for i in new:
                decided[i] = value
        return decided


def capped_proportional(rates: Sequence[float], pieces: Sequence[int], density: float) -> list[float]:
    """Return ``p_l = min(1, e * rate_l)`` with the ``e`` that solves ``sum p_l * pieces_l = density * sum pieces_l``.

    Layers above 1 are fixed at 1 and ``e`` is solved for the others, until none is above 1. As ``e`` only grows in that loop, a
    layer that was fixed once stays so in the solution.

    Args:
        rates: positive, one a layer.
        pieces: one a layer.
        density: in (0, 1].

    >>> capped_proportional([1.0, 3.0], [10, 10], 0.5)
    [0.25, 0.75]
    >>> capped_proportional([1.0, 3.0], [10, 10], 0.75)
    [0.5, 1.0]
    """
    budget = density * sum(pieces)
    free = list(range(len(rates)))
    result = [1.0] * len(rates)
    while free:
        left = budget - (sum(pieces) - sum(pieces[i] for i in free))
        weight = math.fsum(rates[i] * pieces[i] for i in free)
        scale = left / weight if weight else 0.0
        below = [i for i in free if scale * rates[i] < 1.0]
        if len(below) == len(free):
            for i in free:
                result[i] = max(scale * rates[i], 0.0)
            break
        free = below
    return result


def largest_remainder(quotas: Sequence[float], total: int, limits: Sequence[int]) -> list[int]:
    """Return whole numbers that sum to ``total``: each quota rounded down, the rest to the largest remainders (ties: lower index).

    Args:
        quotas: non-negative; they sum to ``total`` within one for each entry.
        total: the sum of the result.
        limits: upper bounds of the results.

    Raises:
        InputError: ``total`` is negative or above the sum of the limits, or far from the sum of the quotas.

    Source: Hamilton 1792 (apportionment of seats).

    >>> largest_remainder([2.5, 2.5, 1.0], 6, [9, 9, 9])
    [3, 2, 1]
    """
    bounded = [min(max(quota, 0.0), float(limit)) for quota, limit in zip(quotas, limits, strict=True)]
    if not 0 <= total <= sum(limits) or not abs(math.fsum(bounded) - total) <= len(bounded):
        raise InputError(f"cannot share {total} pieces by quotas that sum to {math.fsum(quotas):.6g} with room for {sum(limits)}")
    counts = [math.floor(quota) for quota in bounded]
    order = sorted(range(len(counts)), key=lambda i: counts[i] - bounded[i])
    missing = total - sum(counts)
    while missing:
        sign = 1 if missing > 0 else -1
        for i in order if sign > 0 else reversed(order):
            if missing and 0 <= counts[i] + sign <= limits[i]:
                counts[i] += sign
                missing -= sign
    return counts


def guard(keep: Sequence[int], layers: Sequence[Layer], minimum: int = 1) -> tuple[list[int], list[str]]:
    """Raise every layer to at least ``minimum`` pieces, at the cost of the others in proportion to what they can spare.

    A layer with fewer pieces than ``minimum`` keeps them all. The total is unchanged unless the others cannot spare enough; then
    it is as small as the minimum allows.

    Args:
        keep: pieces kept by each layer.
        layers: the layers.
        minimum: pieces that no layer goes below.

    Returns:
        the new counts, and the names of the layers that were raised.

    >>> layers = [Layer(name, Layout(("output", "input"), (3, 4)), 12) for name in "abc"]
    >>> guard([9, 0, 3], layers)
    ([8, 1, 3], ['b'])
    """
    floors = [min(minimum, layer.pieces) for layer in layers]
    missing = sum(max(low - n, 0) for low, n in zip(floors, keep, strict=True))
    spare = [max(n - low, 0) for low, n in zip(floors, keep, strict=True)]
    available = sum(spare)
    given = [0] * len(spare)
    if missing and available:
        share = min(missing / available, 1.0)
        given = largest_remainder([n * share for n in spare], min(missing, available), spare)
    raised = [layer.name for low, n, layer in zip(floors, keep, layers, strict=True) if n < low]
    return [max(n, low) - out for low, n, out in zip(floors, keep, given, strict=True)], raised
