"""The report of one run, from its record alone."""

from __future__ import annotations

import json
from collections.abc import Sequence

from niwaki.errors import InputError
from niwaki.metrics.units import show
from niwaki.recipe import Recipe
from niwaki.recipe import text as yaml
from niwaki.removed import ADDED
from niwaki.report import bars, figures, groups
from niwaki.report.page import (
    Cell,
    Content,
    Picture,
    beside,
    code,
    count,
    group,
    headline,
    number,
    page,
    paragraph,
    pictures,
    section,
    sentences,
    table,
)
from niwaki.report.words import change, points
from niwaki.training.record import Epoch, Layer, Measure, Predictions, Record, Results

BIG = (groups.SPARSITY, groups.FILE_SIZE, groups.FLOPS)
"""Measures that stand on top, after the headline metric."""

SIZE = (
    "What the sparse model's weights need in each storage format. The entropy bound is the least that a format needs if it can hold every"
    " pattern of as many active weights; a format for regular patterns alone can need less."
)


def run_report(record: Record) -> str:
    """Return one self-contained HTML document about a finished run; the same record gives the same text.

    Raises:
        InputError: the run has not finished.
    """
    found = groups.results("run.json", record)
    choices = record.choices
    what = "trained dense and sparse" if choices.kind == "run" else "a trained model, pruned"
    return page(
        f"{choices.method_name} on {choices.task} · {choices.model}",
        f"{what} · seed {choices.seed} · run {record.identity[:12]}",
        headline(_big(record)),
        section("Numbers", _numbers(found.measures), _start(found), about="What was measured on the dense and on the sparse model."),
        section("Over time", *_over_time(record, found)),
        section("Layers", *_layers(found.layers), about="Where the active weights are. Tensors that are no targets stay dense."),
        section("Size", *_storage(found), about=SIZE),
        section("Speed", *_latency(found.measures)),
        section("Classes", *_classes(found), about="Recall is the share of a class's test examples that a model recognizes."),
        section("Recipe", *_recipe(record), about="The method as data, and in words."),
        section("What was done", _stages(found), _notes(found), _choices(record), _environment(record), _files(found)),
    )  # fmt: skip


def _big(record: Record) -> list[tuple[str, str, str, str]]:
    first = record.headline
    rows = []
    for measure in [first, *(one for name in BIG if (one := groups.find(record, name)) is not None)]:
        aside = f"{show(measure.dense, measure.unit)} dense" if measure.name != groups.SPARSITY else "of the weights it acts on are masked"
        rows.append(
            (measure.name, show(measure.sparse, measure.unit), "; ".join(filter(None, (aside, change(measure)))), measure.definition)
        )
    return rows


def _numbers(measures: Sequence[Measure]) -> str:
    rows = [(m.name, number(m.dense, m.unit), number(m.sparse, m.unit), change(m), m.unit, m.definition) for m in measures]
    return table("numbers", "Dense and sparse", ("measure", "dense", "sparse", "change", "unit", "what it is"), rows)


def _start(found: Results) -> str:
    """Tell the metrics of the weights that the run started from."""
    units = {measure.name: measure.unit for measure in found.measures}
    said = (f"{name} {show(value, units.get(name, 'number'))}" for name, value in (found.start_metrics or {}).items())
    return paragraph(f"The weights that it started from, before any training: {', '.join(said)}.") if found.start_metrics else ""


def _over_time(record: Record, found: Results) -> list[str]:
    dense, sparse, stages = found.dense_history, found.sparse_history, found.stages
    last = max([*dense, *sparse], key=lambda epoch: epoch.step, default=None)
    if last is None or last.step == 0:
        return []
    scale = last.epoch / last.step
    first = record.headline
    known = all(first.name in epoch.metrics for epoch in (*dense, *sparse))
    parted = " Dotted lines part the stages of the recipe." if sum(stage.end > stage.begin for stage in stages) > 1 else ""
    drawn = [
        Picture(
            figures.over_time(dense, sparse, first.name, first.unit, stages, scale),
            f"{first.name.capitalize()} on the test examples after each epoch, and the sparsity then.{parted}",
            f"Curves of {first.name} over epochs, ending at {show(first.dense, first.unit)} dense and"
            f" {show(first.sparse, first.unit)} sparse; below them the sparsity.",
        )
        if known
        else None,
        Picture(
            figures.losses(dense, sparse, stages, scale),
            "Mean loss of the training batches of each epoch, while the model learned from them.",
            "Curves of the training loss over epochs, dense and sparse.",
        ),
    ]
    if any(epoch.dynamics is not None for epoch in sparse):
        drawn += [
            Picture(
                figures.movement(sparse, stages, scale),
                "Weights that became active (grown) and inactive (pruned) in each epoch.",
                "Bars over epochs: weights grown upwards, weights pruned downwards.",
            ),
            Picture(
                figures.stability(sparse, stages, scale),
                "Overlap: of the weights active in one of two neighbouring epochs, the share active in both. Ever active: weights that"
                " were active at some time. Active: now.",
                "Curves of mask overlap, ever active share and active share over epochs.",
            ),
        ]
    return [pictures(*drawn), _history("dense", dense), _history("sparse", sparse)]


def _history(which: str, epochs: Sequence[Epoch]) -> str:
    metrics = list(dict.fromkeys(name for epoch in epochs for name in epoch.metrics))
    columns = (
        "epoch",
        "step",
        "stage",
        "training loss",
        "learning rate",
        *metrics,
        groups.SPARSITY,
        "overlap",
        "pruned",
        "grown",
        "ever active",
    )
    rows: list[list[Content]] = []
    for epoch in epochs:
        d = epoch.dynamics
        moved = (None, None, None, None) if d is None else (d.overlap, d.pruned, d.grown, d.ever_active)
        rows.append(
            [
                Cell(f"{epoch.epoch:.4g}", epoch.epoch),
                count(epoch.step),
                count(epoch.stage),
                number(epoch.train_loss),
                Cell(f"{epoch.learning_rate:.4g}", epoch.learning_rate),
                *(number(epoch.metrics.get(name)) for name in metrics),
                number(epoch.sparsity, "share"),
                *(number(value, unit) for value, unit in zip(moved, ("number", "weights", "weights", "share"), strict=True)),
            ]
        )
    return table(f"history-{which}", f"Every epoch of the {which} training", columns, rows, folded=True)


def _layers(layers: Sequence[Layer]) -> list[str]:
    targets = [layer for layer in layers if layer.target]
    largest = sorted(sorted(range(len(targets)), key=lambda i: -targets[i].elements)[: bars.MOST_BARS])
    shown = [targets[i] for i in largest]
    which = "each target" if len(shown) == len(targets) else f"the {len(shown)} largest of {len(targets)} targets"
    drawn = (
        [
            Picture(bars.active_shares(shown), f"Share of the weights of {which} that is active.", f"Bars: active share of {which}."),
            Picture(bars.layer_sizes(shown), f"Number of weights of {which}.", f"Bars: active weights and all weights of {which}."),
            Picture(
                bars.layer_flops(shown),
                f"FLOPs of a forward pass on one example in {which} (a multiply-add is 2).",
                f"Bars: sparse and dense FLOPs of {which}.",
            ),
        ]
        if shown
        else []
    )
    rows = [
        (
            layer.name,
            " × ".join(map(str, layer.shape)),
            "target" if layer.target else "stays dense",
            number(layer.elements, "weights"),
            number(layer.active, "weights"),
            number(layer.active / layer.elements if layer.elements else None, "share"),
            number(layer.dense_flops, "FLOPs"),
            number(layer.sparse_flops, "FLOPs"),
        )
        for layer in layers
    ]
    columns = ("tensor", "shape", "role", "weights", "active", "active share", "dense FLOPs", "sparse FLOPs")
    return [pictures(*drawn), table("layers", "Every weight tensor", columns, rows, folded=len(rows) > 12)]


def _storage(found: Results) -> list[str]:
    bound = next((row for row in found.storage if row.format == "entropy bound"), None)
    formats = [row for row in found.storage if row is not bound]
    drawn = (
        Picture(
            bars.storage_sizes(formats, bound, found.model.bytes),
            "All parameters in each format; 'this file' is model.safetensors as it was written, names and buffers included.",
            f"Bars: bytes by format; the smallest is {min(formats, key=lambda row: row.bits).format}.",
        )
        if formats
        else None
    )
    dense = next((row.bits for row in formats if row.format == "dense"), None)
    rows = [
        (
            row.format,
            number(row.bits / 8, "bytes"),
            Cell(show(row.position_bits / 8, "bytes"), row.position_bits / 8),
            number(row.bits / bound.bits, "number") if bound is not None and bound.bits else number(None),
            Cell(f"{dense / row.bits:.2f}×", dense / row.bits) if dense and row.bits else number(None),
            row.definition,
        )
        for row in sorted(found.storage, key=lambda row: row.bits)
    ]
    columns = ("format", "size", "of it positions", "size / entropy bound", "dense size / size", "what it is")
    return [beside(pictures(drawn), table("storage", "Size by format", columns, rows))]


def _latency(measures: Sequence[Measure]) -> list[str]:
    timed = [measure for measure in measures if measure.unit == "milliseconds"]
    if not timed:
        return []
    drawn = Picture(
        bars.times([(m.name, m.dense, m.sparse) for m in timed], "milliseconds"),
        "Measured on the machine named below; other machines differ.",
        "Bars: " + "; ".join(f"{m.name} {show(m.dense, m.unit)} dense, {show(m.sparse, m.unit)} sparse" for m in timed) + ".",
    )
    return [pictures(drawn)]


def _classes(found: Results) -> list[str]:
    if not found.classes:
        return []
    total = sum(one.examples for one in found.classes) or 1
    overall = sum(one.examples * (one.sparse_recall - one.dense_recall) for one in found.classes) / total
    drawn = Picture(
        bars.recall_changes(found.classes[: bars.MOST_BARS], overall),
        "Change of recall, sparse minus dense. One run cannot tell damage from chance: compare several seeds."
        + (f" The first {bars.MOST_BARS} of {len(found.classes)} classes." if len(found.classes) > bars.MOST_BARS else ""),
        "Bars: " + "; ".join(f"{one.name} {points(one.sparse_recall - one.dense_recall)}" for one in found.classes[: bars.MOST_BARS]) + ".",
    )
    rows = [
        (
            one.name,
            count(one.examples),
            number(one.dense_recall, "share"),
            number(one.sparse_recall, "share"),
            Cell(points(one.sparse_recall - one.dense_recall), one.sparse_recall - one.dense_recall),
            Cell(points(one.sparse_recall - one.dense_recall - overall), one.sparse_recall - one.dense_recall - overall),
        )
        for one in found.classes
    ]
    columns = ("class", "examples", "dense recall", "sparse recall", "change", "change beyond that of all classes")
    return [
        beside(
            pictures(drawn),
            table("classes", "Recall by class", columns, rows, folded=len(rows) > 20),
            _disagreement(found.predictions) if found.predictions is not None else "",
        )
    ]


def _disagreement(predictions: Predictions) -> str:
    true, dense, sparse = (Predictions.unpack(text) for text in (predictions.true, predictions.dense, predictions.sparse))
    kinds = [
        ("right in both", (dense == true) & (sparse == true)),
        ("right dense, wrong sparse", (dense == true) & (sparse != true)),
        ("wrong dense, right sparse", (dense != true) & (sparse == true)),
        ("wrong in both, the same class", (dense != true) & (sparse == dense)),
        ("wrong in both, different classes", (dense != true) & (sparse != true) & (sparse != dense)),
    ]
    rows = [(name, count(int(which.sum())), number(float(which.mean()) if len(true) else None, "share")) for name, which in kinds]
    return table("agreement", "Where the two models agree", ("test examples", "number", "share"), rows)


def _recipe(record: Record) -> list[str]:
    data = record.choices.recipe
    try:
        words = sentences(Recipe.from_data(data).describe())
    except InputError as error:  # a component of the user's own, say, which is not registered where the report is made
        words = paragraph(f"This version cannot put the recipe into words: {error}")
    return [code(yaml.write(data)), words]


def _stages(found: Results) -> str:
    rows = [
        (
            count(stage.number),
            stage.says,
            count(stage.begin),
            count(stage.end),
            number(stage.sparsity, "share"),
        )
        for stage in found.stages
    ]
    return table("stages", "Stages, in optimizer steps", ("stage", "what it did", "from step", "to step", "sparsity after it"), rows)


def _notes(found: Results) -> str:
    return group("Notes", sentences(found.notes))


def _choices(record: Record) -> str:
    choices = record.choices
    said = choices.model_dump(mode="json", exclude={"recipe", "training", "start"})
    rows = [(name.replace("_", " "), _plain(value)) for name, value in said.items() if value is not None]
    if choices.start is not None:
        rows.append(("starts from", f"{choices.start.file} (SHA-256 {choices.start.sha256})"))
    rows += [(name.replace("_", " "), _plain(value)) for name, value in choices.training.model_dump(mode="json").items()]
    rows.append(("identity", record.identity))
    return table("choices", "What determines the numbers", ("choice", "value"), rows)


def _environment(record: Record) -> str:
    rows = [(name.replace("_", " "), _plain(value)) for name, value in record.environment.items()]
    return table("environment", "What it ran on", ("what", "value"), rows)


def _files(found: Results) -> str:
    rows = [(found.model.file, number(found.model.bytes, "bytes"), found.model.sha256), ("masks", number(None), found.masks_hash)]
    removed = [
        (f"{name}, dimension {dimension}", _kept(kept), " ".join(map(str, kept)))
        for name, dimensions in found.removed.tensors.items()
        for dimension, kept in dimensions.items()
    ]
    removed += [(name, Cell(f"{len(kept):,} kept", len(kept)), " ".join(map(str, kept))) for name, kept in found.removed.layers.items()]
    removed += [(path, Cell("a number", 0), str(value)) for path, value in found.removed.attributes.items()]
    return table("files", "Files and hashes", ("what", "size", "SHA-256"), rows) + table(
        "removed",
        "What was taken out of the model, or added",
        ("what", "entries or blocks", "indices that were kept (-1: added), or the value"),
        removed,
        folded=True,
    )


def _kept(indices: Sequence[int]) -> Cell:
    added = indices.count(ADDED)
    text = f"{len(indices) - added:,} kept" + (f", {added:,} added" if added else "")
    return Cell(text, len(indices))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, sort_keys=True)
