"""The rows of the catalogue as they stand in its files: what a row holds, and what is wrong with one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from niwaki.errors import InputError, did_you_mean
from niwaki.recipe import Recipe, Stage, text
from niwaki.recipe.strict import Strict

CHAPTERS: Mapping[str, str] = MappingProxyType(
    {
        "schedules": "When: schedules, stages and rewinding",
        "initialization": "Before training",
        "removal": "Which weights: by themselves, by data, to first order",
        "second_order": "Which weights: to second order",
        "layerwise": "Layer by layer",
        "units": "Which units",
        "relaxations": "Gates, learned thresholds and learned masks",
        "penalties": "Penalties",
        "variational": "Posteriors",
        "budgets": "How much from which layer",
        "regrowth": "Dropping and growing during training",
        "widening": "Units that are added",
        "structured": "Structured sparsity",
    }
)
"""The data files -> what their methods are about: the survey's chapters 3 (training, and before it), 4 (weights; to second order; layer by
layer; units; gates and thresholds; penalties; posteriors), 5 and 6 (weights that come back, units that are added), and structured
methods of all chapters."""

SURVEY_ROWS = 260
"""Rows of the survey's method table."""

Text = Annotated[str, Field(min_length=1)]
Codes = tuple[str, ...]
Year = Annotated[int, Field(ge=1900, le=2100)]
Row = Annotated[int, Field(ge=1, le=SURVEY_ROWS)]


class Citation(Strict):
    """The work that a method comes from."""

    authors: Text
    title: Text
    venue: Text
    year: Year

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
        for column, said in self:
            for code in said:
                if code not in codes()[column]:
                    raise InputError(f"{column}: unknown code {code!r}; {did_you_mean(code, codes()[column])}")
        return self

    def in_words(self) -> dict[str, str]:
        """Return column -> words for people; a dash where the survey has one."""
        return {column: ", ".join(codes()[column][code] for code in said) or "-" for column, said in self}


class Method(Strict):
    """A row of the catalogue.

    Attributes:
        name: what users call it in Python and on the command line.
        title: its name in print.
        citation: the work that it comes from.
        section: section of the survey that describes it.
        row: number of its row in the survey's method table, None where the table has none.
        columns: the survey's columns.
        fidelity: ``exact``: the published method; ``simplified``: its idea, with differences that can change results; ``alias_of``: a
            published method whose idea is that of another row, which has the recipe.
        of: the other row, of an alias.
        differs: what differs from the published method, and where its code differs from the paper, which of the two is followed.
        recipe: with the published defaults; times that the original counts in epochs of a run of fixed length are fractions of the run.
    """

    name: Text
    title: Text
    citation: Citation
    section: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")]
    row: Row | None = None
    columns: Columns
    fidelity: Literal["exact", "simplified", "alias_of"]
    of: Text | None = None
    differs: tuple[Text, ...]
    recipe: Annotated[Recipe, BeforeValidator(Recipe.from_data), PlainSerializer(Recipe.to_data)]

    @property
    def year(self) -> int:
        """Year of publication."""
        return self.citation.year

    @property
    def faithful(self) -> str:
        """Its fidelity for people: ``exact``, ``simplified`` or ``alias of NAME``."""
        return self.fidelity if self.of is None else f"alias of {self.of}"

    @property
    def takes_sparsity(self) -> bool:
        """Whether a sparsity can be asked for without a final cut: its own, that of the one stage that says one, or the most that its
        schedule may reach.

        Otherwise its strength decides (``by_strength``), or its stages or thresholds do.
        """
        ceiling = self.recipe.selects and self.recipe.schedule.validates
        return self.recipe.sparsity is not None or len(saying_sparsity(self.recipe.stages or ())) == 1 or ceiling

    @property
    def by_strength(self) -> bool:
        """Whether the method's strength decides how sparse the model gets."""
        return self.recipe.stages is None and not self.takes_sparsity and not self.recipe.selects


class LeftOut(Strict):
    """A row of the survey's method table for which the catalogue has no method.

    Attributes:
        row: its number.
        name: what the survey calls it.
        authors: the first ones, as the survey names them.
        year: of publication, the first one if there are several.
        lacks: the component that would be needed.
        why: what the method needs it for.
    """

    row: Row
    name: Text
    authors: Text
    year: Year
    lacks: Text
    why: Text


def saying_sparsity(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages, those inside others too, that say a sparsity."""
    return [said for stage in stages for said in ([stage] if stage.sparsity is not None else saying_sparsity(stage.stages or ()))]


@lru_cache(maxsize=1)
def codes() -> Mapping[str, Mapping[str, str]]:
    """Return the survey's codes in words, by column."""
    data: dict[str, dict[str, str]] = _load("codes")
    return MappingProxyType({column: MappingProxyType(words) for column, words in data.items()})


@lru_cache(maxsize=1)
def methods() -> Mapping[str, Method]:
    """Return all methods by name, validated."""
    return MappingProxyType(parse_rows({_file(chapter): _load(chapter) for chapter in CHAPTERS}))


def by_chapter() -> Mapping[str, list[Method]]:
    """Return the methods of each data file."""
    return {chapter: [methods()[str(name)] for name in _load(chapter)] for chapter in CHAPTERS}


@lru_cache(maxsize=1)
def left_out() -> Mapping[int, LeftOut]:
    """Return the rows of the survey's method table that the catalogue has no method for, by number."""
    where, found = _file("left_out"), {}
    for number, row in _entries(_load("left_out"), where, "row"):
        try:
            found[int(number)] = LeftOut(row=int(number), **row)
        except InputError as error:
            raise InputError(f"{where}: {number}: {error}") from None
    return MappingProxyType(found)


def parse_rows(data: Mapping[str, Any]) -> dict[str, Method]:
    """Return the methods of some files, in their order; the keys of ``data`` name the files in errors.

    Raises:
        InputError: a field that is unknown, missing or wrong; one line with file, row and field.
    """
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, content in data.items():
        for name, row in _entries(content, where, "name"):
            if name in rows:
                raise InputError(f"{where}: {name}: there is a method of this name in {rows[name][0]}")
            rows[name] = where, row
    methods = {}
    for name, (where, row) in rows.items():
        try:
            methods[name] = Method(**{"name": name} | row | _borrowed(row, {other: fields for other, (_, fields) in rows.items()}))
        except InputError as error:
            raise InputError(f"{where}: {name}: {error}") from None
    return methods


def _borrowed(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the recipe of the row that an alias names; nothing for a row that is none."""
    of = row.get("of")
    if (row.get("fidelity") == "alias_of") != (of is not None):
        raise InputError("of: names the row whose recipe an alias has, so it goes with fidelity alias_of, and with no other")
    if of is None:
        return {}
    if "recipe" in row:
        raise InputError(f"recipe: an alias has that of {of!r}; drop it")
    if of not in rows:
        raise InputError(f"of: unknown method {of!r}; {did_you_mean(str(of), rows)}")
    if "of" in rows[of]:
        raise InputError(f"of: {of!r} is an alias itself, of {rows[of]['of']!r}; name that")
    return {"recipe": rows[of].get("recipe")}


def _entries(data: Any, where: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of one file; ``key`` is the field that a row's own key fills."""
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected a mapping from {key}s to rows, got {data!r:.60}")
    for name, row in data.items():
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: {name}: expected a mapping of fields, got {row!r:.60}")
        if key in row and key == "name":
            raise InputError(f"{where}: {name}: {key}: the key of a row is its {key}")
        yield str(name), {str(field): value for field, value in row.items()}


def _file(name: str) -> str:
    return f"catalogue/{name}.yaml"


def _load(name: str) -> Any:
    return text.parse(files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"), _file(name))
