"""How results look on a terminal."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from niwaki.metrics.units import NOTHING, show
from niwaki.report.groups import ACTIVE, FILE_SIZE, FLOPS, SPARSITY, Family, families
from niwaki.report.words import change, deviation, difference

if TYPE_CHECKING:
    from niwaki.dependency import Groups
    from niwaki.dry_run import Plan
    from niwaki.recipe.stages import Leaf
    from niwaki.training.jobs import Job
    from niwaki.training.record import Measure, Record, Results

WIDTH_WITHOUT_TERMINAL = 110

DETAILS = frozenset(
    {
        "parameters",
        "weights of the targets",
        "sparsity of all parameters",
        "zeros among active weights",
        "zeros of all parameters",
        "peak memory of a forward pass",
        "accuracy density",
        "parameter efficiency (odds)",
        "parameter efficiency (bits)",
    }
)
"""Measures that are shown on request."""

FIRST = (FILE_SIZE, FLOPS, ACTIVE, "training FLOPs", "latency")
"""Measures that a comparison shows before others, for which there may be no room."""


def console() -> Console:
    """Return the console of standard output; where that is no terminal, and nothing says otherwise, it is wide enough for the tables."""
    out = Console(highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = WIDTH_WITHOUT_TERMINAL
    return out


def print_groups(model: str, groups: Groups) -> None:
    """Print the dependency groups of a model."""
    from niwaki.dependency.member import COLUMNS

    table = Table(box=box.SIMPLE_HEAD, title=f"Dependency groups of {model}", title_justify="left")
    for header in COLUMNS:
        table.add_column(header, justify="right" if header in ("units", "along") else "left", overflow="fold")
    for group in groups:
        table.add_row(*group.row())
    out = console()
    out.print(table)
    for note in groups.notes:
        out.print(f"note: {note}")


def print_run(record: Record, folder: Path, again: bool, definitions: bool) -> None:
    """Print the main numbers of one finished run; with ``definitions`` all of them, the storage formats, and what each number is."""
    assert record.results is not None
    found = record.results
    shown = [measure for measure in found.measures if definitions or measure.name not in DETAILS]
    table = table_of("", "dense", "sparse", "change")
    for measure in shown:
        row = [show(measure.dense, measure.unit), show(measure.sparse, measure.unit), change(measure)]
        table.add_row(measure.name, *row, style="bold" if measure is found.measures[0] else None)
    out = console()
    out.print(heading(record.choices.method_name, _about(record)))
    out.print(table)
    if definitions:
        out.print(_defined((measure.name, measure.definition) for measure in shown))
        out.print(_stored(found))
        out.print(Text("\nAll parameters together: n elements, m of them active, k bits a value.", style="dim"))
        out.print(_defined((row.format, row.definition) for row in found.storage))
    else:
        out.print(Text(f"\n{len(found.measures) - len(shown)} more numbers, and what each means: --definitions", style="dim"))
    for note in found.notes:
        out.print(Text(f"note: {note}", style="yellow"))
    said = "Finished before, nothing was computed again; in" if again else "Saved in"
    out.print(Text(f"\n{said} {folder}: run.json, report.html, and {found.model.file}, which was loaded again with the same metrics"))


def _stored(found: Results) -> Table:
    """Return the table of what the sparse model's parameters need in each storage format."""
    bound = next((row.bits for row in found.storage if row.format == "entropy bound"), None)
    table = table_of("stored as", "size", "positions", "of the bound")
    for row in found.storage:
        share = f"{row.bits / bound:.2f} ×" if bound else NOTHING
        table.add_row(row.format, show(row.bits / 8, "bytes"), show(row.position_bits / 8, "bytes"), share)
    return table


def print_comparison(runs: Sequence[tuple[str, Record]], definitions: bool) -> None:
    """Print one table for each dense baseline, whatever its seed: the baseline, and a row for each setting with its mean over seeds."""
    out = console()
    for family in families(runs):
        seeds = sorted({record.choices.seed for _, record in family.runs})
        first, *others = (m for m in family.measures if m.name not in DETAILS and m.name != SPARSITY)
        others.sort(key=lambda measure: FIRST.index(measure.name) if measure.name in FIRST else len(FIRST))
        table, left_out = _fitting(family, first, others, len(seeds) > 1, out)
        out.print(heading(family.title, _about(family.first, what=False, seeds=seeds)))
        out.print(table)
        notes = [f"left out for lack of room: {', '.join(left_out)}; --json has all"] if left_out else []
        if len(seeds) > 1:
            notes.append(f"mean ± standard deviation over seeds; change: of {first.name}, to the dense model of the same seed")
        for setting in family.settings:
            if setting.name != setting.runs[0][1].choices.method_name:  # one of several that differ in other choices
                notes.append(f"{setting.title}: {', '.join(label for label, _ in setting.runs)}")
        out.print(Text("\n".join(["", *notes]), style="dim"))
        if definitions:
            out.print(_defined((measure.name, measure.definition) for measure in family.measures if measure in (first, *others)))


def _fitting(family: Family, first: Measure, others: Sequence[Measure], seeds: bool, out: Console) -> tuple[Table, list[str]]:
    """Return the table with as many of the measures as fit into the console, and the names of the others."""
    for fit in range(len(others), -1, -1):
        table = table_of(
            "method", "sparsity", *(["seeds"] if seeds else []), first.name, "change", *(_folded(m.name) for m in others[:fit])
        )
        for setting in family.all:
            counted = [str(len(setting.runs))] if seeds else []
            changed = "" if setting is family.dense else difference(setting.changes(first.name), first.unit).removesuffix(" points")
            cells = [show(setting.mean(measure.name), measure.unit) for measure in others[:fit]]
            headline = Text(_spread(setting.values(first.name), first.unit), style="bold")
            table.add_row(setting.name, show(setting.sparsity, "share"), *counted, headline, changed, *cells)
            if setting is family.dense:
                table.add_section()
        if out.measure(table, options=out.options.update(max_width=10_000)).maximum <= out.width:
            break
    return table, [measure.name for measure in others[fit:]]


def _folded(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 10))


def _spread(values: Sequence[float], unit: str) -> str:
    """Return mean ± standard deviation, or the value alone when there is but one."""
    mean, around = show(fmean(values) if values else None, unit), deviation(values)
    return mean if around is None else f"{mean.removesuffix(' %')} ± {show(around, unit)}"


def print_plan(job: Job, plans: Sequence[tuple[Leaf, Plan]]) -> None:
    """Print what each stage of a recipe would mask while it trains: which tensor, how much, when and why; what it leaves out and why."""
    out = console()
    length = f"{job.steps_per_epoch:,} steps an epoch, {job.training.epochs} epochs a run"
    out.print(heading(job.choices.method_name, f"dry run · {job.task.name} · {job.model} · {length}"))
    for i, (leaf, plan) in enumerate(_once(plans)):
        if job.recipe.stages is not None:
            out.print(Text("\n" * (i > 0) + f"{leaf.says}\n", style="bold"))
        out.print(_planned(plan))
        out.print(Text.assemble("\n", ("masks are updated: ", "bold"), plan.when()))
        for reason, names in _by_reason((one.name, one.reason) for one in plan.left_out).items():
            out.print(Text.assemble((f"left dense, {reason}: ", "bold"), ", ".join(names)))
    words = Table.grid(padding=(0, 2))
    for line in job.recipe.describe():
        slot, _, rest = line.partition(": ")
        words.add_row(Text(slot, style="bold dim"), Text(rest, style="dim"))
    out.print(Padding(words, (1, 0)))
    for note in dict.fromkeys(note for _, plan in plans for note in plan.notes):
        out.print(Text(f"note: {note}", style="yellow"))
    out.print(Text("Nothing was trained or written."))


def _once(plans: Sequence[tuple[Leaf, Plan]]) -> list[tuple[Leaf, Plan]]:
    """Return the first round of each stage."""
    found: dict[str, tuple[Leaf, Plan]] = {}
    for leaf, plan in plans:
        found.setdefault(leaf.where, (leaf, plan))
    return list(found.values())


def _planned(plan: Plan) -> Table:
    table = table_of("tensor", "shape", "pieces", "kept", "sparsity", "why", left=(0, 1, 5))
    for row in plan.tensors:
        kept = "by score" if row.keep is None else f"{row.keep:,}"
        share = "" if row.sparsity is None else show(row.sparsity, "share")
        table.add_row(row.name, " × ".join(map(str, row.shape)), f"{row.pieces:,}", kept, share, row.why)
    pieces = sum(row.pieces for row in plan.tensors)
    if plan.final_sparsity is not None:
        from niwaki.selection import kept as kept_pieces

        table.add_section()
        total = kept_pieces(plan.final_sparsity, pieces)
        table.add_row("all targets", "", f"{pieces:,}", f"{total:,}", show(1 - total / pieces, "share"), "", style="bold")
    return table


def print_rows(title: str, about: str, table: Table, notes: Iterable[str] = ()) -> None:
    """Print any table in the same dress."""
    out = console()
    out.print(heading(title, about))
    out.print(table)
    out.print()
    for note in notes:
        out.print(Text(note, style="dim"))


def table_of(*columns: str, left: Iterable[int] = (0,)) -> Table:
    """Return an empty table in the common dress; columns other than those numbered in ``left`` are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    aligned = set(left)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in aligned else "right", overflow="fold")
    return table


def heading(title: str, about: str) -> RenderableType:
    """Return a line that says what follows, and about what it is."""
    return Padding(Text.assemble((title, "bold green"), f"  {about}"), (1, 0, 1, 0))


def _about(record: Record, what: bool = True, seeds: Sequence[int] = ()) -> str:
    choices = record.choices
    named = f"{choices.task} · {choices.model} · " if what else ""
    seed = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {choices.seed}"
    start = "" if choices.start is None else f" · from {choices.start.file}"
    epochs = f"{choices.training.epochs} epoch{'' if choices.training.epochs == 1 else 's'}"
    if choices.kind == "prune":
        tuned = f"fine-tuned for {epochs}" if choices.training.epochs else "not fine-tuned"
        return f"{named}{seed}{start} · dense: as it is; sparse: {tuned}"
    history = record.results.sparse_history if record.results is not None else []
    as_long = not history or history[-1].epoch == choices.training.epochs
    return f"{named}{seed}{start} · {epochs} dense, and {'the same' if as_long else f'{history[-1].epoch:.3g}'} sparse"


def _defined(names: Iterable[tuple[str, str]]) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column()
    for name, definition in names:
        lines.add_row(Text(name, style="dim bold"), Text(definition, style="dim"))
    return Padding(lines, (1, 0))


def _by_reason(left_out: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in left_out:
        grouped.setdefault(reason, []).append(name)
    return grouped
