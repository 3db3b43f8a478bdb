"""What a growth is, those that exchange nothing, and what those that do have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.growth.decay import ConstantDecay, DecayField
from niwaki.growth.initial_value import InitialValueField, Total, Zero
from niwaki.statistics import Statistic

if TYPE_CHECKING:
    from niwaki.saliency import Observation


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
    """Whether updates drop some of the active pieces and grow others in their place by ``score`` (see ``DropAndGrow``)."""
    needs_whole: ClassVar[bool] = False
    """Whether its score looks at whole tensors, so that they cannot be spread over processes."""
    every_gradient: ClassVar[bool] = False
    """Whether it follows the gradients of pruned weights at every step, rather than at updates."""
    at_once: ClassVar[bool] = False
    """Whether masks are updated right after a step, before the coming forward pass, rather than before the coming step."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What it asks to know of every tensor whose pieces grow."""
        return ()

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
    effort = "nothing"
    advice = "pruning of a trained network, or while it trains"


class AllGrowth(Growth):
    """Everything may come back: each update chooses among all pieces anew, and a dense phase restores them all, at zero.

    All candidates score the same, so where fewer than all come back they do by index.
    """

    name = "all"
    equation = "M = 1 at a dense time"
    source = "Han et al. 2017 (DSD); Peste, Iofinova, Vladu, Alistarh 2021 (AC/DC)"
    effort = "nothing; the dense phases cost what a dense network does"
    advice = "alternating dense and sparse training, where the last phase decides what ships"

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        return torch.zeros_like(reduce(torch.zeros_like(seen.weight)))


class DropAndGrow(Growth):
    """What growths that exchange active pieces for others have in common (drop and grow). A base class, itself not registered.

    Attributes:
        at_update: ``skip_step``: the optimizer takes no step when masks are updated; ``step``: it does.
        initial_mask: how the first mask is chosen: ``random``, or by the recipe's ``saliency``.
    """

    grows = True

    at_update: Literal["skip_step", "step"] = "step"
    initial_mask: Literal["random", "saliency"] = "random"

    def stays(self, seen: Observation) -> Tensor:
        """Return which elements may stay active (bool, shape of the view)."""
        return torch.ones_like(seen.weight, dtype=torch.bool)

    def first(self, seen: Observation) -> Tensor | None:
        """Return the weights that the first masks are applied to, or None where they are those of the model."""
        return None

    def grown(self, seen: Observation, new: Tensor, total: Total) -> Tensor | None:
        """Return the weights with what the new ones start from, or None where that is zero.

        Args:
            seen: the tensor before the update; its pruned weights are zero.
            new: True at elements that become active and were not, or that might not stay (bool).
            total: sums over all parts of the tensor.
        """
        return None


class AdaptiveThreshold(BaseModel):
    """Drops what is below one threshold for all tensors, which is moved so that about a fraction of all is.

    With ``N`` pieces asked for by the fraction and ``K`` that an update dropped, ``H`` is halved if ``K > (1 + d) N`` and doubled if
    ``K < (1 - d) N``. Mostafa & Wang 2019 (DSR).

    Attributes:
        initial: ``H`` at the first update, in the unit of the saliency, above 0.
        tolerance: ``d``, in [0, 1).

    >>> threshold = AdaptiveThreshold(initial=0.5, tolerance=0.1)
    >>> threshold.moved(0.5, dropped=20, asked=10), threshold.moved(0.5, dropped=11, asked=10), threshold.moved(0.5, dropped=3, asked=10)
    (0.25, 0.5, 1.0)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-3
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1

    def moved(self, threshold: float, dropped: int, asked: int) -> float:
        """Return the threshold of the next update."""
        if dropped > (1.0 + self.tolerance) * asked:
            return threshold / 2.0
        return threshold * 2.0 if dropped < (1.0 - self.tolerance) * asked else threshold


class ByFraction(DropAndGrow):
    """Growths that exchange a fraction of the active pieces. A base class, itself not registered.

    Attributes:
        fraction: ``f(t)``, the share of active pieces dropped at an update, and its decay over the schedule.
        initial_value: what new weights start from: ``zero``, ``normal``, ``uniform``, ``initial`` or ``gradient``.
        threshold: drop what is below one adaptive threshold for all tensors, and about this fraction of all, in place of the lowest of
            each tensor.
    """

    fraction: DecayField = ConstantDecay(initial=0.3)
    initial_value: InitialValueField = Zero()
    threshold: AdaptiveThreshold | None = None

    reads_gradient: ClassVar[bool] = False
    """Whether its score reads the gradient."""

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of the class, unless a field decides
        """The gradient, if the score or the initial value reads it."""
        return self.initial_value.needs | (frozenset({"gradient"}) if self.reads_gradient else frozenset())

    @property
    def statistics(self) -> tuple[Statistic, ...]:  # noqa: D102
        return self.initial_value.statistics

    def grown(self, seen: Observation, new: Tensor, total: Total) -> Tensor | None:  # noqa: D102
        if isinstance(self.initial_value, Zero):
            return None
        return self.initial_value.values(seen, total).to(seen.weight.dtype).where(new, seen.weight)
