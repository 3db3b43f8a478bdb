"""Scores that follow a unit's influence through the network to its outputs."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.saliency.activity import UnitSaliency, mean_over_entries
from niwaki.saliency.base import Observation, Reduce
from niwaki.statistics import OutputSensitivity, Relevance, Statistic


class Nisp(UnitSaliency):
    """Importance that is propagated backwards from the last responses, through the sizes of all weights.

    A unit of several entries has the sum of their importances, and so has a unit that several tensors read (``aggregate: sum``).

    Attributes:
        final: importance of the last responses: their infinite feature ranking, or all alike.

    Source: Yu, Li, Chen, Lai, Morariu, Han, Gao, Lin, Davis 2018 (NISP).

    >>> import torch
    >>> from niwaki.saliency import Nisp, Observation
    >>> from niwaki.statistics import Relevance
    >>> seen = Observation("fc.weight", torch.zeros(5, 2), statistics={Relevance(): torch.tensor([[0.5, 2.0]])})
    >>> Nisp().score(seen, lambda values: values.sum(0))
    tensor([0.5000, 2.0000], dtype=torch.float64)
    """

    name = "nisp"
    equation = "s_(l-1) = |W_l|ᵀ s_l, from the importance s of the last responses"
    source = "Yu et al. 2018"
    effort = "one forward pass for the last responses and one pass back; no labels"
    advice = "units of a trained network, of all layers at once, for the sake of its last responses"
    single_field = "final"

    final: Literal["infinite_ranking", "equal"] = "infinite_ranking"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The importance of each input."""
        return (Relevance(final=self.final),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores; zero for a unit that this weight does not read."""
        [request] = self.statistics
        relevance: Tensor = seen.of(request).to(torch.float64)
        repeated = seen.weight.numel() / max(relevance.numel(), 1)  # every input stands so often in the view
        return reduce(relevance.expand(seen.weight.shape)) / repeated


class Sensitivity(UnitSaliency):
    """How strongly the model's outputs react to a unit, on average over the data.

    Source: Engelbrecht, Cloete 1996; Zeng & Yeung 2006.

    >>> import torch
    >>> from niwaki.saliency import Observation, Sensitivity
    >>> from niwaki.statistics import OutputSensitivity
    >>> seen = Observation("fc.weight", torch.zeros(5, 2), statistics={OutputSensitivity(): torch.tensor([[[1.0, 2.0]]] * 3)})
    >>> Sensitivity().score(seen, lambda values: values.sum(0))
    tensor([1., 2.], dtype=torch.float64)
    """

    name = "output_sensitivity"
    equation = "s = E |∂out/∂x|, mean over the outputs and the entries of the unit"
    source = "Engelbrecht & Cloete 1996; Zeng & Yeung 2006"
    effort = "a backward pass over the data for each output of the model; no labels"
    advice = "units of networks with few outputs"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The sensitivity of the outputs to each input."""
        return (OutputSensitivity(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores; zero for a unit that this weight does not read."""
        return mean_over_entries(seen.of(OutputSensitivity())[0], seen, reduce)


class VarianceNullity(UnitSaliency):
    """Variance of the outputs' sensitivity to a unit over the examples: where it does not differ from zero, the unit decides nothing.

    Engelbrecht's test statistic is Γ = (P - 1) var / var0 of P examples, and units go with Γ below the critical value χ² of P - 1 degrees
    of freedom. The score is Γ / (P - 1), so that a selection ``threshold: χ²/(P - 1)`` makes this test. A unit with a constant influence,
    which is large perhaps, is told from one without by ``output_sensitivity``.

    Attributes:
        null_variance: var0, the variance that counts as none.

    Source: Engelbrecht 2001 (variance nullity).

    >>> import torch
    >>> from niwaki.saliency import Observation, VarianceNullity
    >>> from niwaki.statistics import OutputSensitivity
    >>> seen = Observation("fc.weight", torch.zeros(5, 2), statistics={OutputSensitivity(): torch.tensor([[[1.0, 2.0]]] * 3)})
    >>> VarianceNullity(null_variance=0.5).score(seen, lambda values: values.sum(0))
    tensor([2., 4.], dtype=torch.float64)
    """

    name = "variance_nullity"
    equation = "s = var(√(mean_k (∂out_k/∂x)²)) / var0, the variance over the examples"
    source = "Engelbrecht 2001"
    effort = "a backward pass over the data for each output of the model; no labels"
    advice = "units of networks with few outputs, where a statistical test is to say how many go"
    single_field = "null_variance"

    null_variance: float = Field(default=0.001, gt=0.0, allow_inf_nan=False)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The sensitivity of the outputs to each input."""
        return (OutputSensitivity(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores; zero for a unit that this weight does not read."""
        return mean_over_entries(seen.of(OutputSensitivity())[2], seen, reduce) / self.null_variance
