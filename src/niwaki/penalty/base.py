"""The interface of a penalty, and what it may look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.clock import Clock, Time, TimeField
from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.layout import Layout

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

Of = Literal["weight", "norm", "gate"]
"""What can be penalized: the weights of the target, the scales of all normalizations, or the gates of the relaxation."""

Weigh = Literal["none", "flops", "parameters"]

AT_ONCE = Time(0.0, "steps")

State = Mapping[str, Tensor]
"""What a penalty remembers: name -> tensor."""


@dataclass(frozen=True)
class Penalized:
    """All that a penalty may look at, for one tensor of numbers that it pulls: weights, scales, gates, or probabilities of being active.

    Attributes:
        weight: the numbers; of weights those that are trained.
        active: bool, the elements of the forward pass; None for all.
        learns: bool, the elements that learn, contains ``active``; None for all.
        density: share of active elements that the recipe asks for, in (0, 1].
        norm: L2 norm of the piece that each element belongs to, over all tensors of the piece, for penalties that are ``grouped``; 0
            where an element belongs to none. Broadcasts against the weight.
        size: number of elements of that piece, for penalties that are ``grouped``. Broadcasts against the weight.
        norms: the norms of all pieces that are penalized together, ``[pieces]``, for penalties that are ``grouped``.
        cost: factor of the strength, as ``weigh`` says: what a number costs, relative to the mean. Broadcasts against the weight.
        ramp: factor of the strength, as ``begin`` and ``end`` say, in [0, 1].
        gradient: of the loss, for penalties that need it.
        layout: roles of the dimensions, where the numbers are weights.
        state: what the penalty remembers of this tensor.
        shared: what it remembers of all of them together.
    """

    weight: Tensor
    active: Tensor | None = None
    learns: Tensor | None = None
    density: float = 1.0
    norm: Tensor | None = None
    size: Tensor | None = None
    norms: Tensor | None = None
    cost: Tensor | float = 1.0
    ramp: float = 1.0
    gradient: Tensor | None = None
    layout: Layout | None = None
    state: State = field(default_factory=dict)
    shared: State = field(default_factory=dict)


class Penalty(Component):
    """Base of the slot ``penalty``."""

    slot = "penalty"

    @property
    def penalties(self) -> tuple[Single, ...]:
        """The single penalties that it consists of."""
        raise NotImplementedError

    def validate_with(self, clock: Clock) -> None:
        """Check the times of all of them against the run.

        Raises:
            InputError: a unit that the clock cannot resolve, an end before the begin or after the run, or an interval of zero.
        """
        for penalty in self.penalties:
            penalty.check(clock)


class Single(Penalty):
    """One penalty. A base class, itself not registered.

    Attributes:
        apply: how it acts: ``gradient``, ``decoupled``, or ``proximal`` where the proximal step has a closed form.
        begin: before this time it does not act.
        end: from this time on it acts in full; its strength grows linearly between the two.
    """

    whole: ClassVar[bool] = False
    """Whether it looks at whole tensors, or at all of them together, which shards of them do not show."""
    remembers: ClassVar[bool] = False
    """Whether it has a state, which ``refresh`` makes."""
    wants_gradient: ClassVar[bool] = False
    """Whether it reads the gradient of the loss."""

    apply: Literal["gradient", "proximal", "decoupled"] = "gradient"
    begin: TimeField = AT_ONCE
    end: TimeField = AT_ONCE

    @property
    def penalties(self) -> tuple[Single, ...]:
        """Itself alone."""
        return (self,)

    @property
    def reads(self) -> str:
        """What it is a penalty of: ``weight``, ``norm``, ``gate``; ``active``, ``divergence`` or ``threshold`` of the relaxation."""
        return str(getattr(self, "of", "weight"))

    @property
    def grouped(self) -> bool:
        """Whether it is about whole pieces of the recipe's granularity, and reads their norms and sizes."""
        return False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of the class, unless a field decides
        """How often each weight is used, if strengths are weighed by FLOPs."""
        return frozenset({"flops"} if getattr(self, "weigh", "none") == "flops" else ())

    @property
    def pulls(self) -> bool:
        """Whether it adds a gradient before the optimizer's step."""
        return self.apply == "gradient"

    @property
    def after_step(self) -> bool:
        """Whether it acts by ``step`` after the optimizer's."""
        return self.apply != "gradient"

    def check(self, clock: Clock) -> None:
        """Check its times against the run, as :meth:`validate_with`."""
        begin, end, every = clock.steps(self.begin), clock.steps(self.end), getattr(self, "every", None)
        if end < begin and self.end != AT_ONCE:
            raise InputError(f"penalty.{self.name}: end ({self.end} = step {end}) must not come before begin ({self.begin} = step {begin})")
        if clock.total_steps is not None and max(begin, end) > clock.total_steps:
            raise InputError(
                f"penalty.{self.name}: it acts in full only from step {max(begin, end)} on, after the run's {clock.total_steps} steps;"
                " lengthen the run, or say times in run, such as 0.25 run"
            )
        if every is not None and clock.interval(every) < 1:
            raise InputError(f"penalty.{self.name}.every: must be longer than zero, got {every}")

    def ramp(self, step: int, clock: Clock) -> float:
        """Return the share of the strength that acts at a step: 0 before ``begin``, 1 from ``end`` on, linear between.

        >>> from niwaki.penalty import L1
        >>> [L1(begin="10 steps", end="20 steps").ramp(step, Clock()) for step in (5, 10, 15, 20, 25)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
        """
        begin, end = clock.steps(self.begin), clock.steps(self.end)
        if step >= max(begin, end):
            return 1.0
        return max(step - begin, 0) / (end - begin) if end > begin else 0.0

    def interval(self, clock: Clock) -> int:
        """Return the steps between two times that its state is made anew: its ``every``, or each step."""
        every: Time | None = getattr(self, "every", None)
        return 1 if every is None else clock.interval(every)

    def refresh(self, everyone: Sequence[Penalized]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return a new state for each tensor, and one that all share; those that the first call sees are empty."""
        return [{} for _ in everyone], {}

    def value(self, seen: Penalized) -> Tensor:
        """Return what the loss gains by one tensor, differentiable in its ``weight``."""
        raise NotImplementedError

    def slope(self, seen: Penalized) -> Tensor:
        """Return the derivative of ``value`` at each element."""
        with torch.enable_grad():
            weight = seen.weight.detach().requires_grad_()
            [found] = torch.autograd.grad(self.value(replace(seen, weight=weight)), weight)
        return found

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return ``argmin_v |v - w|^2 / 2 + rate * value(v)``."""
        raise NotImplementedError

    def gradient(self, seen: Penalized) -> Tensor:
        """Return the penalty's gradient with respect to the weight, in its dtype, zero where nothing learns."""
        pull = self.slope(_precise(seen)).to(seen.weight.dtype)
        return pull if seen.learns is None else pull.masked_fill(~seen.learns, 0.0)

    def step(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight after a step of length ``rate``, for penalties that do not apply as a gradient; never -0.0 by it."""
        if self.apply == "decoupled":
            return seen.weight - rate * self.gradient(seen)
        found = self.proximal(_precise(seen), rate).to(seen.weight.dtype)
        found = found.masked_fill(found == 0, 0.0)
        return found if seen.learns is None else found.where(seen.learns, seen.weight)


class WithStrength(Single):
    """A penalty times a number. A base class, itself not registered.

    Attributes:
        strength: non-negative factor of the penalty.
    """

    strength: NotNegative = 1e-4

    def factor(self, seen: Penalized) -> Tensor | float:
        """Return the strength at this moment on each element."""
        return seen.cost * (self.strength * seen.ramp)


class Elementwise(WithStrength):
    """A sum over numbers of a curve of their sizes, each times its strength. A base class, itself not registered.

    Attributes:
        of: ``weight`` for the recipe's target, ``norm`` for the scales of all normalization layers, whatever the target, ``gate`` for
            the gates of the recipe's relaxation.
        weigh: multiply the strength by what a number stands for, relative to the mean: ``flops`` or ``parameters``. A weight stands for
            itself, a gate for its piece, and a scale for its unit (with granularity ``channel``).
    """

    of: Of = "weight"
    weigh: Weigh = "none"

    def curve(self, size: Tensor) -> Tensor:
        """Return the penalty at strength 1 of numbers of these sizes."""
        raise NotImplementedError

    def rise(self, size: Tensor) -> Tensor | float:
        """Return the derivative of ``curve``."""
        raise NotImplementedError

    def value(self, seen: Penalized) -> Tensor:
        """Return the sum of the curve over the elements."""
        return (self.curve(seen.weight.abs()) * self.factor(seen)).sum()

    def slope(self, seen: Penalized) -> Tensor:
        """Return the sign of each element times the rise of the curve, 0 at 0."""
        return torch.sign(seen.weight) * (self.rise(seen.weight.abs()) * self.factor(seen))


def soft_threshold(weight: Tensor, threshold: Tensor | float) -> Tensor:
    """Return ``sign(w) max(|w| - threshold, 0)``."""
    return torch.sign(weight) * (weight.abs() - threshold).clamp(min=0.0)


def _precise(seen: Penalized) -> Penalized:
    """Return the same with a weight of at least float32."""
    dtype: Any = torch.promote_types(seen.weight.dtype, torch.float32)
    return seen if seen.weight.dtype == dtype else replace(seen, weight=seen.weight.to(dtype))
