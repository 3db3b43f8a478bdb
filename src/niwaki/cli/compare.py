"""``niwaki compare``: finished runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from niwaki.cli.options import json_option, print_json
from niwaki.errors import InputError


@click.command(short_help="Show finished runs side by side.", epilog="Example: niwaki compare runs/gmp runs/rigl")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show finished runs side by side: the dense baseline, then one column for each of RUNS.

    RUNS are --out folders of `niwaki run`. Runs with different baselines (another task, model, seed or training) stand in tables of
    their own.
    """
    from niwaki.training.record import read

    records = [(folder, read(folder)) for folder in dict.fromkeys(runs)]
    for folder, record in records:
        if record.results is None:
            raise InputError(f"{folder}: this run has not finished; give the same niwaki run command again to finish it")
    if as_json:
        print_json([{"folder": str(folder), **record.model_dump(mode="json", by_alias=True)} for folder, record in records])
    else:
        from niwaki.cli.tables import print_comparison

        print_comparison(records)
