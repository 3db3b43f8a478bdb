"""The main job: a dense baseline, the same training with a sparsifier, and what came of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from niwaki.dry_run import Plan, plan
from niwaki.errors import NiwakiError
from niwaki.formats import load, save
from niwaki.masks import Masks, sparsity_of
from niwaki.metrics import flops, sizes
from niwaki.recipe import Recipe
from niwaki.sparsifier import Sparsifier
from niwaki.tasks import Data, Task, Training
from niwaki.training.environment import environment
from niwaki.training.folder import finished_before, opened, sha256
from niwaki.training.loop import batches, evaluate, fit, steps_per_epoch
from niwaki.training.record import MODEL_FILE, Choices, Epoch, Layer, Measure, Record, Results, Stored, write

STATISTICS_BATCHES = 16
"""Batches that a recipe gets for statistics before the first step (a SNIP score, say)."""

Progress = Callable[[str, int, int, Epoch | None], None]
"""Called with ``dense`` or ``sparse``, the steps done, the steps of that training, and the epoch that just ended, if one did."""


@dataclass(frozen=True)
class Job:
    """A task, a model, a recipe and a seed: all that a run needs, checked."""

    task: Task
    data: Data
    model: str
    method: str
    recipe: Recipe
    training: Training
    seed: int

    @property
    def choices(self) -> Choices:
        """What determines the run, as it is recorded."""
        return Choices(
            task=self.task.name,
            model=self.model,
            method=self.method,
            recipe=self.recipe.to_data(defaults=True),
            seed=self.seed,
            training=self.training,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return steps_per_epoch(self.data, self.training)

    @property
    def total_steps(self) -> int:
        """Batches of each of the two trainings."""
        return self.steps_per_epoch * self.training.epochs

    def plan(self) -> Plan:
        """Return what the recipe would do, without doing it."""
        return plan(self.build(), self.recipe, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)

    def build(self) -> nn.Module:
        """Return the model with the initial weights of the seed."""
        return self.task.build(self.model, self.seed)

    def sparsifier(self, model: nn.Module) -> Sparsifier:
        """Return the sparsifier of this run for a model that :meth:`build` made."""
        return Sparsifier(
            model,
            self.recipe,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            seed=self.seed,
            data=list(islice(batches(self.data.train, self.training.batch_size, self.seed, epoch=0), STATISTICS_BATCHES)),
            loss=self.task.loss,
        )


def job(task: Task, recipe: Recipe, *, method: str, model: str | None = None, seed: int = 0, epochs: int | None = None) -> Job:
    """Bring together what a run needs.

    Args:
        task: what to train.
        recipe: how to sparsify.
        method: what people call the recipe.
        model: one of the task's models; by default its first.
        seed: of the initial weights, the order of examples and the sparsifier.
        epochs: length of each of the two trainings; by default the model's own.

    Raises:
        InputError: an unknown model, data that cannot be had, or a recipe that this version cannot run.
    """
    recipe.require_complete()
    name, chosen = task.model(model)
    training = chosen.training if epochs is None else chosen.training.model_copy(update={"epochs": epochs})
    return Job(task, task.data(), name, method, recipe, training, seed)


def run(job: Job, folder: Path, progress: Progress | None = None) -> Record:
    """Train dense, train sparse, evaluate, save into the folder, and return the record; a finished run is read, not repeated.

    Both trainings start from the same weights and see the same batches. The stored model is loaded into a fresh one again and must
    have the same metrics.

    Raises:
        InputError: the recipe does not fit the model, or the folder cannot take the run; nothing has been written then.
        NiwakiError: the run failed; what it wrote is taken away again.
    """
    choices = job.choices
    done = finished_before(folder, choices)
    if done is not None:
        return done
    with threads(job.training.threads), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"niwaki\.")  # the sparsifier's sentences: they are in the record
        dense, sparse = job.build(), job.build()
        sparsifier = job.sparsifier(sparse)
        record = Record(identity=choices.identity(), choices=choices, environment=environment())
        with opened(folder, record):
            record = record.model_copy(update={"results": _train(job, dense, sparse, sparsifier, folder / MODEL_FILE, progress)})
            write(record, folder)
    return record


def _train(job: Job, dense: nn.Module, sparse: nn.Module, sparsifier: Sparsifier, path: Path, progress: Progress | None) -> Results:
    def telling(phase: str) -> Callable[[int, int, Epoch | None], None] | None:
        return None if progress is None else lambda *what: progress(phase, *what)

    arguments = (job.task, job.data, job.training, job.seed)
    begin = time.perf_counter()
    dense_history = fit(dense, *arguments, progress=telling("dense"))
    middle = time.perf_counter()
    sparse_history = fit(
        sparse,
        *arguments,
        attach=lambda optimizer, scheduler: sparsifier.attach(optimizer, scheduler=scheduler),
        progress=telling("sparse"),
    )
    sparsifier.finalize()
    seconds = (middle - begin, time.perf_counter() - middle)
    masks = sparsifier.masks
    save(sparse, path, masks=masks)
    found = evaluate(sparse, job.task, job.data.test)
    _check_stored(job, path, masks, found)
    example = job.task.example(job.data)
    return Results(
        measures=_measures(job, dense, sparse, masks, found, path.stat().st_size, seconds),
        layers=_layers(sparse, example, masks),
        dense_history=dense_history,
        sparse_history=sparse_history,
        masks_hash=masks.hash(),
        notes=list(sparsifier.notes),
        model=Stored(file=path.name, bytes=path.stat().st_size, sha256=sha256(path)),
    )


def _check_stored(job: Job, path: Path, masks: Masks, found: dict[str, float]) -> None:
    """Load the file into a model with other weights, and require the same masks and metrics."""
    fresh = job.task.build(job.model, job.seed + 1)
    loaded = load(path, model=fresh)
    again = evaluate(fresh, job.task, job.data.test)
    if loaded.masks != masks or again != found:
        raise NiwakiError(f"{path}: the reloaded model differs from the trained one: {again} instead of {found}")


def _measures(
    job: Job, dense: nn.Module, sparse: nn.Module, masks: Masks, found: dict[str, float], stored: int, seconds: tuple[float, float]
) -> list[Measure]:
    before = evaluate(dense, job.task, job.data.test)
    count = sparsity_of(sparse, masks)
    operations = flops.forward_flops(sparse, job.task.example(job.data), masks=masks)
    rows = [
        Measure(
            name=name,
            unit="share" if metric.percent else "number",
            definition=f"{metric.definition} ({len(job.data.test):,} test examples)",
            higher_is_better=metric.higher_is_better,
            dense=before[name],
            sparse=found[name],
        )
        for name, metric in job.task.metrics.items()
    ]

    def add(name: str, unit: str, definition: str, better: bool | None, dense: float, sparse: float) -> None:
        rows.append(Measure(name=name, unit=unit, definition=definition, higher_is_better=better, dense=dense, sparse=sparse))

    add(
        "sparsity of the targets",
        "share",
        "masked weights / weights of the tensors that the recipe acts on",
        None,
        0,
        count.of_targets,
    )
    add("sparsity of all parameters", "share", "masked weights / elements of all parameters", None, 0, count.of_parameters)
    add(
        "active parameters",
        "weights",
        "elements of all parameters that are not masked",
        None,
        count.parameters,
        count.parameters - count.masked,
    )
    add(
        "zeros among active weights",
        "weights",
        "weights of the targets that are zero and not masked",
        None,
        _zeros(dense, masks),
        count.active_zeros,
    )
    add("file size", "bytes", "dense: a plain safetensors file; sparse: model.safetensors", False, sizes.dense_bytes(dense), stored)
    add("forward FLOPs", "FLOPs", flops.DEFINITION, False, operations.dense, operations.sparse)
    add("training time", "seconds", "wall time of the training with an evaluation after each epoch; varies", False, *seconds)
    return rows


def _zeros(dense: nn.Module, masks: Masks) -> int:
    everything = Masks({name: torch.ones_like(mask) for name, mask in masks.items()})
    return sparsity_of(dense, everything).active_zeros


def _layers(sparse: nn.Module, example: tuple[Tensor, ...], masks: Masks) -> list[Layer]:
    counted = flops.forward_flops(sparse, example, masks=masks).layers
    return [
        Layer(
            name=one.name,
            target=one.name in masks,
            elements=one.elements,
            active=one.active,
            dense_flops=one.dense,
            sparse_flops=one.sparse,
        )
        for one in counted
    ]


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch use this many CPU threads inside the block; None leaves it as it is."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
