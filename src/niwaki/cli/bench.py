"""``niwaki bench``: measurements on this machine, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niwaki.cli.options import (
    PATH,
    SHARE,
    Group,
    data_option,
    draws_option,
    json_option,
    print_json,
    require_known,
    results_option,
    show_option,
)
from niwaki.cli.phenomena import phenomena
from niwaki.cli.progress import progress_bar
from niwaki.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table


@click.group(cls=Group, no_args_is_help=False, epilog="Example: niwaki bench upkeep")
def bench() -> None:
    """Measure on this machine: upkeep, selection; architectures that removal works on; criteria for filters and weights; phenomena."""


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
    with progress_bar("measuring") as progress:
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

    with progress_bar("measuring") as progress:
        rows = measurement.run(scores or measurement.SIZES, rounds, sparsity=sparsity, progress=progress)
    about = f"the best {1 - sparsity:.0%} of the scores, {rows[0]['threads']} threads, {rounds} rounds"
    _show("selection", about, rows, measurement.table(rows), measurement.DEFINITIONS, as_json)


@bench.command(
    epilog="\b\nExamples:\n  niwaki bench coverage\n  niwaki bench coverage --architecture llama --architecture swin --sparsity 0.5"
)
@click.option("--architecture", "names", multiple=True, metavar="NAME", help="Such as llama or timm:resnet50; by default all.")
@click.option(
    "--sparsity",
    "sparsities",
    multiple=True,
    type=SHARE,
    metavar="S",
    help="Share of the units that go; by default 0.25 and 0.5.",
)
@click.option("--export", is_flag=True, help="Try torch.export on each one too.")
@json_option
def coverage(names: tuple[str, ...], sparsities: tuple[float, ...], export: bool, as_json: bool) -> None:
    """Make architectures really smaller, and check what holds afterwards.

    The project's own networks and torch's, and those of transformers, timm and Torch-Pruning where these are installed.
    """
    from niwaki.bench import coverage as measurement
    from niwaki.bench.architectures import architectures

    known = architectures()
    for name in names:
        if name not in known:
            raise InputError(f"--architecture: there is no architecture {name!r}; {did_you_mean(name, known)}")
    with progress_bar("trying") as progress:
        rows = measurement.run(names or None, sparsities=sparsities or measurement.SPARSITIES, export=export, progress=progress)
    about = f"{len({row['architecture'] for row in rows})} architectures, random units of every group of channels and heads"
    _show("coverage", about, rows, measurement.table(rows), (*measurement.summary(rows), *measurement.DEFINITIONS), as_json)


@bench.command(
    epilog="\b\nExamples:\n  niwaki bench structured --data DATA --out structured.json\n"
    "  niwaki bench structured --data DATA --out structured.json --model resnet20 --criterion fpgm --criterion taylor"
)
@data_option("With CIFAR-10 and models/cifar10_MODEL.safetensors")
@results_option
@click.option("--model", "networks", multiple=True, metavar="NAME", help="resnet20 or resnet56; by default both.")
@click.option("--criterion", "criteria", multiple=True, metavar="NAME", help="Such as filter_l1, fpgm or taylor; by default all six.")
@click.option("--allocation", "allocations", multiple=True, metavar="NAME", help="uniform or search; by default uniform.")
@click.option("--by", "makers", multiple=True, metavar="NAME", help="niwaki or torch-pruning; by default both, if both are installed.")
@click.option(
    "--flops",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    metavar="F",
    help="Budget, as a share.",
)
@click.option("--epochs", type=click.IntRange(min=0), default=3, show_default=True, metavar="N", help="Of fine-tuning.")
@show_option
@click.option("--latencies", is_flag=True, help="Train nothing: measure the latencies of what --out holds anew.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="K", help="Of everything random.")
@json_option
def structured(
    data: Path | None,
    out: Path,
    networks: tuple[str, ...],
    criteria: tuple[str, ...],
    allocations: tuple[str, ...],
    makers: tuple[str, ...],
    flops: float,
    epochs: int,
    seed: int,
    show: bool,
    latencies: bool,
    as_json: bool,
) -> None:
    """Prune filters of pretrained networks by several criteria at one budget of FLOPs, and fine-tune all alike.

    This takes minutes a case, and hours for all of them; it can be interrupted, and goes on with the case that it was at.
    """
    from niwaki.bench import structured as measurement

    installed = [measurement.NIWAKI, *([measurement.PEER] if measurement.has_peer() else [])]
    require_known(
        ("--model", networks, measurement.NETWORKS),
        ("--criterion", criteria, measurement.CRITERIA),
        ("--allocation", allocations, measurement.ALLOCATIONS),
        ("--by", makers, installed),
    )
    chosen = measurement.cases(
        networks or measurement.NETWORKS, criteria or tuple(measurement.CRITERIA), allocations or ("uniform",), makers or installed
    )
    with progress_bar("measuring") as progress:
        rows = (
            measurement.stored(out)
            if show
            else measurement.run(chosen, data, out, budget=flops, epochs=epochs, seed=seed, latencies=latencies, progress=progress)
        )
    _show(
        "structured pruning",
        "filters of pretrained CIFAR-10 networks, all fine-tuned alike",
        rows,
        measurement.table(rows),
        measurement.DEFINITIONS,
        as_json,
    )


@bench.command(
    epilog="\b\nExamples:\n  niwaki bench oneshot --data DATA --out oneshot.json\n"
    "  niwaki bench oneshot --data DATA --out oneshot.json --network lenet_300_100 --method snip --method woodfisher --plot cut.svg"
)
@data_option("With CIFAR-10, models/cifar10_resnet20.safetensors and Fashion-MNIST")
@results_option
@click.option("--network", "networks", multiple=True, metavar="NAME", help="lenet_300_100 or resnet20; by default both.")
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Such as magnitude, snip or woodfisher; by default all.")
@click.option(
    "--sparsity",
    "sparsities",
    multiple=True,
    type=SHARE,
    metavar="S",
    help="By default 0.5, 0.7, 0.8, 0.9, 0.95 and 0.98.",
)
@click.option(
    "--recover",
    multiple=True,
    type=SHARE,
    metavar="S",
    help="Sparsities after which an epoch of training follows, with the first seed; by default 0.8, 0.9 and 0.95.",
)
@draws_option(3)
@click.option("--plot", type=PATH, metavar="FILE", help="Draw the accuracies right after the cut (SVG or PNG).")
@show_option
@json_option
def oneshot(
    data: Path | None,
    out: Path,
    networks: tuple[str, ...],
    methods: tuple[str, ...],
    sparsities: tuple[float, ...],
    recover: tuple[float, ...],
    seeds: int,
    plot: Path | None,
    show: bool,
    as_json: bool,
) -> None:
    """Prune trained networks at once by many criteria: accuracy right after the cut and after an epoch of recovery, time and memory.

    This takes seconds to minutes a case, and hours for all of them; it can be interrupted, and goes on with the case that it was at.
    """
    from niwaki.bench import oneshot as measurement
    from niwaki.bench.plot import draw
    from niwaki.bench.results import stored

    require_known(("--network", networks, measurement.NETWORKS), ("--method", methods, measurement.METHODS))
    chosen = measurement.cases(
        networks or tuple(measurement.NETWORKS), methods or tuple(measurement.METHODS), sparsities or measurement.SPARSITIES, seeds
    )
    with progress_bar("measuring") as progress:
        recovered = recover or measurement.RECOVERED
        rows = stored(out)["rows"] if show else measurement.run(chosen, data, out, recover=recovered, progress=progress)
    if plot is not None:
        moments = {name: measurement.curves(rows, field) for field, name in measurement.WHEN.items()}
        draw(moments, {name: method.family for name, method in measurement.METHODS.items()}, plot)
    about = "trained networks, single weights, no training before the cut"
    _show("one-shot pruning", about, rows, measurement.table(rows), measurement.DEFINITIONS, as_json)


@bench.command(
    epilog="\b\nExamples:\n  niwaki bench blocks --data DATA --out blocks.json\n"
    "  niwaki bench blocks --data DATA --embeddings MINILM --out blocks.json --method wanda --method sparsegpt"
)
@data_option("With stories260K, its text and SST-2")
@click.option("--embeddings", type=PATH, metavar="DIR", help="Folder of a sentence-embedding BERT, such as MiniLM.")
@results_option
@click.option("--method", "methods", multiple=True, metavar="NAME", help="magnitude, wanda, sparsegpt or obc; by default all.")
@click.option("--pattern", "patterns", multiple=True, metavar="P", help="A sparsity or N:M; by default 0.5 and 2:4.")
@draws_option(1)
@show_option
@json_option
def blocks(
    data: Path | None,
    embeddings: Path | None,
    out: Path,
    methods: tuple[str, ...],
    patterns: tuple[str, ...],
    seeds: int,
    show: bool,
    as_json: bool,
) -> None:
    """Prune pretrained transformers block by block: the loss of stories260K, and how far sentence embeddings drift."""
    from functools import partial

    from niwaki.bench import blocks as measurement
    from niwaki.bench.results import stored

    require_known(("--method", methods, measurement.METHODS))
    networks = {"stories260k": partial(measurement.stories, data)}
    if embeddings is not None:
        networks["embeddings"] = partial(measurement.embeddings, data, embeddings)
    with progress_bar("measuring") as progress:
        rows = (
            stored(out)["rows"]
            if show
            else measurement.run(
                networks,
                out,
                methods=methods or tuple(measurement.METHODS),
                patterns=patterns or measurement.PATTERNS,
                seeds=seeds,
                progress=progress,
            )
        )
    about = "pretrained transformers, each block on what the pruned ones before it put out"
    _show("block by block", about, rows, measurement.table(rows), measurement.DEFINITIONS, as_json)


bench.add_command(phenomena)


def _show(title: str, about: str, rows: list[dict[str, Any]], table: Table, notes: Iterable[str], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    from niwaki.cli.tables import print_rows

    print_rows(title, about, table, notes)
