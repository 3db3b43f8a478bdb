"""The slots of a recipe: what each is called, what fills it by default, and how it is read and written.

Importing this module registers every component of the library.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator

from niwaki.allocation import Allocation
from niwaki.compensation import Compensation
from niwaki.component import Component, build
from niwaki.gradient import GradientPolicy
from niwaki.granularity import Granularity
from niwaki.growth import Growth
from niwaki.normalization import Normalization
from niwaki.objective import Objective
from niwaki.penalty import Penalty
from niwaki.relaxation import Relaxation
from niwaki.saliency import Saliency
from niwaki.schedule import Schedule
from niwaki.selecting import Selection
from niwaki.target import Target

DEFAULTS: dict[str, str | None] = {
    "target": "weights",
    "granularity": "element",
    "saliency": "magnitude",
    "normalization": "none",
    "allocation": "uniform",
    "schedule": "one_shot",
    "selection": "top_k",
    "growth": "none",
    "gradient": "active",
    "relaxation": "hard",
    "penalty": None,
    "compensation": None,
    "objective": None,
    "memory": None,
}
"""Every slot, in the order in which recipes are written -> the component that fills it when a recipe does not say."""


def default(slot: str) -> Component:
    """Return the component that fills a slot when the recipe does not say."""
    return build(slot, DEFAULTS[slot])


_data = PlainSerializer(lambda component: None if component is None else component.to_data())


def _read(slot: str) -> PlainValidator:
    return PlainValidator(partial(build, slot))


def _read_optional(slot: str) -> PlainValidator:
    return PlainValidator(lambda data: None if data is None else build(slot, data))


# A component that this version cannot run is a `Missing` in the place of the slot's class: `Recipe.require_complete` rules it out
# before anything calls it.
TargetField = Annotated[Target, _read("target"), _data]
GranularityField = Annotated[Granularity, _read("granularity"), _data]
SaliencyField = Annotated[Saliency, _read("saliency"), _data]
NormalizationField = Annotated[Normalization, _read("normalization"), _data]
AllocationField = Annotated[Allocation, _read("allocation"), _data]
ScheduleField = Annotated[Schedule, _read("schedule"), _data]
SelectionField = Annotated[Selection, _read("selection"), _data]
GrowthField = Annotated[Growth, _read("growth"), _data]
GradientField = Annotated[GradientPolicy, _read("gradient"), _data]
RelaxationField = Annotated[Relaxation, _read("relaxation"), _data]
PenaltyField = Annotated[Penalty | None, _read_optional("penalty"), _data]
CompensationField = Annotated[Compensation | None, _read_optional("compensation"), _data]
ObjectiveField = Annotated[Objective | None, _read_optional("objective"), _data]
MemoryField = Annotated[Component | None, _read_optional("memory"), _data]
