"""The catalogue: named methods of the survey as data, a file for each of its chapters, and one for structured methods.

A row holds a citation, the survey's place and columns, how faithful it is, and a recipe. Files are read once, when the first row is
asked for, and validated strictly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from niwaki.component import build
from niwaki.errors import InputError, did_you_mean
from niwaki.recipe import Recipe, Slots, Stage, combinations, text
from niwaki.recipe.strict import Strict
from niwaki.relaxation import Relaxation

CHAPTERS = ("schedules", "initialization", "removal", "second_order", "layerwise", "units", "budgets", "regrowth", "structured")
"""The data files: the survey's chapters 3 (training, and before it), 4 (weights; to second order; layer by layer; units), 5 and 6, and
structured methods of all chapters."""

Text = Annotated[str, Field(min_length=1)]
Codes = tuple[str, ...]


class Citation(Strict):
    """The work that a method comes from."""

    authors: Text
    title: Text
    venue: Text
    year: Annotated[int, Field(ge=1900, le=2100)]

    def __str__(self) -> str:
        return f"{self.authors}. {self.title}. {self.venue}, {self.year}."


class Columns(Strict):
    """What the survey's method table says: codes, which ``in_words`` spells out. An empty column is the table's dash."""

    what: Codes
    when: Codes
    criterion: Codes
    growth: Codes
    budget: Codes
    regularization: Codes

    @model_validator(mode="after")
    def _check(self) -> Self:
        for column, codes in self:
            for code in codes:
                if code not in _codes()[column]:
                    raise InputError(f"{column}: unknown code {code!r}; {did_you_mean(code, _codes()[column])}")
        return self

    def in_words(self) -> dict[str, str]:
        """Return column -> words for people; a dash where the survey has one."""
        return {column: ", ".join(_codes()[column][code] for code in codes) or "-" for column, codes in self}


class Method(Strict):
    """A row of the catalogue.

    Attributes:
        name: what users call it in Python and on the command line.
        title: its name in print.
        citation: the work that it comes from.
        section: section of the survey that describes it.
        row: number of its row in the survey's method table, None where the table has none.
        columns: the survey's columns.
        fidelity: ``exact``: the published method; ``simplified``: its idea, with differences that can change results.
        differs: what differs from the published method, and where its code differs from the paper, which of the two is followed.
        recipe: with the published defaults; times that the original counts in epochs of a run of fixed length are fractions of the run.
    """

    name: Text
    title: Text
    citation: Citation
    section: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")]
    row: Annotated[int, Field(ge=1, le=260)] | None = None
    columns: Columns
    fidelity: Literal["exact", "simplified"]
    differs: tuple[Text, ...]
    recipe: Annotated[Recipe, BeforeValidator(Recipe.from_data), PlainSerializer(Recipe.to_data)]

    @property
    def year(self) -> int:
        """Year of publication."""
        return self.citation.year

    @property
    def takes_sparsity(self) -> bool:
        """Whether a sparsity can be asked for without a final cut: its own, or that of the one stage that says one.

        Otherwise its strength decides (``by_strength``), or its stages do.
        """
        return self.recipe.final_sparsity is not None or len(_saying_sparsity(self.recipe.stages or ())) == 1

    @property
    def by_strength(self) -> bool:
        """Whether the method's strength decides how sparse the model gets."""
        return self.recipe.stages is None and not self.takes_sparsity


class _Methods(Mapping[str, Method]):
    """The rows by name, in the survey's order, read when first needed."""

    def __getitem__(self, name: str) -> Method:
        return _read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_read())

    def __len__(self) -> int:
        return len(_read())

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
        others = ", ".join(name for name, method in METHODS.items() if method.by_strength)
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


def _saying_sparsity(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages, those inside others too, that say a sparsity."""
    return [said for stage in stages for said in ([stage] if stage.sparsity is not None else _saying_sparsity(stage.stages or ()))]


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
        return found if sparsity is None else found.replace(sparsity=sparsity, **fields)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


@lru_cache(maxsize=1)
def _codes() -> Mapping[str, Mapping[str, str]]:
    """Return the survey's codes in words, by column."""
    data: dict[str, dict[str, str]] = _load("codes")
    return MappingProxyType({column: MappingProxyType(words) for column, words in data.items()})


@lru_cache(maxsize=1)
def _read() -> Mapping[str, Method]:
    """Return all rows, validated."""
    methods: dict[str, Method] = {}
    for chapter in CHAPTERS:
        for name, method in parse_rows(_load(chapter), f"catalogue/{chapter}.yaml").items():
            if name in methods:
                raise InputError(f"catalogue/{chapter}.yaml: method {name!r} stands in two files")
            methods[name] = method
    return MappingProxyType(methods)


def _load(file: str) -> Any:
    where = f"catalogue/{file}.yaml"
    return text.parse(files(__package__).joinpath(f"{file}.yaml").read_text(encoding="utf-8"), where)


def parse_rows(data: Any, where: str) -> dict[str, Method]:
    """Return the rows of one file; ``where`` names it in errors.

    Raises:
        InputError: a field that is unknown, missing or wrong; one line with file, row and field.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected a mapping from names to rows, got {data!r:.60}")
    methods = {}
    for name, row in data.items():
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: {name}: expected a mapping of fields, got {row!r:.60}")
        if "name" in row:
            raise InputError(f"{where}: {name}: name: the key of a row is its name")
        try:
            methods[str(name)] = Method(**{"name": str(name)} | {str(field): value for field, value in row.items()})
        except InputError as error:
            raise InputError(f"{where}: {name}: {error}") from None
    return methods
