"""What relaxations have in common that multiply whole pieces by a learned number."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from niwaki.errors import InputError
from niwaki.relaxation.base import LearnsOwn, Moment


class Gate(LearnsOwn):
    """One gate for each piece of the recipe's granularity. A base class, itself not registered.

    The gate ``z`` multiplies the weights of its piece. Of a unit of a dependency group (granularity ``channel``, ``head``, ...) it
    multiplies the weights that read the unit, which is the same as multiplying what the unit puts out; where the gate is zero, all
    members of the unit are masked. Own parameters have the shape of the pieces: that of the granularity's grid, or ``[units]``.
    """

    decides: ClassVar[bool] = True
    has_scores: ClassVar[bool] = True

    def initial_parameters(self, shape: tuple[int, ...], moment: Moment) -> dict[str, Tensor]:
        """Return the initial own parameters of the gates, each of this shape, float32; ``moment`` names the random stream."""
        raise NotImplementedError

    def gate(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:
        """Return the gates: a sample, or the mode where ``moment.evaluating``; differentiable in the own parameters."""
        raise NotImplementedError

    def gate_soft(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:
        """Return the gates that penalties see: without noise, differentiable."""
        return self.gate(own, replace(moment, evaluating=True))

    def gate_constrain(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the own parameters that a step must not leave as it has: name -> the value in its place."""
        return {}

    def gate_score(self, own: Mapping[str, Tensor]) -> Tensor:
        """Return the learned score of each piece: higher is kept sooner. By default the gates without noise."""
        return self.gate(own, Moment("", evaluating=True))

    def gate_active(self, own: Mapping[str, Tensor]) -> Tensor:
        """Return the probability that each gate is not zero; differentiable.

        Raises:
            InputError: the gates have no such notion.
        """
        raise InputError(f"relaxation: {self.name!r} has no probability that a gate is open; choose another penalty")

    def gate_divergence(self, own: Mapping[str, Tensor]) -> Tensor:
        """Return the Kullback-Leibler divergence of each gate's posterior from its prior; differentiable.

        Raises:
            InputError: the gates have no posterior.
        """
        raise InputError(f"relaxation: {self.name!r} has no posterior; choose a variational one, or another penalty")
