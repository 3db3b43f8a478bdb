"""What a recipe is: one choice for each slot of the vocabulary, with stages if there are several, strictly validated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from niwaki.clock import Clock, TimeField
from niwaki.component import Component, Missing, describe
from niwaki.errors import InputError, did_you_mean
from niwaki.growth import DropAndGrow
from niwaki.recipe import combinations, text
from niwaki.recipe import vocabulary as v
from niwaki.recipe.strict import Strict

RESERVED = ("keep", "fresh")
"""What ``restore`` can say instead of the name of a snapshot, so no snapshot can be called that."""

NOT_WHOLE = ("element", "n_m", "block", "vector", "kernel")
"""Granularities whose pieces cannot be taken out of a dense model."""


def _sparsity(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"sparsity: must be a number in [0, 1), got {value!r}")
    number = float(value)
    if not 0.0 <= number < 1.0:
        hint = f"; a fraction, not per cent: {number / 100:g}" if 2.0 <= number < 100.0 else ""
        raise InputError(f"sparsity: must be in [0, 1), got {value!r}{hint}")
    return number


class Slots(Strict):
    """The fields that recipes and stages share: the sparsity, and a component for every slot of the vocabulary."""

    must_mask: ClassVar[bool] = True
    """Whether it has to mask something; a stage may only train."""

    sparsity: Annotated[float | None, BeforeValidator(_sparsity)] = None
    target: v.TargetField = Field(default_factory=lambda: v.default("target"))  # type: ignore[assignment]
    granularity: v.GranularityField = Field(default_factory=lambda: v.default("granularity"))  # type: ignore[assignment]
    saliency: v.SaliencyField = Field(default_factory=lambda: v.default("saliency"))  # type: ignore[assignment]
    normalization: v.NormalizationField = Field(default_factory=lambda: v.default("normalization"))  # type: ignore[assignment]
    allocation: v.AllocationField = Field(default_factory=lambda: v.default("allocation"))  # type: ignore[assignment]
    schedule: v.ScheduleField = Field(default_factory=lambda: v.default("schedule"))  # type: ignore[assignment]
    selection: v.SelectionField = Field(default_factory=lambda: v.default("selection"))  # type: ignore[assignment]
    growth: v.GrowthField = Field(default_factory=lambda: v.default("growth"))  # type: ignore[assignment]
    gradient: v.GradientField = Field(default_factory=lambda: v.default("gradient"))  # type: ignore[assignment]
    relaxation: v.RelaxationField = Field(default_factory=lambda: v.default("relaxation"))  # type: ignore[assignment]
    penalty: v.PenaltyField = None
    compensation: v.CompensationField = None
    objective: v.ObjectiveField = None
    memory: v.MemoryField = None

    @property
    def given(self) -> frozenset[str]:
        """The fields that were said, rather than left at their defaults."""
        return frozenset(field for field in self.model_fields_set if getattr(self, field) is not None)

    @property
    def final_sparsity(self) -> float | None:
        """The sparsity that masks reach: said, or implied by N:M or by a list of sparsities; None where strength decides."""
        if self.sparsity is not None:
            return self.sparsity
        fixed = combinations.fixed_sparsity(self)
        return None if fixed is None else fixed[1]

    def to_data(self, *, defaults: bool = False) -> dict[str, Any]:
        """Return plain data that ``from_data`` takes: what was said, in the order of the vocabulary.

        With ``defaults`` nothing is left to defaults: every slot that has an effect, with all settings of its component. What has
        stages is always returned as it was said, since stages take from the recipe what they do not say.
        """
        if not defaults or getattr(self, "stages", None) is not None:
            data: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
            return data
        sparsity = {} if self.final_sparsity is None else {"sparsity": self.final_sparsity}
        return sparsity | {slot: component.to_data(defaults=True) for slot, component in self.components()}

    def components(self) -> Iterator[tuple[str, Component]]:
        """Yield every slot that has an effect, with its component."""
        unused = set(combinations.RANKING) - self.given if self.final_sparsity is None else set()
        for slot in v.DEFAULTS:
            component = getattr(self, slot)
            if component is not None and slot not in unused:
                yield slot, component


class Restore(Strict):
    """What goes back to an earlier snapshot: each a snapshot's name, ``keep``, or (the optimizer) ``fresh``."""

    weights: str = "keep"
    optimizer: str = "keep"
    learning_rate: str = "keep"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if all(getattr(self, field) == "keep" for field in type(self).model_fields):
            raise InputError("restores nothing; name a snapshot for weights, optimizer or learning_rate")
        for field in ("weights", "learning_rate"):
            if getattr(self, field) == "fresh":
                raise InputError(f"{field}: 'fresh' is for the optimizer; name a snapshot, or choose keep")
        return self

    def snapshots(self) -> list[str]:
        """Return the names of the snapshots that it needs."""
        return [name for name in (self.weights, self.optimizer, self.learning_rate) if name not in RESERVED]


class Prune(Strict):
    """Masks a fraction of the pieces that are still active, ranked as its own slots say."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
    target: v.TargetField = Field(default_factory=lambda: v.default("target"))  # type: ignore[assignment]
    granularity: v.GranularityField = Field(default_factory=lambda: v.default("granularity"))  # type: ignore[assignment]
    saliency: v.SaliencyField = Field(default_factory=lambda: v.default("saliency"))  # type: ignore[assignment]
    normalization: v.NormalizationField = Field(default_factory=lambda: v.default("normalization"))  # type: ignore[assignment]
    allocation: v.AllocationField = Field(default_factory=lambda: v.default("allocation"))  # type: ignore[assignment]
    selection: v.SelectionField = Field(default_factory=lambda: v.default("selection"))  # type: ignore[assignment]


class Stage(Slots):
    """One part of a recipe: it trains (``for``) as its slots say, then prunes, saves, restores and finishes, as far as it says so.

    A stage with ``stages`` runs those, ``repeat`` times. A slot that a stage does not fill is filled by the recipe around it.
    """

    must_mask = False

    for_: TimeField | None = Field(default=None, alias="for")
    repeat: Annotated[int, Field(ge=1, strict=True)] = 1
    stages: tuple[Stage, ...] | None = None
    prune: Prune | None = None
    save: Annotated[str, Field(min_length=1)] | None = None
    restore: Restore | None = None
    finish: Literal["shrink"] | None = None

    @model_serializer(mode="wrap")
    def _in_reading_order(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = write(self)
        return {key: data[key] for key in sorted(data, key=lambda key: key not in ("for", "for_", "repeat"))}

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.given
        if not given:
            raise InputError("does nothing; say what it is for, such as {for: 1 run}")
        if self.for_ is not None and self.for_.value == 0:
            raise InputError("for: a stage must last longer than nothing")
        if self.stages == ():
            raise InputError("stages: needs at least one stage")
        if self.repeat > 1 and self.stages is None:
            raise InputError("repeat: needs stages to repeat")
        if self.stages is not None and given - {"stages", "repeat"}:
            extra = sorted(field.rstrip("_") for field in given - {"stages", "repeat"})
            raise InputError(f"{extra[0]}: a stage with stages says only repeat; put {extra[0]} into one of its stages")
        if self.prune is not None and self.sparsity is not None:
            raise InputError("prune: masks a fraction of what is left, so it cannot stand beside a sparsity; drop one of them")
        if self.save in RESERVED:
            raise InputError(f"save: {self.save!r} cannot name a snapshot, as restore reads it as an instruction")
        if self.finish is not None and {"granularity", "sparsity"} & given and self.granularity.name in NOT_WHOLE:
            choices = "granularity input_channel, output_channel"
            raise InputError(f"finish: 'shrink' removes whole channels, not pieces of {self.granularity.name!r}; choices: {choices}")
        return self


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
        """What this version cannot run, such as ``saliency 'woodfisher'`` or ``stages``."""
        found = {str(component): None for _, component in self.components() if isinstance(component, Missing)}
        if self.stages is not None:
            found |= {"stages": None} | {name: None for stage in self.stages for name in _missing(stage)}
        return list(found)

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

        Raises:
            InputError: a component is missing, a time cannot be resolved, or the schedule ends after the run.
        """
        self.require_complete()
        self.schedule.validate_with(clock)
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
            lines.append(f"sparsity: {100 * self.final_sparsity:.6g} % of the target is masked {when}.")
        if self.stages is not None:
            lines += [line for i, stage in enumerate(self.stages, 1) for line in _describe_stage(stage, str(i))]
            return lines + [_sentence(slot, c) for slot, c in self.components() if slot in self.given]
        if self.final_sparsity is None and combinations.decides(self.relaxation):
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
        own = {field: getattr(stage, field) for field in stage.given}
        # A stage that masks nothing may leave the slots of the ranking unused.
        given = own.keys() if stage.prune is None else own.keys() - set(combinations.RANKING)
        try:
            _raise_first(Stage.model_construct(stage.model_fields_set | shared.keys(), **{**dict(stage), **shared, **own}), given)
        except InputError as error:
            raise InputError(f"{here}.{error}") from None
        if stage.save is not None:
            saved.add(stage.save)
        for name in stage.restore.snapshots() if stage.restore is not None else ():
            if name not in saved:
                raise InputError(f"{here}.restore: no earlier stage saves {name!r}; {did_you_mean(name, {*saved, *RESERVED})}")


def _leaves(stage: Stage) -> Iterator[Component]:
    yield from (component for _, component in stage.components())
    if stage.prune is not None:
        yield from (getattr(stage.prune, field) for field in Prune.model_fields if field != "fraction")
    for inner in stage.stages or ():
        yield from _leaves(inner)


def _missing(stage: Stage) -> list[str]:
    return [str(component) for component in _leaves(stage) if isinstance(component, Missing)]


def _settings(value: Any) -> str:
    """Return settings in words: ``every 100 steps, end 0.75 run``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_settings(inner)}" for key, inner in value.items())
    return ", ".join(_settings(inner) for inner in value) if isinstance(value, list) else str(value)


def _sentence(slot: str, component: Component) -> str:
    data = component.to_data()
    name, settings = (data, "") if isinstance(data, str) else next((k, f" ({_settings(f)})") for k, f in data.items())
    purpose = "Not in this version yet." if isinstance(component, Missing) else describe(type(component))
    return f"{slot}: {name}{settings}. {purpose}"


def _describe_stage(stage: Stage, number: str) -> list[str]:
    if stage.stages is not None:
        head = f"stage {number}: {stage.repeat} times the stages within."
        return [head] + [line for i, inner in enumerate(stage.stages, 1) for line in _describe_stage(inner, f"{number}.{i}")]
    data = stage.to_data()
    words = [f"train for {data.pop('for')}"] if "for" in data else []
    words += [f"{field} {_settings(value)}" for field, value in data.items()]
    return [f"stage {number}: {'; '.join(words)}."]
