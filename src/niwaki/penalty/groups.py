"""Norms of whole pieces of the recipe's granularity, which go to zero together."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from niwaki.errors import InputError
from niwaki.penalty.base import Penalized, Weigh, WithStrength, soft_threshold


class Pieces(WithStrength):
    """A sum over pieces. A base class, itself not registered.

    Attributes:
        scaled: whether a piece counts by the square root of its number of elements, as Yuan and Lin have it.
        weigh: multiply the strength by what a piece costs, relative to the mean: ``flops`` by its FLOPs, ``parameters`` by its weights.
    """

    scaled: bool = True
    weigh: Weigh = "none"

    @property
    def grouped(self) -> bool:
        """Whether it reads norms and sizes: always."""
        return True

    def inner(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight whose norms a proximal step of length ``rate`` reads."""
        return seen.weight

    def _strengths(self, seen: Penalized) -> Tensor | float:
        assert seen.size is not None
        return seen.size.sqrt() * self.factor(seen) if self.scaled else self.factor(seen)


class GroupLasso(Pieces):
    """Sum of the norms of whole pieces of the recipe's granularity, so that pieces go to zero together.

    With ``granularity: channel`` a piece is a unit of a dependency group: the rows of the weights that make it and the columns of those
    that read it, biases and normalizations not counted. With ``granularity: output_channel`` (or any other of pieces) it is part of one
    tensor. A weight in two groups is pulled by both, and steps after the optimizer's are taken for one group after the other.

    Attributes:
        ratio: in the place of a strength: the share that the penalty has in the sum of it and the loss, at the first step. The strength
            that gives it is found then, on ``data``, and stays.
    """

    name = "group_lasso"
    equation = "c Σ_g √n_g ‖w_g‖ over the pieces g; with a ratio r, c = r / (1 - r) L / Σ_g √n_g ‖w_g‖ at the first step"
    source = "Yuan & Lin 2006; Wen, Wu, Wang, Chen, Li 2016 (SSL); Lym et al. 2019 (PruneTrain, the ratio)"
    effort = "two passes over the weights"
    advice = "channels, heads or layers that are to leave together; proximal, with selection threshold"

    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None

    @model_validator(mode="after")
    def _strength_or_ratio(self) -> Self:
        if self.ratio is not None and "strength" in self.model_fields_set:
            raise InputError("strength: is what a ratio is turned into; drop one of strength and ratio")
        return self

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of the class, unless a field decides
        """Statistics: the mean loss, if a ratio is to be turned into a strength; FLOPs, if strengths are weighed by them."""
        return super().needs | ({"loss"} if self.ratio is not None else set())

    def strength_at(self, loss: float, value: float) -> float:
        """Return the strength that the ratio stands for.

        ``loss``: the mean loss of the model as it is; ``value``: the penalty of the same model at strength 1.

        Raises:
            InputError: one of the two is zero or not finite, so that no strength gives the ratio.

        >>> GroupLasso(ratio=0.2).strength_at(loss=2.0, value=50.0)
        0.01
        """
        assert self.ratio is not None
        if not (0.0 < loss < math.inf and 0.0 < value < math.inf):
            raise InputError(
                f"penalty.group_lasso.ratio: no strength gives it where the loss is {loss:.6g} and the penalty at strength 1 is"
                f" {value:.6g}; say a strength"
            )
        return self.ratio / (1.0 - self.ratio) * loss / value

    def with_strength(self, strength: float) -> Self:
        """Return the same penalty with a strength in the place of the ratio."""
        return self.model_copy(update={"strength": strength, "ratio": None})

    def total(self, norm: Tensor, size: Tensor, cost: Tensor | float = 1.0) -> float:
        """Return the penalty at strength 1, from the norm, the number of elements, and the cost of each piece."""
        return float(((norm * size.sqrt() if self.scaled else norm) * cost).sum(dtype=norm.dtype))

    def slope(self, seen: Penalized) -> Tensor:
        """Return ``c v / |v|`` of each piece ``v``, 0 at 0."""
        assert seen.norm is not None
        return (seen.weight / seen.norm * self._strengths(seen)).where(seen.norm > 0, 0.0)

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return ``v (1 - rate c / |v|)`` of each piece, or 0 where that would turn it around (block soft thresholding)."""
        assert seen.norm is not None
        return _shrunk(self.inner(seen, rate), seen.norm, self._strengths(seen) * rate)


class SparseGroupLasso(Pieces):
    """Group lasso and L1 together: whole pieces go to zero, and single weights within those that stay.

    The proximal step is exact: soft thresholding of single weights, then block soft thresholding of what is left.

    Attributes:
        share: of L1 in the strength, in [0, 1].
    """

    name = "sparse_group_lasso"
    equation = "c ((1 - a) Σ_g √n_g ‖w_g‖ + a Σ |w|), a the share"
    source = "Friedman, Hastie, Tibshirani 2010; Scardapane, Comminiello, Hussain, Uncini 2017"
    effort = "two passes over the weights"
    advice = "units that leave together, sparse within; DropNeuron and Sparse CNN are this too"

    share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5

    def slope(self, seen: Penalized) -> Tensor:
        """Return the sum of both gradients, 0 at 0."""
        assert seen.norm is not None
        assert seen.size is not None
        of_pieces = (seen.weight / seen.norm * self._strengths(seen) * (1.0 - self.share)).where(seen.norm > 0, 0.0)
        return of_pieces + (seen.weight.sign() * self._single(seen)).where(seen.size > 0, 0.0)

    def inner(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight after soft thresholding, where it belongs to a piece."""
        assert seen.size is not None
        return soft_threshold(seen.weight, self._single(seen) * rate).where(seen.size > 0, seen.weight)

    def proximal(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight after both thresholds; ``norm`` is that of ``inner``."""
        assert seen.norm is not None
        return _shrunk(self.inner(seen, rate), seen.norm, self._strengths(seen) * (1.0 - self.share) * rate)

    def _single(self, seen: Penalized) -> Tensor | float:
        return self.factor(seen) * self.share


class HoyerSquare(WithStrength):
    """The square of the ratio of the L1 norm to the L2 norm, of each tensor: how many of its numbers are in use, whatever their scale.

    It is 1 where one number is not zero and the number of elements where all are alike. Large weights are pushed up and small ones
    down, so that the trade is not against size; a cut at a small threshold follows.

    Attributes:
        of: ``weight``, ``norm``, or ``gate``, each tensor by itself.
        per: ``element`` or ``piece``: with pieces, the norms of pieces stand in the place of sizes.
    """

    name = "hoyer_square"
    equation = "c Σ_l (Σ |w|)² / Σ w²; of pieces (Σ_g ‖w_g‖)² / Σ_g ‖w_g‖²"
    source = "Yang, Wen, Li 2020 (DeepHoyer)"
    effort = "two passes over the weights"
    advice = "where L1 would only shrink, as behind normalizations; then fine-tune under a mask"

    of: Literal["weight", "norm", "gate"] = "weight"
    per: Literal["element", "piece"] = "element"
    apply: Literal["gradient", "decoupled"] = "gradient"
    whole = True

    @model_validator(mode="after")
    def _pieces_are_of_weights(self) -> Self:
        if self.per == "piece" and self.of != "weight":
            raise InputError("per: pieces are of weights; choices: per: element, or of: weight")
        return self

    @property
    def grouped(self) -> bool:
        """Whether it reads the norms of pieces."""
        return self.per == "piece"

    def value(self, seen: Penalized) -> Tensor:
        """Return the square of the ratio of one tensor, of single numbers; 0 of one that is all zero."""
        size = seen.weight.abs()
        return _over(size.sum().square(), size.square().sum()) * self.factor(seen)

    def slope(self, seen: Penalized) -> Tensor:
        """Return ``2 sign(w) s (1 - |w| s)`` with ``s = Σ |w| / Σ w²``, or the same of norms times ``w / ‖w_g‖``."""
        if not self.grouped:
            size = seen.weight.abs()
            share = _over(size.sum(), size.square().sum())
            return seen.weight.sign() * (1.0 - size * share) * (2.0 * share * self.factor(seen))
        assert seen.norm is not None
        assert seen.norms is not None
        share = _over(seen.norms.sum(), seen.norms.square().sum())
        return (seen.weight / seen.norm * (1.0 - seen.norm * share) * (2.0 * share * self.factor(seen))).where(seen.norm > 0, 0.0)


class Hoyer(WithStrength):
    """The ratio of the L1 norm to the L2 norm of each tensor, which no scale changes.

    Attributes:
        of: ``weight``, ``norm``, or ``gate``, each tensor by itself.
    """

    name = "hoyer"
    equation = "c Σ_l Σ |w| / √(Σ w²)"
    source = "Hoyer 2004; Yang, Wen, Li 2020 (DeepHoyer)"
    effort = "two passes over the weights"
    advice = "as hoyer_square, with gradients that are less steep"

    of: Literal["weight", "norm", "gate"] = "weight"
    apply: Literal["gradient", "decoupled"] = "gradient"
    whole = True

    def value(self, seen: Penalized) -> Tensor:
        """Return the ratio of one tensor; 0 of one that is all zero."""
        size = seen.weight.abs()
        return _over(size.sum(), size.square().sum().sqrt()) * self.factor(seen)

    def slope(self, seen: Penalized) -> Tensor:
        """Return ``(sign(w) - w Σ |w| / Σ w²) / √(Σ w²)``, 0 of a tensor that is all zero."""
        squares = seen.weight.square().sum()
        share = _over(seen.weight.abs().sum(), squares)
        return (seen.weight.sign() - seen.weight * share) * (_over(share.new_ones(()), squares.sqrt()) * self.factor(seen))


def _shrunk(weight: Tensor, norm: Tensor, threshold: Tensor | float) -> Tensor:
    factor = (1.0 - threshold / norm).where(norm > 0, 1.0).clamp_(min=0.0)
    return (weight * factor).where(factor > 0, 0.0)


def _over(above: Tensor, below: Tensor) -> Tensor:
    """Return the quotient, 0 where there is nothing below."""
    return (above / below).where(below > 0, 0.0)
