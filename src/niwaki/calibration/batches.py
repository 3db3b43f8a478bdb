"""Batches of any structure, as tensors along whose first dimension the examples lie."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from niwaki.calibration.passes import Arguments, pairs
from niwaki.errors import InputError


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return tuples, lists, mappings and :class:`Arguments` with every tensor in them replaced; anything else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Arguments):
        return Arguments(mapped(function, value.args), mapped(function, dict(value.kwargs)))
    if isinstance(value, Mapping):
        return {key: mapped(function, part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, part) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(function, part) for part in value)
    return value


def leaves(value: Any) -> list[Tensor]:
    """Return the tensors inside, in the order in which :func:`mapped` meets them."""
    found: list[Tensor] = []
    mapped(found.append, value)
    return found


def replaced(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the value with other tensors in the places of :func:`leaves`."""
    rest: Iterator[Tensor] = iter(tensors)
    return mapped(lambda _: next(rest), value)


def count(inputs: Any) -> int:
    """Return how many examples a batch has: the first dimension of its first tensor that has one; 1 when there is none."""
    return next((len(tensor) for tensor in leaves(inputs) if tensor.ndim), 1)


@dataclass(frozen=True, eq=False)
class Examples:
    """Some examples of a batch.

    Attributes:
        batch: anything with tensors in it.
        tensors: those tensors.
        by_example: of each whether the examples lie along its first dimension; otherwise it belongs to all of them.
        size: how many examples.
    """

    batch: Any
    tensors: Sequence[Tensor]
    by_example: Sequence[bool]
    size: int

    @classmethod
    def of(cls, inputs: Any, targets: Any) -> Examples:
        """Return a batch ``(inputs, targets)``: tensors as long as the first one of the inputs are cut into examples."""
        size = count(inputs)
        tensors = leaves((inputs, targets))
        return cls((inputs, targets), tensors, [tensor.ndim > 0 and len(tensor) == size for tensor in tensors], size)

    @property
    def value(self) -> Any:
        """The batch, of these examples alone."""
        return replaced(self.batch, self.tensors)

    def part(self, start: int, stop: int) -> Examples:
        """Return the examples from ``start`` to before ``stop``."""
        tensors = [t[start:stop] if by else t for t, by in zip(self.tensors, self.by_example, strict=True)]
        return replace(self, tensors=tensors, size=stop - start)

    def and_then(self, other: Examples) -> Examples:
        """Return these and other examples together.

        Raises:
            InputError: they differ in more than their number.
        """
        alike = list(self.by_example) == list(other.by_example) and all(
            a.shape[1:] == b.shape[1:] if by else torch.equal(a, b)
            for a, b, by in zip(self.tensors, other.tensors, self.by_example, strict=True)
        )
        if not alike:
            raise InputError(
                "data: a gradient of samples_per_gradient examples would join batches of different shapes; give batches whose size is a"
                " multiple of samples_per_gradient, or samples_per_gradient: null for one gradient of each batch"
            )
        both = [torch.cat([a, b]) if by else a for a, b, by in zip(self.tensors, other.tensors, self.by_example, strict=True)]
        return replace(self, tensors=both, size=self.size + other.size)


def examples(data: Iterable[tuple[Any, Any]], count: int = 1) -> Iterator[tuple[Any, Any]]:
    """Yield parts of the batches with ``count`` examples each; the last of a batch may have fewer.

    Raises:
        InputError: a batch whose inputs have no tensor with a first dimension.

    >>> [inputs.tolist() for inputs, _ in examples([(torch.arange(3), None)], 2)]
    [[0, 1], [2]]
    """
    for inputs, targets in pairs(data):
        if not any(tensor.ndim for tensor in leaves(inputs)):
            raise InputError(f"data: expected inputs with a first dimension of examples, got {type(inputs).__name__}")
        batch = Examples.of(inputs, targets)
        for start in range(0, batch.size, count):
            yield batch.part(start, min(start + count, batch.size)).value


def in_float64(value: Any) -> Any:
    """Return the value with every floating-point tensor in float64."""
    return mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)


def logits_of(outputs: Any) -> Tensor:
    """Return the tensor that a model answers with: its output, or the ``logits`` of that.

    Raises:
        InputError: there is neither.
    """
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(f"model: its output must be a tensor or have logits for this statistic, got {type(outputs).__name__}")
    return logits


def with_logits(outputs: Any, logits: Tensor) -> Any:
    """Return a model's answer with other logits."""
    if isinstance(outputs, Tensor):
        return logits
    changed = copy.copy(outputs)
    changed.logits = logits
    return changed


def class_dimension(outputs: Tensor) -> int:
    """Return the dimension of classes or features: 1 of maps ``[examples, classes, height, width]``, otherwise the last."""
    return 1 if outputs.ndim >= 4 else outputs.ndim - 1
