"""What a stage does to the size of the model at its end: make it smaller, or wider."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, model_validator

from niwaki.addition import Addition, Split
from niwaki.component import build
from niwaki.errors import InputError
from niwaki.recipe.strict import Strict

AdditionField = Annotated[Addition, PlainValidator(partial(build, "addition")), PlainSerializer(lambda addition: addition.to_data())]


class Widen(Strict):
    """Multiplies the widths of the model by one factor, as :func:`niwaki.structured.uniform` does.

    Attributes:
        factor: of the widths, at least 1; or
        flops: budget of a forward pass, as a share of the FLOPs of the model that the run began with; the factor is the largest within it.
        by: where the units come from.
    """

    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] | None = None
    flops: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    by: AdditionField = Field(default_factory=Split)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.factor is None) == (self.flops is None):
            raise InputError("needs a factor of the widths, or flops as a share of those of the first model: one of them")
        return self


class Finish(Strict):
    """What is done to the size of the model, where that has settings."""

    widen: Widen


def _finish(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Finish(**value)
    if value is None or value == "shrink" or isinstance(value, Finish):
        return value
    raise InputError(f"finish: must be shrink, or {{widen: {{factor: 1.5}}}}, got {value!r}")


FinishField = Annotated[Literal["shrink"] | Finish | None, BeforeValidator(_finish)]
"""What ``finish`` of a stage can say."""
