"""The training loop behind the command line: plain torch, the same for dense and sparse models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from niwaki.counter import key
from niwaki.errors import NiwakiError
from niwaki.tasks import Data, Examples, Task, Training
from niwaki.training.record import Epoch

EVALUATION_BATCH = 512


class Sparsifying(Protocol):
    """What the loop asks of a sparsifier."""

    @property
    def sparsity(self) -> float:
        """Share of the targets' weights that is masked now."""
        ...

    def evaluating(self) -> AbstractContextManager[object]:
        """Return a block inside which the model has the weights to evaluate with."""
        ...


Attach = Callable[[torch.optim.Optimizer, LambdaLR], Sparsifying]
Progress = Callable[[int, int, Epoch | None], None]
"""Called with the steps done, the steps of the whole training, and the epoch that just ended, if one did."""


def steps_per_epoch(data: Data, training: Training) -> int:
    """Return the optimizer steps of one epoch; the last batch may be smaller."""
    return math.ceil(len(data.train) / training.batch_size)


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, over all parameters."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
        )
    return torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)


def learning_rate_factor(training: Training, step: int, total: int) -> float:
    """Return the share of the peak learning rate that step ``step`` of ``total`` uses.

    ``cosine``: ``(1 + cos(π p)) / 2`` with p the share of the steps after the warm-up that has passed (Loshchilov & Hutter 2017).
    """
    warm = round(training.warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    if training.learning_rate_schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2


def batches(examples: Examples, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch in a random order that depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(key(seed, epoch, "order of examples"))
    order = torch.randperm(len(examples), generator=generator)
    for begin in range(0, len(order), batch_size):
        inputs, targets = examples[order[begin : begin + batch_size]]
        yield inputs, targets


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, examples: Examples) -> dict[str, float]:
    """Return every metric of the task on the examples; the model's mode is left as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    sums = dict.fromkeys(task.metrics, 0.0)
    for begin in range(0, len(examples), EVALUATION_BATCH):
        inputs, targets = examples[torch.arange(begin, min(begin + EVALUATION_BATCH, len(examples)))]
        outputs = model(inputs)
        for name, metric in task.metrics.items():
            sums[name] += float(metric.values(outputs, targets).sum(dtype=torch.float64))
    for module, mode in modes:
        module.training = mode
    return {name: total / len(examples) for name, total in sums.items()}


def fit(
    model: nn.Module,
    task: Task,
    data: Data,
    training: Training,
    seed: int,
    *,
    attach: Attach | None = None,
    progress: Progress | None = None,
) -> list[Epoch]:
    """Train a model in place and return what happened after each epoch.

    Args:
        attach: gets the optimizer and the scheduler before the first step and returns the sparsifier that it attached to them.
        progress: told about every step and every epoch.

    Raises:
        NiwakiError: the loss is not finite.
    """
    per_epoch = steps_per_epoch(data, training)
    total = per_epoch * training.epochs
    optimizer = make_optimizer(model, training)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(training, step, total))
    sparsifier = attach(optimizer, scheduler) if attach else None
    history: list[Epoch] = []
    step = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for dropout and the like
        for epoch in range(1, training.epochs + 1):
            model.train()
            losses = []
            for inputs, targets in batches(data.train, training.batch_size, seed, epoch):
                optimizer.zero_grad()
                loss = task.loss(model(inputs), targets)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                scheduler.step()
                losses.append(loss.detach())
                step += 1
                if progress:
                    progress(step, total, None)
            mean = float(torch.stack(losses).mean(dtype=torch.float64))
            if not math.isfinite(mean):
                raise NiwakiError(f"training: the loss became {mean} in epoch {epoch}; a smaller learning rate may help")
            with sparsifier.evaluating() if sparsifier else nullcontext():
                metrics = evaluate(model, task, data.test)
            history.append(
                Epoch(epoch=epoch, step=step, train_loss=mean, metrics=metrics, sparsity=sparsifier.sparsity if sparsifier else 0.0)
            )
            if progress:
                progress(step, total, history[-1])
    return history
