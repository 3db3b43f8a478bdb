"""The main job: a dense baseline, the same training with a sparsifier, and what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from niwaki.component import one_line
from niwaki.dry_run import Plan, plan, statistics_bytes
from niwaki.errors import InputError
from niwaki.formats import load
from niwaki.recipe import Prune, Recipe
from niwaki.recipe.stages import Leaf, unroll, validates
from niwaki.schedule import OneShot
from niwaki.tasks import Data, Task, Training
from niwaki.training import processes
from niwaki.training.baseline import CHECKPOINT_FILE, Sitting, dense, saying_what_is_left, train
from niwaki.training.environment import environment
from niwaki.training.folder import finished_before, opened, sha256
from niwaki.training.loop import hold_out, on, steps_per_epoch, targets
from niwaki.training.record import Choices, Record, Start, read, write
from niwaki.training.results import results
from niwaki.training.trainer import Trainer
from niwaki.training.trial import check_data, try_out

HELD_OUT = 0.1
"""Share of the training examples that is held out where a method follows the loss on examples that are not trained on."""


@dataclass(frozen=True)
class Job:
    """A task, a model, a recipe and a seed: all that a run needs, checked.

    Attributes:
        start: the trained weights to start from, or None.
        choices: what determines the run, as it is recorded.
    """

    task: Task
    data: Data
    model: str
    recipe: Recipe
    training: Training
    seed: int
    start: Path | None
    choices: Choices

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_per_epoch(self.data, self.training)

    def plans(self) -> list[tuple[Leaf, Plan]]:
        """Return what every stage that acts would do to the whole model, without doing it."""
        model = self.build()
        trainer = self.trainer(model, self.recipe)
        self._check_parts(model)
        self.recipe.fit(trainer.clock)  # whose errors name the stage
        return [
            (
                leaf,
                plan(
                    model,
                    leaf.recipe,
                    total_steps=max(steps, 1),
                    steps_per_epoch=self.steps_per_epoch,
                    tokens_per_step=trainer.clock.tokens_per_step,
                    example=trainer.example,
                ),
            )
            for leaf, steps in zip(trainer.leaves, trainer.lengths, strict=True)
            if leaf.acts
        ]

    def statistics_bytes(self, memory: int | None = None) -> int:
        """Return the most bytes that statistics of one stage take; after a ``finish`` that changes the model's size nobody knows yet.

        Raises:
            InputError: those of a stage take more than ``memory``; it says what would fit.
        """
        recipes: list[Recipe | Prune] = []
        for leaf in unroll(self.recipe):
            recipes += [leaf.recipe] if leaf.prune is None else [leaf.recipe, leaf.prune]
            if leaf.finish is not None:
                break
        model, example = self.build(), on(processes.local_device(), tuple(self.task.example(self.data)))
        return max(statistics_bytes(model, recipe, example=example, memory=memory) for recipe in recipes)

    def _check_parts(self, model: nn.Module) -> None:
        """Refuse parts of a batch with a single example where batch normalization needs two."""
        if not any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
            return
        size, examples = self.training.batch_size, len(self.data.train)
        for batch in {min(size, examples), examples % size or size}:
            for mine in torch.arange(batch).tensor_split(processes.world_size()):
                if any(len(part) == 1 for part in mine.tensor_split(self.training.accumulate)) or not len(mine):
                    raise InputError(
                        f"--set: batch_size={size} leaves a part of a batch with a single example (of {examples:,} in all), and batch"
                        " normalization needs two; choose another batch_size or accumulate"
                    )

    def build(self) -> nn.Module:
        """Return the model with the initial weights of the seed, or those of ``start``, on the device of this process."""
        model = self.task.build(self.model, self.data, self.seed)
        if self.start is not None and load(self.start, model=model).masks:
            raise InputError(f"--from: {self.start} is a sparse model, with masks; give the weights of a dense one")
        return model.to(processes.local_device())

    def trainer(
        self, model: nn.Module, recipe: Recipe | None = None, teacher: nn.Module | None = None, memory: int | None = None
    ) -> Trainer:
        """Return the trainer of a model that :meth:`build` made."""
        return Trainer(model, self.task, self.data, self.training, self.seed, recipe, teacher, memory, self._build_random)

    def _build_random(self, seed: int) -> nn.Module:
        return self.task.build(self.model, self.data, seed).to(processes.local_device())


def job(
    task: Task,
    recipe: Recipe,
    *,
    method: str,
    data_folder: Path | None = None,
    model: str | None = None,
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
    start: Path | None = None,
    kind: Literal["run", "prune"] = "run",
) -> Job:
    """Bring together what a run needs.

    Args:
        task: what to train.
        recipe: how to sparsify.
        method: what people call the recipe.
        data_folder: where the task's files are.
        model: one of the task's models; by default its first.
        seed: of the initial weights, the order of examples and the sparsifier.
        training: settings of the training that differ from the model's own.
        start: a safetensors file with trained weights to start from.
        kind: ``run`` trains a dense baseline beside the sparse model; for ``prune`` the weights of ``start`` are the baseline.

    Raises:
        InputError: an unknown model or setting, data that cannot be had, a batch larger than the data, weights that do not fit, or a
            recipe that this version cannot run.
    """
    recipe.require_complete()
    name, chosen = task.model(model)
    try:
        settings = Training.model_validate(chosen.training.model_dump() | dict(training or {}))
    except ValidationError as error:
        raise InputError(f"--set: {one_line(error, Training).lstrip('.: ')}") from None
    if settings.epochs == 0 and kind == "run":
        raise InputError("--epochs: a run trains for at least 1 epoch; niwaki prune needs none")
    data = task.data(data_folder)
    check_data(task, data)
    if data.validation is None and validates(recipe):
        data = hold_out(data, HELD_OUT, seed)
    _check_examples(task, data, settings)
    if start is not None and not start.is_file():
        raise InputError(f"--from: {start} is no file; give a .safetensors file with the model's trained weights")
    if kind == "prune" and settings.epochs == 0 and (recipe.stages is not None or not isinstance(recipe.schedule, OneShot)):
        raise InputError("--epochs: without fine-tuning there is one moment to prune; choose schedule: one_shot, or give epochs")
    if kind == "prune" and start is None:
        raise InputError("--from: missing; give the .safetensors file of the trained model")
    choices = Choices(
        kind=kind,
        task=task.name,
        task_code=task.code,
        data=data.fingerprint(),
        model=name,
        start=None if start is None else Start(file=start.name, sha256=sha256(start)),
        method=method,
        recipe=recipe.to_data(defaults=True),
        seed=seed,
        processes=processes.world_size(),
        training=settings,
    )
    return Job(task, data, name, recipe, settings, seed, start, choices)


def run(job: Job, folder: Path, *, baselines: Path | None = None, sitting: Sitting | None = None) -> Record:
    """Train dense, train sparse, evaluate, save into the folder, and return the record; a finished run is read, not repeated.

    Both trainings start from the same weights and see the same batches. Each can be interrupted at any time, and goes on from its last
    checkpoint when the run is given again; the result is the same to the bit. The stored model is loaded into a fresh one again
    and must have the same metrics.

    Args:
        job: what to run.
        folder: new, empty, or of this run.
        baselines: where dense baselines are kept; by default ``.baselines`` beside the folder.
        sitting: how to train, which does not change the result.

    Raises:
        InputError: the recipe does not fit the model, or the folder cannot take the run; nothing has been written then.
        NiwakiError: the run failed; its last checkpoint is kept.
    """
    sitting = sitting or Sitting()
    choices, first = job.choices, processes.rank() == 0
    done = finished_before(folder, choices)
    if done is not None:
        with suppress(OSError):  # a process may have been killed just before
            (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        return done
    with threads(job.training.threads), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"niwaki\.")  # the sparsifier's sentences: they are in the record
        try_out(job.task, job.data, job.build())
        job.plans()
        needed = job.statistics_bytes(sitting.memory)
        if first:
            sitting.estimated(needed)
        record = Record(identity=choices.identity(), choices=choices, environment=environment())
        with opened(folder, record) if first else nullcontext():
            processes.wait_for_all()
            model, baseline = job.build(), None
            if choices.kind == "run":
                place = (baselines or folder.absolute().parent / ".baselines") / choices.baseline()[:16]
                model, baseline = dense(job.build, job.trainer, choices.baseline(), place, sitting)
            sparse = job.build()
            trainer = job.trainer(sparse, job.recipe, teacher=model.eval(), memory=sitting.memory)
            trained = train(trainer, record.identity, folder, sitting, "sparse")
            if first:
                plain = job.task.build(job.model, job.data, job.seed + 1).to(processes.local_device())
                start = job.build() if job.start is not None else None
                with saying_what_is_left(folder):
                    found = results(trainer, trained, model, baseline, plain, start, folder)
                    write(record.model_copy(update={"results": found}), folder)
                (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
            processes.wait_for_all()
    return read(folder)


def _check_examples(task: Task, data: Data, training: Training) -> None:
    """Refuse what would only show much later: batches larger than the data, or cut into too many parts, wrong labels."""
    if training.batch_size > len(data.train):
        raise InputError(
            f"--set: batch_size={training.batch_size} is more than the {len(data.train):,} training examples of {task.name};"
            f" choose at most {len(data.train)}"
        )
    if training.accumulate > training.batch_size:
        raise InputError(
            f"--set: accumulate={training.accumulate} cuts a batch of {training.batch_size} into more parts than it has examples"
        )
    if data.classes:
        for which, examples in (("training", data.train), ("test", data.test)):
            labels = targets(examples)
            if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= len(data.classes):
                raise InputError(
                    f"--task: {task.name} has {which} labels from {labels.min().item()} to {labels.max().item()}, and {len(data.classes)}"
                    f" classes: whole numbers from 0 to {len(data.classes) - 1} are possible"
                )


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
