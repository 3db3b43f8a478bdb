"""Passes over data that need a model: they leave the model as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.masks import is_sharded
from niwaki.ranks import average_


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


def forward(model: nn.Module, inputs: Any) -> Any:
    """Return ``model(inputs)``, or ``model(*inputs)`` for a tuple."""
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def loss_gradients(model: nn.Module, data: Iterable[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor]) -> None:
    """Leave in every ``.grad`` the gradient of the mean over the batches (and ranks) of ``loss(forward(model, inputs), targets)``.

    Raises:
        InputError: there is no batch, or a batch is not a pair.
    """
    batches = 0
    with torch.enable_grad():
        for batch in data:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise InputError(f"data: expected batches (inputs, targets), got {type(batch).__name__}")
            inputs, targets = batch
            loss(forward(model, inputs), targets).backward()  # type: ignore[no-untyped-call]
            batches += 1
    if batches == 0:
        raise InputError("data: there is no batch to collect statistics from")
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient in gradients:
        gradient.div_(batches)
    average_([g for g in gradients if not is_sharded(g)])
