"""``niwaki methods``: the catalogue as the survey's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from niwaki.cli.options import json_option, print_json
from niwaki.errors import InputError, did_you_mean

COLUMNS = {
    "what": "What goes: weights W, units U, N:M patterns NM, ...",
    "when": "When: it, grad, init, dyn, ...",
    "criterion": "By what: mag, obs, ste, ...",
    "growth": "What grows back: rand, grd, mom, ...",
    "budget": "How much from which layer: uni, glob, erk, ...",
    "regularization": "What pushes towards zero: L1, GL, KL, ...",
}
"""Columns of the survey's method table -> help."""


def filters(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command an option for each column of the survey's table."""
    for column, said in reversed(COLUMNS.items()):
        command = click.option(f"--{column}", multiple=True, metavar="CODE", help=said)(command)
    return command


@click.command(
    short_help="List the named methods, or show one.",
    epilog="\b\nExamples:\n  niwaki methods\n  niwaki methods --when dyn --growth grd --growth mom --year 2018..2020\n"
    "  niwaki methods --search lottery\n  niwaki methods rigl",
)
@click.argument("name", required=False)
@filters
@click.option("--fidelity", type=click.Choice(("exact", "simplified", "alias_of")), help="How faithful the recipe is.")
@click.option("--year", metavar="YEAR", help="Of publication: 2017, 2017..2020, 2017.. or ..2020.")
@click.option("--search", default="", metavar="TEXT", help="Words of the title, the citation, or of components.")
@click.option("--left-out", is_flag=True, help="Show the rows of the survey's table that are not there, and what they lack.")
@json_option
def methods(
    name: str | None, fidelity: str | None, year: str | None, search: str, left_out: bool, as_json: bool, **columns: tuple[str, ...]
) -> None:
    """List the named methods with the survey's columns, or show one: its source, equations, recipe, and what differs from it.

    Options choose among them, and all must hold. A code given twice, as in --when dyn --when alt, means either; - is an empty column.
    """
    from niwaki import catalogue
    from niwaki.catalogue.search import Query, command, years

    try:
        query = Query({column: wanted for column, wanted in columns.items() if wanted}, fidelity, years(year) if year else None, search)
    except InputError as error:
        raise InputError(f"--{error}") from None
    if name is not None:
        show_one(name, query != Query() or left_out, as_json)
        return
    if left_out and (query.columns or query.fidelity):
        raise InputError("--left-out: rows that are left out have no codes and no fidelity; choose by --year and --search")
    rows: list[Any] = [row for row in (catalogue.left_out() if left_out else catalogue.METHODS).values() if query.matches(row)]
    if as_json:
        print_json([row.model_dump(mode="json") | ({} if left_out else {"command": command(row)}) for row in rows])
        return
    from niwaki.cli.method_tables import print_left_out, print_methods

    if left_out:
        print_left_out(rows, str(query))
    else:
        print_methods(rows, len(catalogue.METHODS), str(query))


def show_one(name: str, chosen: bool, as_json: bool) -> None:
    """Print one method in full."""
    from niwaki.catalogue import METHODS
    from niwaki.catalogue.search import command

    if name not in METHODS:
        raise InputError(f"methods: there is no method {name!r}; {did_you_mean(name, METHODS)}")
    if chosen:
        raise InputError(f"methods: {name!r} is one method, so there is nothing to choose from; drop the name or the options")
    if as_json:
        print_json(METHODS[name].model_dump(mode="json") | {"command": command(METHODS[name])})
        return
    from niwaki.cli.method_tables import print_method

    print_method(METHODS[name])
