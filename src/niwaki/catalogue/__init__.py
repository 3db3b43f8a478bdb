"""The catalogue: named methods of the survey as data, a file for each of its chapters, and one for structured methods.

A row holds a citation, the survey's place and columns, how faithful it is, and a recipe. Files are read once, when the first row is
asked for, and validated strictly. The rows of the survey's method table that no method stands for are listed too, with what they lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from niwaki.catalogue import rows
from niwaki.catalogue.rows import CHAPTERS, Citation, Columns, LeftOut, Method, left_out, parse_rows, saying_sparsity
from niwaki.component import build
from niwaki.errors import InputError, did_you_mean
from niwaki.recipe import Recipe, Slots, Stage, combinations
from niwaki.relaxation import Relaxation


class _Methods(Mapping[str, Method]):
    """The rows by name, in the survey's order, read when first needed."""

    def __getitem__(self, name: str) -> Method:
        return rows.methods()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(rows.methods())

    def __len__(self) -> int:
        return len(rows.methods())

    def __repr__(self) -> str:
        return f"<{len(self)} methods: {', '.join(self)}>"


CUT: Mapping[str, Any] = MappingProxyType({"saliency": "score", "allocation": "global", "schedule": {"one_shot": {"at": "1 run"}}})
"""What a final exact cut adds to a recipe: one ranking of all weights by their learned scores, at the end of the run."""

METHODS: Mapping[str, Method] = _Methods()
"""All methods by name."""


def method(name: str, sparsity: float | None = None, cut: bool = False, **fields: Any) -> Recipe:
    """Return the recipe of a named method.

    Args:
        name: a name of ``METHODS``.
        sparsity: in [0, 1), in the place of the one that the recipe or one of its stages says; None takes the published default.
        cut: for methods whose strength decides how sparse the model gets: make a final exact cut to ``sparsity`` by the learned score.
        **fields: slots of the recipe that replace the method's; None takes a slot back to the vocabulary's default.

    Raises:
        InputError: unknown method or field, a sparsity where strength decides and no cut is asked for, or choices that cannot go together.

    >>> method("rigl", sparsity=0.95, allocation="uniform").sparsity
    0.95
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; {did_you_mean(name, METHODS)}")
    row = METHODS[name].recipe
    said = {field: value for field, value in ({f: getattr(row, f) for f in row.given} | fields).items() if value is not None}
    if sparsity is not None and row.stages is not None:
        if not METHODS[name].takes_sparsity:
            raise InputError(
                f"sparsity: the stages of {name!r} decide it; drop it, or change them (niwaki methods {name} shows the recipe)"
            )
        if not cut:
            return Recipe(**said | {"stages": _with_sparsity(row.stages, Slots(sparsity=sparsity).sparsity)})
    decides = combinations.decides(cast(Relaxation, build("relaxation", said.get("relaxation", "hard"))))
    if cut and not decides:
        others = ", ".join(name for name, method in METHODS.items() if method.by_strength and method.recipe.relaxation.has_scores)
        raise InputError(f"cut: {name!r} reaches its sparsity without a final cut; choices: {others}")
    if cut and sparsity is None:
        raise InputError("cut: needs the sparsity to cut to")
    if cut:
        said = {**CUT, **said}
    elif decides and sparsity is not None and "schedule" not in fields:
        raise InputError(
            f"sparsity: the strength of {name!r} decides it; drop it, or ask for a final exact cut by its learned score"
            " (cut=True, or --cut)"
        )
    if sparsity is not None:
        said["sparsity"] = sparsity
    elif combinations.fixed_sparsity(Slots(**{field: said[field] for field in ("granularity", "schedule") if field in said})) is not None:
        said.pop("sparsity", None)
    return Recipe(**said)


def _with_sparsity(stages: Sequence[Stage], sparsity: float | None) -> list[Stage]:
    """Return the stages with a sparsity in the place of every one that they say."""
    replaced = []
    for stage in stages:
        if stage.sparsity is not None:
            stage = stage.model_copy(update={"sparsity": sparsity})
        elif stage.stages is not None:
            stage = stage.model_copy(update={"stages": tuple(_with_sparsity(stage.stages, sparsity))})
        replaced.append(stage)
    return replaced


def find(name: str, sparsity: float | None = None, cut: bool = False) -> Recipe:
    """Return the recipe of a named method, or of a YAML file; the arguments are those of :func:`method`.

    Raises:
        InputError: there is no such method or file, or the sparsity does not go with its choices.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        return method(name, sparsity=sparsity, cut=cut)
    found = Recipe.read(path)
    if cut and sparsity is None:
        raise InputError("cut: needs the sparsity to cut to")
    fields: dict[str, Any] = {field: value for field, value in CUT.items() if cut and field not in found.given}
    try:
        if sparsity is not None and not cut and len(saying_sparsity(found.stages or ())) == 1:
            return found.replace(stages=_with_sparsity(found.stages or (), Slots(sparsity=sparsity).sparsity))
        return found if sparsity is None else found.replace(sparsity=sparsity, **fields)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


__all__ = ["CHAPTERS", "CUT", "METHODS", "Citation", "Columns", "LeftOut", "Method", "find", "left_out", "method", "parse_rows"]
