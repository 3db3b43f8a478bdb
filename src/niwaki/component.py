"""What a component is, and how one is built from data.

A component is a frozen record of hyper-parameters with one method that does one thing on tensors. It knows nothing of models, loops,
files or other components. Declaring a class with a ``name`` registers it, which makes it usable in recipes, on the command line
and in the documentation.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from niwaki.errors import InputError, did_you_mean

Fraction = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
"""A sparsity in a recipe: in [0, 1)."""

REGISTRY: dict[str, dict[str, type[Component]]] = {}
"""Slot of the recipe -> component name -> class."""

PLANNED: dict[str, frozenset[str]] = {
    "target": frozenset({"heads", "activations", "errors", "gradients", "router"}),
    "selection": frozenset({"sampled_top_k"}),
    "objective": frozenset({"adversarial"}),
    "memory": frozenset({"error_feedback", "momentum_correction"}),
}
"""Names that the vocabulary has and this version cannot run yet: recipes with them parse, and say what is missing."""


class Component(BaseModel):
    """A frozen record of hyper-parameters, registered under its ``name`` in the ``slot`` of the recipe that it fills."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, populate_by_name=True)

    slot: ClassVar[str] = ""
    name: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What must be at hand for it: ``gradient`` (of the loss at the current weights), ``score`` (the relaxation's learned score),
    ``flops`` (how often each weight is used in a forward pass), ``loss`` (the mean loss), ``teacher`` (outputs of the trained dense
    model). What has to be collected over data is a :class:`~niwaki.statistics.Statistic`."""
    effort: ClassVar[str] = ""
    """What it costs: time, memory, data."""
    advice: ClassVar[str] = ""
    """When to use it."""

    single_field: ClassVar[str | None] = None
    """The field that a bare value stands for: ``{name: value}`` for ``{name: {single_field: value}}``."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InputError(f"{self.slot}.{self.name}{one_line(error, type(self))}") from None

    # As in pydantic's own RootModel: only direct construction goes through __init__, validation from data does not.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "name" in cls.__dict__ and cls.name:
            REGISTRY.setdefault(cls.slot, {})[cls.name] = cls

    @classmethod
    def from_text(cls, text: str) -> Self | None:
        """Return the component that a slot's own shorthand stands for (such as ``2:4``), or None when the text is none."""
        return None

    def to_data(self, *, defaults: bool = False) -> str | dict[str, Any]:
        """Return what a recipe would say: the bare name, or ``{name: {field: value}}`` with the fields that were given, or all of them."""
        given = self.model_dump(mode="json", by_alias=True, exclude_unset=not defaults)
        return {self.name: given} if given else self.name


class Missing(Component):
    """A component of the vocabulary that this version cannot run: kept as written, so that recipes round-trip."""

    kind: str
    component: str
    fields: Any = None

    def to_data(self, *, defaults: bool = False) -> str | dict[str, Any]:
        """Return what was written."""
        return self.component if self.fields is None else {self.component: self.fields}

    def __str__(self) -> str:
        return f"{self.kind} {self.component!r}"


def build(slot: str, data: Any) -> Component:
    """Build the component of a slot from recipe data: ``name``, ``{name: {field: value}}``, a shorthand, or a component.

    Raises:
        InputError: unknown name or field, or a value that the component does not take; one line with the nearest choice.
    """
    if isinstance(data, Component):
        kind, name = (data.kind, data.component) if isinstance(data, Missing) else (data.slot, data.name)
        if kind != slot:
            raise InputError(f"{slot}: {name!r} is a component of {kind}, not of {slot}")
        return data
    known = REGISTRY.get(slot, {})
    planned = PLANNED.get(slot, frozenset())
    fields: Any
    if isinstance(data, Mapping):
        if len(data) != 1:
            raise InputError(f"{slot}: expected one component as NAME or {{NAME: {{field: value}}}}, got {dict(data)!r}")
        [(name, fields)] = data.items()
    else:
        name, fields = data, None
    name = str(name)
    if name in known:
        cls = known[name]
    elif name in planned:
        return Missing(kind=slot, component=name, fields=fields)
    else:
        if fields is None:
            for base in dict.fromkeys(c.__mro__[1] for c in known.values()):
                found = base.from_text(name) if issubclass(base, Component) else None
                if found is not None:
                    return found
        raise InputError(f"{slot}: unknown component {name!r}; {did_you_mean(name, {*known, *planned})}")
    return construct(cls, fields, f"{slot}.{name}")


def construct(cls: type[Component], fields: Any, where: str) -> Component:
    """Validate ``fields`` as the hyper-parameters of ``cls``; every error becomes one line that starts with ``where``."""
    if fields is None:
        fields = {}
    if not isinstance(fields, Mapping):
        if cls.single_field is None:
            raise InputError(f"{where}: expected {{field: value}}, got {fields!r}; fields: {', '.join(field_names(cls)) or 'none'}")
        fields = {cls.single_field: fields}
    try:
        return cls.model_validate(dict(fields))
    except ValidationError as error:
        raise InputError(f"{where}{one_line(error, cls)}") from None


def one_line(error: ValidationError, cls: type[BaseModel]) -> str:
    """Say the first problem of a validation error in one line, with the nearest field for an unknown one."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])  # a misspelt field is also a missing one
    path = "".join(f".{part}" for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        unknown = str(problem["loc"][-1])
        return f": unknown field {unknown!r}; {did_you_mean(unknown, field_names(cls)) if cls.model_fields else 'it has no fields'}"
    if problem["type"] == "missing":
        return f"{path}: this field is required"
    message = problem["msg"].removeprefix("Value error, ")
    says_it_all = isinstance(problem.get("ctx", {}).get("error"), InputError)
    return f"{path}: {message}" if says_it_all else f"{path}: {message}, got {problem['input']!r}"


def field_names(cls: type[BaseModel]) -> list[str]:
    """Return the names that a recipe uses for the hyper-parameters of ``cls``."""
    return [field.alias or name for name, field in cls.model_fields.items()]


def describe(cls: type[Component]) -> str:
    """Return the first line of a component's docstring: its purpose."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]
