"""What pushes weights towards zero: a term that is added to the loss, as its gradient or as a step of its own after the optimizer's.

``apply`` says how. ``gradient`` adds the penalty's gradient to that of the loss, so that the optimizer's momentum and preconditioner see
it too. ``decoupled`` subtracts the learning rate times that gradient after the optimizer's step. ``proximal`` takes the proximal step
``argmin_v |v - w|^2 / 2 + rate * penalty(v)`` there, which arrives at exact zeros, as a gradient does not.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from niwaki.component import Component
from niwaki.errors import InputError


@dataclass(frozen=True)
class Penalized:
    """All that a penalty may look at, for one tensor.

    Attributes:
        weight: the weight that is trained.
        active: bool, the elements of the forward pass; None for all.
        learns: bool, the elements that learn, contains ``active``; None for all.
        density: share of active elements that the recipe asks for, in (0, 1].
        norm: L2 norm of the piece that each element belongs to, over all tensors of the piece, for penalties that are ``grouped``; 0
            where an element belongs to none. Broadcasts against the weight.
        size: number of elements of that piece, for penalties that are ``grouped``. Broadcasts against the weight.
    """

    weight: Tensor
    active: Tensor | None = None
    learns: Tensor | None = None
    density: float = 1.0
    norm: Tensor | None = None
    size: Tensor | None = None


class Penalty(Component):
    """Base of the slot ``penalty``."""

    slot = "penalty"

    grouped: ClassVar[bool] = False
    """Whether it is about whole pieces of the recipe's granularity, and reads their norms and sizes."""

    @property
    def after_step(self) -> bool:
        """Whether it acts by ``step`` after the optimizer's, rather than by ``gradient`` before it."""
        return False

    def gradient(self, seen: Penalized) -> Tensor:
        """Return the penalty's gradient with respect to the weight, zero where nothing learns."""
        raise NotImplementedError

    def step(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight after a step of length ``rate``, for penalties that do not apply as a gradient."""
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

    def gradient(self, seen: Penalized) -> Tensor:
        """Return twice the strength times the weight, divided by the density outside the active set."""
        pull = seen.weight * (2.0 * self.strength)
        if seen.active is not None:
            pull = pull.div(seen.density).where(~seen.active, pull)
        return _learning(pull, seen)


class Norms(Penalty):
    """A sum of norms, each times its own strength. A base class, itself not registered.

    With ``v`` a piece and ``c`` its strength, the gradient of ``c |v|`` is ``c v / |v|`` (0 at 0), and the proximal step is
    ``v <- v (1 - rate c / |v|)``, or 0 where that would turn it around.
    """

    strength: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1e-4
    apply: Literal["gradient", "proximal", "decoupled"] = "gradient"

    @property
    def after_step(self) -> bool:
        """Whether it is proximal or decoupled."""
        return self.apply != "gradient"

    def terms(self, seen: Penalized) -> tuple[Tensor, Tensor | float]:
        """Return the norm of the piece that each element belongs to, and the strength on it; both broadcast against the weight."""
        raise NotImplementedError

    def gradient(self, seen: Penalized) -> Tensor:
        """Return ``c v / |v|``, in the weight's dtype."""
        norm, strength = self.terms(seen)
        pull = (seen.weight / norm * strength).where(norm > 0, 0.0)
        return _learning(pull.to(seen.weight.dtype), seen)

    def step(self, seen: Penalized, rate: float) -> Tensor:
        """Return the weight after the proximal step, or after one of the gradient."""
        if self.apply == "decoupled":
            return seen.weight - rate * self.gradient(seen)
        norm, strength = self.terms(seen)
        factor = (1.0 - rate * strength / norm).where(norm > 0, 1.0).clamp_(min=0.0)
        shrunk = (seen.weight * factor).where(factor > 0, 0.0).to(seen.weight.dtype)  # never -0.0
        return shrunk if seen.learns is None else shrunk.where(seen.learns, seen.weight)


class L1(Norms):
    """Sum of the sizes of all weights, or of the scales of all normalizations (network slimming).

    Attributes:
        strength: non-negative factor of the penalty.
        of: ``weight`` for the recipe's target, ``norm`` for the scales of all normalization layers, whatever the target.
        apply: ``gradient``, ``decoupled`` or ``proximal`` (soft thresholding).

    >>> import torch
    >>> weight = torch.tensor([-0.3, 0.0, 0.05])
    >>> L1(strength=0.5).gradient(Penalized(weight))
    tensor([-0.5000,  0.0000,  0.5000])
    >>> L1(strength=0.5, apply="proximal").step(Penalized(weight), rate=0.2)
    tensor([-0.2000,  0.0000,  0.0000])
    """

    name = "l1"
    equation = "c Σ |w|"
    source = "Tibshirani 1996; Liu, Li, Shen, Huang, Yan, Zhang 2017 (of norm)"

    of: Literal["weight", "norm"] = "weight"

    def terms(self, seen: Penalized) -> tuple[Tensor, Tensor | float]:
        """Return the size of each weight, and the strength."""
        return seen.weight.abs(), self.strength


class GroupLasso(Norms):
    """Sum of the norms of whole pieces of the recipe's granularity, so that pieces go to zero together.

    With ``granularity: channel`` a piece is a unit of a dependency group: the rows of the weights that make it and the columns of those
    that read it, biases and normalizations not counted. With ``granularity: output_channel`` (or any other of pieces) it is part of one
    tensor. A weight in two groups is pulled by both, and steps after the optimizer's are taken for one group after the other.

    Attributes:
        strength: non-negative factor of the penalty.
        apply: ``gradient``, ``decoupled`` or ``proximal`` (block soft thresholding).
        scaled: whether a piece counts by the square root of its number of elements, as Yuan and Lin have it.
        ratio: in the place of a strength: the share that the penalty has in the sum of it and the loss, at the first step. The strength
            that gives it is found then, on ``data``, and stays.
    """

    name = "group_lasso"
    equation = "c Σ_g √n_g ‖w_g‖ over the pieces g; with a ratio r, c = r / (1 - r) L / Σ_g √n_g ‖w_g‖ at the first step"
    source = "Yuan & Lin 2006; Wen, Wu, Wang, Chen, Li 2016 (SSL); Lym et al. 2019 (PruneTrain, the ratio)"
    grouped = True

    scaled: bool = True
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None

    @model_validator(mode="after")
    def _strength_or_ratio(self) -> Self:
        if self.ratio is not None and "strength" in self.model_fields_set:
            raise InputError("strength: is what a ratio is turned into; drop one of strength and ratio")
        return self

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of the class, unless a field decides
        """Statistics: the mean loss, if a ratio is to be turned into a strength."""
        return frozenset({"loss"} if self.ratio is not None else ())

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

    def value(self, norm: Tensor, size: Tensor) -> float:
        """Return the penalty at strength 1, from the norm and the number of elements of each piece."""
        return float((norm * size.sqrt() if self.scaled else norm).sum(dtype=torch.float64))

    def terms(self, seen: Penalized) -> tuple[Tensor, Tensor | float]:
        """Return the norms of the pieces, and their strengths."""
        assert seen.norm is not None
        assert seen.size is not None
        return seen.norm, self.strength * seen.size.sqrt() if self.scaled else self.strength


def _learning(pull: Tensor, seen: Penalized) -> Tensor:
    return pull if seen.learns is None else pull.masked_fill(~seen.learns, 0.0)
