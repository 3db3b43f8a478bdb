"""Which elements of a tensor learn, given its mask.

The policy acts on the gradient at the step boundary. Most policies need a relaxation that keeps dense weights beside
the published ones: in a hard-masked tensor a pruned weight has no value that could learn.
"""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from niwaki.component import Component, Fraction
from niwaki.errors import InputError


class GradientPolicy(Component):
    """Base of the slot ``gradient``."""

    slot = "gradient"

    weights_learn: ClassVar[bool] = True
    """Whether the weights take part in the step at all (otherwise only a relaxation's own parameters do)."""

    masked: ClassVar[bool] = True
    """Whether the gradient is zero outside a set of elements: the active ones, or the superset."""

    needs_dense_weights: ClassVar[bool] = True
    """Whether it is about pruned weights too, which must have a value to learn."""


class Active(GradientPolicy):
    """Only active elements learn: the gradient is zero where the mask is."""

    name = "active"
    equation = "g <- M * g"
    source = "the usual policy of pruning with retraining (Han et al. 2015)"
    effort = "nothing"
    advice = "the default"
    needs_dense_weights = False


class Dense(GradientPolicy):
    """All elements learn: pruned ones take the gradient at the pruned model, as with a straight-through estimator."""

    name = "dense"
    equation = "w_t+1 = w_t - lr * g(M * w_t)"
    source = "Lin, Stich, Barba, Dmitriev, Jaggi 2020 (DPF)"
    effort = "the gradient of all weights at every step"
    advice = "what was pruned should be able to come back by learning"
    masked = False


class Frozen(GradientPolicy):
    """No weight learns; only the relaxation's own parameters (scores) do."""

    name = "frozen"
    equation = "w_t+1 = w_t"
    source = "Zhou, Lan, Liu, Yosinski 2019 (supermasks); Ramanujan et al. 2020 (edge-popup)"
    effort = "nothing"
    advice = "learning masks over weights that stay as they are"
    weights_learn = False
    masked = False


class Superset(GradientPolicy):
    """The active elements and the next best ones learn: a second selection at a lower sparsity by the same scores.

    Attributes:
        sparsity: share of the targets outside the superset, in [0, 1), below the recipe's sparsity.
        multiple: instead of ``sparsity``: how many times as many elements as the active set the superset has, above 1.
    """

    name = "superset"
    equation = "g <- B * g, B = top (1 - sparsity) by saliency, B contains M"
    source = "Jayakumar, Pascanu, Rae, Osindero, Elsen 2020 (Top-KAST)"
    effort = "the gradient of the superset, and a second selection at updates"
    advice = "training that is sparse in both passes and still explores"

    sparsity: Fraction | None = None
    multiple: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.sparsity is None) == (self.multiple is None):
            raise InputError("give either sparsity or multiple, and not both")
        return self

    def outside(self, sparsity: float) -> float:
        """Return the share outside the superset while the active set has this sparsity; never more than that.

        >>> round(Superset(multiple=2.0).outside(0.9), 12), Superset(sparsity=0.8).outside(0.5)
        (0.8, 0.5)
        """
        outside = self.sparsity if self.multiple is None else max(0.0, 1.0 - self.multiple * (1.0 - sparsity))
        assert outside is not None
        return min(outside, sparsity)


class Selected(GradientPolicy):
    """In every step only the weights take the loss's gradient that would change it most; all take weight decay and momentum.

    The others decay to zero by themselves, so that cutting them at the end costs little. Of all targets together, equal products keep the
    lower (parameter order, flat index).

    Attributes:
        sparsity: share of the targets that takes no gradient in a step, in [0, 1); None: the recipe's.
    """

    name = "selected"
    equation = "g <- g where |g w| is among the (1 - sparsity) N largest, else 0"
    source = "Ding, Ding, Zhou, Guo, Han, Liu 2019 (global sparse momentum SGD)"
    effort = "a selection over all products at every step"
    advice = "pruning a trained network by its optimizer's own weight decay, which must be on"
    single_field = "sparsity"
    needs_dense_weights = False

    sparsity: Fraction | None = None
