"""Accumulators of the training's own steps, one class for each request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.statistics.base import Statistic
from niwaki.statistics.steps import InitialWeight, Momentum, Movement, PathSensitivity, StepGradients, WeightChange


class StepAccumulator(ABC):
    """Follows one tensor. Tensors are in the layout's view; it keeps copies."""

    @abstractmethod
    def update(self, weight: Tensor, gradient: Tensor) -> None:
        """Look at the weight and its gradient before an optimizer step."""

    @abstractmethod
    def value(self, weight: Tensor) -> Tensor:
        """Return the statistic, ``weight`` being the weight now."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors and numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""


class _Kept(StepAccumulator):
    """Base: the state is a few float64 tensors of the weight's shape."""

    def __init__(self, request: Statistic, weight: Tensor) -> None:
        self._kept = {
            key: _copy(weight) if key in ("initial", "weight") else torch.zeros_like(weight, dtype=torch.float64) for key in self.keys
        }

    keys: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {key: tensor.clone() for key, tensor in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, tensor in self._kept.items():
            tensor.copy_(state[key])


class _Initial(_Kept):
    keys = ("initial",)

    def update(self, weight: Tensor, gradient: Tensor) -> None:
        pass

    def value(self, weight: Tensor) -> Tensor:
        return self._kept["initial"]


class _Movement(_Kept):
    keys = ("total",)

    def __init__(self, request: Movement, weight: Tensor) -> None:
        super().__init__(request, weight)
        self._decay = request.decay

    def update(self, weight: Tensor, gradient: Tensor) -> None:
        moved = _copy(gradient).mul_(weight)
        if self._decay is None:
            self._kept["total"] -= moved
        else:
            self._kept["total"].mul_(self._decay).sub_(moved, alpha=1.0 - self._decay)

    def value(self, weight: Tensor) -> Tensor:
        return self._kept["total"]


class _Momentum(_Kept):
    keys = ("mean",)

    def __init__(self, request: Momentum, weight: Tensor) -> None:
        super().__init__(request, weight)
        self._decay = request.decay

    def update(self, weight: Tensor, gradient: Tensor) -> None:
        self._kept["mean"].lerp_(_copy(gradient), 1.0 - self._decay)

    def value(self, weight: Tensor) -> Tensor:
        return self._kept["mean"]


class _Change(_Kept):
    keys = ("total", "weight")

    def update(self, weight: Tensor, gradient: Tensor) -> None:
        self._kept["total"] += (weight - self._kept["weight"]).abs_()
        self._kept["weight"].copy_(weight)

    def value(self, weight: Tensor) -> Tensor:
        return self._kept["total"] + (weight - self._kept["weight"]).abs_()


class _Path(_Kept):
    keys = ("total", "weight", "gradient")

    def update(self, weight: Tensor, gradient: Tensor) -> None:
        self._kept["total"] += (weight - self._kept["weight"]).mul_(self._kept["gradient"])
        self._kept["weight"].copy_(weight)
        self._kept["gradient"].copy_(gradient)

    def value(self, weight: Tensor) -> Tensor:
        return self._kept["total"] + (weight - self._kept["weight"]).mul_(self._kept["gradient"])


class _Gradients(StepAccumulator):
    """A ring of gradients."""

    def __init__(self, request: StepGradients, weight: Tensor) -> None:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._ring = torch.empty(request.window, *weight.shape, dtype=dtype, device=weight.device)
        self._count = self._next = 0

    def update(self, weight: Tensor, gradient: Tensor) -> None:
        self._ring[self._next].copy_(gradient)
        self._next = (self._next + 1) % len(self._ring)
        self._count = min(self._count + 1, len(self._ring))

    def value(self, weight: Tensor) -> Tensor:
        """Return the ring itself, turned so that the oldest comes first: it changes with the next update."""
        if self._count == len(self._ring) and self._next:
            for part in torch.split(
                self._ring.view(len(self._ring), -1), 4096, dim=1
            ):  # in place: a copy of the whole would double the memory
                part.copy_(part.roll(-self._next, dims=0))
            self._next = 0
        return self._ring[: self._count]

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self.value(self._ring[0]).clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count = len(state["gradients"])
        self._next = self._count % len(self._ring)
        self._ring[: self._count].copy_(state["gradients"])


_ACCUMULATORS: Mapping[type[Statistic], Callable[[Any, Tensor], StepAccumulator]] = {
    InitialWeight: _Initial,
    Momentum: _Momentum,
    Movement: _Movement,
    PathSensitivity: _Path,
    StepGradients: _Gradients,
    WeightChange: _Change,
}


def accumulator(request: Statistic, weight: Tensor) -> StepAccumulator:
    """Return what answers a request of the training's steps for a tensor whose weight is now ``weight``, in the layout's view.

    Raises:
        InputError: the request is not one of steps.

    >>> watched = accumulator(Movement(), torch.tensor([2.0]))
    >>> watched.update(torch.tensor([2.0]), torch.tensor([-3.0]))
    >>> watched.value(torch.tensor([2.5])).tolist()
    [6.0]
    """
    if type(request) not in _ACCUMULATORS:
        raise InputError(f"{type(request).__name__} is not collected over the steps of a training; ask niwaki.calibration for it")
    return _ACCUMULATORS[type(request)](request, weight.detach())


def _copy(values: Tensor) -> Tensor:
    return values.detach().to(torch.float64, copy=True)
