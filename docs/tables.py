"""Fills the pages with what the code knows, when the documentation is built: a marker in a page becomes tables."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import niwaki
from niwaki.catalogue import CHAPTERS, Columns, Method, left_out
from niwaki.catalogue.rows import by_chapter
from niwaki.catalogue.search import command
from niwaki.component import REGISTRY, Component, describe

sys.path.insert(0, str(Path(__file__).parent))

import pages

from results import fill


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page; mkdocs calls it for each one."""
    for marker, make in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return fill(SLOT.sub(lambda found: pages.slot(found[1]), markdown))


def components() -> str:
    """Return one table for each slot: those of a recipe in its order, then those that stand inside components."""
    ordered = [field for field in niwaki.Recipe.model_fields if field in REGISTRY]
    return "\n\n".join(_slot(slot) for slot in [*ordered, *sorted(REGISTRY.keys() - set(ordered))])


def _slot(slot: str) -> str:
    names = pages.names(slot)
    if slot in pages.PAGES:
        links = [(f"[`{known[0]}`]({pages.PAGES[slot]}#{pages.anchor(slot, known[0])})", describe(cls)) for cls, known in names.items()]
        return f"## {slot}\n\n{_table(('name', 'what it is'), links)}"
    rows = [
        (" or ".join(f"`{name}`" for name in known), describe(cls), _code(cls.equation), "<br>".join(_fields(cls)), cls.source)
        for cls, known in names.items()
    ]
    return f"## {slot}\n\n{_table(('name', 'what it is', 'equation', 'fields and defaults', 'source'), rows)}"


def _fields(cls: type[Component]) -> list[str]:
    fields = {field.alias or name: field for name, field in cls.model_fields.items()}
    return [f"`{n}`" if f.is_required() else _code(f"{n}: {_value(f.get_default(call_default_factory=True))}") for n, f in fields.items()]


def _value(value: Any) -> Any:
    data = value.to_data() if isinstance(value, Component) else value
    return "none" if data is None or data == () else data


def methods() -> str:
    """Return the catalogue chapter by chapter: a table in the survey's columns, then each method with source, differences and recipe."""
    chapters = [(f"[{CHAPTERS[chapter]}](#chapter-{chapter})", str(len(rows))) for chapter, rows in by_chapter().items()]
    parts = [_table(("chapter", "methods"), [*chapters, ("[Left out](#left-out)", str(len(left_out())))])]
    for chapter, rows in by_chapter().items():
        lines = [(f"[`{m.name}`](#{m.name})", str(m.year), _survey(m), *m.columns.in_words().values(), _faithful(m)) for m in rows]
        table = _table(("method", "year", "survey", *Columns.model_fields, "fidelity"), lines)
        parts += [f"## {CHAPTERS[chapter]} {{ #chapter-{chapter} }}", table, *(_method(m) for m in rows)]
    return "\n\n".join([*parts, "## Left out { #left-out }", LEFT_OUT, missing()])


LEFT_OUT = "Rows of the survey's method table for which there is no method yet, and the component that they would need."


def missing() -> str:
    """Return the rows of the survey's method table that are left out, as a table."""
    rows = [(str(row.row), row.name, row.authors, str(row.year), row.lacks, row.why) for row in left_out().values()]
    return _table(("row", "name", "authors", "year", "lacks", "why"), rows)


def _survey(method: Method) -> str:
    return method.section + (f", row {method.row}" if method.row is not None else "")


def _faithful(method: Method) -> str:
    return method.fidelity if method.of is None else f"alias of [`{method.of}`](#{method.of})"


def _method(method: Method) -> str:
    differs = "\n".join(f"- {difference}" for difference in method.differs)
    recipe = f"```yaml\n{method.recipe.to_yaml()}```" if method.of is None else ""
    parts = [
        f"### {method.title} {{ #{method.name} }}",
        f"`{method.name}` ({_faithful(method)}). {method.citation}",
        f"What differs from the paper:\n\n{differs}" if differs else "Nothing differs from the paper.",
        recipe,
        f"```sh\n{command(method)}\n```",
    ]
    return "\n\n".join(part for part in parts if part)


def public_face() -> str:
    """Return a directive for each public name, by the module that defines it."""
    defined = {"METHODS": "niwaki.catalogue.METHODS"}
    for name in niwaki.__all__:
        if name not in defined:
            thing = getattr(niwaki, name)
            defined[name] = f"{thing.__module__}.{thing.__qualname__}"
    return "\n\n".join(f"::: {defined[name]}" for name in niwaki.__all__)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: str) -> str:
    """Escape what would end the cell; between backticks it does not."""
    return "`".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(cell.split("`")))


SLOT = re.compile(r"<!-- slot (\w+) -->")

MARKERS: dict[str, Callable[[], str]] = {
    "<!-- components -->": components,
    "<!-- methods -->": methods,
    "<!-- public face -->": public_face,
}
