"""Which pruned pieces come back, and what share of the active ones is exchanged at an update (drop and grow).

An update of a tensor (or, with ``allocation: global``, of all tensors together) with ``n`` active pieces goes in this order, which is
that of RigL (Evci, Gale, Menick, Castro, Elsen 2020):

1. Of the active pieces the ``K = floor(f(t) n)`` with the lowest saliency are dropped; ``n - K`` stay.
2. The candidates for growth are **all** pieces that do not stay: the dropped ones compete too, and may be regrown at once.
3. The ``K`` candidates with the highest growth score become active, so that the number of active pieces is unchanged.
4. A piece that was inactive before the update starts at zero, with fresh optimizer state. A piece that was dropped and regrown in
   the same update keeps its value and its state.
5. With ``at_update: skip_step`` the optimizer takes no step: the gradient of that step only chose what grows.

The growth score comes from the weights and gradients before the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, SerializationInfo
from torch import Tensor

from niwaki.component import Component, build
from niwaki.counter import key, uniform
from niwaki.errors import InputError

if TYPE_CHECKING:
    from niwaki.saliency import Observation

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


def dropped(fraction: float, active: int) -> int:
    """Return how many of the active pieces an update drops: ``K = floor(fraction * active)``, the product in float64.

    Args:
        fraction: in [0, 1].
        active: number of active pieces.

    Raises:
        InputError: a fraction outside [0, 1] or a negative count.

    >>> dropped(0.3, 10), dropped(0.3, 9), dropped(1.0, 7)
    (3, 2, 7)
    """
    if not 0.0 <= fraction <= 1.0 or active < 0:
        raise InputError(f"the fraction to drop must be in [0, 1] and the count at least 0, got {fraction!r} and {active!r}")
    return math.floor(fraction * active)


class Growth(Component):
    """Base of the slot ``growth``."""

    slot = "growth"

    grows: ClassVar[bool] = False
    """Whether updates drop a fraction of the active pieces and grow others in their place by ``score`` (see ``DropAndGrow``)."""

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Return how soon each piece comes back, higher = sooner; read only for pieces that are candidates.

        Args:
            seen: one tensor, in the shape of its layout's view.
            reduce: sums the elements of each piece.

        Returns:
            a floating-point tensor, one number a piece.

        Raises:
            InputError: a statistic that it needs is absent.
        """
        raise NotImplementedError


class NoGrowth(Growth):
    """Nothing comes back: a pruned piece stays pruned."""

    name = "none"
    equation = "M_t+1 <= M_t"
    source = "the usual pruning; LeCun, Denker, Solla 1989"


class AllGrowth(Growth):
    """Everything may come back: each update chooses among all pieces anew, and a dense phase restores them all, at zero.

    All candidates score the same, so where fewer than all come back they do by index.
    """

    name = "all"
    equation = "M = 1 at a dense time"
    source = "Han et al. 2017 (DSD); Peste, Iofinova, Vladu, Alistarh 2021 (AC/DC)"

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        return torch.zeros_like(reduce(torch.zeros_like(seen.weight)))


class DropAndGrow(Growth):
    """What the growths that exchange a fraction of the active pieces have in common.

    Attributes:
        fraction: ``f(t)``, the share of active pieces dropped at an update, and its decay over the schedule.
        at_update: ``skip_step``: the optimizer takes no step when masks are updated; ``step``: it does.
        initial_mask: how the first mask is chosen: ``random``, or by the recipe's ``saliency``.
    """

    grows = True

    fraction: DecayField = ConstantDecay(initial=0.3)
    at_update: Literal["skip_step", "step"] = "step"
    initial_mask: Literal["random", "saliency"] = "random"


class RandomGrowth(DropAndGrow):
    """Pruned pieces come back at random, each with the same chance.

    A piece's number is the fractional part of the sum of its elements' uniform numbers, which is again uniform, so that pieces
    that are cut short at an edge have the same chance as whole ones, and shards of a tensor agree with the whole.
    """

    name = "random"
    equation = "G = frac(sum over piece of u), u uniform in [0, 1)"
    source = "Mocanu et al. 2018 (SET)"

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        weight = seen.weight
        # A stream of its own: the random saliency may draw for the same tensor at the same step.
        numbers = uniform(key(seen.seed, seen.step, f"growth {seen.name}"), seen.start, weight.numel(), weight.device)
        return reduce(numbers.view(weight.shape)).remainder(1.0)


class GradientGrowth(DropAndGrow):
    """Pruned pieces come back where the loss would fall fastest: at the largest gradients of the dense model.

    The gradient is that of all elements at the pruned model, and is needed only at update steps.
    """

    name = "gradient"
    equation = "G = sum over piece of |dL/dw|"
    source = "Evci, Gale, Menick, Castro, Elsen 2020 (RigL)"
    needs = frozenset({"gradient"})

    fraction: DecayField = CosineDecay(initial=0.3)
    at_update: Literal["skip_step", "step"] = "skip_step"

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        if seen.gradient is None:
            raise InputError(f"growth.gradient: {seen.name} has no gradient at this update; it must take part in the loss")
        # Sums over pieces in at least float32: bfloat16 would lose small addends.
        return reduce(seen.gradient.abs().to(torch.promote_types(seen.gradient.dtype, torch.float32)))
