"""What a recipe is: one choice for each slot of the vocabulary, with stages if there are several, strictly validated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from niwaki.clock import Clock
from niwaki.component import Component, Missing, describe
from niwaki.errors import InputError, did_you_mean
from niwaki.growth import DropAndGrow
from niwaki.recipe import combinations, text
from niwaki.recipe.fields import RESERVED, Prune, Slots, Stage, in_words, settings_in_words
from niwaki.schedule import OneShot

NOT_WHOLE = ("element", "n_m", "block", "vector", "kernel")
"""Granularities whose pieces cannot be taken out of a dense model."""

TRAINING = ("growth", "gradient", "relaxation", "penalty", "objective", "memory")
"""Slots that act only while a model trains."""


class Recipe(Slots):
    """A sparsification method as data: one choice for each slot. Slots that are not said have the vocabulary's defaults.

    Raises:
        InputError: an unknown field or component, a value that does not fit, or choices that cannot go together; one line.

    >>> recipe = Recipe(sparsity=0.9, saliency="magnitude", schedule={"cubic": {"every": "100 steps", "end": "0.75 run"}})
    >>> print(recipe.to_yaml(), end="")
    sparsity: 0.9
    saliency: magnitude
    schedule:
      cubic: {end: 0.75 run, every: 100 steps}
    """

    stages: tuple[Stage, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stages is None:
            _raise_first(self, self.given)
            return self
        if self.sparsity is not None:
            raise InputError("sparsity: with stages, say it in the stage that prunes")
        if self.stages == ():
            raise InputError("stages: needs at least one stage")
        shared = {field: getattr(self, field) for field in self.given - {"stages"}}
        _check_stages(self.stages, shared, set(), "")
        return self

    @classmethod
    def from_data(cls, data: Any, where: str | None = None) -> Recipe:
        """Build a recipe from plain data; ``where`` (such as a file) starts the errors."""
        prefix = f"{where}: " if where else ""
        if not isinstance(data, Mapping):
            raise InputError(f"{prefix}a recipe is a mapping of fields, got {data!r:.60}; fields: {', '.join(cls.model_fields)}")
        for key in _keys(data):
            if not isinstance(key, str):
                raise InputError(f"{prefix}the key {key!r} is not text; write it in quotes")
        try:
            return cls(**data)
        except InputError as error:
            raise InputError(f"{prefix}{error}") from None

    @classmethod
    def from_yaml(cls, yaml: str, where: str | None = None) -> Recipe:
        """Read a recipe from YAML 1.2 text; ``where`` (such as a file) starts the errors.

        >>> Recipe.from_yaml("{granularity: 2:4}").final_sparsity
        0.5
        """
        return cls.from_data(text.parse(yaml, where or "recipe"), where)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML 1.2 file."""
        try:
            yaml = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8 text") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        return cls.from_yaml(yaml, str(path))

    def to_yaml(self) -> str:
        """Return the recipe as YAML 1.2: what was said, in the order of the vocabulary; ``from_yaml`` gives an equal recipe."""
        return text.write(self.to_data())

    def replace(self, **fields: Any) -> Recipe:
        """Return the recipe with fields said anew; None takes a field back to its default."""
        said = {field: getattr(self, field) for field in self.given} | fields
        return Recipe(**{field: value for field, value in said.items() if value is not None})

    @property
    def missing(self) -> list[str]:
        """What this version cannot run, such as ``saliency 'woodfisher'``; in stages too."""
        used = [component for _, component in self.components()] + [c for stage in self.stages or () for c in _components(stage)]
        return list(dict.fromkeys(str(component) for component in used if isinstance(component, Missing)))

    def require_complete(self) -> None:
        """Raise InputError, naming what is missing, when this version cannot run the recipe."""
        if self.missing:
            raise InputError(f"this recipe needs what this version of Niwaki cannot run yet: {', '.join(self.missing)}")

    @property
    def skips_steps(self) -> bool:
        """Whether the optimizer takes no step where masks are updated."""
        return isinstance(self.growth, DropAndGrow) and self.growth.at_update == "skip_step"

    def fit(self, clock: Clock) -> list[str]:
        """Check the recipe against the length of a run, and return what the user should know of it.

        Each stage is checked against its own length.

        Raises:
            InputError: a component is missing, a time cannot be resolved, or a schedule ends after the run.
        """
        self.require_complete()
        if self.stages is not None:
            from niwaki.recipe.stages import fit  # which is about recipes, so it comes after this module

            return fit(self, clock)
        self.schedule.validate_with(clock)
        if self.penalty is not None:
            self.penalty.validate_with(clock)
        last = self.schedule.last(clock)
        if clock.total_steps is not None and last > clock.total_steps:
            raise InputError(
                f"schedule.{self.schedule.name}: it ends at step {last}, after the run's {clock.total_steps} steps; lengthen the run, or"
                " say times in run, such as 0.75 run"
            )
        every = getattr(self.schedule, "every", None)
        if self.skips_steps and every and clock.interval(every) == 1:
            raise InputError(
                f"growth.{self.growth.name}: at_update 'skip_step' with an update at every step ({every} in this run) never trains;"
                " choices: step, or a longer every"
            )
        if self.growth.grows and self.final_sparsity is not None and last == self._first_update(clock):
            return [f"growth {self.growth.name!r} never acts: the schedule makes its only update before step {last}; shorten its every"]
        return []

    def _first_update(self, clock: Clock) -> int:
        last, target = self.schedule.last(clock), self.final_sparsity or 0.0
        return next((step for step in range(last) if self.schedule.at(step, target, clock) is not None), last)

    def describe(self) -> list[str]:
        """Return one line for each choice, for people: the slot, its component with its settings, and what that does."""
        lines = []
        if self.final_sparsity is not None:
            ends_dense = not isinstance(self.schedule, Missing) and self.schedule.final(self.final_sparsity) == 0.0 < self.final_sparsity
            when = "in the sparse phases, nothing at the end" if ends_dense else "at the end"
            most = "at most " if combinations.known(self.schedule) and self.schedule.decides else ""
            lines.append(f"sparsity: {most}{100 * self.final_sparsity:.6g} % of the target is masked {when}.")
        if self.stages is not None:
            lines += [line for i, stage in enumerate(self.stages, 1) for line in _describe_stage(stage, str(i))]
            return lines + [_sentence(slot, c) for slot, c in self.components() if slot in self.given]
        if self.final_sparsity is None and self.selects and self.schedule.decides:
            by = "the validation loss" if self.schedule.validates else "the scores, which it compares with thresholds"
            lines.append(f"sparsity: decided by the schedule {combinations.name_of(self.schedule)} and {by}.")
        elif self.final_sparsity is None and self.selects:
            lines.append(
                f"sparsity: decided by the scores, which the selection {combinations.name_of(self.selection)} compares with a value."
            )
        elif self.final_sparsity is None and combinations.decides(self.relaxation):
            lines.append(f"sparsity: decided by the strength of the relaxation {combinations.name_of(self.relaxation)}.")
        return lines + [_sentence(slot, component) for slot, component in self.components()]


def _keys(data: Any) -> Iterator[Any]:
    """Yield the keys of all mappings in plain data."""
    if isinstance(data, Mapping):
        yield from data
        data = list(data.values())
    if isinstance(data, list | tuple):
        for inner in data:
            yield from _keys(inner)


def _raise_first(recipe: Slots, given: Collection[str]) -> None:
    problem = next(combinations.problems(recipe, given), None)
    if problem is not None:
        raise InputError(problem)


def _check_stages(stages: tuple[Stage, ...], shared: dict[str, Any], saved: set[str], where: str) -> None:
    """Check the combinations of every stage, with the recipe's own slots filled in, and that snapshots exist when they are restored."""
    for i, stage in enumerate(stages):
        here = f"{where}stages[{i}]"
        if stage.stages is not None:
            _check_stages(stage.stages, shared, saved, f"{here}.")
            continue
        # What a stage says of the ranking may be meant for its prune.
        given = stage.given if stage.prune is None else stage.given - set(combinations.RANKING)
        try:
            filled = stage.filled(shared)
            _raise_first(filled, given)
            _require_prunable(filled)
            _require_time(filled, given)
            _require_waiting(filled)
            _require_whole(filled)
        except InputError as error:
            raise InputError(f"{here}.{error}") from None
        if stage.save is not None:
            saved.add(stage.save)
        for name in stage.restore.snapshots() if stage.restore is not None else ():
            if name not in saved:
                raise InputError(f"{here}.restore: no earlier stage saves {name!r}; {did_you_mean(name, {*saved, *RESERVED})}")
        if stage.finish is not None:
            saved.clear()  # they are of a model of another size


def _require_prunable(stage: Stage) -> None:
    """Refuse choices of a stage's ``prune`` that cannot go together."""
    if stage.prune is None:
        return
    try:
        Recipe(sparsity=stage.prune.fraction, **{field: getattr(stage.prune, field) for field in Prune.model_fields if field != "fraction"})
    except InputError as error:
        raise InputError(f"prune.{error}") from None


def _require_time(stage: Stage, given: Collection[str]) -> None:
    """Refuse a stage without a length that says what takes time."""
    if stage.for_ is not None:
        return
    idle = next((slot for slot in TRAINING if slot in given), None)
    if idle is not None:
        raise InputError(f"for: missing; {idle} acts while a stage trains, so say how long, such as for: 1 run")
    at_once = isinstance(stage.schedule, OneShot) and stage.schedule.moment.value == 0
    if stage.selects and not at_once:
        name = combinations.name_of(stage.schedule)
        raise InputError(f"for: missing; the schedule {name!r} takes time, so say how long, such as for: 1 run, or choose one_shot")


def _require_waiting(stage: Stage) -> None:
    """Refuse to wait for stable masks where nothing looks at how stable they are."""
    waits = stage.selects and combinations.known(stage.schedule) and stage.schedule.candidates
    if stage.until is not None and not waits:
        raise InputError("until: 'masks_stable' needs a sparsity and a schedule that waits for stable masks; choices: mask_stability")


def _require_whole(stage: Stage) -> None:
    """Refuse to take out of a model what a stage masks in pieces that are no channels."""
    granularity = stage.prune.granularity if stage.prune is not None else stage.granularity
    masks = stage.prune is not None or stage.selects
    if stage.finish == "shrink" and masks and granularity.name in NOT_WHOLE:
        choices = "granularity channel, head, layer, group, input_channel, output_channel"
        raise InputError(f"finish: 'shrink' removes whole channels, not pieces of {granularity.name!r}; choices: {choices}")


def _components(stage: Stage) -> Iterator[Component]:
    yield from (component for _, component in stage.components())
    if stage.prune is not None:
        yield from (getattr(stage.prune, field) for field in Prune.model_fields if field != "fraction")
    for inner in stage.stages or ():
        yield from _components(inner)


def _sentence(slot: str, component: Component) -> str:
    data = component.to_data()
    name, settings = (data, "") if isinstance(data, str) else next((k, f" ({settings_in_words(f)})") for k, f in data.items())
    purpose = "Not in this version yet." if isinstance(component, Missing) else describe(type(component))
    return f"{slot}: {name}{settings}. {purpose}"


def _describe_stage(stage: Stage, number: str) -> list[str]:
    if stage.stages is not None:
        head = f"stage {number}: {stage.repeat} times the stages within."
        return [head] + [line for i, inner in enumerate(stage.stages, 1) for line in _describe_stage(inner, f"{number}.{i}")]
    return [f"stage {number}: {in_words(stage)}."]
