"""When masks are due, and which: it looks at weights, gradients and data, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from niwaki.allocation import Allocation
from niwaki.binding import Bound
from niwaki.choosing import quantile, sum_counts
from niwaki.clock import Clock
from niwaki.collecting import Collected, Statistics, Values, requests_of, statistics_of
from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.gradient import Superset
from niwaki.growth import DropAndGrow, Growth, NoGrowth
from niwaki.masked import MaskedTensor
from niwaki.masks import local
from niwaki.pieces import Ranked, element_masks
from niwaki.recipe import Recipe
from niwaki.recipe.combinations import has_curvature, watches_steps
from niwaki.recipe.stages import sparsity_after
from niwaki.saliency import Observation, Saliency
from niwaki.schedule_state import ScheduleState
from niwaki.selecting import Bernoulli
from niwaki.selection import kept
from niwaki.statistics import Statistic
from niwaki.update import keeps_all, next_pieces, starts_at_random
from niwaki.update_input import Update


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
        self.gradient_scale: Tensor | None = None
        """Of the gradients of the step, where a fused optimizer under a gradient scaler divides by it in its own step."""
        self.numbers: dict[str, float] = {}
        """What components remember from one update to the next, such as a threshold that moves."""
        self.schedule_state = ScheduleState(recipe.schedule, ranked)
        """What the schedule has seen, where it decides by that."""
        self._require_attainable()
        self._require_data_for_the_end()

    # ------------------------------------------------------------------ when

    def due(self, step: int) -> float | None:
        """Return the sparsity of an update that is due before this step, or None."""
        if self.selected_at == step or self.schedule_state.settled or not self.recipe.selects:
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

        None where the schedule only compares them with others, or the validation loss asks for no more pruning.

        Args:
            step: number of optimizer steps taken.
            grows: whether drop-and-grow may exchange pieces.
            sparsity: of a round on the way, in place of the one that is due.
        """
        if sparsity is None:
            sparsity = self.due(step)
        assert sparsity is not None
        if self.recipe.schedule.validates:
            sparsity = self._asked_by_loss(sparsity)
            if sparsity is None:
                self.selected_at = step
                return None
        fewer = self.given or isinstance(self.recipe.selection, Bernoulli)  # may be active than the sparsity asks for
        ends = isinstance(self.recipe.growth, DropAndGrow) and not grows
        if (ends or (fewer and self.only_removes)) and self.recipe.allocation.budget is None:
            active = self._active_pieces()
            if ends and kept(sparsity, self._pieces) > active:
                self.tell(
                    f"growth {self.recipe.growth.name!r}: the sparsity stays at {1.0 - active / self._pieces:.6g}, and does not fall to"
                    f" {sparsity:.6g}, for what grows at the end of the run could not learn; end the schedule earlier"
                )
            sparsity = max(sparsity, 1.0 - active / self._pieces)
        blind = keeps_all(self.recipe, self.ranked, sparsity) and not requests_of(self.recipe.growth)
        seen = Collected() if blind else self._collect(step)
        pieces, update = self._next(step, sparsity, grows, seen)
        if not self.schedule_state.accept(pieces, at_end=step >= self.recipe.schedule.last(self.clock)):
            self.selected_at = step
            return None
        keep = self._masks(pieces, update)
        if isinstance(self.recipe.growth, DropAndGrow):
            update.weights.update(self._grown(self.recipe.growth, step, keep, seen))
        learns = keep
        if isinstance(self.recipe.gradient, Superset):
            wider = self._masks(*self._next(step, self.recipe.gradient.outside(sparsity), grows, seen))
            learns = {name: mask | wider[name] for name, mask in keep.items()}
        self.selected_at = step
        return Selection(keep, learns, pieces, update.weights, seen)

    def _asked_by_loss(self, most: float) -> float | None:
        """Return the sparsity that the validation loss asks for now, or None where nothing more goes."""
        fraction, active = self.schedule_state.fraction(self.statistics.validation_loss()), self._active_pieces()
        most = 1.0 if self.recipe.final_sparsity is None else most
        sparsity = min(sparsity_after(fraction, active, self._pieces), most)
        return sparsity if kept(sparsity, self._pieces) < active else None

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

    def _collect(self, step: int) -> Collected:
        """Collect what the coming selection needs to know."""
        if self._draws:
            return Collected()
        self._require_steps(step)
        saliency = self.recipe.saliency
        asked = statistics_of(self.recipe, self.ranked)
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
        elif "score" in saliency.needs:
            seen.averaged = self._scores_of_gates()
        return seen

    def _scores_of_gates(self) -> list[Tensor] | None:
        """Return what gates have learned of everything ranked: a tensor's elements belong to several. None where there are none."""
        owners = {id(part): gates for tensor in self.tensors.values() for gates, part, _ in tensor.gates}
        return [owners[id(one.parts[0])].scores() for one in self.ranked] if owners else None

    def _grown(self, growth: DropAndGrow, step: int, keep: Mapping[str, Tensor], seen: Collected) -> dict[str, Tensor]:
        """Return the weights of tensors that do not begin, or whose new weights do not begin, as they are."""
        weights = {}
        for name, mask in keep.items():
            tensor, bound = self.tensors[name], self.tensors[name].bound

            def total(values: Tensor, bound: Bound = bound) -> Tensor:
                found = values.sum(dtype=torch.float64)
                if bound.group is not None:
                    dist.all_reduce(found, group=bound.group)
                return found

            active = self._active_mask(bound)
            alone = bound.observe(tensor.weight, need_gradient=False, seed=self.seed, step=step, active=active)
            started = growth.first(alone) if self.selected_at is None else None
            if active is not None and int(total(new := mask & ~(active & growth.stays(alone)))):
                look = self._observe(bound, step, growth, seen)
                if started is not None:
                    look = replace(look, weight=started)
                if look.gradient is not None and self.gradient_scale is not None:
                    look = replace(look, gradient=look.gradient / self.gradient_scale)
                grown = growth.grown(look, new, total)
                started = started if grown is None else grown
            if started is not None:
                weights[name] = started
        return weights

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
            threshold=self._threshold(step),
            numbers=self.numbers,
        )
        pieces = next_pieces(recipe, self.ranked, self._active(), update)
        for note in (*update.notes, *(seen.curvature.notes if seen.curvature is not None else ())):
            self.tell(note)
        return pieces, update

    def _threshold(self, step: int) -> Callable[[Ranked, Tensor, Tensor], float] | None:
        """Return what gives the value that scores of something ranked must reach, in place of a count."""
        schedule, share = self.recipe.schedule, self.recipe.schedule.quantile
        if share is None:
            value = getattr(self.recipe.selection, "value", None)
            return None if value is None else lambda *_: value
        multiple = schedule.threshold(step, self.clock)
        return lambda one, scores, active: multiple * self.schedule_state.reference(one.name, lambda: quantile(one, scores, active, share))

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
