"""``niwaki compare``: finished runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from niwaki.cli.options import PATH, definitions_option, json_option, print_json
from niwaki.cli.training import report_link
from niwaki.errors import InputError


@click.command(
    short_help="Show finished runs side by side.",
    epilog="\b\nExamples:\n  niwaki compare runs/gmp runs/rigl\n  niwaki compare runs/* --report comparison.html",
)
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write an HTML page: accuracy against sparsity, Pareto fronts, efficiency, damage by class; of one run, its own report.",
)
@definitions_option
@json_option
def compare(runs: tuple[Path, ...], page: Path | None, definitions: bool, as_json: bool) -> None:
    """Show finished runs side by side: the dense baseline, then each method and sparsity, with means over seeds.

    RUNS are --out folders of `niwaki run`, or their run.json files. Runs with different baselines (another task, model or training)
    stand in tables of their own.
    """
    from niwaki.training.record import read

    if page is not None and page.suffix.lower() != ".html":  # so that a slip of the hand overwrites no record
        raise InputError(f"--report: {page} does not end in .html; give the name of an HTML page to write")
    records = [(folder, read(folder)) for folder in dict.fromkeys(runs)]
    for folder, record in records:
        if record.results is None:
            raise InputError(f"{folder}: this run has not finished; give the same niwaki run command again to finish it")
    if page is not None:
        from niwaki import report

        if len(records) == 1:
            text = report.run_report(records[0][1])
        else:
            links = {str(folder): link for folder, _ in records if (link := report_link(folder, page)) is not None}
            text = report.comparison_report([(str(folder), record) for folder, record in records], links)
        report.write(text, page)
    if as_json:
        print_json([{"folder": str(folder), **record.model_dump(mode="json", by_alias=True)} for folder, record in records])
    else:
        from niwaki.cli.tables import print_comparison

        print_comparison([(str(folder), record) for folder, record in records], definitions)
        if page is not None:
            click.echo(f"Report: {page}")
