"""What components ask to know and only data can tell, collected where a recipe needs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.binding import Bound
from niwaki.calibration import (
    Replay,
    Watched,
    add_gradient,
    collect,
    examples,
    first_pair,
    forward,
    loss_gradients,
    mean_loss,
    pairs,
    preserved,
)
from niwaki.calibration.batches import count
from niwaki.component import Component
from niwaki.curvature import Curvature
from niwaki.errors import InputError, NiwakiError
from niwaki.granularity import Grouped
from niwaki.metrics.flops import forward_flops, weight_uses
from niwaki.metrics.units import show
from niwaki.pieces import Ranked
from niwaki.ranks import average_, mean
from niwaki.recipe import Prune, Recipe
from niwaki.saliency import Observation
from niwaki.statistics import Statistic

Values = Mapping[str, Mapping[Statistic, Any]]
"""Tensor name -> statistic -> its value."""


@dataclass
class Collected:
    """Statistics of the model as it is at one update.

    Attributes:
        values: what was asked for.
        averaged: the saliency's scores of everything ranked, where they are averaged over batches or examples, or those of gates;
            else None.
        curvature: of all scored tensors, for saliencies that build one.
    """

    values: Values = field(default_factory=dict)
    averaged: list[Tensor] | None = None
    curvature: Curvature | None = None


class Statistics:
    """Batches, a loss, and what they are needed for.

    Args:
        model: whose statistics.
        recipe: whose components ask.
        data: batches ``(inputs, targets)``, or None.
        loss: called as ``loss(model(inputs), targets)``, or None.
        seed: of sampled labels and random vectors.
        validation: batches of examples that are not trained on, or None.

    Raises:
        InputError: a component needs data, a loss or validation examples that were not given.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: Iterable[tuple[Any, Any]] | None,
        loss: Callable[[Any, Any], Tensor] | None,
        seed: int = 0,
        validation: Iterable[tuple[Any, Any]] | None = None,
    ) -> None:
        self.model, self.recipe, self.loss = model, recipe, loss
        self.data = Replay(data) if data is not None and iter(data) is data else data
        self.validation = Replay(validation) if validation is not None and iter(validation) is validation else validation
        self.seed = seed
        self.collecting = False
        """Whether gradients that are accumulated now are statistics, and none of the training's own."""
        for slot, name, why, with_loss in reasons(recipe):
            if data is None or (with_loss and loss is None):
                given = "data= and loss=" if with_loss else "data="
                raise InputError(f"{slot}: {name!r} needs {given} {why}")
        if recipe.selects and recipe.schedule.validates and (validation is None or loss is None):
            raise InputError(f"schedule: {recipe.schedule.name!r} needs validation= and loss=, to see how the loss of other examples moves")
        self.uses: Mapping[str, float] | None = None
        """Parameter name -> multiply-adds of each of its weights in a forward pass, if a component needs it."""
        self.dense_flops: float | None = None
        """FLOPs of a forward pass of the dense model on one example, if a component needs them."""
        penalty = frozenset() if recipe.penalty is None else recipe.penalty.needs
        if "flops" in recipe.normalization.needs | penalty or "flops" in recipe.allocation.wants:
            assert data is not None
            (inputs, _), self.data = first_pair(data)
            with preserved(model), torch.no_grad():
                self.uses = weight_uses(model, lambda: forward(model, inputs), examples=count(inputs))
                if "flops" in recipe.allocation.wants:
                    positional = inputs if isinstance(inputs, tuple) else (inputs,)
                    self.dense_flops = forward_flops(model, positional, examples=count(inputs)).dense

    @property
    def has_loss(self) -> bool:
        """Whether gradients can be collected."""
        return self.data is not None and self.loss is not None

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Hold, inside the block, the gradient of the mean loss over the data in every ``.grad``."""
        assert self.data is not None
        assert self.loss is not None
        with self._apart():
            loss_gradients(self.model, self.data, self.loss)
            yield

    def mean_loss(self) -> float:
        """Return the mean loss over the data, of the model as it is."""
        assert self.data is not None
        assert self.loss is not None
        return mean_loss(self.model, self.data, self.loss)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean loss of the validation examples (of all ranks), of the model as it is, in evaluation mode.

        Raises:
            InputError: there is no batch.
            NiwakiError: the loss is not finite.
        """
        assert self.validation is not None
        assert self.loss is not None
        losses, examples = 0.0, 0
        with preserved(self.model):
            self.model.eval()
            for inputs, targets in pairs(self.validation):
                losses += count(inputs) * float(self.loss(forward(self.model, inputs), targets))
                examples += count(inputs)
        device = next(self.model.parameters()).device
        sums = mean(torch.tensor([losses, examples], dtype=torch.float64, device=device))
        value = float(sums[0] / sums[1])
        if not math.isfinite(value):
            raise NiwakiError(f"the validation loss is {value}; a smaller learning rate may help")
        return value

    def collect(self, asked: Mapping[Statistic, Sequence[Bound]], active: Callable[[Bound], Tensor | None]) -> Values:
        """Return the statistics that components ask for, each of its tensors; those of the training's steps are not among them.

        Args:
            asked: statistic -> the tensors that it is asked of.
            active: tensor -> its mask now, True where active.
        """
        asked = {request: bounds for request, bounds in asked.items() if request.source != "steps" and bounds}
        for request, bounds in asked.items():
            sharded = next((bound.name for bound in bounds if bound.group is not None and request.source != "inputs"), None)
            if sharded is not None:
                raise InputError(f"{sharded}: it is sharded, and {type(request).__name__} is of whole tensors; prune before sharding")
        found: dict[str, dict[Statistic, Any]] = {}
        together: dict[tuple[str, ...], list[Statistic]] = {}
        for request, bounds in asked.items():
            together.setdefault(tuple(dict.fromkeys(bound.name for bound in bounds)), []).append(request)
        by_name = {bound.name: bound for bounds in asked.values() for bound in bounds}
        for names, requests in together.items():
            watched = [Watched(by_name[n].name, by_name[n].parameter, by_name[n].layout, active(by_name[n])) for n in names]
            assert self.data is not None
            with self._apart(), torch.enable_grad():
                values = collect(self.model, self.data, self.loss, watched, requests, seed=self.seed)
            for name, one in values.items():
                found.setdefault(name, {}).update(one)
        return found

    def averaged(self, ranked: Sequence[Ranked], observe: Callable[[Bound], Observation]) -> list[Tensor]:
        """Return the scores by the gradient of each batch, or each example, alone, averaged over them and the ranks."""
        assert self.data is not None
        assert self.loss is not None
        totals: list[Tensor] = []
        batches = 0
        with self._apart():
            self.model.eval()  # as for all statistics of gradients; single examples have no batch to normalize by
            for batch in examples(self.data) if self.recipe.saliency.averages == "sample" else pairs(self.data):
                for parameter in self.model.parameters():
                    parameter.grad = None
                add_gradient(self.model, batch, self.loss, batches)
                scores = [one.score(self.recipe.saliency, observe).to(torch.float64) for one in ranked]
                totals = [a + b for a, b in zip(totals, scores, strict=True)] if totals else scores
                batches += 1
        means = [total / batches for total in totals]
        average_(means)
        return means

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Leave the model as it was, and say that what is accumulated inside the block is no gradient of the training."""
        self.collecting = True
        try:
            with preserved(self.model):
                yield
        finally:
            self.collecting = False


def requests_of(component: Component | None) -> tuple[Statistic, ...]:
    """Return the statistics that a component of any slot asks for."""
    return getattr(component, "statistics", ())


def statistics_of(recipe: Recipe | Prune, ranked: Sequence[Ranked]) -> dict[Statistic, list[Bound]]:
    """Return the statistics that the components of a recipe ask for, each with its tensors."""
    asked: dict[Statistic, list[Bound]] = {}
    scored = [part.bound for one in ranked for part in one.scored]
    readers = [part.bound for one in ranked for part in one.readers or one.makers]
    for request in requests_of(recipe.saliency):
        asked.setdefault(request, []).extend(scored)
    for request in requests_of(recipe.allocation):
        asked.setdefault(request, []).extend(readers if recipe.allocation.observes == "inputs" else scored)
    for request in requests_of(getattr(recipe, "growth", None)):
        asked.setdefault(request, []).extend(part.bound for one in ranked for part in one.parts)
    for request in requests_of(recipe.compensation):
        asked.setdefault(request, []).extend(_survivors(recipe, ranked))
    return {request: list({bound.name: bound for bound in bounds}.values()) for request, bounds in asked.items()}


def _survivors(recipe: Recipe | Prune, ranked: Sequence[Ranked]) -> list[Bound]:
    """Return the weights whose remaining entries can make up for those that go: of units, those that read them."""
    grouped = isinstance(recipe.granularity, Grouped)
    parts = (part for one in ranked for part in (one.readers if grouped else one.parts))
    return list({p.bound.name: p.bound for p in parts if p.bound.parameter.ndim >= 2 and "input" in p.bound.layout.roles}.values())


def bytes_of(asked: Mapping[Statistic, Sequence[Bound]], memory: int | None = None) -> int:
    """Return the bytes that statistics take while they are collected and used.

    Raises:
        InputError: these are more than ``memory``; it says what would fit.
    """
    each = {request: sum(request.memory(bound.layout) for bound in bounds) for request, bounds in asked.items()}
    needed = sum(each.values())
    if memory is None or needed <= memory:
        return needed
    largest = max(each, key=lambda request: each[request])
    fits = largest.within(memory - (needed - each[largest]), [bound.layout for bound in asked[largest]])
    raise InputError(
        f"memory: the statistics need {show(needed, 'bytes')}, {show(each[largest], 'bytes')} of it for"
        f" {type(largest).__name__}, and {show(memory, 'bytes')} are allowed; "
        + (f"{fits} would fit" if fits else "allow more, exclude large tensors from the target, or choose a saliency that needs less")
    )


def asking(recipe: Recipe | Prune) -> list[Component]:
    """Return the components of a recipe that may ask for statistics of the model on data."""
    if isinstance(recipe, Recipe) and not recipe.acts:
        return []
    names = ("normalization", "saliency", "allocation", "growth", "penalty", "compensation")
    slots = (getattr(recipe, slot, None) for slot in names)
    return [component for component in slots if component is not None]


def reasons(recipe: Recipe | Prune) -> Iterator[tuple[str, str, str, bool]]:
    """Yield what cannot do without data: slot, component, why, and whether it needs a loss too."""
    for component in asking(recipe):
        for need in component.needs & NEEDS_DATA.keys():
            yield component.slot, component.name, NEEDS_DATA[need], need in NEEDS_LOSS
        for want in getattr(component, "wants", frozenset()) & WANTS_DATA.keys():
            yield component.slot, component.name, WANTS_DATA[want], want == "loss"
        if getattr(component, "averages", None) is not None:
            yield component.slot, component.name, f"({CALLED}) for the gradient of each {getattr(component, 'averages')} by itself", True  # noqa: B009
        for request in requests_of(component):
            if request.needs_data:
                with_loss = request.needs_loss
                called = f" ({CALLED})" if with_loss else ""
                yield component.slot, component.name, f"to collect {type(request).__name__}{called}", with_loss
        if getattr(component, "recalibrates", False):
            yield component.slot, component.name, "to estimate batch normalization's statistics anew", False


def uses_data(recipe: Recipe | Prune) -> bool:
    """Return whether a recipe can make use of data."""
    return any("gradient" in component.needs for component in asking(recipe)) or any(True for _ in reasons(recipe))


CALLED = "called as loss(model(inputs), targets)"

NEEDS_DATA = {
    "flops": "to see how often each weight is used",
    "loss": f"({CALLED}) to turn its ratio to the loss into a strength",
}
"""What components need that is always collected from ``data`` -> what for."""

NEEDS_LOSS = frozenset({"loss"})
"""Those of them that need a loss, too."""

WANTS_DATA = {
    "flops": "to see how often each weight is used",
    "loss": f"({CALLED}) to try sparsities of each layer",
}
"""What allocations want -> what for."""
