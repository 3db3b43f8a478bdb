"""What ``niwaki methods`` shows: the catalogue as the survey's table, one method in full, and the rows that are left out."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from niwaki.catalogue import LeftOut, Method
from niwaki.catalogue.search import command, components
from niwaki.cli.tables import console, heading, table_of


def print_methods(methods: Sequence[Method], of: int, query: str) -> None:
    """Print methods as the survey's table: its columns in its codes, and what the codes mean."""
    out = console()
    count = f"{len(methods)} methods" if len(methods) == of else f"{len(methods)} of {of} methods"
    out.print(heading(count, query or "with the columns of the survey's method table (Hoefler et al. 2021)"))
    if not methods:
        out.print("None is like that; niwaki methods lists all, with what the codes mean.")
        return
    columns = ["what", "when", "criterion", "growth", "budget", "regularization"]
    for dropped in itertools.accumulate(((), ("what",), ("regularization",), ("budget",), ("growth",), ("criterion",), ("when",))):
        shown = [column for column in columns if column not in dropped]
        table = _listed(methods, shown)
        if out.measure(table, options=out.options.update(max_width=10_000)).maximum <= out.width:
            break
    out.print(table)
    if dropped:
        out.print(Text(f"No room for {', '.join(dropped)} here: a wider window or --json shows them.", style="dim"))
    out.print(Padding(_pairs(_meanings(methods, shown), dim=True), (1, 0)))
    strength = [method.name for method in methods if method.by_strength]
    if strength:
        out.print(Text(f"Strength decides how sparse these make a model, and --sparsity needs --cut: {', '.join(strength)}.", style="dim"))
        out.print()
    out.print("One method in full: niwaki methods NAME. Some of them: --when dyn --year 2018..2020, and other options (--help).")


def _listed(methods: Sequence[Method], columns: Sequence[str]) -> Table:
    table = table_of("method", "year", *("reg." if column == "regularization" else column for column in columns), "fidelity", left=range(9))
    for place in table.columns:
        place.no_wrap = True
    for method in methods:
        codes = dict(method.columns)
        said = ("/".join(codes[column]) or "-" for column in columns)
        fidelity = "alias" if method.of is not None else method.fidelity
        table.add_row(Text(method.name, style="bold"), str(method.year), *said, fidelity)
    return table


def _meanings(methods: Sequence[Method], columns: Sequence[str]) -> dict[str, str]:
    """Return what the codes of the methods mean: column -> words."""
    found: dict[str, dict[str, str]] = {column: {} for column in columns}
    for method in methods:
        for column, said in method.columns:
            for code in said if column in found else ():
                found[column][code] = method.columns.model_copy(update={column: (code,)}).in_words()[column]
    return {column: "; ".join(f"{code} {word}" for code, word in sorted(words.items())) for column, words in found.items() if words}


def print_left_out(rows: Sequence[LeftOut], query: str) -> None:
    """Print rows of the survey's table that the catalogue has no method for."""
    out = console()
    table = table_of("row", "name", "year", "lacks", "why", left=range(1, 5))
    for row in rows:
        table.add_row(str(row.row), Text(row.name, style="bold"), str(row.year), row.lacks, row.why)
    count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
    out.print(heading(f"{count} left out", query or "of the survey's method table (Hoefler et al. 2021), with what they lack"))
    out.print(table if rows else "None is like that.")


def print_method(method: Method) -> None:
    """Print one method: source, place in the survey, equations, recipe, what differs, and the command that runs it."""
    out = console()
    out.print(heading(method.name, f"{method.title} · survey section {method.section}" + (f", row {method.row}" if method.row else "")))
    out.print(Text(str(method.citation)))
    out.print()
    out.print(_pairs({**method.columns.in_words(), "fidelity": method.faithful}))
    equations = list(dict.fromkeys((slot, type(component)) for slot, component in components(method.recipe) if component.equation))
    if equations:
        _section(
            "equations",
            *(
                Group(
                    Text.assemble((f"{slot} {component.name}: ", "bold dim"), component.equation),
                    *(
                        Padding(Text.assemble((f"{what}: ", "dim"), said), (0, 0, 0, 2))
                        for what, said in (("cost", component.effort), ("when to use it", component.advice))
                        if said
                    ),
                )
                for slot, component in equations
            ),
        )
    out.print()
    out.print(Text("recipe" if method.of is None else f"recipe (of {method.of})", style="bold"))
    written = Syntax("", "yaml", theme="ansi_dark", background_color="default").highlight(textwrap.indent(method.recipe.to_yaml(), "  "))
    written.rstrip()
    out.print(written, soft_wrap=True)  # a line that was broken would not be read as YAML any more
    if method.differs:
        items = Table.grid(padding=(0, 1))
        for line in method.differs:
            items.add_row("-", Text(line))
        _section("differs", items)
    _section("command")
    out.print(Text(f"  {command(method)}"), soft_wrap=True)


def _section(title: str, *parts: RenderableType) -> None:
    out = console()
    out.print()
    out.print(Text(title, style="bold"))
    for part in parts:
        out.print(Padding(part, (0, 0, 0, 2)))


def _pairs(words: Mapping[str, str], dim: bool = False) -> Table:
    """Return two columns: what it is, and what is said of it."""
    lines = Table.grid(padding=(0, 2))
    for what, said in words.items():
        lines.add_row(Text(what, style="bold dim" if dim else "bold"), Text(said, style="dim" if dim else ""))
    return lines
