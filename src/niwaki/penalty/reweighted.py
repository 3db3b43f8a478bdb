"""L1 with a strength for each weight: by its own size, or by the loss's sensitivity to it."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from niwaki.clock import Time, TimeField
from niwaki.penalty.base import Elementwise, Penalized, Positive, WithStrength, soft_threshold


class ReweightedL1(Elementwise):
    """L1 whose strength on a weight is one over its size, taken anew from time to time: small weights go, large ones hardly feel it.

    Attributes:
        epsilon: added to the size.
        every: the time between two reweightings.
    """

    name = "reweighted_l1"
    equation = "c Σ γ |w|, γ = 1 / (|w| + ε) at the last reweighting; proximal: sign(w) max(|w| - rate c γ, 0)"
    source = "Candès, Wakin, Boyd 2008; Guo, Liu, Mungall, Lin, Wang 2019 (RPP)"
    effort = "one pass over the weights; memory of one number for each"
    advice = "pretrained transformers; proximal under AdamW, whose preconditioner the step then does not pass"
    remembers = True

    apply: Literal["gradient", "proximal", "decoupled"] = "proximal"
    epsilon: Positive = 1e-3
    every: TimeField = Time(1.0, "epochs")

    def refresh(self, everyone: Sequence[Penalized]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the strengths of all weights."""
        return [{"gamma": 1.0 / (seen.weight.abs() + self.epsilon)} for seen in everyone], {}

    def value(self, seen: Penalized) -> Tensor:
        """Return the sum of sizes by their strengths."""
        return (seen.weight.abs() * seen.state["gamma"] * self.factor(seen)).sum()

    def slope(self, seen: Penalized) -> Tensor:
        """Return the sign of each weight by its strength."""
        return seen.weight.sign() * (seen.state["gamma"] * self.factor(seen))

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight after soft thresholding, each by its strength."""
        return soft_threshold(seen.weight, seen.state["gamma"] * self.factor(seen) * rate)


class Sensitivity(WithStrength):
    """Decay of the weights that the loss does not feel: in full where its gradient is zero, not at all where that reaches a bound.

    Attributes:
        bound: the size of the gradient from which on a weight does not decay.
    """

    name = "sensitivity"
    equation = "gradient c w max(0, 1 - |∂L/∂w| / bound)"
    source = "Tartaglione, Lepsøy, Fiandrotti, Francini 2018 (of outputs); Tartaglione, Bragagnolo, Fiandrotti, Grangetto 2022 (LOBSTER)"
    effort = "one pass over the weights and their gradients"
    advice = "in the place of weight decay, on a trained model; then a cut by magnitude"

    apply: Literal["gradient", "decoupled"] = "gradient"
    bound: Positive = 1.0
    wants_gradient = True

    def value(self, seen: Penalized) -> Tensor:
        """Return half the sum of squares, each by how little the loss feels it, which counts as a constant."""
        return (seen.weight.square() * self._felt_not(seen) * self.factor(seen)).sum() / 2

    def slope(self, seen: Penalized) -> Tensor:
        """Return the weight times how little the loss feels it."""
        return seen.weight * (self._felt_not(seen) * self.factor(seen))

    def _felt_not(self, seen: Penalized) -> Tensor:
        assert seen.gradient is not None
        return (1.0 - seen.gradient.abs() / self.bound).clamp(min=0.0)
