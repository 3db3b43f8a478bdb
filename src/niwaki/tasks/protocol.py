"""What a task is: models, data, a loss, metrics, and settings of the training that suit them.

A task is a record of plain values and functions. A user's own task is one more ``Task``:

>>> import torch
>>> from torch import nn
>>> from torch.utils.data import TensorDataset
>>> inputs = torch.randn(64, 3)
>>> examples = TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())
>>> task = Task(
...     name="sign of a sum",
...     models={"linear": Model(lambda: nn.Linear(3, 2), Training(epochs=2, batch_size=16))},
...     data=lambda: Data(train=examples, test=examples),
...     loss=nn.functional.cross_entropy,
...     metrics={"accuracy": Metric(lambda outputs, targets: outputs.argmax(1) == targets, "share of right answers")},
... )
>>> task.build("linear", seed=0)
Linear(in_features=3, out_features=2, bias=True)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from niwaki.errors import InputError, did_you_mean


class Examples(Protocol):
    """Examples that can be fetched as a batch by a tensor of indices, such as ``torch.utils.data.TensorDataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> tuple[Tensor, ...]:
        """Return ``(inputs, targets)`` of a batch, each with the examples along its first dimension."""
        ...


@dataclass(frozen=True)
class Data:
    """The examples to train on and those to test on."""

    train: Examples
    test: Examples


@dataclass(frozen=True)
class Metric:
    """One number about a model on examples: the mean over all examples of ``values(outputs, targets)``.

    Attributes:
        values: returns one number per example, shape ``[batch]``.
        definition: what the mean is, in words.
        higher_is_better: which way is up.
        percent: whether it is a share that people read in per cent.
    """

    values: Callable[[Tensor, Tensor], Tensor]
    definition: str
    higher_is_better: bool = True
    percent: bool = True


class Training(BaseModel):
    """Settings of a training: everything that is not the model, the data or the loss.

    The learning rate is the peak; ``cosine`` decays it to 0 over the run (Loshchilov & Hutter 2017) after a linear ``warmup`` share.
    ``threads`` is the number of CPU threads, None for torch's default: one is fastest for tiny models, and makes the numbers the same
    however many cores a machine has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    learning_rate_schedule: Literal["constant", "cosine"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    threads: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Model:
    """How to build a network, with random initial weights, and the training that suits it."""

    build: Callable[[], nn.Module]
    training: Training


@dataclass(frozen=True)
class Task:
    """A task: what to train, on what, how wrong it is, and how good.

    Attributes:
        name: how it is called on the command line.
        models: model name -> how it is built and trained; the first is the default.
        data: loads the examples; raises InputError when they cannot be had.
        loss: ``loss(outputs, targets)`` -> scalar mean over the batch.
        metrics: metric name -> metric; the first is the headline.
        summary: one line for people.
    """

    name: str
    models: Mapping[str, Model]
    data: Callable[[], Data]
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Mapping[str, Metric]
    summary: str = ""
    example: Callable[[Data], tuple[Any, ...]] = field(default=lambda data: (data.test[torch.arange(1)][0],))
    """Positional arguments of a forward pass on one example."""

    def model(self, name: str | None = None) -> tuple[str, Model]:
        """Return a model's name and record; the default one when no name is given. Raises InputError for an unknown name."""
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            raise InputError(f"--model: the task {self.name!r} has no model {name!r}; {did_you_mean(name, self.models)}")
        return name, self.models[name]

    def build(self, name: str, seed: int) -> nn.Module:
        """Build a model with the initial weights of a seed; the random state of the process stays as it was."""
        _, model = self.model(name)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return model.build()
