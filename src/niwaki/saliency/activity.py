"""Scores that look at what units do on data, without gradients.

All are read off the weights that read a unit: what they see is behind the non-linearity, normalization and pooling. Where a unit has
several entries there (positions of a flattened map, entries of a head), the score is the mean over them. A unit that several tensors read
has a score in each, and the granularity's ``aggregate`` makes one of them.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.errors import InputError
from niwaki.layout import columns_view
from niwaki.saliency.base import Observation, Reduce, Saliency, Scored
from niwaki.statistics import InputMean, InputResponses, InputSize, InputSquare, InputVariance, InputZeros, Statistic


class UnitSaliency(Saliency):
    """Base: it says something about units, seen by the weights that read them."""

    scored_on: ClassVar[Scored] = "inputs"
    of_units: ClassVar[bool] = True


class Activity(UnitSaliency):
    """Mean size of a unit's activations over the data, as the weights that read the unit see them.

    Source: Molchanov, Tyree, Karras, Aila, Kautz 2017 (as a baseline); Tan, Motani 2020 (DropNet).

    >>> import torch
    >>> from niwaki.saliency import Activity, Observation
    >>> from niwaki.statistics import InputSize
    >>> seen = Observation("fc.weight", torch.zeros(5, 3), statistics={InputSize(): torch.tensor([[0.5, 0.0, 2.0]])})
    >>> Activity().score(seen, lambda values: values.sum(0))  # pieces are the columns
    tensor([0.5000, 0.0000, 2.0000], dtype=torch.float64)
    """

    name = "activity"
    equation = "s = mean |x| over the data and the entries of the unit"
    source = "Molchanov et al. 2017; Tan & Motani 2020 (DropNet)"
    effort = "one forward pass over the data; a number for each input"
    advice = "units behind a ReLU, for a cheap first look: it does not see what the next layer makes of a unit"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The mean size of each input."""
        return (InputSize(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores; zero for a unit that this weight does not read.

        Raises:
            InputError: no activity was collected for the tensor.
        """
        return mean_over_entries(seen.of(InputSize()), seen, reduce)


class Apoz(UnitSaliency):
    """How seldom a unit's activation is exactly zero: one minus the average percentage of zeros, APoZ.

    It says something behind a ReLU; of units whose activations are never zero, all scores are 1.

    Source: Hu, Peng, Tai, Tang 2016 (network trimming).

    >>> import torch
    >>> from niwaki.saliency import Apoz, Observation
    >>> from niwaki.statistics import InputZeros
    >>> seen = Observation("fc.weight", torch.zeros(5, 3), statistics={InputZeros(): torch.tensor([[0.5, 0.0, 1.0]])})
    >>> Apoz().score(seen, lambda values: values.sum(0))
    tensor([0.5000, 1.0000, 0.0000], dtype=torch.float64)
    """

    name = "apoz"
    equation = "s = 1 - APoZ, APoZ = share of x = 0 over the data and the entries of the unit"
    source = "Hu et al. 2016"
    effort = "one forward pass over the data; a number for each input"
    advice = "units behind a ReLU, of which some hardly ever fire"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The share of zeros of each input."""
        return (InputZeros(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores in [0, 1]; zero for a unit that this weight does not read."""
        return mean_over_entries(1.0 - seen.of(InputZeros()), seen, reduce)


class ActivityVariance(UnitSaliency):
    """Variance of a unit's activation over the data: a unit that hardly varies is a constant, and a bias can take its place.

    With the compensation ``bias_absorb``, what a constant unit contributes is kept exactly.

    Source: Sietsma & Dow 1988, 1991 (constant units); Polyak & Wolf 2015 (channels of little variance).

    >>> import torch
    >>> from niwaki.saliency import ActivityVariance, Observation
    >>> from niwaki.statistics import InputVariance
    >>> seen = Observation("fc.weight", torch.zeros(5, 2), statistics={InputVariance(): torch.tensor([[0.5, 0.0]])})
    >>> ActivityVariance().score(seen, lambda values: values.sum(0))
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """

    name = "activity_variance"
    equation = "s = var(x) over the data, mean over the entries of the unit"
    source = "Sietsma & Dow 1991; Polyak & Wolf 2015"
    effort = "one forward pass over the data; a number for each input"
    advice = "units that are nearly constant, with bias_absorb, so that they go almost without loss"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The variance of each input."""
        return (InputVariance(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores; zero for a unit that this weight does not read."""
        return mean_over_entries(seen.of(InputVariance()), seen, reduce)


class Entropy(UnitSaliency):
    """Entropy of a unit's response over examples: what nearly always answers alike tells little.

    The response is the mean over positions and entries. Its values over the examples are counted in equal bins between the unit's own
    least and largest one; a constant unit has entropy 0. The scale of a unit does not matter.

    Attributes:
        bins: of the histogram.
        examples: of the data that are looked at.

    Source: Luo & Wu 2017 (entropy-based pruning).

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> from niwaki.saliency import Entropy, Observation
    >>> from niwaki.statistics import InputResponses
    >>> class Columns:  # pieces are the columns of a matrix
    ...     def __call__(self, values): return values.sum(0)
    ...     def rows(self, values): return values.T
    ...     def index(self): return torch.arange(2)
    >>> responses = torch.tensor([[0.0, 1.0], [1.0, 1.0]])  # of two examples
    >>> layout = Layout(("output", "input"), (3, 2))
    >>> seen = Observation("fc.weight", torch.zeros(3, 2), layout=layout, statistics={InputResponses(examples=512): responses})
    >>> Entropy().score(seen, Columns())  # ln 2 and 0
    tensor([0.6931, 0.0000], dtype=torch.float64)
    """

    name = "entropy"
    equation = "s = -Σ_b p_b ln p_b, p_b the share of examples whose response is in bin b of the unit's range"
    source = "Luo & Wu 2017"
    effort = "one forward pass over the data; a number for each input and example"
    advice = "units, where the scale of activations is not to count"

    bins: int = Field(default=100, ge=2)
    examples: int = Field(default=512, ge=2)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The responses of each input, example by example."""
        return (InputResponses(examples=self.examples),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores in [0, ln bins].

        Raises:
            InputError: units have different numbers of entries.
        """
        [request] = self.statistics
        responses = seen.of(request).to(torch.float64) @ entries(seen, reduce).T
        if responses.isnan().any():
            raise InputError(f"saliency {self.name}: the responses that {seen.name!r} reads contain NaN; check the data and the weights")
        low, high = responses.amin(dim=0), responses.amax(dim=0)
        place = (responses - low) / torch.where(high > low, high - low, 1.0) * self.bins
        counts = torch.zeros(self.bins, responses.shape[1], dtype=torch.float64, device=responses.device)
        counts.scatter_add_(0, place.long().clamp(max=self.bins - 1), torch.ones_like(place))
        share = counts / len(responses)
        return (-torch.xlogy(share, share).sum(dim=0) + 0.0).reshape(reduce.index().shape)


class Contribution(Saliency):
    """What the weights that read a unit make of it: how strongly it takes part in what comes next.

    ``goodness``: the goodness factor, the mean square of all the unit's contributions w x; of a single weight it is Wanda's score, squared.
    ``energy``: the consuming energy, the size of the mean of all its contributions, whose signs cancel.

    Source: Hagiwara 1993, 1994.

    >>> import torch
    >>> from niwaki.saliency import Contribution, Observation
    >>> from niwaki.statistics import InputSquare
    >>> seen = Observation("fc.weight", torch.tensor([[2.0, 1.0], [1.0, 1.0]]), statistics={InputSquare(): torch.tensor([[1.0, 4.0]])})
    >>> Contribution().score(seen, lambda values: values.sum(0))
    tensor([5., 8.], dtype=torch.float64)
    """

    name = "contribution"
    equation = "s = Σ_o w_o² E[x²] (goodness) or |Σ_o w_o E[x]| (energy) over the outputs o and entries that read the unit"
    source = "Hagiwara 1993"
    effort = "one forward pass over the data; a number for each column"
    advice = "units, for little more than activity: it counts what the next layer reads of them; weights, as wanda"
    scored_on: ClassVar[Scored] = "inputs"
    single_field = "measure"

    measure: Literal["goodness", "energy"] = "goodness"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The mean, or mean square, of what is read."""
        return (InputSquare(),) if self.measure == "goodness" else (InputMean(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores."""
        [request] = self.statistics
        weight, moment = seen.weight.to(torch.float64), seen.of(request)
        return reduce(weight.square() * moment) if self.measure == "goodness" else reduce(weight * moment).abs()


def mean_over_entries(values: Tensor, seen: Observation, reduce: Reduce) -> Tensor:
    """Return the mean over each piece of a value that each input has; 0 for pieces without elements.

    Args:
        values: in the view, of size 1 but for groups and inputs.
        seen: the tensor that reads the units.
        reduce: its pieces.
    """
    values = values.to(torch.float64)
    total = reduce(values.expand(seen.weight.shape))
    return total / reduce(torch.ones_like(values).expand(seen.weight.shape)).clamp(min=1.0)


def entries(seen: Observation, reduce: Reduce) -> Tensor:
    """Return which inputs each piece consists of: float64 ``[pieces, inputs]``, rows that sum to 1.

    It turns what is known of inputs into what holds for units: their mean response, or the covariance of these.

    Raises:
        InputError: pieces have different numbers of entries.
    """
    assert seen.layout is not None
    layout = seen.layout
    inputs = torch.arange(layout.inputs, device=seen.weight.device).view(layout.size("group"), -1)
    rows = reduce.rows(columns_view(inputs, layout).expand(seen.weight.shape))
    found = torch.zeros(len(rows), layout.inputs, dtype=torch.float64, device=rows.device)
    return found.scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float64)) / max(rows.shape[1], 1)
