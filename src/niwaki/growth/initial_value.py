"""What a weight that has just grown starts from.

``w`` are the active weights of its tensor before the update, ``g`` the gradient of the loss, ``c`` the ``scale``. A weight that was dropped
and regrown in the same update is not new, and keeps its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, SerializationInfo
from torch import Tensor

from niwaki.component import Component, build
from niwaki.counter import key, normal, uniform
from niwaki.errors import InputError
from niwaki.statistics import InitialWeight, Statistic

if TYPE_CHECKING:
    from niwaki.saliency import Observation

Total = Callable[[Tensor], Tensor]
"""Sum of the elements of a tensor, over all processes that it is spread over: a float64 number."""

Scale = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class InitialValue(Component):
    """Base of the slot ``initial_value`` of growths."""

    slot = "initial_value"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What it asks to know of every tensor."""
        return ()

    def values(self, seen: Observation, total: Total) -> Tensor:
        """Return a value for every element of the tensor's view; those of new weights are used.

        Args:
            seen: the tensor before the update.
            total: sums over all parts of the tensor.
        """
        raise NotImplementedError


class Zero(InitialValue):
    """Zero: the model computes what it did before, and the gradient decides the rest."""

    name = "zero"
    equation = "w = 0"
    source = "Evci et al. 2020 (RigL); Dettmers & Zettlemoyer 2019"

    def values(self, seen: Observation, total: Total) -> Tensor:  # noqa: D102
        return torch.zeros_like(seen.weight)


class FromNormal(InitialValue):
    """Small and random: normal, with a share of the standard deviation of the tensor's active weights.

    Attributes:
        scale: ``c``, at least 0.
    """

    name = "normal"
    equation = "w = c σ N(0, 1), σ: root mean square deviation of the active weights"
    source = "Mocanu et al. 2018 (SET, small random values); code of Evci et al. 2020"
    single_field = "scale"

    scale: Scale = 0.1

    def values(self, seen: Observation, total: Total) -> Tensor:  # noqa: D102
        active, weight = _active(seen), seen.weight.to(torch.float64)
        number = total(active).clamp(min=1.0)
        mean = total(weight * active) / number
        deviation = (total((weight - mean).square() * active) / number).sqrt()
        return normal(_stream(seen), seen.start, weight.numel(), weight.device).view(weight.shape) * (self.scale * deviation)


class FromUniform(InitialValue):
    """Small and random: uniform, up to a share of the mean size of the tensor's active weights.

    Attributes:
        scale: ``c``, at least 0.
    """

    name = "uniform"
    equation = "w = c m U(-1, 1), m: mean |w| of the active weights"
    source = "code of Evci et al. 2020 (RigL)"
    single_field = "scale"

    scale: Scale = 0.1

    def values(self, seen: Observation, total: Total) -> Tensor:  # noqa: D102
        active, weight = _active(seen), seen.weight.to(torch.float64)
        size = total(weight.abs() * active) / total(active).clamp(min=1.0)
        numbers = uniform(_stream(seen), seen.start, weight.numel(), weight.device).view(weight.shape)
        return (2.0 * numbers - 1.0) * (self.scale * size)


class FromInitial(InitialValue):
    """What the weight was when the sparsifier was built, times a share: its initialization, where training begins there.

    Attributes:
        scale: ``c``, at least 0.
    """

    name = "initial"
    equation = "w = c w_0"
    source = "after the code of Evci et al. 2020, which draws from the tensor's own values"
    single_field = "scale"

    scale: Scale = 1.0

    @property
    def statistics(self) -> tuple[Statistic, ...]:  # noqa: D102
        return (InitialWeight(),)

    def values(self, seen: Observation, total: Total) -> Tensor:  # noqa: D102
        initial: Tensor = seen.of(InitialWeight())
        return initial * self.scale


class FromGradient(InitialValue):
    """Where the loss falls: against the gradient, whose size counts with a power.

    Power 1 is a step of gradient descent with the learning rate ``scale``, 0 takes the sign alone, and 1/2 is the rule of NeST.

    Attributes:
        scale: ``c``, at least 0.
        power: ``p``, at least 0.
    """

    name = "gradient"
    equation = "w = -c sign(g) |g|^p"
    source = "Dai, Yin, Jha 2018 (NeST, p = 1/2); code of Evci et al. 2020 (p = 1 and 0, with the gradient's own sign)"
    needs = frozenset({"gradient"})
    single_field = "scale"

    scale: Scale = 1e-2
    power: Scale = 1.0

    def values(self, seen: Observation, total: Total) -> Tensor:  # noqa: D102
        if seen.gradient is None:
            raise InputError(f"initial_value.gradient: {seen.name} has no gradient at step {seen.step}; it must take part in the loss")
        gradient = seen.gradient.to(torch.float64)
        return gradient.sign() * gradient.abs().pow(self.power) * -self.scale


def _active(seen: Observation) -> Tensor:
    ones = torch.ones_like(seen.weight, dtype=torch.float64)
    return ones if seen.active is None else seen.active.to(torch.float64).view(seen.weight.shape)


def _stream(seen: Observation) -> int:
    return key(seen.seed, seen.step, f"initial value {seen.name}")


def _value_data(value: InitialValue, info: SerializationInfo) -> Any:
    return value.to_data(defaults=not info.exclude_unset)


InitialValueField = Annotated[
    InitialValue, BeforeValidator(lambda data: build("initial_value", data)), PlainSerializer(_value_data, return_type=Any)
]
"""A field that holds an initial value: a name, or ``{name: {field: value}}``."""
