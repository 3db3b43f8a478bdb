"""Passes over data that need a model: they leave the model as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.masks import is_sharded
from niwaki.ranks import average_, mean


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the random state, the buffers, every ``.grad`` and the training modes of a model on leaving the block."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    for parameter in model.parameters():
        parameter.grad = None
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Arguments:
    """Inputs of a module that is called with keyword arguments, as the blocks of pretrained networks are.

    >>> forward(nn.Linear(2, 1), Arguments(kwargs={"input": torch.ones(3, 2)})).shape
    torch.Size([3, 1])
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def forward(model: nn.Module, inputs: Any) -> Any:
    """Return ``model(inputs)``; ``model(*inputs)`` for a tuple, ``model(*args, **kwargs)`` for :class:`Arguments`."""
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def loss_gradients(model: nn.Module, data: Iterable[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor]) -> None:
    """Leave in every ``.grad`` the gradient of the mean over the batches (and ranks) of ``loss(forward(model, inputs), targets)``.

    Raises:
        InputError: there is no batch, or a batch is not a pair.
    """
    batches = 0
    for batch in pairs(data):
        add_gradient(model, batch, loss)
        batches += 1
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient in gradients:
        gradient.div_(batches)
    average_([g for g in gradients if not is_sharded(g)])


@torch.no_grad()
def mean_loss(model: nn.Module, data: Iterable[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor]) -> float:
    """Return the mean over the batches (and ranks) of ``loss(forward(model, inputs), targets)``, in the model's training mode.

    Raises:
        InputError: there is no batch, or a batch is not a pair.
    """
    with preserved(model):
        found = torch.stack([loss(forward(model, inputs), targets).to(torch.float64) for inputs, targets in pairs(data)])
    return float(mean(found.mean()))


def add_gradient(model: nn.Module, batch: tuple[Any, Any], loss: Callable[[Any, Any], Tensor]) -> None:
    """Add the gradient of the loss of one batch to every ``.grad``."""
    inputs, targets = batch
    with torch.enable_grad():
        loss(forward(model, inputs), targets).backward()  # type: ignore[no-untyped-call]


def pairs(data: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Yield the batches.

    Raises:
        InputError: there is none, or one that is not a pair.
    """
    batch = None
    for batch in data:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"data: expected batches (inputs, targets), got {type(batch).__name__}")
        yield batch[0], batch[1]
    if batch is None:
        raise InputError("data: there is no batch to collect statistics from")


def first_pair(data: Iterable[tuple[Any, Any]]) -> tuple[tuple[Any, Any], Iterable[tuple[Any, Any]]]:
    """Return the first batch, and data that still begins with it where ``data`` is an iterator.

    Raises:
        InputError: there is none, or it is not a pair.
    """
    batches = iter(data)
    batch = next(pairs(islice(batches, 1)))
    return batch, chain([batch], batches) if batches is data else data
