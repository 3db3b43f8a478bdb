"""Curves that rise ever more slowly, so that weights in use are left alone: energies of the 1980s, and logarithms."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.penalty.base import Elementwise, Penalized, Positive


class Saturating(Elementwise):
    """A curve of the size over a scale. A base class, itself not registered.

    Attributes:
        scale: the size ``s`` below which a weight counts as small.
    """

    scale: Positive = 1.0
    apply: Literal["gradient", "decoupled"] = "gradient"


class Hyperbolic(Saturating):
    """The bias of a minimal network: rises like the size at first, and never above one."""

    name = "hyperbolic"
    equation = "c Σ u / (1 + u), u = |w| / s"
    source = "Hanson & Pratt 1989"
    effort = "one pass over the weights"
    advice = "small networks from scratch; small scales let large weights alone"

    def curve(self, size: Tensor) -> Tensor:  # noqa: D102
        return size / (self.scale + size)

    def rise(self, size: Tensor) -> Tensor:  # noqa: D102
        return self.scale / (self.scale + size).square()


class Exponential(Saturating):
    """The other bias of a minimal network: like the hyperbolic one, with a sharper end."""

    name = "exponential"
    equation = "c Σ 1 - exp(-u), u = |w| / s"
    source = "Hanson & Pratt 1989"
    effort = "one pass over the weights"
    advice = "as hyperbolic, where weights above a few scales are to feel nothing"

    def curve(self, size: Tensor) -> Tensor:  # noqa: D102
        return -torch.expm1(-size / self.scale)

    def rise(self, size: Tensor) -> Tensor:  # noqa: D102
        return torch.exp(-size / self.scale) / self.scale


class WeightElimination(Saturating):
    """Count the weights that are larger than a scale, softly: small ones decay, large ones cost one each."""

    name = "weight_elimination"
    equation = "c Σ u² / (1 + u²), u = |w| / s"
    source = "Weigend, Rumelhart, Huberman 1991; Reed 1993"
    effort = "one pass over the weights"
    advice = "in the place of weight decay before a cut by magnitude"

    def curve(self, size: Tensor) -> Tensor:  # noqa: D102
        return size.square() / (self.scale**2 + size.square())

    def rise(self, size: Tensor) -> Tensor:  # noqa: D102
        return 2.0 * self.scale**2 * size / (self.scale**2 + size.square()).square()


class Energy(Saturating):
    """The energy that is spent by numbers, of squares: decay (0), logarithmic (1), or bounded (2 and more).

    Chauvin's is of what units put out. Of a gate it is the same for a unit whose other output is one.

    Attributes:
        exponent: ``n`` of the derivative ``e'(u) = 1 / (1 + u)^n`` in ``u = (w / s)²``.
    """

    name = "energy"
    equation = "c Σ e((w / s)²), e'(u) = 1 / (1 + u)^n: u, log(1 + u), (1 - (1 + u)^(1-n)) / (n - 1)"
    source = "Chauvin 1989"
    effort = "one pass over the weights"
    advice = "of: gate, where units are to be spent sparingly"

    exponent: Annotated[int, Field(ge=0)] = 2

    def curve(self, size: Tensor) -> Tensor:  # noqa: D102
        u, n = (size / self.scale).square(), self.exponent
        return torch.log1p(u) if n == 1 else (1.0 - (1.0 + u) ** (1 - n)) / (n - 1)

    def rise(self, size: Tensor) -> Tensor:  # noqa: D102
        return 2.0 * size / self.scale**2 / (1.0 + (size / self.scale).square()) ** self.exponent


class Log(Elementwise):
    """Sum of logarithms of sizes: the limit of L1 that is reweighted at every step.

    The proximal step is exact: the better one of zero and the larger root of ``v² + (s - |w|) v + λ - s |w|``, with ``λ = rate c``.

    Attributes:
        scale: the size ``s`` below which a weight counts as small.
    """

    name = "log"
    equation = "c Σ log(1 + |w| / s)"
    source = "Candès, Wakin, Boyd 2008; Gong, Zhang, Lu, Huang, Ye 2013 (the proximal step)"
    effort = "one pass over the weights"
    advice = "as L1, with large weights left alone; proximal for exact zeros"

    scale: Positive = 0.1

    def curve(self, size: Tensor) -> Tensor:  # noqa: D102
        return torch.log1p(size / self.scale)

    def rise(self, size: Tensor) -> Tensor:  # noqa: D102
        return 1.0 / (size + self.scale)

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the global minimum."""
        size, pull = seen.weight.abs(), self.factor(seen) * rate
        inside = (size + self.scale).square() - 4.0 * pull
        root = ((size - self.scale) + inside.clamp(min=0.0).sqrt()) / 2.0
        better = (root - size).square() / 2.0 + pull * torch.log1p(root.clamp(min=0.0) / self.scale) < size.square() / 2.0
        return (torch.sign(seen.weight) * root).where((inside >= 0) & (root > 0) & better, 0.0)


class Bimodal(Elementwise):
    """Push gates to one of 0 and 1: largest half way between them.

    Sizes above one are pulled back to it.
    """

    name = "bimodal"
    equation = "c Σ |g| |1 - |g||"
    source = "Srinivas & Babu 2016 (tri-state ReLU; training sparse neural networks)"
    effort = "one pass over the gates"
    advice = "gates that have to be cut to 0 or 1 in the end"

    of: Literal["norm", "gate"] = "gate"
    apply: Literal["gradient", "decoupled"] = "gradient"

    def curve(self, size: Tensor) -> Tensor:  # noqa: D102
        return size * (1.0 - size).abs()

    def rise(self, size: Tensor) -> Tensor:  # noqa: D102
        return (1.0 - 2.0 * size) * torch.sign(1.0 - size)
