"""How results look on a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from niwaki.catalogue import Method
    from niwaki.dry_run import Plan
    from niwaki.training.jobs import Job
    from niwaki.training.record import Measure, Record

WIDTH_WITHOUT_TERMINAL = 110


def console() -> Console:
    """Return the console of standard output; where that is no terminal, and nothing says otherwise, it is wide enough for the tables."""
    out = Console(highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = WIDTH_WITHOUT_TERMINAL
    return out


def show(value: float, unit: str) -> str:
    """Return a value with its unit, for people.

    >>> show(0.98028, "share"), show(202872, "bytes"), show(100400, "FLOPs"), show(50610, "weights")
    ('98.03 %', '203 kB', '100 k', '50,610')
    """
    if unit == "share":
        return f"{100 * value:.2f} %"
    if unit == "bytes":
        return _scaled(value) + "B"
    if unit == "FLOPs":
        return _scaled(value).rstrip()
    if unit == "weights":
        return f"{value:,.0f}"
    if unit == "seconds":
        return f"{value:.1f} s"
    return f"{value:.4f}"


def _scaled(value: float) -> str:
    """Return three significant digits and a decimal prefix, such as ``1.20 M``.

    >>> _scaled(1203200), _scaled(999.6), _scaled(999600), _scaled(12)
    ('1.20 M', '1.00 k', '1.00 M', '12 ')
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        digits = 0 if prefix == "" or value >= 99.95 else 1 if value >= 9.995 else 2
        if round(value, digits) < 1000 or prefix == "P":
            return f"{value:.{digits}f} {prefix}"
        value /= 1000
    raise AssertionError


def change(measure: Measure) -> str:
    """Say how the sparse model differs from the dense one: in points for shares, as a factor for costs."""
    if measure.unit == "share" and measure.higher_is_better is not None:
        return f"{100 * (measure.sparse - measure.dense):+.2f} points"
    if measure.unit in ("bytes", "FLOPs") and measure.sparse and measure.dense:
        factor = measure.dense / measure.sparse
        less, more = ("smaller", "larger") if measure.unit == "bytes" else ("fewer", "more")
        return f"{factor:.1f}× {less}" if factor >= 1 else f"{1 / factor:.1f}× {more}"
    return ""


def print_run(record: Record, folder: Path, again: bool) -> None:
    """Print the table of one finished run."""
    assert record.results is not None
    table = _table("", "dense", "sparse", "change")
    for measure in record.results.measures:
        row = [show(measure.dense, measure.unit), show(measure.sparse, measure.unit), change(measure)]
        table.add_row(measure.name, *row, style="bold" if measure is record.results.measures[0] else None)
    out = console()
    out.print(_heading(record.choices.method, _about(record)))
    out.print(table)
    out.print(_definitions(record.results.measures))
    for note in record.results.notes:
        out.print(Text(f"note: {note}", style="yellow"))
    files = f"{folder / record.results.model.file} (reloaded: the same numbers) and {folder / 'run.json'}"
    said = f"This run was finished before: nothing was computed again. Its files are {files}." if again else f"Saved {files}."
    out.print(Text(said))


def print_comparison(records: Sequence[tuple[Path, Record]]) -> None:
    """Print one table for each dense baseline: it, and a column for each run."""
    groups: dict[str, list[tuple[Path, Record]]] = {}
    for folder, record in records:
        choices = record.choices
        groups.setdefault(f"{choices.task}\n{choices.model}\n{choices.seed}\n{choices.training.model_dump_json()}", []).append(
            (folder, record)
        )
    out = console()
    for members in groups.values():
        runs = [record.results for _, record in members if record.results is not None]
        labels = _labels(members)
        table = _table("", "dense", *(header for label in labels for header in (label, "")))
        for first in runs[0].measures:
            found = [next((m for m in run.measures if m.name == first.name), None) for run in runs]
            style = "bold" if first is runs[0].measures[0] else None
            table.add_row(first.name, show(first.dense, first.unit), *(cell for measure in found for cell in _cells(measure)), style=style)
        choices = members[0][1].choices
        out.print(_heading(f"{choices.task} · {choices.model}", _about(members[0][1], which=False)))
        out.print(table)
    measures = next(record.results.measures for _, record in records if record.results is not None)
    out.print(_definitions(measures))


def print_plan(job: Job, plan: Plan) -> None:
    """Print what a recipe would do: which tensor, how much, when and why, and what is left out and why."""
    table = _table("tensor", "shape", "pieces", "kept", "sparsity", "why", left=(0, 1, 5))
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
    out = console()
    out.print(_heading(job.method, f"dry run · {job.task.name} · {job.model} · {job.total_steps:,} steps in {job.training.epochs} epochs"))
    out.print(table)
    out.print(Text.assemble("\n", ("masks are updated: ", "bold"), plan.when()))
    for reason, names in _by_reason((one.name, one.reason) for one in plan.left_out).items():
        out.print(Text.assemble((f"left dense, {reason}: ", "bold"), ", ".join(names)))
    words = Table.grid(padding=(0, 2))
    for line in job.recipe.describe():
        slot, _, rest = line.partition(": ")
        words.add_row(Text(slot, style="bold dim"), Text(rest, style="dim"))
    out.print(Padding(words, (1, 0)))
    for note in plan.notes:
        out.print(Text(f"note: {note}", style="yellow"))
    out.print(Text("Nothing was trained or written."))


def print_methods(methods: Sequence[Method]) -> None:
    """Print the catalogue as the survey's table: its columns in its codes, and what the codes mean."""
    out = console()
    columns = [column for column, _ in methods[0].columns if column not in ("what", "regularization") or out.width >= 100]
    shown = ["reg." if column == "regularization" else column for column in columns]
    table = _table("method", "year", *shown, "fidelity", left=range(9))
    for place in table.columns:
        place.no_wrap = place.header != "budget"
        place.min_width = 6
    meanings: dict[str, dict[str, str]] = {column: {} for column in columns}
    for method in methods:
        codes = dict(method.columns)
        table.add_row(Text(method.name, style="bold"), str(method.year), *(", ".join(codes[c]) or "-" for c in columns), method.fidelity)
        for column in columns:
            for code in codes[column]:
                meanings[column][code] = method.columns.model_copy(update={column: (code,)}).in_words()[column]
    legend = Table.grid(padding=(0, 2))
    for column, words in meanings.items():
        legend.add_row(
            Text(column, style="bold dim"), Text("; ".join(f"{code} {word}" for code, word in sorted(words.items())), style="dim")
        )
    out.print(_heading(f"{len(methods)} methods", "with the columns of the survey's method table (Hoefler et al. 2021)"))
    out.print(table)
    out.print(Padding(legend, (1, 0)))
    strength = [method.name for method in methods if not method.takes_sparsity]
    if strength:
        out.print(
            f"The strength of {', '.join(strength)} decides how sparse the model gets: --sparsity needs --cut, a final exact cut, there."
        )
    out.print("One method with its source, what differs from it, and its recipe: niwaki methods NAME")


def print_method(method: Method) -> None:
    """Print one method: source, place in the survey, what differs, recipe."""
    out = console()
    out.print(_heading(method.name, f"{method.title} · survey section {method.section}" + (f", row {method.row}" if method.row else "")))
    out.print(Text(str(method.citation)))
    out.print()
    words = Table.grid(padding=(0, 2))
    for column, value in method.columns.in_words().items():
        words.add_row(Text(column, style="bold"), value)
    words.add_row(Text("fidelity", style="bold"), method.fidelity)
    out.print(words)
    out.print()
    if method.differs:
        out.print(Text("differs", style="bold"))
        items = Table.grid(padding=(0, 1))
        for line in method.differs:
            items.add_row("-", Text(line))
        out.print(Padding(items, (0, 0, 0, 2)))
        out.print()
    out.print(Text("recipe", style="bold"))
    out.print(Padding(Syntax(method.recipe.to_yaml().rstrip(), "yaml", theme="ansi_dark", background_color="default"), (0, 0, 0, 2)))
    equations = [(slot, type(c)) for slot, c in method.recipe.components() if slot in method.recipe.given and type(c).equation]
    if equations:
        out.print()
        out.print(Text("equations", style="bold"))
        for slot, component in equations:
            out.print(Padding(Text.assemble((f"{slot} {component.name}: ", "bold dim"), component.equation), (0, 0, 0, 2)))


def print_rows(title: str, about: str, table: Table, notes: Iterable[str] = ()) -> None:
    """Print any table in the same dress."""
    out = console()
    out.print(_heading(title, about))
    out.print(table)
    out.print()
    for note in notes:
        out.print(Text(note, style="dim"))


def _table(*columns: str, left: Iterable[int] = (0,)) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    aligned = set(left)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in aligned else "right", overflow="fold")
    return table


def _heading(title: str, about: str) -> RenderableType:
    return Padding(Text.assemble((title, "bold green"), f"  {about}"), (1, 0, 1, 0))


def _about(record: Record, which: bool = True) -> str:
    choices = record.choices
    what = f"{choices.task} · {choices.model} · " if which else ""
    return f"{what}seed {choices.seed} · {choices.training.epochs} epochs dense, and the same sparse"


def _definitions(measures: Iterable[Measure]) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column()
    for measure in measures:
        lines.add_row(Text(measure.name, style="dim bold"), Text(measure.definition, style="dim"))
    return Group(Text(), lines, Text())


def _cells(measure: Measure | None) -> tuple[Text, Text]:
    """Return the sparse model's number, and in short how it differs from the dense one's."""
    if measure is None:
        return Text("-"), Text()
    return Text(show(measure.sparse, measure.unit)), Text(change(measure).partition(" ")[0], style="dim")


def _labels(members: Sequence[tuple[Path, Record]]) -> list[str]:
    names = [record.choices.method for _, record in members]
    return names if len(set(names)) == len(names) else [str(folder) for folder, _ in members]


def _by_reason(left_out: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in left_out:
        grouped.setdefault(reason, []).append(name)
    return grouped
