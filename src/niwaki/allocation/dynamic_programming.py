"""The best level for every layer, by errors that add up, under a budget of pieces, FLOPs, energy or measured seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from niwaki.allocation.base import Allocation, Evidence
from niwaki.allocation.costs import Cost, LatencyTable, energy, flops, size
from niwaki.allocation.layer import Layer
from niwaki.allocation.levels import cheapest, densities, filled, in_steps, within
from niwaki.allocation.sharing import bounded, largest_remainder
from niwaki.allocation.trials import Losses, generator
from niwaki.errors import InputError
from niwaki.layout import matrix
from niwaki.selection import kept
from niwaki.statistics import InputGram, Statistic

Share = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]

MUTATED = 0.1
"""Share of the coefficients that are drawn anew in a trial."""


class LeastError(Allocation):
    """Base: a level for every layer, chosen by dynamic programming, and the room that levels leave filled evenly.

    Attributes:
        error: what counts as the error of a level: ``scores``, the sum of the scores that go; ``layerwise``, the relative squared error of
            the layer's outputs without update, of single weights; ``quadratic``, the square of the level, the same for all layers
            (which only makes sense with trials).
        levels: how many densities each layer may have: geometric from 1 to 1 %, and a single piece.
        steps: the budget in as many steps; costs are rounded up to them.
        trials: choices with random coefficients in front of each layer's errors whose loss is measured; the best one is returned.
    """

    error: Literal["scores", "layerwise", "quadratic"] = "scores"
    levels: Annotated[int, Field(ge=2, le=1000)] = 40
    steps: Annotated[int, Field(ge=10, le=1_000_000)] = 10_000
    trials: Annotated[int, Field(ge=0)] = 0

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"scores"} | ({"observe"} if self.error == "layerwise" else set()) | ({"loss"} if self.trials else set()))

    @property
    def statistics(self) -> tuple[Statistic, ...]:  # noqa: D102
        return (InputGram(),) if self.error == "layerwise" else ()

    def cost_of(self, layers: Sequence[Layer], evidence: Evidence) -> Cost:
        """Return what is bounded."""
        raise NotImplementedError

    def counts(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[int]:
        """Return the counts with the least sum of errors that cost at most ``1 - sparsity``; in pieces, exactly that.

        Raises:
            InputError: the budget cannot be met; it says what can be reached.
        """
        cost = self.cost_of(layers, evidence)
        limits = evidence.limits(layers)
        # In pieces the whole number counts, of which the cost of the levels must not be more.
        goal = (1.0 - sparsity) * cost.dense if self.budget is not None else float(kept(sparsity, sum(layer.pieces for layer in layers)))
        if cost.total(limits) <= goal:
            return limits
        options = [level_counts(limit, self.levels) for limit in limits]
        least = [own[-1] for own in options]
        if cost.total(least) > goal:
            if self.budget is None:  # fewer pieces than layers
                return largest_remainder(bounded([1.0 * n for n in least], int(goal), least), int(goal), least)
            reach = f"{cost.total(least) / cost.dense:.4g} and {cost.total(limits) / cost.dense:.4g}"
            raise InputError(
                f"allocation.{self.name}: {1.0 - sparsity:.4g} of the cost is asked for, and these targets can leave between {reach}"
            )
        errors = self._errors(options, layers, evidence)

        def choose(coefficients: Sequence[float]) -> list[int]:
            weighted = [c * own for c, own in zip(coefficients, errors, strict=True)]
            return within(cost, goal, lambda additive: self._chosen(weighted, options, cost, additive, goal, limits))

        start = [1.0] * len(layers)
        return choose(start) if not self.trials else self._searched(start, choose, evidence)

    def _chosen(
        self,
        errors: Sequence[NDArray[np.float64]],
        options: Sequence[Sequence[int]],
        cost: Cost,
        additive: float,
        goal: float,
        limits: Sequence[int],
    ) -> list[int]:
        """Return the counts of the best levels within an additive goal, raised evenly as far as the goal allows."""
        each = [[of(n) for n in own] for of, own in zip(cost.layers, options, strict=True)]
        costs, budget = in_steps(each, additive - cost.fixed, self.steps)
        # What fits exactly may not fit in steps, which are rounded up; the smallest levels do, as the caller has checked.
        levels = cheapest([own.tolist() for own in errors], costs, budget) if budget >= 0 else None
        levels = [len(own) - 1 for own in options] if levels is None else levels
        counts = [own[level] for own, level in zip(options, levels, strict=True)]
        if self.budget is not None:
            return filled(counts, limits, lambda more: cost.total(more) <= goal) if cost.total(counts) <= goal else counts
        room, missing = sum(limits) - sum(counts), int(goal) - sum(counts)
        share = missing / room if room else 0.0
        quotas = [n + share * (limit - n) for n, limit in zip(counts, limits, strict=True)]
        return largest_remainder(quotas, int(goal), limits)

    def _errors(self, options: Sequence[Sequence[int]], layers: Sequence[Layer], evidence: Evidence) -> list[NDArray[np.float64]]:
        """Return the error of every level of every layer."""
        if self.error == "quadratic":
            return [(np.arange(len(own)) / max(len(own) - 1, 1)) ** 2 for own in options]
        if self.error == "layerwise":
            return [layerwise_errors(i, own, layers[i], evidence) for i, own in enumerate(options)]
        return [lost(evidence.best(i, layers[i].name), own) for i, own in enumerate(options)]

    def _searched(self, start: Sequence[float], choose: Callable[[Sequence[float]], list[int]], evidence: Evidence) -> list[int]:
        """Return the choice with the least loss: the plain one, those of random coefficients, and those of small changes of the best."""
        random, losses = generator(evidence, self.name), Losses(evidence, self.name)
        best, least = list(start), losses(choose(start))
        for trial in range(self.trials):
            drawn = (1.0 - random.random(len(start))).tolist()  # in (0, 1]
            if trial >= self.trials // 2:
                again = random.random(len(start)) < MUTATED
                again[random.integers(len(start))] = True
                drawn = [new if changed else old for new, old, changed in zip(drawn, best, again.tolist(), strict=True)]
            loss = losses(choose(drawn))
            if loss < least:
                best, least = drawn, loss
        return losses.best


class DynamicProgramming(LeastError):
    """The levels with the least sum of errors under a budget of pieces, FLOPs or energy: the optimum, but for the steps of the budget.

    Errors of layers must mean the same: scores that are changes of one loss do (``woodfisher``, ``taylor``), magnitudes do after a
    normalization. With ``trials`` the coefficients of the layers are searched by the loss itself, as in SPDY, and the result is
    never worse than without. Time O(layers · levels · steps) and a pass over the data for each trial.

    Attributes:
        cost: what is bounded: ``size``, the pieces that the recipe's sparsity counts; ``flops`` of the whole model; or ``energy`` of the
            target weights.
        share: share of the FLOPs, or the energy, that stays at the end of the schedule.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (1, 8)), 8) for name in "ab"]
    >>> scores = [torch.full((8,), 1.0), torch.tensor([9.0, 9.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])]
    >>> DynamicProgramming(levels=20).keep(0.375, layers, evidence=Evidence(scores=scores.__getitem__))
    [8, 2]
    """

    name = "dynamic_programming"
    equation = "min sum_l c_l E_l(n_l) such that fixed + sum_l C_l(n_l) ≤ B"
    source = "Frantar & Alistarh 2022 (SPDY)"
    effort = "layers · levels · steps operations; a pass over the data for each trial"
    advice = "errors that add up over layers, and a budget other than the number of weights"

    cost: Literal["size", "flops", "energy"] = "size"
    share: Share | None = None

    @model_validator(mode="after")
    def _needs_a_share(self) -> DynamicProgramming:
        if (self.cost == "size") != (self.share is None):
            raise ValueError("share: it goes with cost: flops or energy, which need one; with cost: size the recipe's sparsity counts")
        return self

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        return super().wants | (frozenset() if self.cost == "size" else {"flops"})

    @property
    def budget(self) -> float | None:  # noqa: D102
        return self.share

    def cost_of(self, layers: Sequence[Layer], evidence: Evidence) -> Cost:  # noqa: D102
        if self.cost == "size":
            return size(layers)
        return flops(layers, evidence) if self.cost == "flops" else energy(layers, evidence)


class LatencyBudget(LeastError):
    """The levels with the least sum of errors whose measured seconds, by a table, are within a budget.

    What layers save together is taken as the sum of what each saves, so measure what comes out. Time as for ``dynamic_programming``.

    Attributes:
        table: file of a :class:`LatencyTable`, or the table itself.
        share: share of the whole model's seconds that stays at the end of the schedule.

    Raises:
        InputError: no such file, a table of another model, or a budget below what the sparsest layers take.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (1, 8)), 8) for name in "ab"]
    >>> table = {"seconds": 10.0, "layers": {"a": {0.0: 4.0, 1.0: 0.0}, "b": {0.0: 4.0, 0.5: 4.0, 1.0: 2.0}}}
    >>> scores = [torch.full((8,), 1.0)] * 2  # b saves nothing up to one half, and is kept dense
    >>> LatencyBudget(table=table, share=0.8).keep(0.2, layers, evidence=Evidence(scores=scores.__getitem__))
    [4, 8]
    """

    name = "latency_budget"
    equation = "min sum_l E_l(n_l) such that fixed + sum_l T_l(1 - n_l / N_l) ≤ B T_dense"
    source = "Frantar & Alistarh 2022 (SPDY); Shen et al. 2022 (HALP)"
    effort = "layers · levels · steps operations; a pass over the data for each trial; a table measured before"
    advice = "a goal in milliseconds on a machine that runs masked weights faster"

    table: LatencyTable | str
    share: Share

    @property
    def budget(self) -> float:  # noqa: D102
        return self.share

    def cost_of(self, layers: Sequence[Layer], evidence: Evidence) -> Cost:  # noqa: D102
        return (LatencyTable.load(self.table) if isinstance(self.table, str) else self.table).cost(layers)


def level_counts(limit: int, levels: int) -> list[int]:
    """Return the numbers of pieces that a layer may keep, decreasing: all that are active, fewer by a constant factor, and one.

    >>> level_counts(100, 4)
    [100, 22, 5, 1]
    """
    return sorted({round(density * limit) for density in densities(levels)} - {0} | {min(limit, 1), limit}, reverse=True)


def lost(best: Tensor, counts: Sequence[int]) -> NDArray[np.float64]:
    """Return the sum of the scores that go when so many of the best stay.

    >>> lost(torch.tensor([3.0, 2.0, 1.0]), [3, 1]).tolist()
    [0.0, 3.0]
    """
    going = torch.cat([best.to(torch.float64).flip(0).cumsum(0).flip(0), best.new_zeros(1, dtype=torch.float64)])
    return going[torch.tensor(counts)].numpy()


def layerwise_errors(i: int, counts: Sequence[int], layer: Layer, evidence: Evidence) -> NDArray[np.float64]:
    """Return ``‖(W - W_n) X‖² / ‖W X‖²`` of a layer whose n best weights stay, for each n.

    Raises:
        InputError: pieces are not single weights of one tensor.
    """
    assert evidence.observe is not None
    seen = evidence.observe(i)
    order = evidence.order(i, layer.name)
    if len(seen) != 1 or seen[0].layout is None or seen[0].weight.numel() != layer.pieces:
        raise InputError(f"allocation: error: layerwise needs single weights as pieces, and {layer.name!r} has others; use error: scores")
    layout, gram = seen[0].layout, seen[0].of(InputGram()).to("cpu", torch.float64)
    weight = seen[0].weight.detach().to("cpu", torch.float64).flatten()

    def energy_of(values: Tensor) -> float:
        rows = matrix(values, layout)
        return float(((rows @ gram) * rows).sum())

    whole = energy_of(weight)
    errors = []
    for n in counts:
        removed = weight.clone()
        removed[order[:n]] = 0.0
        errors.append(energy_of(removed) / whole if whole > 0 else 0.0)
    return np.array(errors)
