"""Which rows of the catalogue somebody asks for, and how to run one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from niwaki.catalogue.rows import LeftOut, Method, codes
from niwaki.component import Component
from niwaki.errors import InputError, did_you_mean
from niwaki.penalty import Sum
from niwaki.recipe import Recipe
from niwaki.recipe.combinations import name_of
from niwaki.recipe.stages import unroll
from niwaki.recipe.vocabulary import DEFAULTS

DASH = "-"
"""What asks for an empty column, as the survey prints it."""


@dataclass(frozen=True)
class Query:
    """What a row has to be like; what is not said is no condition, and all conditions must hold.

    Attributes:
        columns: column -> codes of which a row has at least one; ``-`` stands for an empty column.
        fidelity: one of the words of :class:`~niwaki.catalogue.Method`.
        years: first and last year of publication.
        text: every word of it is part of the row's name, title or citation, or the name of one of its components.
    """

    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fidelity: str | None = None
    years: tuple[int, int] | None = None
    text: str = ""

    def __post_init__(self) -> None:
        for column, wanted in self.columns.items():
            for code in wanted:
                if code != DASH and code not in codes()[column]:
                    raise InputError(f"{column}: unknown code {code!r}; {did_you_mean(code, codes()[column])}")

    def matches(self, row: Method | LeftOut) -> bool:
        """Return whether a row is like that. Rows that are left out have no columns and no fidelity.

        >>> from niwaki.catalogue import METHODS
        >>> query = Query(columns={"when": ["dyn"], "growth": ["grd", "mom"]}, years=(2019, 2020))
        >>> [name for name in ("set", "rigl", "top_kast") if query.matches(METHODS[name])]
        ['rigl']
        """
        if self.years is not None and not self.years[0] <= row.year <= self.years[1]:
            return False
        if isinstance(row, LeftOut):
            conditions, about = bool(self.columns or self.fidelity), [row.name, row.authors, row.lacks, row.why]
            return not conditions and self._said_in(about)
        said = dict(row.columns)
        if not all(any(code in (said[column] or (DASH,)) for code in wanted) for column, wanted in self.columns.items()):
            return False
        if self.fidelity is not None and row.fidelity != self.fidelity:
            return False
        return self._said_in([row.name, row.title, str(row.citation), *(component.name for _, component in components(row.recipe))])

    def _said_in(self, texts: Sequence[str]) -> bool:
        whole = "\n".join(texts).casefold()
        return all(word in whole for word in self.text.casefold().split())

    def __str__(self) -> str:
        said = [f"{column} {' or '.join(wanted)}" for column, wanted in self.columns.items()]
        said += [self.fidelity.replace("_", " ")] if self.fidelity else []
        if self.years is not None:
            first, last = self.years
            bounds = [f"from {first}"] * (first > 0) + [f"to {last}"] * (last < LAST)
            said.append(f"{first}" if first == last else " ".join(bounds))
        return ", ".join([*said, *([repr(self.text)] if self.text else [])])


LAST = 9999
"""The last year, where none is said."""


def years(text: str) -> tuple[int, int]:
    """Read ``2017``, ``2017..2020``, ``2017..`` or ``..2020`` as the first and the last year.

    Raises:
        InputError: it is none of them, or the first is after the last.
    """
    found = re.fullmatch(r"\s*(\d{4})?\s*(\.\.)?\s*(\d{4})?\s*", text)
    if found is None or not (found[1] or found[3]) or (found[1] and found[3] and not found[2]):
        raise InputError(f"year: {text!r} is no year, and no range such as 2017..2020, 2017.. or ..2020")
    first, last = int(found[1] or 0), int(found[3] or (LAST if found[2] else found[1]))
    if first > last:
        raise InputError(f"year: {first} is after {last}")
    return first, last


def components(recipe: Recipe) -> Iterator[tuple[str, Component]]:
    """Yield what a recipe, or its stages, say, stage by stage, each in the order of the vocabulary; after a sum, its terms."""
    for leaf in unroll(recipe):
        for said in (leaf.recipe, leaf.prune):
            for slot in DEFAULTS:
                component = getattr(said, slot, None)
                if said is not None and slot in said.model_fields_set and isinstance(component, Component):
                    yield slot, component
                    if isinstance(component, Sum):
                        yield from ((slot, penalty) for penalty in component.penalties)


def command(method: Method) -> str:
    """Return a command that runs a method on a small task that has what it is about; a call in Python where no command can.

    >>> from niwaki.catalogue import METHODS
    >>> command(METHODS["rigl"])
    'niwaki run rigl --task digits --sparsity 0.9 --out runs/rigl'
    >>> command(METHODS["network_slimming"])
    'niwaki run network_slimming --task digits --model convnet --sparsity 0.7 --out runs/network_slimming'
    """
    chosen = [component for _, component in components(method.recipe)]
    names = {name_of(component) for component in chosen}
    if "eigenbasis" in names:
        return f'niwaki.prune(model, "{method.name}", data=data, loss=loss)'
    task = "digits"
    if names & {"head", "layer"}:
        task = "characters --data TEXT.txt"
    elif "norm_scale" in names or any(getattr(c, "scored_on", "") == "norms" or getattr(c, "of", "") == "norm" for c in chosen):
        task = "digits --model convnet"
    sparsity = published_sparsity(method)
    asked = "" if sparsity is None else f" --sparsity {sparsity:g}"
    return f"niwaki run {method.name} --task {task}{asked} --out runs/{method.name}"


def published_sparsity(method: Method) -> float | None:
    """Return the sparsity that ``--sparsity`` would replace, None where there is none."""
    said = (leaf.recipe.sparsity for leaf in unroll(method.recipe) if leaf.recipe.sparsity is not None)
    return next(said, None) if method.takes_sparsity else None
