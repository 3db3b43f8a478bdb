"""A recipe's stages one after the other, as they are carried out: repeats unrolled, slots of the recipe around them filled in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from niwaki.clock import Clock, Time
from niwaki.errors import InputError
from niwaki.objective import Objective
from niwaki.recipe.combinations import RANKING
from niwaki.recipe.fields import Prune, Restore, Slots, Stage, in_words
from niwaki.recipe.finish import FinishField
from niwaki.recipe.recipe import Recipe
from niwaki.schedule import OneShot
from niwaki.selection import kept


class StageRecipe(Recipe):
    """What a stage does while it trains: a recipe that may mask nothing."""

    must_mask: ClassVar[bool] = False


@dataclass(frozen=True)
class Leaf:
    """One stage as it is carried out, in this order: train, prune, save, restore, finish.

    Attributes:
        number: its position, from 1; repeats are counted.
        says: what it does, in one line for people.
        where: its field of the recipe, for errors; empty for a recipe without stages.
        recipe: what acts while it trains; may mask nothing (see ``acts``).
        length: how long it trains; None when it does not.
        until: whether it ends earlier, as soon as the masks that its schedule waits for act.
        prune: with the slots around it filled in.
        save: the name under which the state is kept.
        restore: what goes back to a kept state.
        finish: what is done to the model at the end.
    """

    number: int
    says: str
    where: str
    recipe: Recipe
    length: Time | None = None
    until: Literal["masks_stable"] | None = None
    prune: Prune | None = None
    save: str | None = None
    restore: Restore | None = None
    finish: FinishField = None

    @property
    def acts(self) -> bool:
        """Whether its recipe needs a sparsifier."""
        return self.recipe.acts

    @property
    def objective(self) -> Objective | None:
        """What is added to the loss while it trains."""
        return self.recipe.objective

    def clock(self, run: Clock) -> Clock:
        """Return the clock inside the stage, whose ``run`` is the stage itself.

        Raises:
            InputError: its length cannot be resolved, or is less than a step.
        """
        if self.length is None:
            return replace(run, total_steps=None)
        try:
            steps = run.steps(self.length)
        except InputError as error:
            raise InputError(_prefixed(self.where, f"for: {error}")) from None
        if steps < 1:
            raise InputError(_prefixed(self.where, f"for: {self.length} is less than one step of this run; make it longer"))
        return replace(run, total_steps=steps)


def unroll(recipe: Recipe) -> tuple[Leaf, ...]:
    """Return the stages in the order in which they are carried out; a recipe without stages is one of length ``1 run``.

    >>> recipe = Recipe.from_yaml("stages: [{repeat: 2, stages: [{for: 1 run}, {prune: {fraction: 0.2}}]}, {for: 5 epochs}]")
    >>> for leaf in unroll(recipe):
    ...     print(leaf.number, leaf.says)
    1 stage 1.1, round 1 of 2: train for 1 run
    2 stage 1.2, round 1 of 2: prune 20 % of what is active
    3 stage 1.1, round 2 of 2: train for 1 run
    4 stage 1.2, round 2 of 2: prune 20 % of what is active
    5 stage 2: train for 5 epochs
    """
    if recipe.stages is None:
        return (Leaf(1, "train for 1 run", "", recipe, Time(1.0, "run")),)
    around = {field: getattr(recipe, field) for field in recipe.given - {"stages"}}
    return tuple(replace(leaf, number=i) for i, leaf in enumerate(_unroll(recipe.stages, around, "stage ", "", ""), 1))


def validates(recipe: Recipe) -> str | None:
    """Return the schedule of a stage that follows the loss of examples that are not trained on, or None where no stage does."""
    return next((leaf.recipe.schedule.name for leaf in unroll(recipe) if leaf.recipe.selects and leaf.recipe.schedule.validates), None)


def then_shrink(recipe: Recipe) -> Recipe:
    """Return a recipe that ends by taking out of the model what it has masked as a whole.

    >>> print(then_shrink(Recipe(sparsity=0.9)).to_yaml(), end="")
    stages:
    - {for: 1 run, sparsity: 0.9}
    - {finish: shrink}
    """
    last = Stage(finish="shrink")
    if recipe.stages is None:
        slots = {field: getattr(recipe, field) for field in recipe.given}
        return Recipe(stages=(Stage(**{"for": "1 run"}, **slots), last))
    return recipe if recipe.stages[-1].finish == "shrink" else recipe.replace(stages=(*recipe.stages, last))


def once(recipe: Recipe) -> Recipe:
    """Return a recipe that masks at one moment what a recipe masks in the end: by the same scores, in the same pieces, without growth.

    Of one with stages, those of the only stage that says a sparsity count.

    Raises:
        InputError: the recipe says no sparsity, or several stages do.

    >>> staged = Recipe(saliency="random", stages=[{"for": "1 run"}, {"sparsity": 0.5, "granularity": "channel", "finish": "shrink"}])
    >>> print(once(staged).to_yaml(), end="")
    {sparsity: 0.5, granularity: channel, saliency: random, schedule: one_shot}
    """
    said: Slots = recipe
    if recipe.stages is not None:
        around = {field: getattr(recipe, field) for field in recipe.given - {"stages"}}
        saying = [leaf for leaf in _leaves(recipe.stages) if leaf.final_sparsity is not None]
        if len(saying) != 1:
            raise InputError(f"stages: {len(saying) or 'none'} of them say a sparsity, and to mask at once one has to")
        said = saying[0].filled(around)
    if not said.selects:
        raise InputError("sparsity: missing; to mask at once, say how much")
    kept = ("sparsity", "target", "granularity", "saliency", "normalization", "allocation", "selection", "compensation")
    schedule = OneShot()
    if isinstance(said.schedule, OneShot) and said.schedule.rounds > 1:
        schedule = OneShot(rounds=said.schedule.rounds, spacing=said.schedule.spacing, revive=said.schedule.revive)
    return Recipe(**{field: getattr(said, field) for field in kept if field in said.given}, schedule=schedule)


def _leaves(stages: Sequence[Stage]) -> list[Stage]:
    return [leaf for stage in stages for leaf in ([stage] if stage.stages is None else _leaves(stage.stages))]


def fit(recipe: Recipe, clock: Clock) -> list[str]:
    """Check every stage of a recipe against its own length; see :meth:`Recipe.fit`."""
    notes: dict[str, None] = {}
    for leaf in {leaf.where: leaf for leaf in unroll(recipe)}.values():  # a repeated one once
        inside = leaf.clock(clock)
        try:
            found = leaf.recipe.fit(inside)
        except InputError as error:
            raise InputError(_prefixed(leaf.where, str(error))) from None
        notes |= dict.fromkeys(f"{leaf.where}: {note}" for note in found)
    return list(notes)


def sparsity_after(fraction: float, active: int, pieces: int) -> float:
    """Return the sparsity at which ``round((1 - fraction) active)`` of ``pieces`` stay: what pruning a fraction of the active ones gives.

    ``s = (pieces - round((1 - fraction) active)) / pieces``, such that ``kept(s, pieces)`` is that number again; the last one stays.

    >>> counts = [1000]
    >>> for _ in range(5):
    ...     counts.append(kept(sparsity_after(0.2, counts[-1], 1000), 1000))
    >>> counts
    [1000, 800, 640, 512, 410, 328]
    """
    return (pieces - max(kept(fraction, active), 1)) / pieces


def _unroll(stages: tuple[Stage, ...], around: Mapping[str, Any], number: str, rounds: str, where: str) -> Iterator[Leaf]:
    for i, stage in enumerate(stages):
        here = f"{number}{i + 1}"
        field = f"{where}stages[{i}]"
        if stage.stages is None:
            yield _leaf(stage, around, f"{here}{rounds}: {in_words(stage)}", field)
            continue
        for n in range(1, stage.repeat + 1):
            told = f", round {n} of {stage.repeat}" if stage.repeat > 1 else ""
            yield from _unroll(stage.stages, around, f"{here}.", rounds + told, f"{field}.")


def _leaf(stage: Stage, around: Mapping[str, Any], says: str, where: str) -> Leaf:
    filled = stage.filled(around)
    slots = {slot: getattr(filled, slot) for slot in filled.given if slot in Slots.model_fields}
    if not filled.acts:
        slots = {slot: component for slot, component in slots.items() if slot == "objective"}
    elif not filled.selects:  # the ranking of the recipe around it, which this stage has no use for
        slots = {slot: component for slot, component in slots.items() if slot not in RANKING}
    return Leaf(0, says, where, StageRecipe(**slots), stage.for_, stage.until, filled.prune, stage.save, stage.restore, stage.finish)


def _prefixed(where: str, message: str) -> str:
    return f"{where}.{message}" if where else message
