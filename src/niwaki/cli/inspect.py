"""``niwaki inspect``: what a file holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niwaki.cli.options import PATH, json_option, print_json
from niwaki.errors import InputError

if TYPE_CHECKING:
    from niwaki.formats.description import Entry
    from niwaki.formats.files import Reader
    from niwaki.removed import Removed
    from niwaki.training.record import Record

DEFINITIONS = (
    "masked: elements that a mask takes out / elements; '-' without a mask.",
    "zeros: elements that equal zero / elements, the masked ones among them.",
    "stored: bytes of the values and positions in the file, without its header. bits: these bits / elements.",
    "bound: m k + log2 C(n, m) bits for m of n values of k bits each, which no lossless format goes below for every such choice; m are the"
    " values that are not masked, or without a mask those with any bit set (-0.0 has one).",
)


REMOVALS = 12
"""Sentences about what was taken out of the model that are printed."""


@dataclass(frozen=True)
class Row:
    """A tensor of a file, and how it is stored.

    Attributes:
        encoding: ``dense``, ``bitmap``, or ``= NAME`` for a further name of another tensor, which takes no bytes.
        masked: elements that the mask takes out; None without a mask.
        zeros: elements that equal zero, the masked ones among them.
        stored: bytes of its values and positions.
        bound: the least bytes that values and positions need.
    """

    name: str
    shape: list[int]
    dtype: str
    encoding: str
    elements: int
    masked: int | None
    zeros: int
    stored: int
    bound: float


@click.command(
    short_help="Look into a .safetensors file or a run.",
    epilog="\b\nExamples:\n  niwaki inspect runs/gmp\n  niwaki inspect model.safetensors --json",
)
@click.argument("path", type=PATH)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show the tensors of a .safetensors file, of this project or any other: shapes, types, encodings, sparsity and sizes.

    PATH is such a file, or the folder of a run, whose model is shown with a summary of the run. Every byte is read once, and
    check sums are checked where the file has them.
    """
    if path.is_file() and _is_json(path):
        raise InputError(f"{path}: this is JSON; give the run's folder, or a .safetensors file")
    file, record = _run(path) if path.is_dir() else (path, None)
    rows, metadata, removed = rows_of(file)
    if not as_json:
        _print(file, rows, metadata, removed, record)
        return
    print_json(
        {
            "file": str(file),
            "bytes": file.stat().st_size,
            "metadata": metadata,
            "tensors": [asdict(row) for row in rows],
            "total": asdict(_total("all tensors", rows)),
            "removed": None if removed is None else removed.model_dump(),
            "run": None if record is None else _summary(record),
        }
    )


def _run(folder: Path) -> tuple[Path, Record | None]:
    """Return the model's file of a run's folder, and the run's record if it has one."""
    from niwaki.training.record import FILE, MODEL_FILE, read

    if not (folder / MODEL_FILE).exists():
        raise InputError(f"{folder}: there is no {MODEL_FILE} in this folder; give a .safetensors file, or the folder of a finished run")
    return folder / MODEL_FILE, read(folder) if (folder / FILE).exists() else None


def _is_json(path: Path) -> bool:
    """Return whether a file begins like a JSON object. A .safetensors file begins with a small number in 64 bits, so with zeros in it."""
    with path.open("rb") as file:
        start = file.read(8)
    return start.startswith(b"{") and b"\0" not in start


def rows_of(path: Path) -> tuple[list[Row], dict[str, str], Removed | None]:
    """Return the tensors of a file, its metadata other than the description of encodings, and what had been taken out of the model.

    One tensor is in memory at a time.

    Raises:
        InputError: the file cannot be read, is damaged, or is not what the format allows.
    """
    from niwaki.formats.description import Description
    from niwaki.formats.files import reading

    with reading(path) as file:
        metadata = {name: text for name, text in file.metadata.items() if name != "niwaki"}
        if "niwaki" not in file.metadata:
            return [_plain(file, name) for name in file.names], metadata, None
        description = Description.from_text(file.metadata["niwaki"], path)
        rows = {name: _described(file, name, entry) for name, entry in description.tensors.items()}
        tied = [_alias(alias, rows[name]) for alias, name in description.tied.items()]
        known = {part for name, entry in description.tensors.items() for part in _parts(name, entry)}
        for name in file.names:
            if name not in known:
                raise InputError(f"{path}: {name!r} is not in the niwaki description")
        return [*rows.values(), *tied], metadata, description.removed or None


def _plain(file: Reader, name: str) -> Row:
    tensor = file.read(name)
    return _row(name, file.kind(name)[0], "dense", tensor, None, tensor.nbytes)


def _described(file: Reader, name: str, entry: Entry) -> Row:
    from niwaki.formats.container import load_entry
    from niwaki.formats.files import DTYPES

    tensor, active = load_entry(file, name, entry)
    kinds = [file.kind(part) for part in _parts(name, entry)]
    stored = sum(DTYPES[dtype].itemsize * prod(shape) for dtype, shape in kinds)
    return _row(name, entry.dtype, entry.encoding, tensor, active if entry.masked else None, stored)


def _parts(name: str, entry: Entry) -> list[str]:
    from niwaki.formats.description import PARTS, component

    return [component(name, entry.encoding, part) for part in PARTS[entry.encoding]]


def _row(name: str, dtype: str, encoding: str, tensor: Any, active: Any, stored: int) -> Row:
    from niwaki.formats.bitmap import has_bits
    from niwaki.masks import equals_zero
    from niwaki.metrics.storage import log2_choose

    elements, zeros = tensor.numel(), int(equals_zero(tensor).sum())
    kept = int((has_bits(tensor) if active is None else active).sum())
    bits = kept * 8 * tensor.element_size() + log2_choose(elements, kept)
    masked = None if active is None else elements - kept
    return Row(name, list(tensor.shape), dtype, encoding, elements, masked, zeros, stored, bits / 8)


def _alias(name: str, row: Row) -> Row:
    return Row(name, row.shape, row.dtype, f"= {row.name}", row.elements, row.masked, row.zeros, 0, 0.0)


def _total(name: str, rows: Sequence[Row]) -> Row:
    """Return the sums over tensors, each counted once."""
    once = [row for row in rows if not row.encoding.startswith("=")]
    masked = [row.masked for row in once if row.masked is not None]
    return Row(
        name,
        shape=[],
        dtype="",
        encoding="",
        elements=sum(row.elements for row in once),
        masked=sum(masked) if masked else None,
        zeros=sum(row.zeros for row in once),
        stored=sum(row.stored for row in once),
        bound=sum(row.bound for row in once),
    )


def _print(file: Path, rows: Sequence[Row], metadata: dict[str, str], removed: Removed | None, record: Record | None) -> None:
    from niwaki.cli.tables import print_rows, table_of
    from niwaki.metrics.units import show

    table = table_of("tensor", "shape", "type", "encoding", "masked", "zeros", "stored", "bits", "bound", left=(0, 1, 2, 3))
    for row in rows:
        table.add_row(*_cells(row))
    table.add_section()
    with_mask = [row for row in rows if row.masked is not None]
    if 0 < len(with_mask) < len(rows):
        table.add_row(*_cells(_total("masked tensors", with_mask)))
    table.add_row(*_cells(_total("all tensors", rows)), style="bold")
    notes = [f"{name}: {text:.200}" for name, text in metadata.items()]
    taken = [] if removed is None else removed.in_words()
    notes += [f"removed: {text}" for text in taken[:REMOVALS]]
    notes += [f"removed: {len(taken) - REMOVALS} more; --json shows all"] if len(taken) > REMOVALS else []
    print_rows(str(file), " · ".join([show(file.stat().st_size, "bytes"), *_about(record)]), table, [*notes, *DEFINITIONS])


def _cells(row: Row) -> list[str]:
    from niwaki.metrics.units import show

    def share(count: int | None) -> str:
        return "-" if count is None or not row.elements else show(count / row.elements, "share")

    shape = " × ".join(map(str, row.shape)) or "scalar" if row.encoding else f"{row.elements:,} elements"
    bits = f"{8 * row.stored / row.elements:.2f}" if row.stored else "-"
    sizes = [show(row.stored, "bytes"), bits, show(row.bound, "bytes")]
    return [row.name, shape, row.dtype, row.encoding, share(row.masked), share(row.zeros), *sizes]


def _about(record: Record | None) -> list[str]:
    if record is None:
        return []
    from niwaki.metrics.units import show

    choices = record.choices
    about = [choices.task, choices.model, choices.method_name, f"seed {choices.seed}"]
    if record.results is None:
        return [*about, "not finished"]
    headline = record.headline
    return [*about, f"{headline.name} {show(headline.sparse, headline.unit)}, dense {show(headline.dense, headline.unit)}"]


def _summary(record: Record) -> dict[str, Any]:
    data = record.model_dump(mode="json", include={"identity", "choices"})
    return data | {"measures": [] if record.results is None else [measure.model_dump(mode="json") for measure in record.results.measures]}
