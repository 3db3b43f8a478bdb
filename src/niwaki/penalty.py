"""What pushes weights towards zero. A penalty is a gradient that is added at the step boundary."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from niwaki.component import Component


class Penalty(Component):
    """Base of the slot ``penalty``."""

    slot = "penalty"

    def gradient(self, weight: Tensor, active: Tensor, learns: Tensor, density: float) -> Tensor:
        """Return the penalty's gradient with respect to the dense weight.

        Args:
            weight: the dense weight.
            active: bool, the elements of the forward pass.
            learns: bool, the elements that learn; contains ``active``.
            density: share of active elements that the recipe asks for, in (0, 1].
        """
        raise NotImplementedError


class ExplorationL2(Penalty):
    """Decay active weights, and the rest of the superset faster, so that the superset has to earn its place.

    The loss gains ``strength * (sum over active of w^2 + sum over superset without active of w^2 / density)``.

    Attributes:
        strength: non-negative factor of the penalty.
    """

    name = "exploration_l2"
    equation = "2 * strength * w on A, 2 * strength * w / D on B without A, 0 elsewhere"
    source = "Jayakumar, Pascanu, Rae, Osindero, Elsen 2020 (Top-KAST)"

    strength: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1e-4

    def gradient(self, weight: Tensor, active: Tensor, learns: Tensor, density: float) -> Tensor:  # noqa: D102
        pull = weight * (2.0 * self.strength)
        return pull.div(density).where(~active, pull).masked_fill_(~learns, 0.0)
