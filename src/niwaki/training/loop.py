"""The parts of a training step that are plain torch: batches, optimizer, learning rate, evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.calibration import forward
from niwaki.counter import key
from niwaki.errors import NiwakiError
from niwaki.tasks import Data, Examples, Inputs, Subset, Task, Training

EVALUATION_BATCH = 512
"""Examples of a forward pass in evaluation; of text at most those of a training step, as a large vocabulary has large outputs."""


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


def order(examples: Examples, seed: int, epoch: int) -> Tensor:
    """Return the order of the examples in an epoch: random, and given by the seed and the epoch alone."""
    return torch.randperm(len(examples), generator=torch.Generator().manual_seed(key(seed, epoch, "order of examples")))


def batches(examples: Examples, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield the batches of an epoch."""
    for indices in order(examples, seed, epoch).split(batch_size):  # type: ignore[no-untyped-call]
        inputs, targets = examples[indices]
        yield inputs, targets


@dataclass(frozen=True)
class Batches:
    """Examples in their order, batch by batch on a device, each time anew."""

    examples: Examples
    size: int
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield the batches."""
        for indices in torch.arange(len(self.examples)).split(self.size):  # type: ignore[no-untyped-call]
            inputs, targets = self.examples[indices]
            yield on(self.device, inputs), on(self.device, targets)


def hold_out(data: Data, share: float, seed: int) -> Data:
    """Return data of which a share of the training examples, drawn at random, is no longer trained on, but there to validate with."""
    held = max(round(share * len(data.train)), 1)
    drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(key(seed, 0, "held-out examples")))
    rest, validation = (Subset(data.train, part.sort().values) for part in (drawn[held:], drawn[:held]))
    return replace(data, train=rest, validation=validation)


def on(device: torch.device, value: Any) -> Any:
    """Return a tensor, or a tuple of them, on a device."""
    return tuple(part.to(device) for part in value) if isinstance(value, tuple) else value.to(device)


@dataclass(frozen=True)
class Evaluation:
    """A model on examples: the mean of every metric, and the class that it gives each example (None where targets are no classes)."""

    metrics: dict[str, float]
    classes: Tensor | None


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, examples: Examples, *, classes: bool = False, batch: int = EVALUATION_BATCH) -> Evaluation:
    """Return every metric of the task on the examples, and with ``classes`` the predicted ones; the model's mode is left as it was.

    Raises:
        NiwakiError: a metric is not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a model that draws random numbers even now gets the same ones each time
        found = _evaluate(model, task, examples, classes, batch)
    for module, mode in modes:
        module.training = mode
    return found


def _evaluate(model: nn.Module, task: Task, examples: Examples, classes: bool, batch: int) -> Evaluation:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.eval()
    sums = dict.fromkeys(task.metrics, 0.0)
    predicted = []
    for begin in range(0, len(examples), batch):
        inputs, targets = examples[torch.arange(begin, min(begin + batch, len(examples)))]
        outputs, targets = forward(model, on(device, inputs)), targets.to(device)
        for name, metric in task.metrics.items():
            sums[name] += float(metric.values(outputs, targets).sum(dtype=torch.float64))
        if classes:
            predicted.append(task.logits(outputs).argmax(dim=-1).cpu())
    metrics = {name: total / len(examples) for name, total in sums.items()}
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NiwakiError(f"the metric {name!r} is {value} on the test examples; a smaller learning rate may help")
    return Evaluation(metrics, torch.cat(predicted) if classes else None)


def targets(examples: Examples) -> Tensor:
    """Return the targets of all examples."""
    whole = getattr(examples, "tensors", None)  # as TensorDataset has them: without the work of making batches
    if whole is not None:
        return torch.as_tensor(whole[-1])
    parts = torch.arange(len(examples)).split(EVALUATION_BATCH)  # type: ignore[no-untyped-call]
    return torch.cat([examples[part][1] for part in parts])
