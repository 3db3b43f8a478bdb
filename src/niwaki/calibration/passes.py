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
        InputError: there is no batch, a batch is not a pair or has no targets, or its loss is not finite.
    """
    batches = 0
    for batch in pairs(data):
        add_gradient(model, batch, loss, batches)
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
        found = torch.stack([_loss(model, batch, loss, number).to(torch.float64) for number, batch in enumerate(pairs(data))])
    return float(mean(found.mean()))


def add_gradient(model: nn.Module, batch: tuple[Any, Any], loss: Callable[[Any, Any], Tensor], number: int = 0) -> None:
    """Add the gradient of the loss of one batch to every ``.grad``; ``number`` is the batch's, for errors.

    Raises:
        InputError: the loss needs targets and there are none, or it is not finite.
    """
    with torch.enable_grad():
        value = _loss(model, batch, loss, number)
        require_finite(value, number)
        value.backward()  # type: ignore[no-untyped-call]


def _loss(model: nn.Module, batch: tuple[Any, Any], loss: Callable[[Any, Any], Tensor], number: int) -> Tensor:
    inputs, targets = batch
    outputs = forward(model, inputs)
    try:
        return loss(outputs, targets)
    except Exception:
        if targets is None:  # a loss that finds its targets elsewhere does not fail
            raise InputError(f"data: batch {number} has no targets (None), which the loss needs; give batches (inputs, targets)") from None
        raise


def require_finite(loss: Tensor, number: int) -> None:
    """Raise an InputError if the loss of a batch is not finite."""
    if not bool(torch.isfinite(loss.detach()).all()):
        raise InputError(
            f"data: the loss of batch {number} is not finite; look for inf and NaN in its inputs and targets and in the weights"
        )


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
