"""What share of the active pieces is exchanged at an update, over the course of the schedule."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, SerializationInfo

from niwaki.component import Component, build
from niwaki.errors import InputError

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class Decay(Component):
    """Base of the slot ``decay``: the share of active pieces that is exchanged, over the course of the schedule."""

    slot = "decay"

    single_field = "initial"

    initial: Share = 0.3

    def at(self, progress: float) -> float:
        """Return the fraction to drop at ``progress`` = step / last step of the schedule, in [0, 1].

        Raises:
            InputError: progress outside [0, 1].
        """
        if not 0.0 <= progress <= 1.0:
            raise InputError(f"decay.{self.name}: progress must be in [0, 1], got {progress!r}")
        return self.value(progress)

    def value(self, progress: float) -> float:
        """Return the fraction at a progress that is known to be in [0, 1]."""
        raise NotImplementedError


class ConstantDecay(Decay):
    """The same fraction at every update. In a recipe a bare number stands for it: ``fraction: 0.3``.

    Attributes:
        initial: ``f0``, in [0, 1].
    """

    name = "constant"
    equation = "f = f0"
    source = "Mocanu et al. 2018 (SET, f0 = 0.3)"

    def value(self, progress: float) -> float:  # noqa: D102
        return self.initial


class CosineDecay(Decay):
    """From ``initial`` to zero along half a cosine wave.

    Attributes:
        initial: ``f0``, in [0, 1].

    >>> CosineDecay(initial=0.3).at(0.0), CosineDecay(initial=0.3).at(1.0)
    (0.3, 0.0)
    """

    name = "cosine"
    equation = "f = f0 / 2 (1 + cos(pi p)), p = t / T_last"
    source = "Dettmers & Zettlemoyer 2019; Evci et al. 2020 (RigL, f0 = 0.3)"

    def value(self, progress: float) -> float:  # noqa: D102
        return self.initial / 2.0 * (1.0 + math.cos(math.pi * progress))


class LinearDecay(Decay):
    """From ``initial`` to zero at a constant speed.

    Attributes:
        initial: ``f0``, in [0, 1].
    """

    name = "linear"
    equation = "f = f0 (1 - p), p = t / T_last"
    source = "Dettmers & Zettlemoyer 2019"

    def value(self, progress: float) -> float:  # noqa: D102
        return self.initial * (1.0 - progress)


class PowerDecay(Decay):
    """From ``initial`` to zero by a power of the time that is left.

    Attributes:
        initial: ``f0``, in [0, 1].
        exponent: ``x``, above 0.
    """

    name = "power"
    equation = "f = f0 (1 - p)^x, p = t / T_last"
    source = "Evci et al. 2020 (RigL, appendix)"

    exponent: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 3.0

    def value(self, progress: float) -> float:  # noqa: D102
        return self.initial * math.pow(1.0 - progress, self.exponent)


def _decay(data: Any) -> Component:
    if isinstance(data, int | float) and not isinstance(data, bool):
        return build("decay", {"constant": {"initial": data}})
    return build("decay", data)


def _decay_data(decay: Decay, info: SerializationInfo) -> Any:
    return decay.initial if isinstance(decay, ConstantDecay) else decay.to_data(defaults=not info.exclude_unset)


DecayField = Annotated[Decay, BeforeValidator(_decay), PlainSerializer(_decay_data)]
"""A field that holds a decay: a number, a name, or ``{name: {field: value}}``."""
