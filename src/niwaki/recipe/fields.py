"""The fields of recipes and of their stages, strictly validated one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from niwaki.clock import TimeField
from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.recipe import combinations
from niwaki.recipe import vocabulary as v
from niwaki.recipe.finish import FinishField
from niwaki.recipe.strict import Strict

RESERVED = ("keep", "fresh")
"""What ``restore`` can say instead of the name of a snapshot, so no snapshot can be called that."""


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

    @property
    def selects(self) -> bool:
        """Whether pieces are masked by their scores: a count of them, those below a threshold, or what the schedule asks for."""
        decided = combinations.known(self.schedule) and self.schedule.decides
        uncounted = combinations.known(self.selection) and not self.selection.counted
        return self.final_sparsity is not None or uncounted or decided

    @property
    def acts(self) -> bool:
        """Whether it needs a sparsifier: something is masked by its score, penalized, decided or drawn by a relaxation."""
        return self.selects or self.penalty is not None or combinations.acts_alone(self.relaxation)

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
        unused = set() if self.selects else set(combinations.RANKING) - self.given
        if combinations.compares(self):
            unused = {"allocation"} - self.given
        for slot in v.DEFAULTS:
            component = getattr(self, slot)
            if component is not None and slot not in unused:
                yield slot, component


class Restore(Strict):
    """What goes back to an earlier snapshot: each a snapshot's name, ``keep``, or (weights and optimizer) ``fresh``.

    Attributes:
        weights: and buffers; ``fresh`` ones are random, as those of a new model of another seed.
        as_: ``values``; or ``signs``: of every masked tensor the signs, times the standard deviation of the snapshot's weights (Zhou, Lan,
            Liu, Yosinski 2019). What is not masked takes its values. In recipes it is called ``as``.
        optimizer: its whole state.
        learning_rate: the position in its schedule.
    """

    weights: str = "keep"
    as_: Literal["values", "signs"] = Field(default="values", alias="as")
    optimizer: str = "keep"
    learning_rate: str = "keep"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.as_ == "signs" and self.weights in RESERVED:
            raise InputError("as: 'signs' are those of a snapshot's weights; name it in weights")
        if all(getattr(self, field) == "keep" for field in ("weights", "optimizer", "learning_rate")):
            raise InputError("restores nothing; name a snapshot for weights, optimizer or learning_rate")
        if self.learning_rate == "fresh":
            raise InputError("learning_rate: 'fresh' is for weights and optimizer; name a snapshot, or choose keep")
        return self

    def snapshots(self) -> list[str]:
        """Return the names of the snapshots that it needs."""
        return [name for name in (self.weights, self.optimizer, self.learning_rate) if name not in RESERVED]


class Prune(Strict):
    """Masks a fraction of the pieces that are still active, ranked as its own slots say (those around it where they are silent)."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
    target: v.TargetField = Field(default_factory=lambda: v.default("target"))  # type: ignore[assignment]
    granularity: v.GranularityField = Field(default_factory=lambda: v.default("granularity"))  # type: ignore[assignment]
    saliency: v.SaliencyField = Field(default_factory=lambda: v.default("saliency"))  # type: ignore[assignment]
    normalization: v.NormalizationField = Field(default_factory=lambda: v.default("normalization"))  # type: ignore[assignment]
    allocation: v.AllocationField = Field(default_factory=lambda: v.default("allocation"))  # type: ignore[assignment]
    selection: v.SelectionField = Field(default_factory=lambda: v.default("selection"))  # type: ignore[assignment]
    compensation: v.CompensationField = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if combinations.known(self.granularity) and self.granularity.sparsity is not None:
            name = self.granularity.name
            raise InputError(f"granularity: {name!r} fixes the sparsity, so a fraction of what is left has no meaning; drop prune")
        if combinations.known(self.selection) and not self.selection.counted:
            name = self.selection.name
            raise InputError(f"selection: {name!r} decides how many pieces go, so a fraction has no meaning; drop one of them")
        if "score" in self.saliency.needs or combinations.watches_steps(self.saliency):
            raise InputError(f"saliency: {self.saliency.name!r} is learned while training, and prune comes after it; choose another")
        if combinations.known(self.allocation) and self.allocation.budget is not None:
            raise InputError(f"allocation: {self.allocation.name!r} decides how many pieces go, so a fraction has no meaning; drop prune")
        return self


class Stage(Slots):
    """One part of a recipe: it trains (``for``) as its slots say, then prunes, saves, restores and finishes, as far as it says so.

    With ``until: masks_stable`` it trains no longer than until its schedule finds the masks stable and lets them act. A stage with
    ``stages`` runs those, ``repeat`` times. A slot that a stage does not fill is filled by the recipe around it.
    """

    must_mask = False

    for_: TimeField | None = Field(default=None, alias="for")
    until: Literal["masks_stable"] | None = None
    repeat: Annotated[int, Field(ge=1, strict=True)] = 1
    stages: tuple[Stage, ...] | None = None
    prune: Prune | None = None
    save: Annotated[str, Field(min_length=1)] | None = None
    restore: Restore | None = None
    finish: FinishField = None

    @model_serializer(mode="wrap")
    def _in_reading_order(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = write(self)
        return {key: data[key] for key in sorted(data, key=lambda key: key not in ("for", "for_", "until", "repeat"))}

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.given
        if not given:
            raise InputError("does nothing; say what it is for, such as {for: 1 run}")
        if self.for_ is not None and self.for_.value == 0:
            raise InputError("for: a stage must last longer than nothing")
        if self.until is not None and self.for_ is None and self.stages is None:
            raise InputError("until: ends a stage early, so say how long it lasts at most, such as for: 1 run")
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
        return self

    def filled(self, around: Mapping[str, Any]) -> Stage:
        """Return the stage (one without stages) with the slots ``around`` it where it is silent, and its ``prune`` with those of both.

        Of the slots around it, a stage that masks nothing takes only those that then have an effect.
        """
        own = {field: getattr(self, field) for field in self.given}
        slots = {**around, **own}
        prune = self.prune
        if prune is not None:
            ranking = {field: value for field, value in slots.items() if field in Prune.model_fields}
            try:
                prune = Prune(**ranking | {field: getattr(prune, field) for field in prune.model_fields_set})
            except InputError as error:
                raise InputError(f"prune.{error}") from None
        whole = Stage.model_construct(set(slots), **slots)
        if not whole.selects:
            useless = set(combinations.RANKING) if whole.acts else around.keys() - {"objective"}
            slots = {field: value for field, value in slots.items() if field in own or field not in useless}
        return Stage.model_construct(set(slots), **slots | {"prune": prune})


def settings_in_words(value: Any) -> str:
    """Return settings in words: ``every 100 steps, end 0.75 run``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {settings_in_words(inner)}" for key, inner in value.items())
    return ", ".join(settings_in_words(inner) for inner in value) if isinstance(value, list) else str(value)


def in_words(stage: Stage) -> str:
    """Return what a stage without stages does, as it says it: ``train for 1 run; prune 20 % of what is active; save ticket``."""
    data = stage.to_data()
    words = [f"train for {data.pop('for')}"] if "for" in data else []
    if data.pop("until", None) is not None:
        words[0] += " at most, until the masks are stable"
    if stage.prune is not None:
        settings = settings_in_words({field: value for field, value in data["prune"].items() if field != "fraction"})
        data["prune"] = f"{100 * stage.prune.fraction:.6g} % of what is active" + (f" ({settings})" if settings else "")
    return "; ".join(words + [f"{field} {settings_in_words(value)}" for field, value in data.items()])
