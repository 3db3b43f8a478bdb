"""Several penalties at once."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PlainSerializer, SkipValidation, model_validator

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.penalty.base import Penalty, Single
from niwaki.penalty.groups import GroupLasso


def _read(data: Any) -> tuple[Any, ...]:
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise InputError(f"expected a list of penalties, got {data!r:.60}")
    return tuple(build("penalty", one) for one in data)


def _written(terms: Sequence[Penalty]) -> list[Any]:
    return [term.to_data() for term in terms]


Terms = Annotated[tuple[SkipValidation[Penalty], ...], BeforeValidator(_read), PlainSerializer(_written)]


class Sum(Penalty):
    """Several penalties at once, each with settings of its own; steps after the optimizer's are taken in their order.

    Attributes:
        terms: the penalties, at least two.

    >>> from niwaki.penalty import Sum
    >>> [term.name for term in Sum(terms=["group_lasso", {"nuclear_norm": {"apply": "proximal"}}]).penalties]
    ['group_lasso', 'nuclear_norm']
    """

    name = "sum"
    equation = "P_1 + P_2 + ..."
    source = "Alvarez & Salzmann 2017 (compression-aware training: group lasso and nuclear norm)"
    effort = "that of all of them"
    advice = "where one penalty makes pieces vanish and another makes what stays simple"
    single_field = "terms"

    terms: Annotated[Terms, Field(min_length=2)]

    @model_validator(mode="after")
    def _strengths_are_given(self) -> Self:
        if any(isinstance(term, GroupLasso) and term.ratio is not None for term in self.terms):
            raise InputError("terms: a ratio is of one penalty and the loss; say the strength of group_lasso")
        return self

    @property
    def penalties(self) -> tuple[Single, ...]:
        """All of them, sums within sums taken apart."""
        return tuple(single for term in self.terms for single in term.penalties)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of the class, unless a field decides
        """What any of them needs."""
        return frozenset().union(*(term.needs for term in self.terms))
