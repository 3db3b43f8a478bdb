"""Sums of powers of single numbers."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.penalty.base import Elementwise, NotNegative, Penalized, Positive, WithStrength, soft_threshold


class L1(Elementwise):
    """Sum of the sizes of all weights, of the scales of all normalizations (network slimming), or of gates.

    All sizes fall at the same speed, so that small ones arrive at zero, but only a proximal step leaves them there.

    >>> import torch
    >>> from niwaki.penalty import L1, Penalized
    >>> weight = torch.tensor([-0.3, 0.0, 0.05])
    >>> L1(strength=0.5).gradient(Penalized(weight))
    tensor([-0.5000,  0.0000,  0.5000])
    >>> L1(strength=0.5, apply="proximal").step(Penalized(weight), rate=0.2)
    tensor([-0.2000,  0.0000,  0.0000])
    """

    name = "l1"
    equation = "c Σ |w|; proximal: sign(w) max(|w| - rate c, 0)"
    source = "Williams 1995; Tibshirani 1996; Liu, Li, Shen, Huang, Yan, Zhang 2017 (of norm)"
    effort = "one pass over the weights"
    advice = "the first to try; of: norm for channels. Proximal or decoupled under Adam, whose preconditioner would undo it"

    def curve(self, size: Tensor) -> Tensor:  # noqa: D102
        return size

    def rise(self, size: Tensor) -> Tensor | float:  # noqa: D102
        return 1.0

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight after soft thresholding."""
        return soft_threshold(seen.weight, self.factor(seen) * rate)


class L2(Elementwise):
    """Weight decay: half the sum of squares, whose gradient is the strength times the weight.

    It shrinks in proportion and leaves nothing at zero. ``apply: decoupled`` is the decay of AdamW.
    """

    name = "l2"
    equation = "c / 2 Σ w²; proximal: w / (1 + rate c)"
    source = "Krogh & Hertz 1991; Loshchilov & Hutter 2019 (decoupled)"
    effort = "one pass over the weights"
    advice = "before a cut by magnitude; or decay of the target alone, where the optimizer's would be of all parameters"

    def curve(self, size: Tensor) -> Tensor:  # noqa: D102
        return size.square() / 2

    def rise(self, size: Tensor) -> Tensor:  # noqa: D102
        return size

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight, shrunk in proportion."""
        return seen.weight / (1.0 + self.factor(seen) * rate)


class Lp(Elementwise):
    """Sum of powers below one, which pull small weights harder than large ones.

    The proximal step is exact: 0 up to a size ``τ``, and beyond it the larger root of ``v - |w| + λ p v^(p-1)`` with ``λ = rate c``, by
    Newton's method. The gradient has no bound near zero, so as a gradient ``|w|`` stands for ``|w| + epsilon``.

    Attributes:
        p: the power, above 0 and below 1.
        epsilon: keeps the gradient finite.
    """

    name = "lp"
    equation = "c Σ |w|^p; proximal: 0 where |w| ≤ τ = (2λ(1-p))^(1/(2-p)) + λ p (2λ(1-p))^((p-1)/(2-p)), λ = rate c"
    source = "Ge, Jiang, Ye 2011; Xu, Chang, Xu, Zhang 2012 (p = 1/2); Zuo, Meng, Zhang, Feng, Zhang 2013 (the threshold)"
    effort = "one pass over the weights; a proximal step several"
    advice = "sparser than L1 at the same loss; proximal, as gradients near zero are steep"

    p: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    epsilon: Positive = 1e-3

    def curve(self, size: Tensor) -> Tensor:
        """Return ``(|w| + epsilon)^p - epsilon^p``."""
        return (size + self.epsilon).pow(self.p) - math.pow(self.epsilon, self.p)

    def rise(self, size: Tensor) -> Tensor:  # noqa: D102
        return (size + self.epsilon).pow(self.p - 1.0) * self.p

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the global minimum for ``|w|^p`` itself, without epsilon."""
        p, size = self.p, seen.weight.abs()
        pull = torch.as_tensor(self.factor(seen) * rate, dtype=size.dtype, device=size.device).expand_as(size)
        kink = (2.0 * pull * (1.0 - p)) ** (1.0 / (2.0 - p))  # the size at which zero is as good
        threshold = kink + pull * p * kink.where(kink > 0, 1.0) ** (p - 1.0)
        stays = size > threshold
        root = size.where(stays, 1.0)
        start, lam = root, pull.where(stays, 0.0)
        for _ in range(8):  # from above on a convex rising function, whose derivative is at least 1 - p / 2 there
            root = root - (root - start + lam * p * root ** (p - 1.0)) / (1.0 - lam * p * (1.0 - p) * root ** (p - 2.0))
        return (torch.sign(seen.weight) * root).where(stays, 0.0)


class ExplorationL2(WithStrength):
    """Decay active weights, and the rest of the superset faster, so that the superset has to earn its place.

    The loss gains ``strength * (sum over active of w^2 + sum over superset without active of w^2 / density)``.
    """

    name = "exploration_l2"
    equation = "2 * strength * w on A, 2 * strength * w / D on B without A, 0 elsewhere"
    source = "Jayakumar, Pascanu, Rae, Osindero, Elsen 2020 (Top-KAST)"
    effort = "one pass over the weights"
    advice = "with gradient: superset"

    apply: Literal["gradient", "decoupled"] = "gradient"

    def value(self, seen: Penalized) -> Tensor:
        """Return the weighted sum of squares."""
        squares = seen.weight.square() * self.factor(seen)
        if seen.active is not None:
            squares = squares.where(seen.active, squares / seen.density)
        return (squares if seen.learns is None else squares.where(seen.learns, 0.0)).sum()

    def slope(self, seen: Penalized) -> Tensor:
        """Return twice the strength times the weight, divided by the density outside the active set."""
        pull = seen.weight * (self.factor(seen) * 2.0)
        return pull if seen.active is None else pull.div(seen.density).where(~seen.active, pull)


class SrSte(WithStrength):
    """Decay of the latent weights that are pruned, so that masks come to rest.

    Weights that are cut by a straight-through estimator get gradients that were computed without them; left alone, they flip in and out.
    """

    name = "sr_ste"
    equation = "c / 2 Σ w² over the pruned latent weights: gradient c (1 - M) w"
    source = "Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li 2021 (SR-STE)"
    effort = "one pass over the weights"
    advice = "N:M trained from scratch: relaxation latent, gradient dense, a mask at every step"

    strength: NotNegative = 2e-4

    def value(self, seen: Penalized) -> Tensor:
        """Return half the sum of the squares of the pruned weights."""
        return (self._pruned(seen).square() * self.factor(seen)).sum() / 2

    def slope(self, seen: Penalized) -> Tensor:
        """Return the strength times the weight where it is pruned."""
        return self._pruned(seen) * self.factor(seen)

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the pruned weights shrunk in proportion."""
        shrunk = seen.weight / (1.0 + self.factor(seen) * rate)
        return seen.weight if seen.active is None else seen.weight.where(seen.active, shrunk)

    def _pruned(self, seen: Penalized) -> Tensor:
        return torch.zeros_like(seen.weight) if seen.active is None else seen.weight.masked_fill(seen.active, 0.0)
