"""``niwaki bench``: measurements on this machine, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from niwaki.cli.options import Group, json_option, print_json
from niwaki.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table


@click.group(cls=Group, no_args_is_help=False, epilog="Example: niwaki bench upkeep")
def bench() -> None:
    """Measure on this machine: mask upkeep, selection."""


@bench.command(epilog="\b\nExamples:\n  niwaki bench upkeep\n  niwaki bench upkeep --network resnet20 --rounds 50")
@click.option("--network", "networks", multiple=True, metavar="NAME", help="resnet20, transformer or transformer_1k; by default all.")
@click.option(
    "--sparsity", type=click.FloatRange(0, 1, max_open=True), default=0.9, show_default=True, metavar="S", help="Of the masked models."
)
@click.option("--rounds", type=click.IntRange(min=10), default=30, show_default=True, metavar="N", help="Steps of each model that count.")
@json_option
def upkeep(networks: tuple[str, ...], sparsity: float, rounds: int, as_json: bool) -> None:
    """Measure what masks cost a training step, and what an update of RigL costs.

    Dense and masked models take turns in one process, with torch's number of threads; medians are reported.
    """
    from niwaki.bench import upkeep as measurement

    for name in networks:
        if name not in measurement.WORKLOADS:
            raise InputError(f"--network: there is no network {name!r}; {did_you_mean(name, measurement.WORKLOADS)}")
    with _progress("measuring") as progress:
        rows = measurement.run(networks or tuple(measurement.WORKLOADS), sparsity=sparsity, rounds=rounds, progress=progress)
    described = dict.fromkeys(f"{row['network']}: {row['description']}, {row['threads']} threads" for row in rows)
    _show("mask upkeep", f"at sparsity {sparsity:g}", rows, measurement.table(rows), (*described, *measurement.DEFINITIONS), as_json)


@bench.command(epilog="\b\nExamples:\n  niwaki bench select\n  niwaki bench select --scores 1000000 --rounds 9")
@click.option("--scores", multiple=True, type=click.IntRange(min=1), metavar="N", help="How many; by default 10^6, 10^7 and 10^8.")
@click.option("--sparsity", type=float, default=0.9, show_default=True, metavar="S", help="Share of the scores that is not kept.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, metavar="N", help="How often each one runs.")
@json_option
def select(scores: tuple[int, ...], sparsity: float, rounds: int, as_json: bool) -> None:
    """Measure the exact selection of the best scores against torch.topk: time and memory.

    All take turns in one process, with torch's number of threads; medians are reported.
    """
    from niwaki.bench import select as measurement

    with _progress("measuring") as progress:
        rows = measurement.run(scores or measurement.SIZES, rounds, sparsity=sparsity, progress=progress)
    about = f"the best {1 - sparsity:.0%} of the scores, {rows[0]['threads']} threads, {rounds} rounds"
    _show("selection", about, rows, measurement.table(rows), measurement.DEFINITIONS, as_json)


def _show(title: str, about: str, rows: list[dict[str, Any]], table: Table, notes: Iterable[str], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    from niwaki.cli.tables import print_rows

    print_rows(title, about, table, notes)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on standard error, where it is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bars:
        row = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(row, completed=done, total=total)
