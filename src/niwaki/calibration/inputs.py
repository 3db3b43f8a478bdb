"""Statistics of what weights read, all in one forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.calibration.across import gathered, share
from niwaki.calibration.passes import forward
from niwaki.calibration.reading import before_reading, column_chunks, column_squares, entries, input_chunks
from niwaki.calibration.run import Run, Watched
from niwaki.errors import InputError
from niwaki.layout import columns_view, matrix
from niwaki.masks import is_sharded
from niwaki.statistics import (
    Coactivity,
    Covariance,
    InputCovariance,
    InputGram,
    InputMean,
    InputResponses,
    InputSize,
    InputSquare,
    InputStatistic,
    InputVariance,
    InputZeros,
    Mean,
    Statistic,
)


def input_statistics(run: Run, requests: Sequence[InputStatistic]) -> dict[str, dict[Statistic, Any]]:
    """Return tensor name -> request -> value."""
    readers = {one.name: {request: _READERS[type(request)](request, one) for request in requests} for one in run.tensors}

    def look(one: Watched, module: nn.Module, inputs: Tensor) -> None:
        for reader in readers[one.name].values():
            reader.look(module, inputs)

    with torch.no_grad(), before_reading(run.model, run.tensors, look):
        for _, inputs, _ in run.batches():
            forward(run.model, inputs)
            if all(reader.full for mine in readers.values() for reader in mine.values()):
                break
    return {name: {request: reader.value() for request, reader in mine.items()} for name, mine in readers.items()}


class _Reader(ABC):
    """Answers one request for one weight."""

    full = False
    """Whether it needs no more data."""

    def __init__(self, request: Any, one: Watched) -> None:
        self.request, self.one = request, one

    @abstractmethod
    def look(self, module: nn.Module, inputs: Tensor) -> None:
        """Take in what a module reads."""

    @abstractmethod
    def value(self) -> Tensor:
        """Return what was asked for, of all ranks."""

    def view(self, found: Tensor) -> Tensor:
        """Return a number for each input or column in the layout's view."""
        return columns_view(found.reshape(self.one.layout.size("group"), -1), self.one.layout)


class _MeanReader(_Reader):
    def __init__(self, request: Any, one: Watched) -> None:
        super().__init__(request, one)
        self.mean = Mean()

    def look(self, module: nn.Module, inputs: Tensor) -> None:
        for total, count in _SUMS[type(self.request)](self.one, module, inputs):
            self.mean.update(total, count)

    def value(self) -> Tensor:
        self.mean.all_reduce()
        return self.mean.value() if isinstance(self.request, InputGram) else self.view(self.mean.value())


class _VarianceReader(_Reader):
    def __init__(self, request: Any, one: Watched) -> None:
        super().__init__(request, one)
        self.covariance = Covariance(full=isinstance(request, InputCovariance))

    def look(self, module: nn.Module, inputs: Tensor) -> None:
        for values in input_chunks(module, self.one.layout, inputs):
            self.covariance.update(values)

    def value(self) -> Tensor:
        self.covariance.all_reduce()
        return self.covariance.value() if self.covariance.full else self.view(self.covariance.value())


class _ResponseReader(_Reader):
    """Responses of the first examples; ranks share them out evenly."""

    def __init__(self, request: InputResponses, one: Watched) -> None:
        super().__init__(request, one)
        self.missing = share(request.examples)
        self.responses: list[Tensor] = []

    @property
    def full(self) -> bool:  # type: ignore[override]
        return self.missing <= 0

    def look(self, module: nn.Module, inputs: Tensor) -> None:
        some = entries(module, self.one.layout, inputs)[: max(0, self.missing)].mean(dim=1, dtype=torch.float64)
        self.responses.append(some)
        self.missing -= len(some)

    def value(self) -> Tensor:
        return gathered(torch.cat(self.responses))


class _CoactivityReader(_Reader):
    """Products of outputs with columns, and the squares of both."""

    def __init__(self, request: Coactivity, one: Watched) -> None:
        super().__init__(request, one)
        if is_sharded(one.parameter):
            raise InputError(f"{one.name}: what its module puts out needs the whole weight, and it is sharded; choose another growth")
        self.products, self.outputs, self.columns = Mean(), Mean(), Mean()

    def look(self, module: nn.Module, inputs: Tensor) -> None:
        if isinstance(module, nn.Embedding):
            raise InputError(f"{self.one.name}: an embedding reads words, which are not active together; exclude it from the target")
        weight = matrix(self.one.parameter.detach(), self.one.layout).double()
        bias = module.bias.detach().double() if isinstance(module.bias, Tensor) else weight.new_zeros(())
        for chunk in column_chunks(module, self.one.layout, inputs, self.one.name):
            columns = chunk.double().movedim(0, 1)  # [groups, observations, columns]
            outputs = columns @ weight.mT + (bias.view(len(weight), 1, -1) if bias.ndim else bias)
            self.products.update(outputs.mT @ columns, len(chunk))
            self.outputs.update(outputs.square().sum(dim=1), len(chunk))
            self.columns.update(columns.square().sum(dim=1), len(chunk))

    def value(self) -> Tensor:
        for mean in (self.products, self.outputs, self.columns):
            mean.all_reduce()
        products = self.products.value()
        if not self.request.normalized:
            return products
        sizes = (self.outputs.value()[:, :, None] * self.columns.value()[:, None, :]).sqrt()
        return (products / sizes).where(sizes > 0, 0.0)


Sums = Iterator[tuple[Tensor, int]]
"""Sums over observations, and of how many."""


def _entrywise(function: Callable[[Tensor], Tensor]) -> Callable[[Watched, nn.Module, Tensor], Sums]:
    def sums(one: Watched, module: nn.Module, inputs: Tensor) -> Sums:
        for values in input_chunks(module, one.layout, inputs):
            yield function(values).sum(dim=0, dtype=torch.float64), len(values)

    return sums


def _squares(one: Watched, module: nn.Module, inputs: Tensor) -> Sums:
    yield column_squares(module, one.layout, inputs, one.name)


def _products(one: Watched, module: nn.Module, inputs: Tensor) -> Sums:
    for chunk in column_chunks(module, one.layout, inputs, one.name):
        columns = chunk.double().movedim(0, 1)  # [groups, observations, columns]
        yield columns.mT @ columns, len(chunk)


_SUMS: Mapping[type[Statistic], Callable[[Watched, nn.Module, Tensor], Sums]] = {
    InputSize: _entrywise(torch.abs),
    InputMean: _entrywise(lambda values: values),
    InputZeros: _entrywise(lambda values: values == 0),
    InputSquare: _squares,
    InputGram: _products,
}

_READERS: Mapping[type[Statistic], Callable[[Any, Watched], _Reader]] = {
    **dict.fromkeys(_SUMS, _MeanReader),
    InputVariance: _VarianceReader,
    InputCovariance: _VarianceReader,
    InputResponses: _ResponseReader,
    Coactivity: _CoactivityReader,
}
