"""Search by variation and choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from niwaki.allocation.base import Allocation, Evidence
from niwaki.allocation.layer import Layer
from niwaki.allocation.sharing import bounded, capped_proportional, largest_remainder
from niwaki.allocation.trials import Losses, generator
from niwaki.selection import kept


class Evolutionary(Allocation):
    """Budgets as genes: the fitter half breeds, children take each layer's gene of either parent and mutate.

    A gene is the logarithm of a layer's density before all are scaled to the total, so every individual meets it exactly. The first
    individual is the uniform budget, and the best one of a generation lives on: the result is never worse than uniform on the data that it
    was tried on. As many passes over the data as individuals, fewer where they are equal, at every update of the masks.

    Attributes:
        population: individuals of a generation.
        generations: how often they breed.
        mutation: standard deviation of a gene's change, in the logarithm of the density.

    Raises:
        InputError: no individual has a finite loss.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (10, 10)), 100) for name in "ab"]
    >>> loss = lambda counts: 10.0 / counts[0] + 90.0 / counts[1]  # least at 1 : 3
    >>> Evolutionary().keep(0.8, layers, evidence=Evidence(loss=loss))
    [10, 30]
    """

    name = "evolutionary"
    equation = "p_l = min(1, e exp(x_l)), e such that sum p_l N_l = (1 - S) sum N_l; x: fittest of all generations"
    source = "Whitley, Starkweather, Bogart 1990; Liu et al. 2019 (MetaPruning)"
    effort = "a pass over the data for each individual, at every update"
    advice = "one update of a trained network, when passes over some data are cheap"

    population: Annotated[int, Field(ge=4, le=10_000)] = 20
    generations: Annotated[int, Field(ge=1, le=10_000)] = 10
    mutation: Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)] = 0.3

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"loss"})

    def counts(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[int]:
        """Return the fittest counts.

        Raises:
            InputError: none has a finite loss.
        """
        pieces, limits = [layer.pieces for layer in layers], evidence.limits(layers)
        total = kept(sparsity, sum(pieces))
        random, losses = generator(evidence, self.name), Losses(evidence, self.name)

        def fitness(genes: NDArray[np.float64]) -> float:
            shares = capped_proportional(np.exp(genes - genes.mean()).tolist(), pieces, 1.0 - sparsity)
            quotas = [share * n for share, n in zip(shares, pieces, strict=True)]
            return losses(largest_remainder(bounded(quotas, total, limits), total, limits))

        size = (self.population, len(layers))
        living = random.normal(0.0, 2.0 * self.mutation, size)
        living[0] = 0.0
        for generation in range(self.generations + 1):
            ranks = np.argsort([fitness(one) for one in living], kind="stable")
            if generation < self.generations:
                parents = living[ranks[: math.ceil(self.population / 2)]]
                mothers, fathers = parents[random.integers(len(parents), size=(2, self.population))]
                living = np.where(random.random(size) < 0.5, mothers, fathers) + random.normal(0.0, self.mutation, size)
                living[0] = parents[0]
        return losses.best
