"""Passes over data that need a model: they leave the model as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.layout import Layout, is_transposed_linear
from niwaki.masks import is_sharded
from niwaki.metrics.flops import observing
from niwaki.ranks import average_, mean

OBSERVED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
"""Module classes whose inputs can be observed."""


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


@torch.no_grad()
def mean_activity(
    model: nn.Module, data: Iterable[tuple[Any, Any]], layouts: Mapping[nn.Parameter, Layout], names: Mapping[nn.Parameter, str]
) -> dict[nn.Parameter, Tensor]:
    """Return the mean of ``|x|`` over the data (and ranks), and over all positions, of each input entry that a weight reads.

    Of an embedding it is the share of each word. The model runs in evaluation mode; weights that several modules use see all their inputs.

    Args:
        model: any module.
        data: batches ``(inputs, targets)``.
        layouts: weights of linear, convolution and embedding modules, each with its layout.
        names: of the same weights, for errors.

    Returns:
        parameter -> float64 of the shape of the layout's view, with size 1 in all dimensions but groups and inputs.

    Raises:
        InputError: there is no batch, or the inputs of a weight cannot be observed.
    """
    totals: dict[nn.Parameter, tuple[Tensor, int]] = {}

    def observe(weight: nn.Parameter, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        if isinstance(module, nn.Embedding):
            total, more = torch.bincount(inputs.flatten(), minlength=module.num_embeddings).double(), inputs.numel()
        else:
            axis = inputs.ndim - 1 - len(layouts[weight].kernel)
            entries = inputs.abs().movedim(axis, -1).reshape(-1, inputs.shape[axis])
            total, more = entries.sum(dim=0, dtype=torch.float64), len(entries)
        before, count = totals.get(weight, (torch.zeros_like(total), 0))
        totals[weight] = before + total, count + more

    with preserved(model), observing(model), ExitStack() as hooks:
        for module in model.modules():
            for _, weight in module.named_parameters(recurse=False):
                if weight in layouts and (isinstance(module, OBSERVED) or is_transposed_linear(module)):
                    hooks.callback(module.register_forward_pre_hook(partial(observe, weight), with_kwargs=True).remove)
        for inputs, _ in pairs(data):
            forward(model, inputs)
    found = {}
    for weight, layout in layouts.items():
        if weight not in totals:
            raise InputError(
                f"{names[weight]}: what it reads cannot be observed, for its module is not called on data (as the projections inside"
                " nn.MultiheadAttention), or is no linear, convolution or embedding layer; exclude it from the target"
            )
        total, count = totals[weight]
        shape = [size if role in ("group", "input") else 1 for role, size in zip(layout.roles, layout.shape, strict=True)]
        found[weight] = (mean(total) / mean(torch.tensor(float(count), dtype=torch.float64, device=total.device))).view(shape)
    return found
