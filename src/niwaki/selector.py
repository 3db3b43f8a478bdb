"""When masks are due, and which: it looks at weights, gradients and data, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from niwaki.allocation import Allocation
from niwaki.binding import Bound
from niwaki.candidates import Candidates
from niwaki.clock import Clock
from niwaki.collecting import Collected, Statistics, Values, requests_of
from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.gradient import Superset
from niwaki.granularity import Grouped
from niwaki.growth import DropAndGrow, Growth, NoGrowth
from niwaki.masked import MaskedTensor
from niwaki.masks import local
from niwaki.pieces import Ranked, element_masks
from niwaki.recipe import Recipe
from niwaki.recipe.combinations import has_curvature, watches_steps
from niwaki.saliency import Observation, Saliency
from niwaki.selection import kept
from niwaki.statistics import Statistic
from niwaki.update import Update, keeps_all, next_pieces, starts_at_random, sum_counts


@dataclass(frozen=True)
class Selection:
    """What one selection found.

    Attributes:
        keep: tensor name -> True where active (bool, shape of its view).
        learns: tensor name -> True where the gradient is used.
        pieces: which pieces of everything ranked are kept (bool).
        weights: tensor name -> new weights in its view, of a saliency that chooses them with the mask.
        seen: what was collected for it.
    """

    keep: dict[str, Tensor]
    learns: dict[str, Tensor]
    pieces: list[Tensor]
    weights: dict[str, Tensor]
    seen: Collected


class Selector:
    """Makes the selections of a recipe.

    Args:
        recipe: what to select.
        ranked: the tensors or groups whose pieces are ranked.
        tensors: their tensors by name, with the masks that they have now.
        statistics: what only data can tell.
        clock: the lengths of the run.
        seed: of everything random.
        tell: takes sentences for the user.
        given: whether masks to start from were given.
        watched_steps: returns the statistics of the training's steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        ranked: Sequence[Ranked],
        tensors: Mapping[str, MaskedTensor],
        statistics: Statistics,
        clock: Clock,
        seed: int,
        tell: Callable[[str], None],
        given: bool,
        watched_steps: Callable[[], Values] = dict,
    ) -> None:
        self.recipe, self.ranked, self.tensors, self.statistics = recipe, ranked, tensors, statistics
        self.clock, self.seed, self.tell, self.given = clock, seed, tell, given
        self.watched_steps = watched_steps
        self.originals: dict[str, Tensor] = {}
        """Weights before the first of several rounds that may take back what earlier ones have removed; else empty."""
        self.selected_at: int | None = None
        """Step before which the last selection was made."""
        self.candidates = Candidates(recipe.schedule, ranked)
        """Selections that the schedule compares before one acts."""
        self._require_attainable()
        self._require_data_for_the_end()

    # ------------------------------------------------------------------ when

    def due(self, step: int) -> float | None:
        """Return the sparsity of an update that is due before this step, or None."""
        if self.selected_at == step or self.candidates.settled or not self.recipe.selects:
            return None
        return self.recipe.schedule.at(step, self.recipe.final_sparsity or 0.0, self.clock)

    @property
    def first(self) -> bool:
        """Whether the coming selection makes the targets' first masks."""
        return self.selected_at is None and all(tensor.pruned is None for tensor in self.tensors.values())

    @property
    def _draws(self) -> bool:
        """Whether the coming selection is drawn at random, and neither its budgets nor what survivors are given look at anything."""
        allocation = self.recipe.allocation
        looks = allocation.wants & {"scores", "loss"} or allocation.statistics or self.recipe.compensation is not None
        return self.first and starts_at_random(self.recipe.growth) and not looks

    def asking(self) -> Component | None:
        """Return the component that reads the step's gradients in the coming selection, or None."""
        if self._draws:
            return None
        components = (self.recipe.saliency,) if self.first else (self.recipe.saliency, self.recipe.growth, self.recipe.allocation)
        return next((component for component in components if reads_gradient(component)), None)

    # ------------------------------------------------------------------ which

    def select(self, step: int, grows: bool = True, sparsity: float | None = None) -> Selection | None:
        """Return the masks that are due before a step, and what learns under them.

        None where the schedule only compares them with others.

        Args:
            step: number of optimizer steps taken.
            grows: whether drop-and-grow may exchange pieces.
            sparsity: of a round on the way, in place of the one that is due.
        """
        if sparsity is None:
            sparsity = self.due(step)
        assert sparsity is not None
        if self.given and self.only_removes and self.recipe.allocation.budget is None:
            sparsity = max(sparsity, 1.0 - self._active_pieces() / self._pieces)
        seen = Collected() if keeps_all(self.recipe, self.ranked, sparsity) else self._collect(step)
        pieces, update = self._next(step, sparsity, grows, seen)
        if not self.candidates.accept(pieces, at_end=step >= self.recipe.schedule.last(self.clock)):
            self.selected_at = step
            return None
        keep = self._masks(pieces, update)
        learns = keep
        if isinstance(self.recipe.gradient, Superset):
            wider = self._masks(*self._next(step, self.recipe.gradient.outside(sparsity), grows, seen))
            learns = {name: mask | wider[name] for name, mask in keep.items()}
        self.selected_at = step
        return Selection(keep, learns, pieces, update.weights, seen)

    def scores(self) -> list[Tensor]:
        """Return the scores of everything ranked, after normalization, on the model as it is."""
        seen, uses = self._collect(0), self.statistics.uses
        found = seen.averaged or [
            one.score(self.recipe.saliency, lambda bound: self._observe(bound, 0, self.recipe.saliency, seen)) for one in self.ranked
        ]
        return [
            self.recipe.normalization.normalize(score, None if uses is None else one.flops(uses))
            for one, score in zip(self.ranked, found, strict=True)
        ]

    def asked(self) -> dict[Statistic, list[Bound]]:
        """Return the statistics that the components ask for, each with its tensors."""
        asked: dict[Statistic, list[Bound]] = {}
        scored = [part.bound for one in self.ranked for part in one.scored]
        readers = [part.bound for one in self.ranked for part in one.readers or one.makers]
        for request in requests_of(self.recipe.saliency):
            asked.setdefault(request, []).extend(scored)
        for request in requests_of(self.recipe.allocation):
            asked.setdefault(request, []).extend(readers if self.recipe.allocation.observes == "inputs" else scored)
        for request in requests_of(self.recipe.compensation):
            asked.setdefault(request, []).extend(self.survivors())
        return {request: list({bound.name: bound for bound in bounds}.values()) for request, bounds in asked.items()}

    def survivors(self) -> list[Bound]:
        """Return the weights whose remaining entries can make up for those that go: of units, those that read them."""
        grouped = isinstance(self.recipe.granularity, Grouped)
        parts = (part for one in self.ranked for part in (one.readers if grouped else one.parts))
        return list({p.bound.name: p.bound for p in parts if p.bound.parameter.ndim >= 2 and "input" in p.bound.layout.roles}.values())

    def _collect(self, step: int) -> Collected:
        """Collect what the coming selection needs to know."""
        if self._draws:
            return Collected()
        self._require_steps(step)
        saliency = self.recipe.saliency
        asked = self.asked()
        values: dict[str, dict[Statistic, Any]] = {}
        for found in (self.statistics.collect(asked, self._active_mask), self.watched_steps()):
            for name, one in found.items():
                values.setdefault(name, {}).update(one)
        seen = Collected(values)
        if has_curvature(saliency):
            scored = {part.bound.name: part.bound for one in self.ranked for part in one.scored}
            seen.curvature = saliency.curvature([self._observe(bound, step, saliency, seen) for bound in scored.values()])
        if saliency.averages is not None:
            seen.averaged = self.statistics.averaged(self.ranked, lambda bound: self._observe(bound, step, saliency, seen))
        return seen

    def _active_mask(self, bound: Bound) -> Tensor | None:
        pruned = self.tensors[bound.name].pruned
        return None if pruned is None else ~pruned

    def _observe(self, bound: Bound, step: int, component: Saliency | Growth | Allocation, seen: Collected) -> Observation:
        """Return what a component may look at."""
        tensor = self.tensors[bound.name]
        # Not always there for an allocation, which says itself where it cannot do without.
        wanted = isinstance(component, Allocation) and "gradient" in component.wants and bound.parameter.grad is not None
        return bound.observe(
            self.originals.get(bound.name, tensor.weight),
            score=tensor.score if "score" in component.needs else None,
            need_gradient="gradient" in component.needs or wanted,
            seed=self.seed,
            step=step,
            active=None if bound.name in self.originals else self._active_mask(bound),
            statistics=seen.values.get(bound.name, {}),
            curvature=seen.curvature,
        )

    def _next(self, step: int, sparsity: float, grows: bool, seen: Collected) -> tuple[list[Tensor], Update]:
        """Return the pieces to keep of everything ranked, and the update that found them."""
        recipe, first = self.recipe, self.first
        update = Update(
            sparsity=sparsity,
            step=step,
            progress=min(step / max(recipe.schedule.last(self.clock), 1), 1.0),
            seed=self.seed,
            observe=lambda bound: self._observe(bound, step, recipe.saliency, seen),
            observe_growth=lambda bound: self._observe(bound, step, recipe.growth, seen),
            observe_allocation=lambda bound: self._observe(bound, step, recipe.allocation, seen),
            flops=self.statistics.uses,
            dense_flops=self.statistics.dense_flops,
            loss=self._loss_of if "loss" in recipe.allocation.wants else None,
            averaged=seen.averaged,
            first=first,
            from_active=not recipe.relaxation.keeps_dense_weights
            and not self.originals
            and (isinstance(recipe.growth, NoGrowth) or (isinstance(recipe.growth, DropAndGrow) and not grows and not first)),
            grows=grows,
        )
        pieces = next_pieces(recipe, self.ranked, self._active(), update)
        for note in (*update.notes, *(seen.curvature.notes if seen.curvature is not None else ())):
            self.tell(note)
        return pieces, update

    def _loss_of(self, pieces: Sequence[Tensor]) -> float:
        """Return the mean loss over the data with only these pieces."""
        masks = element_masks(self.ranked, pieces)
        before = {name: local(self.tensors[name].bound.parameter.detach()).clone() for name in masks}
        try:
            for name, mask in masks.items():
                here = local(self.tensors[name].bound.parameter.detach())
                if name in self.originals:
                    here.copy_(self.originals[name].view(here.shape))
                here.masked_fill_(~mask.view(here.shape), 0.0)
            return self.statistics.mean_loss()
        finally:
            for name, value in before.items():
                local(self.tensors[name].bound.parameter.detach()).copy_(value)

    def _masks(self, pieces: Sequence[Tensor], update: Update) -> dict[str, Tensor]:
        """Return the masks of all tensors."""
        masks = element_masks(self.ranked, pieces)
        if self.given and update.from_active:  # masks that were given may cut through pieces
            return {name: mask & self.tensors[name].kept(self.tensors[name].pruned) for name, mask in masks.items()}
        return masks

    # ------------------------------------------------------------------ how many there are

    @property
    def only_removes(self) -> bool:
        """Whether what is pruned stays pruned."""
        return isinstance(self.recipe.growth, NoGrowth) and not self.recipe.relaxation.keeps_dense_weights

    @property
    def _pieces(self) -> int:
        return sum(one.pieces for one in self.ranked)

    def _active(self) -> list[Tensor]:
        return [one.active(lambda bound: self.tensors[bound.name].pruned) for one in self.ranked]

    def _active_pieces(self) -> int:
        return sum(sum_counts(self._active(), self.ranked))

    # ------------------------------------------------------------------ what cannot work is told at once

    def _require_attainable(self) -> None:
        """Refuse a sparsity that the allocation cannot give, or below that of the masks to start from where nothing grows back."""
        final, allocation = self.recipe.final_sparsity, self.recipe.allocation
        if final is None:
            return
        if allocation.budget is None and self.given and self.only_removes and kept(final, self._pieces) > self._active_pieces():
            masked = 1.0 - self._active_pieces() / self._pieces
            raise InputError(
                f"sparsity: {final!r} is below that of the masks to start from, {masked:.6g}, and growth: none brings nothing back; choose"
                " a higher sparsity, or growth: all, random or gradient"
            )
        if not allocation.joint and not allocation.wants and not allocation.statistics:
            allocation.keep(final, [one.layer for one in self.ranked], final)

    def _require_steps(self, step: int) -> None:
        """Refuse a ranking by what steps have added up to before the first of them, when it is the same for all weights."""
        recipe = self.recipe
        if step or not watches_steps(recipe.saliency):
            return
        raise InputError(
            f"schedule: the masks of step 0 would be ranked by what saliency {recipe.saliency.name!r} adds up while the model trains,"
            f" before it has seen a step; let {recipe.schedule.name!r} begin later"
        )

    def _require_data_for_the_end(self) -> None:
        """Refuse a last selection that ranks by gradients after the last step, when there is none, unless it can collect them."""
        recipe, total = self.recipe, self.clock.total_steps
        if not reads_gradient(recipe.saliency) or total is None or not recipe.selects or self.statistics.has_loss:
            return
        if recipe.schedule.at(total, recipe.final_sparsity or 0.0, self.clock) is not None:
            raise InputError(
                f"saliency: {recipe.saliency.name!r} ranks by gradients, and the schedule's last update is at the end of the run; pass"
                " data= and loss=, or end the schedule earlier"
            )


def reads_gradient(component: Component) -> bool:
    """Return whether a component reads the gradients of the step, rather than those of each batch of ``data`` by itself."""
    reads = "gradient" in component.needs or "gradient" in getattr(component, "wants", ())
    return reads and getattr(component, "averages", None) is None
