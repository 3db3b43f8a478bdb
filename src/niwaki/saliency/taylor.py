"""First-order scores: how the loss changes when a piece is removed, to first order in the weights.

Removing a piece changes its weights by -w, hence the loss by about -Σ g w with g = dL/dw. The same number is, but for its sign, the
derivative of the loss with respect to a mask m = 1 that multiplies the piece.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.saliency.base import Observation, Reduce, Saliency, Scored
from niwaki.statistics import HessianGradient, Statistic

Over = Literal["data", "batch", "sample"]
"""Whose gradient a score is of: the mean over the data, or each batch or example by itself, and then the scores are averaged."""


class Taylor(Saliency):
    """Change of the loss when a piece is removed, to first order; signs within a piece cancel.

    Units of dependency groups are scored on the weights that read them, where the sum is the derivative with respect to a gate on the
    unit's activation: gradient times activation, summed over positions. On those that make a unit it says nothing: in front of a
    normalization, whose output their scale does not change, it is zero. Behind a batch normalization that only a ReLU parts from the
    readers, it equals the derivative with respect to a gate on the normalization's output, too.

    ``signed`` is the predicted rise of the loss, which is negative for what does harm; the mean over the data is what skeletonization
    calls relevance. ``over: sample`` with ``squared`` is Theis's Fisher pruning, but for its factor ½, and with ``absolute`` Molchanov's
    first criterion (to be normalized by ``layer_l2``).

    Attributes:
        aggregate: what becomes of the sum over the piece.
        over: whose gradient: of the mean loss over the data (or of the step), or of each batch or example by itself; those scores are
            averaged, so that gradients of opposite signs do not cancel.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz 2019 (``squared``); Molchanov, Tyree, Karras, Aila, Kautz 2017 (``absolute``, sample);
    Mozer & Smolensky 1988 (``signed``); Theis, Korshunova, Tejani, Huszár 2018 (``squared``, sample).

    >>> import torch
    >>> from niwaki.saliency import Observation, Taylor
    >>> seen = Observation("weight", torch.tensor([3.0, 1.0]), gradient=torch.tensor([1.0, -2.0]))
    >>> [float(Taylor(aggregate=how).score(seen, lambda values: values.sum())) for how in ("squared", "absolute", "signed")]
    [1.0, 1.0, -1.0]
    """

    name = "taylor"
    equation = "s = (Σ g w)² (squared), |Σ g w| (absolute) or -Σ g w (signed) over the piece; mean over the data, batches or examples"
    source = "Molchanov et al. 2019; Mozer & Smolensky 1988"
    effort = "one backward pass over the data, or none within a training; over: sample, one for each example"
    advice = "units of trained networks with labelled data: a good first choice"
    needs = frozenset({"gradient"})
    scored_on: ClassVar[Scored] = "inputs"

    aggregate: Literal["squared", "absolute", "signed"] = "squared"
    over: Over = "data"

    @property
    def averages(self) -> Literal["batch", "sample"] | None:
        """Whose scores are averaged."""
        return None if self.over == "data" else self.over

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores.

        Raises:
            InputError: the tensor has no gradient.
        """
        change = reduce(_products(seen.weight, self._needed(seen.gradient, seen, "gradient")))
        if self.aggregate == "signed":
            return -change
        return change.square() if self.aggregate == "squared" else change.abs()


class Snip(Saliency):
    """Connection sensitivity: how strongly the loss reacts to a mask on each weight, summed over the piece.

    The paper divides by the sum over the network, which changes no order. Computed anew on the pruned network over several rounds of a
    one-shot schedule, it is iterative SNIP; where what earlier rounds removed may come back, FORCE.

    Source: Lee, Ajanthan, Torr 2019; rounds: de Jorge, Sanyal, Behl, Torr, Rogez, Dokania 2021.

    >>> import torch
    >>> from niwaki.saliency import Observation, Snip
    >>> seen = Observation("weight", torch.tensor([3.0, 1.0]), gradient=torch.tensor([1.0, -2.0]))
    >>> Snip().score(seen, lambda values: values.sum())
    tensor(5., dtype=torch.float64)
    """

    name = "snip"
    equation = "s = Σ |g w| = Σ |dL/dm| at m = 1 over the piece"
    source = "Lee et al. 2019"
    effort = "one backward pass over the data"
    advice = "before training, on a batch; at high sparsity in rounds"
    needs = frozenset({"gradient"})

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores.

        Raises:
            InputError: the tensor has no gradient.
        """
        return reduce(_products(seen.weight, self._needed(seen.gradient, seen, "gradient")).abs())


class Grasp(Saliency):
    """How removing a weight changes the flow of gradients, ‖g‖²: those whose removal lowers it least, or raises it most, go.

    Removing a weight changes the squared norm of the gradient by about -2 w (H g); what is kept is where w (H g) is highest. The authors
    take the loss of logits divided by a temperature, at initialization, once.

    Attributes:
        temperature: that the logits are divided by.

    Source: Wang, Zhang, Grosse 2020 (GraSP).

    >>> import torch
    >>> from niwaki.saliency import Grasp, Observation
    >>> from niwaki.statistics import HessianGradient
    >>> seen = Observation("weight", torch.tensor([3.0, 1.0]), statistics={HessianGradient(): torch.tensor([1.0, -2.0])})
    >>> Grasp().score(seen, lambda values: values)
    tensor([ 3., -2.], dtype=torch.float64)
    """

    name = "grasp"
    equation = "s = Σ w (H g) over the piece; the lowest go"
    source = "Wang et al. 2020"
    effort = "a gradient, and the gradient of its square, over the data"
    advice = "before training at high sparsity, where snip cuts layers off"

    temperature: float = Field(default=200.0, gt=0.0, allow_inf_nan=False)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The Hessian times the gradient."""
        return (HessianGradient(temperature=self.temperature),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores."""
        [request] = self.statistics
        return reduce(_products(seen.weight, seen.of(request)))


class HeadImportance(Saliency):
    """Expected change of the loss when a head (or unit) is removed, batch by batch, from the weights that read it.

    Multiplying the output of a head by a gate ξ is multiplying those weights by it, so that for one batch Σ g w over them is
    dL/dξ at ξ = 1, which is Aᵀ dL/dA of the head's output A. Its size is averaged over the batches, or with ``over: sample`` over the
    examples as in the paper. Unlike in ``taylor``, opposite signs do not cancel.

    Attributes:
        over: whose gradient by itself.

    Source: Michel, Levy, Neubig 2019.

    >>> import torch
    >>> from niwaki.saliency import HeadImportance, Observation
    >>> seen = Observation("out.weight", torch.tensor([[3.0, 1.0]]), gradient=torch.tensor([[1.0, -2.0]]))  # of one batch
    >>> HeadImportance().score(seen, lambda values: values.sum(0))
    tensor([3., 2.], dtype=torch.float64)
    """

    name = "head_importance"
    equation = "s = E |Σ g w| = E |dL/dξ| over the batches or examples, ξ the gate of the piece"
    source = "Michel et al. 2019"
    effort = "one backward pass for each batch, or example"
    advice = "attention heads, and units whose gradients cancel over the data"
    needs = frozenset({"gradient"})
    scored_on: ClassVar[Scored] = "inputs"
    single_field = "over"

    over: Literal["batch", "sample"] = "batch"

    @property
    def averages(self) -> Literal["batch", "sample"]:
        """Whose scores are averaged."""
        return self.over

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores for the gradient of one batch or example.

        Raises:
            InputError: the tensor has no gradient.
        """
        return reduce(_products(seen.weight, self._needed(seen.gradient, seen, "gradient"))).abs()


class GateDecorator(Saliency):
    """Change of the loss when a channel is switched off at its normalization's scale, to first order, batch by batch.

    The shift of the normalization stays in this estimate; ``taylor`` on the weights that read the channel counts it as well.

    Attributes:
        over: whose gradient by itself; ``data``: of the mean over the data.

    Source: You, Yan, Ye, Ma, Wang 2019 (Gate Decorator).

    >>> import torch
    >>> from niwaki.saliency import GateDecorator, Observation
    >>> seen = Observation("bn.weight", torch.tensor([3.0, 1.0]), gradient=torch.tensor([1.0, -2.0]))
    >>> GateDecorator().score(seen, lambda values: values)
    tensor([3., 2.], dtype=torch.float64)
    """

    name = "gate_decorator"
    equation = "s = E |φ dL/dφ|, φ the scale of the normalization"
    source = "You et al. 2019"
    effort = "one backward pass for each batch, or example"
    advice = "channels behind normalizations that are trained with a penalty on their scales"
    needs = frozenset({"gradient"})
    scored_on: ClassVar[Scored] = "norms"

    over: Over = "batch"

    @property
    def averages(self) -> Literal["batch", "sample"] | None:
        """Whose scores are averaged."""
        return None if self.over == "data" else self.over

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores.

        Raises:
            InputError: the scale has no gradient.
        """
        return reduce(_products(seen.weight, self._needed(seen.gradient, seen, "gradient")).abs())


def _products(weight: Tensor, gradient: Tensor) -> Tensor:
    # float64, because products of two small float32 numbers would underflow and lose their order.
    return weight.to(torch.float64) * gradient.to(torch.float64)
