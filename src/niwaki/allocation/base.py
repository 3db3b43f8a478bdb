"""What an allocation sees, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from niwaki.allocation.layer import Layer
from niwaki.allocation.sharing import bounded, largest_remainder
from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.saliency import Observation
from niwaki.selection import kept
from niwaki.statistics import Statistic


def _say_nothing(note: str) -> None:
    pass


@dataclass(frozen=True)
class Evidence:
    """What an allocation may look at besides the layers. What it does not want (:attr:`Allocation.wants`) is None.

    Of a tensor that is spread over processes, everything is of the whole tensor, so that all processes find the same budgets.

    Attributes:
        scores: index of a layer -> scores of its pieces after normalization, any shape; higher: keep.
        active: pieces of each layer that may be kept (bool, any shape); None where all may.
        flops: FLOPs of one piece of each layer in a forward pass of one example: a number, or one for each piece. They may be 0.
        dense_flops: FLOPs of a forward pass of the whole model, with what is no target.
        flops_left: FLOPs of the whole model if each layer keeps so many pieces; None where those of the pieces add up (not those of
            units, which share weights with the units that they read).
        loss: mean loss over the data if each layer keeps its best so many pieces.
        survivors: pieces that stay in each layer after the drop of a drop-and-grow update; None when the first masks are made.
        observe: index of a layer -> its tensors, with the statistics that were asked for.
        seed: of the run.
        step: optimizer step.
        tell: takes sentences for the user.
    """

    scores: Callable[[int], Tensor] | None = None
    active: Sequence[Tensor] | None = None
    flops: Sequence[float | Tensor] | None = None
    dense_flops: float | None = None
    flops_left: Callable[[Sequence[int]], float] | None = None
    loss: Callable[[Sequence[int]], float] | None = None
    survivors: Sequence[int] | None = None
    observe: Callable[[int], Sequence[Observation]] | None = None
    seed: int = 0
    step: int = 0
    tell: Callable[[str], None] = _say_nothing

    def limits(self, layers: Sequence[Layer]) -> list[int]:
        """Return how many pieces each layer may keep."""
        return [layer.pieces for layer in layers] if self.active is None else [int(active.sum()) for active in self.active]

    def order(self, i: int, name: str) -> Tensor:
        """Return the indices of the pieces of a layer that may be kept, the best first, of equal ones the lower index.

        Raises:
            InputError: a score is NaN; it says ``name``, that of the layer.
        """
        scores = self._flat(i)
        if bool(scores.isnan().any()):
            raise InputError(f"allocation: the scores of {name!r} hold a NaN; look at its weights, gradients and data")
        order = scores.argsort(descending=True, stable=True)
        return order if self.active is None else order[self.active[i].to("cpu").flatten()[order]]

    def best(self, i: int, name: str) -> Tensor:
        """Return the scores of the pieces of a layer that may be kept, in float64, the best first.

        Raises:
            InputError: one is NaN.
        """
        return self._flat(i)[self.order(i, name)]

    def _flat(self, i: int) -> Tensor:
        assert self.scores is not None
        return self.scores(i).detach().to("cpu", torch.float64).flatten()


class Allocation(Component):
    """Base of the slot ``allocation``."""

    slot = "allocation"

    joint: ClassVar[bool] = False
    """Whether one ranking over all layers decides, so that budgets follow from the scores instead of ``keep``."""

    observes: ClassVar[Literal["scored", "inputs"]] = "scored"
    """Which tensors of a layer it observes where pieces are units: those that the saliency scores, or the weights that read the units."""

    @property
    def wants(self) -> frozenset[str]:
        """What it looks at besides the layers: names of fields of :class:`Evidence`, and ``gradient`` for that of the observations.

        ``flops`` stands for ``flops``, ``dense_flops`` and, of units, ``flops_left``.
        """
        return frozenset()

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What it asks to know of the tensors in ``observe``."""
        return ()

    @property
    def budget(self) -> float | None:
        """Share of a cost, such as FLOPs, that stays at the end; None where the sparsity of the recipe counts pieces.

        Where it is not None, the sparsity that ``keep`` is given is that of the cost, ``1 - budget`` at the end of the schedule.
        """
        return None

    @property
    def asked(self) -> dict[str, str]:
        """What counts cannot be given without: field of the evidence -> what it is, in words."""
        fields = self.wants | ({"dense_flops"} if "flops" in self.wants else set())
        return {field: _WANTED[field] for field in sorted(fields - _NOT_ALWAYS)}

    @property
    def by_row(self) -> bool:
        """Whether each layer's count is shared among the outputs of its tensor, by :func:`row_counts`."""
        return False

    def keep(self, sparsity: float, layers: Sequence[Layer], final: float | None = None, evidence: Evidence | None = None) -> list[int]:
        """Return how many pieces each layer keeps; together ``kept(sparsity, all pieces)``, or what the budget's cost allows.

        Args:
            sparsity: in [0, 1), of all layers together.
            layers: in parameter order.
            final: the recipe's sparsity, of which ``sparsity`` may be a stage on the way; by default ``sparsity`` itself.
            evidence: what it wants to look at; ``active`` of it bounds the counts of all allocations.

        Raises:
            InputError: a sparsity outside [0, 1), one that the allocation cannot give to these layers, or evidence that is missing.
        """
        final = sparsity if final is None else final
        for value in (sparsity, final):
            if not 0.0 <= value < 1.0:
                raise InputError(f"allocation.{self.name}: sparsity must be in [0, 1), got {value!r}")
        if sparsity == final == 0.0 or not layers:
            return [layer.pieces for layer in layers]
        evidence = Evidence() if evidence is None else evidence
        missing = sorted({words for field, words in self.asked.items() if getattr(evidence, field) is None})
        if missing:
            raise InputError(f"allocation.{self.name}: it needs {' and '.join(missing)}")
        total, active = kept(sparsity, sum(layer.pieces for layer in layers)), sum(evidence.limits(layers))
        if self.budget is None and total > active:
            raise InputError(f"allocation.{self.name}: {total} pieces are to be kept at sparsity {sparsity!r}, and {active} are active")
        return self.counts(sparsity, layers, final, evidence)

    def counts(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[int]:
        """Return how many pieces each layer keeps, where something is to be removed: the quotas in whole pieces, within what is active."""
        total = kept(sparsity, sum(layer.pieces for layer in layers))
        limits = evidence.limits(layers)
        return largest_remainder(bounded(self.quotas(sparsity, layers, final, evidence), total, limits), total, limits)

    def quotas(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[float]:
        """Return what each layer keeps before rounding: positive numbers whose proportions count, and whose sum is that of all layers."""
        densities = self.densities(sparsity, layers, final)
        return [density * layer.pieces for density, layer in zip(densities, layers, strict=True)]

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:
        """Return the share of its pieces that each layer keeps, in [0, 1], with ``sum density * pieces = (1 - sparsity) * all pieces``."""
        raise NotImplementedError


_NOT_ALWAYS = frozenset({"gradient", "survivors"})  # no fields, or None before the first update
_WANTED = {
    "scores": "the scores of all pieces",
    "flops": "the FLOPs of a forward pass (example= or data=)",
    "dense_flops": "the FLOPs of a forward pass (example= or data=)",
    "loss": "a loss over data (data= and loss=)",
    "observe": "to see the weights",
}
