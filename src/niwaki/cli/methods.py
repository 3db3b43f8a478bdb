"""``niwaki methods``: the catalogue as the survey's table."""

from __future__ import annotations

import click

from niwaki.cli.options import json_option, print_json
from niwaki.errors import InputError, did_you_mean


@click.command(short_help="List the named methods, or show one.", epilog="\b\nExamples:\n  niwaki methods\n  niwaki methods rigl")
@click.argument("name", required=False)
@json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the named methods with the survey's columns, or show one: its source, what differs from it, and its recipe."""
    from niwaki.catalogue import METHODS

    if name is not None and name not in METHODS:
        raise InputError(f"methods: there is no method {name!r}; {did_you_mean(name, METHODS)}")
    chosen = list(METHODS.values()) if name is None else [METHODS[name]]
    if as_json:
        data = [method.model_dump(mode="json") for method in chosen]
        print_json(data if name is None else data[0])
        return
    from niwaki.cli.tables import print_method, print_methods

    if name is None:
        print_methods(chosen)
    else:
        print_method(chosen[0])
