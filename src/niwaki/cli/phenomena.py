"""``niwaki bench phenomena``: experiments on what the literature on sparsity says to happen."""

from __future__ import annotations

from pathlib import Path

import click

from niwaki.cli.options import PATH, data_option, json_option, print_json, require_known, results_option, show_option
from niwaki.cli.progress import progress_bar


@click.command(
    epilog="\b\nExamples:\n  niwaki bench phenomena dense_sparse_dense --data DATA --out dsd.json --plot dsd.svg\n"
    "  niwaki bench phenomena early_structure --network digits_mlp --out early.json"
)
@click.argument("name")
@data_option("With Fashion-MNIST, and CIFAR-10 for layer_collapse; the networks digits_mlp and digits_convnet need none")
@results_option
@click.option("--network", "networks", multiple=True, metavar="NETWORK", help="Such as lenet_300_100; by default that of the results.")
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="By default 2 to 5.")
@click.option("--epochs", type=click.IntRange(min=1), metavar="N", help="Of each training; by default 2 to 20.")
@click.option("--plot", type=PATH, metavar="FILE", help="Draw what was measured (SVG or PNG).")
@show_option
@json_option
def phenomena(
    name: str,
    data: Path | None,
    out: Path,
    networks: tuple[str, ...],
    seeds: int | None,
    epochs: int | None,
    plot: Path | None,
    show: bool,
    as_json: bool,
) -> None:
    """Look for a phenomenon, and say what was found.

    NAME is early_structure, layer_collapse, random_tickets, dense_sparse_dense, large_sparse or power_law. Each takes minutes on one
    core, and can be interrupted: it goes on with the case that it was at.
    """
    from niwaki.bench.phenomena import EXPERIMENTS
    from niwaki.bench.results import stored

    require_known(("NAME", (name,), EXPERIMENTS))
    experiment = EXPERIMENTS[name]
    require_known(("--network", networks, experiment.known))
    with progress_bar("measuring") as progress:
        changed = {} if epochs is None else {"epochs": epochs}
        rows = stored(out)["rows"] if show else experiment.run(data, out, networks=networks, seeds=seeds, progress=progress, **changed)
    if plot is not None:
        experiment.picture(rows, plot)
    if as_json:
        print_json(rows)
        return
    from niwaki.cli.tables import print_rows

    print_rows(name, "what is said, and what was measured", experiment.table(rows), (experiment.statement, *experiment.definitions))
