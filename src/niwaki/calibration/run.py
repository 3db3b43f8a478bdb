"""What every pass works on: the model, its weights, the data, and a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from niwaki.calibration.batches import in_float64
from niwaki.calibration.passes import first_pair, pairs, require_finite
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.masks import is_sharded

NO_LOSS = "loss= is needed, called as loss(model(inputs), targets)"

Batch = tuple[Any, Any]
Values = dict[str, Tensor]
"""Tensor name -> value."""


@dataclass(frozen=True, eq=False)
class Watched:
    """A weight to collect statistics of.

    Attributes:
        name: canonical parameter name.
        parameter: the model's own.
        layout: of the whole parameter, sharded or not.
        active: True where it is not masked (bool, of as many elements as the parameter); None: everywhere.
    """

    name: str
    parameter: nn.Parameter
    layout: Layout
    active: Tensor | None = None

    def view(self, values: Tensor) -> Tensor:
        """Return values of the parameter's shape in the layout's view, zero where the weight is not active."""
        seen = values.detach().reshape(self.layout.shape)
        return seen if self.active is None else seen.masked_fill(~self.active.reshape(self.layout.shape), 0.0)


@dataclass(eq=False)
class Run:
    """A model as the passes see it, and what they need. The model is in evaluation mode while they run.

    Attributes:
        model: without wrappers.
        tensors: the weights.
        data: batches; None where there are none.
        loss: of a model's output and the targets.
        seed: of random probes and sampled labels.
        example: inputs of one forward pass.
    """

    model: nn.Module
    tensors: Sequence[Watched]
    data: Iterable[Batch] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    seed: int = 0
    example: Any = None

    def batches(self, *, targets: bool = False) -> Iterator[tuple[int, Any, Any]]:
        """Yield the batches with their numbers.

        Raises:
            InputError: there is none, or one that is no pair, or has no targets where they are needed.
        """
        if self.data is None:
            raise InputError("data= is needed: batches (inputs, targets) to collect statistics from")
        for number, (inputs, wanted) in enumerate(pairs(self.data)):
            if targets and wanted is None:
                raise InputError(f"data: batch {number} has no targets (None), which the loss needs; give batches (inputs, targets)")
            yield number, inputs, wanted

    def first_inputs(self) -> Any:
        """Return inputs of one forward pass: the example, or the first batch's."""
        if self.example is not None:
            return self.example
        if self.data is None:
            raise InputError("data= is needed to see what the model takes in")
        (inputs, _), self.data = first_pair(self.data)
        return inputs

    def loss_of(self, outputs: Any, targets: Any, number: int) -> Tensor:
        """Return the loss of a batch.

        Raises:
            InputError: there is no loss, or it is not finite.
        """
        if self.loss is None:
            raise InputError(NO_LOSS)
        value = self.loss(outputs, targets)
        require_finite(value, number)
        return value

    @cached_property
    def in_float64(self) -> Run:
        """The same with a copy of the model and the data in float64."""
        copied = self.copied()
        data = None if self.data is None else _Float64(self.data)
        return replace(copied, data=data, example=in_float64(self.example))

    def copied(self) -> Run:
        """Return the same with a copy of the model in float64, and the data as they are."""
        self.require_whole()
        model = copy.deepcopy(self.model).double()
        ours = {id(parameter): name for name, parameter in self.model.named_parameters()}
        theirs = dict(model.named_parameters())
        for one in self.tensors:
            theirs[ours[id(one.parameter)]].requires_grad_(True)
        return replace(self, model=model, tensors=[replace(one, parameter=theirs[ours[id(one.parameter)]]) for one in self.tensors])

    @contextmanager
    def requiring_gradients(self) -> Iterator[None]:
        """Inside, the weights require gradients."""
        self.require_whole()
        before = [one.parameter.requires_grad for one in self.tensors]
        try:
            for one in self.tensors:
                one.parameter.requires_grad_(True)
            yield
        finally:
            for one, required in zip(self.tensors, before, strict=True):
                one.parameter.requires_grad_(required)

    def require_whole(self) -> None:
        """Raise an InputError if a weight is sharded."""
        for one in self.tensors:
            if is_sharded(one.parameter):
                raise InputError(f"{one.name}: statistics of gradients and of the whole model need weights that are not sharded")

    @property
    def weights(self) -> list[Tensor]:
        """The weights themselves."""
        return [one.parameter for one in self.tensors]

    def views(self, values: Sequence[Tensor]) -> Values:
        """Return values of the weights' shapes in their views, float64, by name."""
        return {one.name: one.view(value).to(torch.float64) for one, value in zip(self.tensors, values, strict=True)}


class _Float64:
    """Batches with every floating-point tensor in float64."""

    def __init__(self, data: Iterable[Batch]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            yield in_float64(batch) if isinstance(batch, tuple | list) else batch


class Replay:
    """Batches of an iterator that can be read again: those read so far are kept.

    >>> again = Replay(iter([1, 2, 3]))
    >>> next(iter(again)), list(again)
    (1, [1, 2, 3])
    """

    def __init__(self, data: Iterator[Any]) -> None:
        self._rest = data
        self._kept: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            if number == len(self._kept):
                try:
                    self._kept.append(next(self._rest))
                except StopIteration:
                    return
            yield self._kept[number]
            number += 1


def plain(model: nn.Module) -> nn.Module:
    """Return the module inside what compiles or replicates it, whose backward passes speak with nobody."""
    while True:
        inner = model._orig_mod if hasattr(model, "_orig_mod") else None
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def differentiable() -> Iterator[None]:
    """Inside, gradients are recorded, and attention takes a form that can be differentiated twice and vectorized."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield
