"""What components ask to know and only data can tell, collected where a recipe needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.binding import Bound
from niwaki.calibration import add_gradient, first_pair, forward, loss_gradients, mean_activity, mean_loss, pairs, preserved
from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.metrics.flops import weight_uses
from niwaki.pieces import Ranked
from niwaki.ranks import average_
from niwaki.recipe import Prune, Recipe
from niwaki.saliency import Observation


@dataclass
class Collected:
    """Statistics of the model as it is at one update.

    Attributes:
        activity: parameter -> mean size of what it reads, in the layout's view.
        averaged: the saliency's scores of everything ranked, averaged over batches; None where no component asks for that.
    """

    activity: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    averaged: list[Tensor] | None = None


class Statistics:
    """Batches, a loss, and what they are needed for.

    Raises:
        InputError: a component needs data or a loss that were not given.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, data: Iterable[tuple[Any, Any]] | None, loss: Callable[[Any, Any], Tensor] | None
    ) -> None:
        self.model, self.recipe, self.data, self.loss = model, recipe, data, loss
        self.collecting = False
        """Whether gradients that are accumulated now are statistics, and none of the training's own."""
        for need, why in NEEDS_DATA.items():
            for component in asking(recipe):
                if need in component.needs and (data is None or (need in NEEDS_LOSS and loss is None)):
                    given = "data= and loss=" if need in NEEDS_LOSS else "data="
                    raise InputError(f"{component.slot}: {component.name!r} needs {given} {why}")
        self.uses: Mapping[str, float] | None = None
        """Parameter name -> multiply-adds of each of its weights in a forward pass, if a component needs it."""
        if "flops" in recipe.normalization.needs:
            assert data is not None
            batch, self.data = first_pair(data)
            with preserved(model), torch.no_grad():
                self.uses = weight_uses(model, lambda: forward(model, batch[0]))

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

    def collect(self, ranked: Sequence[Ranked], observe: Callable[[Bound], Observation], needs: frozenset[str]) -> Collected:
        """Return what ``needs`` names: ``activity`` of the scored weights, scores averaged over ``batch_gradients``."""
        found = Collected()
        if "activity" in needs:
            assert self.data is not None
            bounds = {part.bound.parameter: part.bound for one in ranked for part in one.scored if "input" in part.bound.layout.roles}
            layouts = {parameter: bound.layout for parameter, bound in bounds.items()}
            found.activity = mean_activity(self.model, self.data, layouts, {p: bound.name for p, bound in bounds.items()})
        if "batch_gradients" in needs:
            found.averaged = self._averaged(ranked, observe)
        return found

    def _averaged(self, ranked: Sequence[Ranked], observe: Callable[[Bound], Observation]) -> list[Tensor]:
        """Return the scores by the gradient of each batch alone, averaged over the batches and ranks."""
        assert self.data is not None
        assert self.loss is not None
        totals: list[Tensor] = []
        batches = 0
        with self._apart():
            for batch in pairs(self.data):
                for parameter in self.model.parameters():
                    parameter.grad = None
                add_gradient(self.model, batch, self.loss)
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


def asking(recipe: Recipe | Prune) -> list[Component]:
    """Return the components of a recipe that may ask for statistics of the model on data."""
    slots = (getattr(recipe, slot, None) for slot in ("normalization", "saliency", "growth", "penalty"))
    return [component for component in slots if component is not None]


NEEDS_DATA = {
    "flops": "to see how often each weight is used",
    "activity": "to see how active the inputs of each weight are",
    "batch_gradients": "(called as loss(model(inputs), targets)) for the gradient of each batch by itself",
    "loss": "(called as loss(model(inputs), targets)) to turn its ratio to the loss into a strength",
}
"""Statistics that are always collected from ``data`` -> what for."""

NEEDS_LOSS = frozenset({"batch_gradients", "loss"})
"""Those of them that need a loss, too."""
