"""First-order scores: how the loss changes when a piece is removed, to first order in the weights.

Removing a piece changes its weights by -w, hence the loss by about -Σ g w with g = dL/dw. The same number is the derivative of the
loss with respect to a mask m = 1 that multiplies the piece.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency, Scored


def _products(weight: Tensor, gradient: Tensor) -> Tensor:
    # float64, because products of two small float32 numbers would underflow and lose their order.
    return weight.to(torch.float64) * gradient.to(torch.float64)


class Taylor(Saliency):
    """Change of the loss when a piece is removed, to first order; signs within a piece cancel.

    Units of dependency groups are scored on the weights that read them, where the sum is the derivative with respect to a gate on the
    unit's activation. On those that make a unit it says nothing: in front of a normalization, whose output their scale does not change,
    it is zero.

    Source: Molchanov et al. 2019 (``squared``), Molchanov et al. 2017 (``absolute``).

    >>> import torch
    >>> from niwaki.saliency import Observation, Taylor
    >>> seen = Observation("weight", torch.tensor([3.0, 1.0]), gradient=torch.tensor([1.0, -2.0]))
    >>> Taylor().score(seen, lambda values: values.sum())
    tensor(1., dtype=torch.float64)
    """

    name = "taylor"
    equation = "s = (Σ g w)² (squared) or |Σ g w| (absolute) over the piece"
    source = "Molchanov et al. 2019"
    needs = frozenset({"gradient"})
    scored_on: ClassVar[Scored] = "inputs"

    aggregate: Literal["squared", "absolute"] = "squared"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores.

        Raises:
            InputError: the tensor has no gradient.
        """
        change = reduce(_products(seen.weight, self._needed(seen.gradient, seen, "gradient")))
        return change.square() if self.aggregate == "squared" else change.abs()


class Snip(Saliency):
    """Connection sensitivity: how strongly the loss reacts to a mask on each weight, summed over the piece.

    The paper divides by the sum over the network, which changes no order.

    Source: Lee, Ajanthan, Torr 2019.

    >>> import torch
    >>> from niwaki.saliency import Observation, Snip
    >>> seen = Observation("weight", torch.tensor([3.0, 1.0]), gradient=torch.tensor([1.0, -2.0]))
    >>> Snip().score(seen, lambda values: values.sum())
    tensor(5., dtype=torch.float64)
    """

    name = "snip"
    equation = "s = Σ |g w| = Σ |dL/dm| at m = 1 over the piece"
    source = "Lee et al. 2019"
    needs = frozenset({"gradient"})

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores.

        Raises:
            InputError: the tensor has no gradient.
        """
        return reduce(_products(seen.weight, self._needed(seen.gradient, seen, "gradient")).abs())


class HeadImportance(Saliency):
    """Expected change of the loss when a head (or unit) is removed, batch by batch, from the weights that read it.

    Multiplying the output of a head by a gate ξ is multiplying those weights by it, so that for one batch Σ g w over them is
    dL/dξ at ξ = 1, which is Aᵀ dL/dA of the head's output A. Its size is averaged over the batches; batches of one example make the
    paper's expectation over examples. Unlike in ``taylor``, batches with opposite signs do not cancel.

    Source: Michel, Levy, Neubig 2019.

    >>> import torch
    >>> from niwaki.saliency import HeadImportance, Observation
    >>> seen = Observation("out.weight", torch.tensor([[3.0, 1.0]]), gradient=torch.tensor([[1.0, -2.0]]))  # of one batch
    >>> HeadImportance().score(seen, lambda values: values.sum(0))
    tensor([3., 2.], dtype=torch.float64)
    """

    name = "head_importance"
    equation = "s = E |Σ g w| = E |dL/dξ| over the batches, ξ the gate of the piece"
    source = "Michel et al. 2019"
    needs = frozenset({"gradient", "batch_gradients"})
    scored_on: ClassVar[Scored] = "inputs"

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores for the gradient of one batch.

        Raises:
            InputError: the tensor has no gradient.
        """
        return reduce(_products(seen.weight, self._needed(seen.gradient, seen, "gradient"))).abs()
