"""A trial of a task on a few examples, so that what is wrong with it is told before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.calibration import forward
from niwaki.errors import InputError
from niwaki.tasks import Data, Task
from niwaki.tasks.user import reported
from niwaki.training.loop import on

EXAMPLES = 8


def check_data(task: Task, data: Any) -> None:
    """Refuse data that is not as the protocol says.

    Raises:
        InputError: no ``Data``, examples without a length, none of them, or a batch that is no pair of inputs and targets.
    """
    if not task.metrics:
        raise InputError(f"--task: {task.name} has no metrics; a task needs at least one")
    if not isinstance(data, Data):
        raise InputError(f"--task: data of {task.name} returned {_kind(data)}; expected Data(train=..., test=...)")
    validation = () if data.validation is None else (("validation", data.validation),)
    for which, examples in (("training", data.train), ("test", data.test), *validation):
        if not hasattr(examples, "__len__"):
            raise InputError(f"--task: the {which} examples of {task.name} have no length; expected something like a TensorDataset")
        if len(examples) == 0:
            raise InputError(f"--task: {task.name} has no {which} examples")
        with _blamed(task, f"fetching {which} examples by a tensor of indices failed"):
            batch = examples[torch.arange(min(2, len(examples)))]
        if not isinstance(batch, tuple) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise InputError(f"--task: a batch of {which} examples of {task.name} is {_kind(batch)}; expected (inputs, targets)")


def try_out(task: Task, data: Data, model: nn.Module) -> None:
    """Run a freshly built model on a few training examples, and check what loss and metrics make of it. The model is used up.

    Raises:
        InputError: something of the task is not as the protocol says, or its own code failed (with its traceback).
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs, targets = data.train[torch.arange(min(EXAMPLES, len(data.train)))]
    with torch.random.fork_rng():
        if task.augment is not None:
            inputs = task.augment(inputs, torch.Generator().manual_seed(0))
        inputs, targets = on(device, inputs), on(device, targets)
        with _blamed(task, "calling the model with a batch of training inputs failed"):
            outputs = forward(model, inputs)
        with _blamed(task, "the loss of a batch of training examples failed"):
            loss = task.loss(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InputError(f"--task: loss of {task.name} returned {_kind(loss)}; expected one number, with gradients")
        with torch.no_grad():
            for name, metric in task.metrics.items():
                values = metric.values(outputs, targets)
                if not isinstance(values, Tensor) or tuple(values.shape) != (len(targets),):
                    expected = f"expected one number for each: a tensor of shape [{len(targets)}]"
                    raise InputError(
                        f"--task: the metric {name!r} of {task.name} returned {_kind(values)} for {len(targets)} examples; {expected}"
                    )
            model.eval()
            with _blamed(task, "calling the model with its example failed"):
                model(*on(device, tuple(task.example(data))))


@contextmanager
def _blamed(task: Task, problem: str) -> Iterator[None]:
    """Tell errors inside as those of a user's own task; the built-in ones are left as they are, for they are ours."""
    if task.code is None:
        yield
    else:
        with reported(task.name, problem):
            yield


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}" + ("" if value.requires_grad else " without gradients")
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"
