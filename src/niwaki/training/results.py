"""What a finished run found: everything that ``run.json`` says of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from niwaki.errors import InputError, NiwakiError
from niwaki.formats import load, save
from niwaki.masks import canonical_name
from niwaki.measurement import Measurement, measure
from niwaki.metrics import training_flops
from niwaki.metrics.sizes import dense_bytes
from niwaki.structured.pretrained import is_pretrained
from niwaki.tasks import Data, Task, huggingface
from niwaki.training.baseline import Baseline
from niwaki.training.folder import sha256
from niwaki.training.loop import Evaluation, on, targets
from niwaki.training.record import MODEL_FILE, Class, Layer, Measure, Predictions, Results, Storage, Stored
from niwaki.training.state import Trained
from niwaki.training.trainer import Trainer

PRETRAINED = "pretrained"
"""Folder of a run for a Hugging Face model that became smaller."""

TIME = "wall time of the training with an evaluation after each epoch, over all sittings; varies"


def results(
    trainer: Trainer, trained: Trained, dense: nn.Module, baseline: Baseline | None, plain: nn.Module, start: nn.Module | None, folder: Path
) -> Results:
    """Save the sparse model into the folder, load it again, and return everything about it.

    Args:
        trainer: with the trained sparse model.
        trained: what its training left.
        dense: the trained dense model.
        baseline: what is known of its training; None when there was none.
        plain: a model of the original shape with other weights, for the file to be loaded into.
        start: the model with the weights that the run started from, or None.
        folder: of the run.

    Raises:
        NiwakiError: the reloaded model differs.
    """
    task, data, sparse, masks = trainer.task, trainer.data, trainer.model, trained.masks
    path = folder / MODEL_FILE
    save(sparse, path, masks=masks, removed=trained.removed)
    with_classes = bool(data.classes)
    before, found = (trainer.evaluate(model, with_classes) for model in (dense, sparse))
    _check_stored(path, plain, trainer, trained, found)
    is_share = "accuracy" in task.metrics and task.metrics["accuracy"].percent
    accuracy = [one.metrics["accuracy"] if is_share else None for one in (found, before)]
    example = on(trainer.device, tuple(task.example(data)))
    measured = measure(sparse, example, masks, dense=dense, accuracy=accuracy[0], dense_accuracy=accuracy[1])
    shapes = {canonical_name(name): list(parameter.shape) for name, parameter in sparse.named_parameters()}
    return Results(
        measures=[
            *_quality(task, data, before, found),
            *_costs(measured, dense_bytes(dense), path.stat().st_size),
            *_training(trained, baseline),
        ],
        start_metrics=None if start is None else trainer.evaluate(start).metrics,
        layers=[
            Layer(
                name=one.name,
                shape=shapes.get(one.name, [one.elements]),
                target=one.name in masks,
                elements=one.elements,
                active=one.active,
                dense_flops=one.dense,
                sparse_flops=one.sparse,
            )
            for one in measured.layers
        ],
        storage=[Storage(**asdict(row)) for row in measured.storage],
        classes=_classes(data, before, found),
        predictions=_predictions(data, before, found),
        dense_history=[] if baseline is None else baseline.history,
        sparse_history=trained.history,
        stages=trained.stages,
        masks_hash=masks.hash(),
        removed=trained.removed,
        notes=[*trained.notes, *_pretrained(trainer, trained, example, folder)],
        model=Stored(file=path.name, bytes=path.stat().st_size, sha256=sha256(path)),
    )


def _check_stored(path: Path, plain: nn.Module, trainer: Trainer, trained: Trained, found: Evaluation) -> None:
    """Load the file into a model with other weights, and require the same masks and metrics."""
    loaded = load(path, model=plain)
    again = trainer.evaluate(plain).metrics
    if loaded.masks != trained.masks or again != found.metrics:
        raise NiwakiError(f"{path}: the reloaded model differs from the trained one: {again} instead of {found.metrics}")


def _pretrained(trainer: Trainer, trained: Trained, example: tuple[Any, ...], folder: Path) -> list[str]:
    """Write a Hugging Face model from which something was removed as the library does; return what became of it, in a sentence."""
    if not (trained.removed and is_pretrained(trainer.model)):
        return []
    name, _ = trainer.task.model()
    try:
        huggingface.save(trainer.model, folder / PRETRAINED, example, name)
    except InputError as error:
        return [f"no folder {PRETRAINED}/ for from_pretrained was written: {error}"]
    return [f"{PRETRAINED}/ has the smaller model for from_pretrained"]


def _quality(task: Task, data: Data, dense: Evaluation, sparse: Evaluation) -> list[Measure]:
    return [
        Measure(
            name=name,
            unit="share" if metric.percent else "number",
            definition=f"{metric.definition} ({len(data.test):,} test examples)",
            higher_is_better=metric.higher_is_better,
            dense=dense.metrics[name],
            sparse=sparse.metrics[name],
        )
        for name, metric in task.metrics.items()
    ]


def _costs(measured: Measurement, dense_file: int, file: int) -> list[Measure]:
    """Return what was measured of the models, without what the record says elsewhere: quality, and bits by format."""
    rows = [
        Measure(
            name=number.name,
            unit=number.unit,
            definition=number.definition,
            higher_is_better=number.higher_is_better,
            dense=number.dense,
            sparse=number.value,
        )
        for number in measured.numbers
        if number.name not in ("accuracy", "dense file size") and not number.name.startswith("bits as ")
    ]
    definition = "dense: a plain safetensors file; sparse: model.safetensors"
    return [*rows, Measure(name="file size", unit="bytes", definition=definition, higher_is_better=False, dense=dense_file, sparse=file)]


def _training(trained: Trained, baseline: Baseline | None) -> list[Measure]:
    costs = (
        ("training FLOPs", "number", training_flops.DEFINITION, 1.0, trained.flops_multiplier),
        ("training time", "seconds", TIME, 0.0 if baseline is None else baseline.seconds, trained.seconds),
    )
    return [
        Measure(name=name, unit=unit, definition=words, higher_is_better=False, dense=None if baseline is None else dense, sparse=sparse)
        for name, unit, words, dense, sparse in costs
    ]


def _classes(data: Data, dense: Evaluation, sparse: Evaluation) -> list[Class]:
    if dense.classes is None or sparse.classes is None:
        return []
    true = targets(data.test)
    rows = []
    for number, name in enumerate(data.classes):
        here = true == number
        count = int(here.sum())
        if count:
            recalls = [float((found[here] == number).to(torch.float64).mean()) for found in (dense.classes, sparse.classes)]
            rows.append(Class(name=name, examples=count, dense_recall=recalls[0], sparse_recall=recalls[1]))
    return rows


def _predictions(data: Data, dense: Evaluation, sparse: Evaluation) -> Predictions | None:
    if dense.classes is None or sparse.classes is None:
        return None
    packed = [Predictions.pack(numbers.numpy()) for numbers in (targets(data.test), dense.classes, sparse.classes)]
    return Predictions(true=packed[0], dense=packed[1], sparse=packed[2])
