"""When masks are due, and which: it looks at weights, gradients and data, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from niwaki.binding import Bound
from niwaki.candidates import Candidates
from niwaki.clock import Clock
from niwaki.errors import InputError
from niwaki.gradient import Superset
from niwaki.growth import DropAndGrow, Growth, NoGrowth
from niwaki.masked import MaskedTensor
from niwaki.pieces import Ranked, element_masks
from niwaki.recipe import Recipe
from niwaki.saliency import Observation, Saliency
from niwaki.selection import kept
from niwaki.statistics import Collected, Statistics
from niwaki.update import Update, next_pieces, starts_at_random, sum_counts


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
    ) -> None:
        self.recipe, self.ranked, self.tensors, self.statistics = recipe, ranked, tensors, statistics
        self.clock, self.seed, self.tell, self.given = clock, seed, tell, given
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

    def asking(self) -> Saliency | Growth | None:
        """Return the component that reads the step's gradients in the coming selection, or None."""
        if self.first and starts_at_random(self.recipe.growth):
            return None
        components = (self.recipe.saliency,) if self.first else (self.recipe.saliency, self.recipe.growth)
        return next((component for component in components if reads_gradient(component)), None)

    # ------------------------------------------------------------------ which

    def select(self, step: int, grows: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Return the masks that are due before a step, and what learns under them: tensor name -> bool, shape of its view.

        None where the schedule only compares them with others.

        ``grows``: whether drop-and-grow may exchange pieces.
        """
        sparsity = self.due(step)
        assert sparsity is not None
        if self.given and self.only_removes:
            sparsity = max(sparsity, 1.0 - self._active_pieces() / self._pieces)
        seen = self._collect(step)
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
        return keep, learns

    def _collect(self, step: int) -> Collected:
        """Collect what the coming selection needs to know from data."""
        saliency, growth = self.recipe.saliency, self.recipe.growth
        needs = frozenset() if self.first and starts_at_random(growth) else saliency.needs | growth.needs
        return self.statistics.collect(self.ranked, lambda bound: self._observe(bound, step, saliency.needs, Collected()), needs)

    def _observe(self, bound: Bound, step: int, needs: frozenset[str], seen: Collected) -> Observation:
        """Return what a component with these needs may look at."""
        tensor = self.tensors[bound.name]
        return bound.observe(
            tensor.weight,
            score=tensor.score if "score" in needs else None,
            activity=seen.activity.get(bound.parameter),
            need_gradient=bool(needs & {"gradient", "batch_gradients"}),
            seed=self.seed,
            step=step,
        )

    def _next(self, step: int, sparsity: float, grows: bool, seen: Collected) -> tuple[list[Tensor], Update]:
        """Return the pieces to keep of everything ranked, and the update that found them."""
        recipe, first = self.recipe, self.first
        update = Update(
            sparsity=sparsity,
            step=step,
            progress=min(step / max(recipe.schedule.last(self.clock), 1), 1.0),
            seed=self.seed,
            observe=lambda bound: self._observe(bound, step, recipe.saliency.needs, seen),
            observe_growth=lambda bound: self._observe(bound, step, recipe.growth.needs, seen),
            flops=self.statistics.uses,
            averaged=seen.averaged,
            first=first,
            from_active=not recipe.relaxation.keeps_dense_weights
            and (isinstance(recipe.growth, NoGrowth) or (isinstance(recipe.growth, DropAndGrow) and not grows and not first)),
            grows=grows,
        )
        pieces = next_pieces(recipe, self.ranked, self._active(), update)
        for note in update.notes:
            self.tell(note)
        return pieces, update

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
        if self.given and self.only_removes and kept(final, self._pieces) > self._active_pieces():
            masked = 1.0 - self._active_pieces() / self._pieces
            raise InputError(
                f"sparsity: {final!r} is below that of the masks to start from, {masked:.6g}, and growth: none brings nothing back; choose"
                " a higher sparsity, or growth: all, random or gradient"
            )
        if not allocation.joint:
            allocation.keep(final, [one.layer for one in self.ranked], final)

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


def reads_gradient(component: Saliency | Growth) -> bool:
    """Return whether a component reads the gradients of the step, rather than those of each batch of ``data`` by itself."""
    return "gradient" in component.needs and "batch_gradients" not in component.needs
