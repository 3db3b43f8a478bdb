"""Gradients of single examples, or of few together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from niwaki.calibration.across import gathered, rank, share
from niwaki.calibration.batches import Examples, leaves, replaced
from niwaki.calibration.labels import sampled_labels
from niwaki.calibration.passes import Arguments, forward, require_finite
from niwaki.calibration.run import NO_LOSS, Run, differentiable
from niwaki.errors import InputError
from niwaki.statistics import GradientBank, GradientMean, GradientSquare, GradientStatistic, Mean, Statistic

CHUNK = 32
"""How many gradients are taken at once."""
CHUNK_BYTES = 2**28
"""And how many bytes they may have."""

Block = tuple[int, Examples, int]
"""Number of a batch, examples, and of how many gradients."""


def gradient_statistics(run: Run, requests: Sequence[GradientStatistic]) -> dict[str, dict[Statistic, Any]]:
    """Return tensor name -> request -> value, of requests that agree in everything but what they make of the gradients.

    Several processes share the gradients out evenly; a bank has the rows of one rank after the other.
    """
    run.require_whole()
    asked = requests[0]
    wanted = None if asked.gradients is None else share(asked.gradients)
    means: dict[tuple[str, GradientStatistic], Mean] = {
        (one.name, request): Mean() for one in run.tensors for request in requests if isinstance(request, GradientMean | GradientSquare)
    }
    banks: dict[str, _Bank] = {}
    with_bank = any(isinstance(request, GradientBank) for request in requests)
    for gradients in gradients_of(run, asked, wanted):
        for one, rows in zip(run.tensors, gradients, strict=True):
            seen = rows if one.active is None else rows.masked_fill_(~one.active.reshape(one.parameter.shape), 0.0)
            for request in requests:
                if isinstance(request, GradientMean | GradientSquare):
                    values = seen.double().square() if isinstance(request, GradientSquare) else seen.double()
                    means[one.name, request].update(values.sum(dim=0), len(seen))
            if with_bank:
                banks.setdefault(one.name, _Bank(wanted)).add(seen)
    found: dict[str, dict[Statistic, Any]] = {one.name: {} for one in run.tensors}
    for one in run.tensors:
        for request in requests:
            if (mean := means.get((one.name, request))) is not None:
                mean.all_reduce()
                found[one.name][request] = mean.value().reshape(one.layout.shape)
            else:
                found[one.name][request] = gathered(banks[one.name].rows).reshape(-1, *one.layout.shape)
    return found


def gradients_of(run: Run, asked: GradientStatistic, wanted: int | None) -> Iterator[list[Tensor]]:
    """Yield the gradients, some at a time: ``[gradients, *parameter]`` of every weight, in the order of ``run.tensors``.

    Raises:
        InputError: the loss or its targets are missing, or it is not finite.
    """
    done = 0
    most = _most(run)
    at_once = vectorizes(run.model)
    for number, examples, amount in _blocks(run, asked):
        each = examples.size // amount
        amount = amount if wanted is None else min(amount, wanted - done)
        for start in range(0, amount, most):
            some = min(most, amount - start)
            block = (number, examples.part(start * each, (start + some) * each), some)
            gradients = None
            if at_once and some > 1:
                gradients = _vectorized(run, block)
                at_once = gradients is not None
            yield one_by_one(run, block) if gradients is None else gradients
        done += amount
        if done == wanted:
            return
    if not done:
        raise InputError(f"data: it has fewer than the {asked.samples_per_gradient} examples of one gradient; lower samples_per_gradient")
    if wanted is not None:
        warnings.warn(f"{type(asked).__name__}: the data has {done} gradients of {wanted}; all of them are used", stacklevel=2)


def vectorizes(model: nn.Module) -> bool:
    """Return whether one vectorized pass for many gradients is faster than a pass for each.

    Measured on CPUs (one thread, 32 gradients): half the time for a small transformer and 0.6 of it for a multilayer perceptron, but three
    times as long for ResNet-20, where weights that differ by example turn every convolution into a grouped one. On accelerators
    launching many small kernels costs more than that.
    """
    convolutions = any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in model.modules())
    return not convolutions or any(parameter.device.type != "cpu" for parameter in model.parameters())


def one_by_one(run: Run, block: Block) -> list[Tensor]:
    """Return the gradients of a block, by a pass for each."""
    number, examples, amount = block
    each = examples.size // amount
    rows = []
    with differentiable(), run.requiring_gradients():
        for start in range(0, examples.size, each):
            inputs, targets = examples.part(start, start + each).value
            value = run.loss_of(forward(run.model, inputs), targets, number)
            rows.append(torch.autograd.grad(value, run.weights, materialize_grads=True))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def vectorized(run: Run, block: Block) -> list[Tensor]:
    """Return the gradients of a block, by one vectorized pass.

    Raises:
        RuntimeError: the model or the loss does something that cannot be vectorized.
    """
    number, examples, amount = block
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    weights = {names[id(one.parameter)]: one.parameter.detach() for one in run.tensors}
    each = examples.size // amount
    folded = [t.reshape(amount, each, *t.shape[1:]) if by else t for t, by in zip(examples.tensors, examples.by_example, strict=True)]
    if run.loss is None:
        raise InputError(NO_LOSS)
    loss = run.loss

    def loss_of(weights: dict[str, Tensor], tensors: list[Tensor]) -> Tensor:
        inputs, targets = replaced(examples.batch, tensors)
        arguments = inputs if isinstance(inputs, Arguments) else Arguments(inputs if isinstance(inputs, tuple) else (inputs,))
        return loss(functional_call(run.model, weights, arguments.args, dict(arguments.kwargs)), targets).reshape(())

    with differentiable(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        across = [0 if by else None for by in examples.by_example]
        gradients, losses = vmap(grad_and_value(loss_of), in_dims=(None, across), randomness="different")(weights, folded)
    require_finite(losses, number)
    return [gradients[names[id(one.parameter)]].detach() for one in run.tensors]


def _vectorized(run: Run, block: Block) -> list[Tensor] | None:
    """Return the gradients, or None where they have to be taken one by one, which gives the same."""
    try:
        return vectorized(run, block)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError):  # what torch raises where it cannot vectorize
        return None


def _blocks(run: Run, asked: GradientStatistic) -> Iterator[Block]:
    """Yield the data in blocks of whole gradients; examples that do not fill one go in front of the next batch."""
    each = asked.samples_per_gradient
    rest: Examples | None = None
    first = 0
    for number, inputs, targets in run.batches(targets=asked.labels == "given"):
        if asked.labels == "sampled":
            with torch.no_grad():
                targets = sampled_labels(forward(run.model, inputs), targets, run.seed, f"labels {rank()}", first)
        examples = Examples.of(inputs, targets)
        first += examples.size
        if each is None:
            yield number, examples, 1
            continue
        if leaves(targets) and not any(len(tensor) == examples.size for tensor in leaves(targets) if tensor.ndim):
            raise InputError(
                f"data: the targets of batch {number} do not lie along the first dimension, as its {examples.size} examples do, and cannot"
                " be told apart; use samples_per_gradient: null for one gradient of each batch"
            )
        examples = examples if rest is None else rest.and_then(examples)
        full = examples.size // each * each
        if full:
            yield number, examples.part(0, full), full // each
        rest = examples.part(full, examples.size) if full < examples.size else None


def _most(run: Run) -> int:
    """Return how many gradients are taken at once."""
    size = sum(one.parameter.numel() * one.parameter.element_size() for one in run.tensors)
    return max(1, min(CHUNK, CHUNK_BYTES // max(size, 1)))


class _Bank:
    """Rows that come a few at a time, in one tensor where their number is known."""

    def __init__(self, wanted: int | None) -> None:
        self._wanted = wanted
        self._parts: list[Tensor] = []
        self._used = 0

    def add(self, rows: Tensor) -> None:
        """Append rows, in float32 or wider."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self._wanted is None:
            self._parts.append(rows.clone())
            return
        if not self._parts:
            self._parts = [rows.new_empty(self._wanted, *rows.shape[1:])]
        self._parts[0][self._used : self._used + len(rows)] = rows
        self._used += len(rows)

    @property
    def rows(self) -> Tensor:
        """All rows."""
        return torch.cat(self._parts) if self._wanted is None else self._parts[0][: self._used]
