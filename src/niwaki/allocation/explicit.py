"""Budgets that a person gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from niwaki.allocation.base import Allocation
from niwaki.allocation.layer import Layer
from niwaki.component import Fraction
from niwaki.errors import InputError


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

    >>> from niwaki.layout import Layout
    >>> layers = [Layer("a", Layout(("output", "input"), (4, 5)), 20), Layer("b", Layout(("output", "input"), (8, 10)), 80)]
    >>> Explicit(layers={"a": 0.25}).keep(0.75, layers)
    [15, 10]
    >>> Explicit(layers={"a": 0.25}).keep(0.375, layers, final=0.75)
    [17, 45]
    """

    name = "explicit"
    equation = "s_l given for named layers; s_rest = (S N - sum_named s_l N_l) / N_rest"
    source = "Gale, Elsen, Hooker 2019 (first convolution dense, last layer at most 80 % sparse)"
    effort = "nothing"
    advice = "budgets that are known, from a paper or from experience"

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
