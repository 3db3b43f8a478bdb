"""Statistics of the training's own steps: what weights and gradients add up to while a sparsifier is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from niwaki.binding import Bound
from niwaki.collecting import Values
from niwaki.masked import MaskedTensor
from niwaki.statistics import Statistic, StepAccumulator, accumulator


class StepWatch:
    """Looks at weights and gradients before every step.

    Args:
        asked: statistic -> the tensors that it is asked of; those of steps count.
        tensors: all tensors by name.
    """

    def __init__(self, asked: Mapping[Statistic, Sequence[Bound]], tensors: Mapping[str, MaskedTensor]) -> None:
        self._tensors = tensors
        self._watched: dict[tuple[str, Statistic], StepAccumulator] = {
            (bound.name, request): accumulator(request, tensors[bound.name].weight)
            for request, bounds in asked.items()
            if request.source == "steps"
            for bound in bounds
        }

    def look(self, scale: Tensor | None = None) -> None:
        """Take in the weights and gradients of a step that is about to be taken.

        Args:
            scale: of the gradients, where a fused optimizer under a gradient scaler divides by it in its own step.
        """
        for (name, _), watched in self._watched.items():
            tensor = self._tensors[name]
            gradient = tensor.bound.parameter.grad
            if gradient is not None:
                seen = tensor.bound.view(gradient.to_dense() if gradient.is_sparse else gradient)
                watched.update(tensor.weight, seen if scale is None else seen / scale)

    def values(self) -> Values:
        """Return tensor name -> statistic -> its value so far."""
        found: dict[str, dict[Statistic, Any]] = {}
        for (name, request), watched in self._watched.items():
            found.setdefault(name, {})[request] = watched.value(self._tensors[name].weight)
        return found

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the states, in the order of what is asked."""
        return [watched.state_dict() for watched in self._watched.values()]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from states."""
        for watched, state in zip(self._watched.values(), states, strict=True):
            watched.load_state_dict(state)
