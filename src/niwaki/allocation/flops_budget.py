"""As sparse as a budget of FLOPs asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from niwaki.allocation.base import Allocation, Evidence
from niwaki.allocation.costs import flops
from niwaki.allocation.layer import Layer
from niwaki.allocation.scored import joint_order
from niwaki.allocation.sharing import bounded, guard, largest_remainder
from niwaki.errors import InputError

Share = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]


class FlopsBudget(Allocation):
    """As many pieces as the FLOPs of the whole model allow, from one ranking of all scores or the same share of each layer.

    The total is bisected: the largest number of pieces whose FLOPs, with those of everything that is no target, are at most the budget.
    It falls short of it by less than the next piece would cost. Every layer keeps its best piece. Pieces count as what they cost, scores as
    they are: with ``normalization: per_flop`` expensive pieces go first. Time O(N log N) for N pieces.

    Attributes:
        flops: share of the whole model's FLOPs that stays at the end of the schedule.
        ranking: ``global``, one ranking of all scores, or ``uniform``, the same sparsity in each layer.

    Raises:
        InputError: a budget below what is left when each layer keeps one piece; it says what can be reached.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (1, 4)), 4) for name in "ab"]
    >>> scores = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.5, 0.5, 0.2, 0.1])]
    >>> evidence = Evidence(scores=scores.__getitem__, flops=[10.0, 2.0], dense_flops=50.0)
    >>> FlopsBudget(flops=0.5).keep(0.5, layers, evidence=evidence)  # 2 FLOPs are no target's
    [2, 1]
    """

    name = "flops_budget"
    equation = "largest K with fixed + sum f_l n_l(K) ≤ B F_dense; n_l(K): pieces of layer l among the K best, or K N_l / N"
    source = "Singh & Alistarh 2020 (FLOP target); Gordon et al. 2018 (MorphNet)"
    effort = "a sort of all scores"
    advice = "a goal in FLOPs rather than in weights"

    single_field = "flops"

    flops: Share
    ranking: Literal["global", "uniform"] = "global"

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"scores", "flops"})

    @property
    def budget(self) -> float:  # noqa: D102
        return self.flops

    def counts(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[int]:
        """Return the counts that leave at most ``1 - sparsity`` of the FLOPs.

        Raises:
            InputError: the budget cannot be met.
        """
        cost = flops(layers, evidence)
        if not cost.dense > 0.0:
            raise InputError("allocation.flops_budget: the model has no FLOPs that are counted")
        goal = (1.0 - sparsity) * cost.dense
        limits = evidence.limits(layers)
        low, high = sum(min(limit, 1) for limit in limits), sum(limits)
        at = self._by_total(layers, limits, evidence)
        if cost.total(at(high)) <= goal:
            return at(high)
        if cost.total(at(low)) > goal:
            reach = f"{cost.total(at(low)) / cost.dense:.4g} and {cost.total(at(high)) / cost.dense:.4g}"
            raise InputError(
                f"allocation.flops_budget: {1.0 - sparsity:.4g} of the model's FLOPs is asked for, and these targets can leave between"
                f" {reach}"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost.total(at(middle)) <= goal else (low, middle)
        return at(low)

    def _by_total(self, layers: Sequence[Layer], limits: Sequence[int], evidence: Evidence) -> Callable[[int], list[int]]:
        """Return the counts as a function of the total; no layer with active pieces is left without one."""
        if self.ranking == "global":
            order = joint_order([evidence.best(i, layer.name) for i, layer in enumerate(layers)])
            return lambda total: torch.bincount(order[:total], minlength=len(layers)).tolist()
        everything = sum(layer.pieces for layer in layers)
        within = [Layer(layer.name, layer.layout, limit) for layer, limit in zip(layers, limits, strict=True)]

        def uniform(total: int) -> list[int]:
            quotas = [total / everything * layer.pieces for layer in layers]
            return guard(largest_remainder(bounded(quotas, total, limits), total, limits), within)[0]

        return uniform
