"""What a task is: models, data, a loss, metrics, and settings of the training that suit them.

A task is a record of plain values and functions. A user's own task is one more ``Task``:

>>> import torch
>>> from torch import nn
>>> from torch.utils.data import TensorDataset
>>> inputs = torch.randn(64, 3)
>>> examples = TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())
>>> task = Task(
...     name="sign of a sum",
...     models={"linear": Model(lambda data: nn.Linear(3, 2), Training(epochs=2, batch_size=16))},
...     data=lambda folder: Data(train=examples, test=examples, classes=("negative", "positive")),
...     loss=nn.functional.cross_entropy,
...     metrics={"accuracy": Metric(lambda outputs, targets: outputs.argmax(1) == targets, "share of right answers")},
... )
>>> task.build("linear", task.data(None), seed=0)
Linear(in_features=3, out_features=2, bias=True)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from niwaki.errors import InputError, did_you_mean

FINGERPRINT_BATCH = 4096

Inputs = Tensor | tuple[Tensor, ...]
"""What a model is called with: ``model(inputs)``, or ``model(*inputs)`` for a tuple."""


class Examples(Protocol):
    """Examples that can be fetched as a batch by a tensor of indices, such as ``torch.utils.data.TensorDataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> tuple[Any, ...]:
        """Return ``(inputs, targets)`` of a batch, each with the examples along its first dimension; inputs may be a tuple of tensors."""
        ...


@dataclass(frozen=True)
class Subset:
    """Some of other examples, by their indices.

    >>> from torch.utils.data import TensorDataset
    >>> Subset(TensorDataset(torch.tensor([1, 2, 3])), torch.tensor([2, 0]))[torch.tensor([0])]
    (tensor([3]),)
    """

    examples: Examples
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Tensor) -> tuple[Any, ...]:
        return self.examples[self.indices[indices]]


@dataclass(frozen=True)
class Data:
    """The examples to train on and those to test on.

    Attributes:
        train: to learn from.
        test: to evaluate on; never learned from, and nothing is decided by them.
        validation: to decide by while training, for methods that follow the loss on examples that are not learned from. None: where a
            method needs some, a tenth of ``train`` is held out.
        classes: names of the classes, when targets are class numbers: recall is then told by class.
        facts: what a model must know of the data to be built, such as ``{"vocabulary": 65}``.
        tokens_per_example: for times in ``tokens``.
    """

    train: Examples
    test: Examples
    classes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    tokens_per_example: int | None = None
    validation: Examples | None = None

    def fingerprint(self) -> str:
        """Return the SHA-256 of all examples, in hexadecimal digits: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for examples in (self.train, self.test, *(() if self.validation is None else (self.validation,))):
            digest.update(len(examples).to_bytes(8, "little"))
            whole = getattr(examples, "tensors", None)  # as TensorDataset has them: without the work of making batches
            batches = [whole] if whole is not None else _batches(examples)
            for batch in batches:
                for tensor in _flat(batch):
                    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _batches(examples: Examples) -> Any:
    return (
        examples[torch.arange(begin, min(begin + FINGERPRINT_BATCH, len(examples)))] for begin in range(0, len(examples), FINGERPRINT_BATCH)
    )


def _flat(batch: Any) -> list[Tensor]:
    return [batch] if isinstance(batch, Tensor) else [tensor for part in batch for tensor in _flat(part)]


@dataclass(frozen=True)
class Metric:
    """One number about a model on examples: the mean over all examples of ``values(outputs, targets)``.

    Attributes:
        values: returns one number per example, shape ``[batch]``.
        definition: what the mean is, in words.
        higher_is_better: which way is up.
        percent: whether it is a share that people read in per cent.
    """

    values: Callable[[Any, Tensor], Tensor]
    definition: str
    higher_is_better: bool = True
    percent: bool = True


class Training(BaseModel):
    """Settings of a training: everything that is not the model, the data or the loss.

    Attributes:
        epochs: passes over the training examples; a *run* is this long.
        batch_size: examples of an optimizer step.
        accumulate: how many backward passes make a step; a batch is cut into as many equal parts.
        optimizer: ``sgd`` (with momentum) or ``adamw``.
        learning_rate: the peak.
        momentum: of ``sgd``.
        weight_decay: of all parameters.
        clip_norm: gradients are scaled down to this norm at most; None for no limit.
        learning_rate_schedule: ``cosine`` decays it to 0 over the run (Loshchilov & Hutter 2017).
        warmup: share of the run in which it rises linearly.
        precision: of the forward and backward pass; weights stay as they are. ``float16`` scales the loss.
        ema: decay of an exponential moving average of the weights, which is then what is evaluated and saved; None for none.
        threads: CPU threads, None for torch's default: one is fastest for tiny models, and makes the numbers the same however many
            cores a machine has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    clip_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    learning_rate_schedule: Literal["constant", "cosine"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    ema: float | None = Field(default=None, gt=0, lt=1)
    threads: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Model:
    """How to build a network for given data, with random initial weights (or trained ones), and the training that suits it."""

    build: Callable[[Data], nn.Module]
    training: Training


def _first_example(data: Data) -> tuple[Any, ...]:
    inputs = data.test[torch.arange(1)][0]
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _same(outputs: Any) -> Tensor:
    assert isinstance(outputs, Tensor)
    return outputs


@dataclass(frozen=True)
class Task:
    """A task: what to train, on what, how wrong it is, and how good.

    Attributes:
        name: how it is called on the command line.
        models: model name -> how it is built and trained; the first is the default.
        data: loads the examples, given the folder of ``--data`` or ``NIWAKI_DATA`` (None without one); raises InputError when they
            cannot be had.
        loss: ``loss(outputs, targets)`` -> scalar mean over the batch.
        metrics: metric name -> metric; the first is the headline.
        summary: one line for people.
        example: positional arguments of a forward pass on one example.
        logits: the scores of the classes in a model's outputs, along the last dimension.
        augment: random changes of a batch's inputs while training; all its randomness must come from the generator.
        code: SHA-256 of the code that defines it, where that is not Niwaki's own.
    """

    name: str
    models: Mapping[str, Model]
    data: Callable[[Path | None], Data]
    loss: Callable[[Any, Tensor], Tensor]
    metrics: Mapping[str, Metric]
    summary: str = ""
    example: Callable[[Data], tuple[Any, ...]] = _first_example
    logits: Callable[[Any], Tensor] = _same
    augment: Callable[[Any, torch.Generator], Any] | None = None
    code: str | None = None

    def model(self, name: str | None = None) -> tuple[str, Model]:
        """Return a model's name and record; the default one when no name is given. Raises InputError for an unknown name."""
        if not self.models:
            raise InputError(f"--task: {self.name} has no models; a task needs at least one")
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            raise InputError(f"--model: the task {self.name!r} has no model {name!r}; {did_you_mean(name, self.models)}")
        return name, self.models[name]

    def build(self, name: str, data: Data, seed: int) -> nn.Module:
        """Build a model with the initial weights of a seed; the random state of the process stays as it was."""
        _, model = self.model(name)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built = model.build(data)
            if not isinstance(built, nn.Module):
                kind = type(built).__name__
                raise InputError(f"--task: building the model {name!r} of {self.name} returned {kind}; expected a torch.nn.Module")
            if any(isinstance(parameter, UninitializedParameter) for parameter in built.parameters()):
                with torch.no_grad():
                    built(*self.example(data))  # lazy layers take their shapes, and random weights, from it
            return built
