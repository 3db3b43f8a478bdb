"""Scores by which the best k are a random sample: coresets, which keep every sum right on average."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki import counter
from niwaki.coresets import edges, sensitivities
from niwaki.errors import InputError
from niwaki.layout import from_matrix, matrix
from niwaki.saliency.activity import entries
from niwaki.saliency.base import Observation, Reduce, Scored
from niwaki.saliency.group import GroupObservation, GroupSaliency
from niwaki.statistics import InputResponses, Statistic


class Coreset(GroupSaliency):
    """Draws units in proportion to how large their part of what comes next can become.

    The k best of ``ln p_j + G_j``, with standard Gumbel noise G, are a sample without replacement with probabilities in proportion to p.
    p_j is the largest part of unit j in the input of any neuron that reads it: of the data for ``bound: data``; for ``bound: norm``,
    without data, of the bound that the norm of the unit's incoming weights sets to a ReLU's activation (biases left out). Of a unit that
    several tensors read, the largest counts; of one with several entries or positions, the mean response. With the compensation
    ``coreset``, which weights what was drawn, the input of the next layer is unchanged on average.

    Single weights are drawn too (with ``bound: data``), by the largest part that they have in the sum of their neuron. The allocation has
    to say how many are drawn in each layer: ``global`` would compare probabilities of different layers.

    Attributes:
        bound: on the size of activations.
        examples: of the data that ``data`` looks at.
        sampled: whether noise is added; else the most likely stay.

    Source: Mussay, Osadchy, Braverman, Zhou, Feldman 2020 (``norm``); Baykal, Liebenwein, Gilitschenski, Feldman, Rus 2019 (weights, data);
    Liebenwein, Baykal, Lang, Feldman, Rus 2020 (filters, data); the sample: Efraimidis & Spirakis 2006.

    >>> import torch
    >>> from niwaki.saliency import Coreset, GroupObservation, Observation
    >>> class Rows:  # pieces are the rows of a matrix
    ...     def __call__(self, values): return values.sum(1)
    ...     def rows(self, values): return values
    ...     def index(self): return torch.arange(2)
    >>> class Columns(Rows):
    ...     def rows(self, values): return values.T
    >>> from niwaki.layout import Layout
    >>> makes = Observation("0.weight", torch.tensor([[1.0], [3.0]]))
    >>> reads = Observation("2.weight", torch.tensor([[1.0, 1.0]]), layout=Layout(("output", "input"), (1, 2)))
    >>> seen = GroupObservation(2, [(makes, Rows())], [(reads, Columns())])
    >>> Coreset(sampled=False).score_group(seen).exp()
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """

    name = "coreset"
    equation = "s_j = ln p_j + G_j; p_j ∝ max_x max_o |w_oj| a_j(x) / Σ_k |w_ok| a_k(x)"
    source = "Mussay et al. 2020; Baykal et al. 2019; Liebenwein et al. 2020"
    effort = "norm: the weights alone; data: one forward pass, and a number for each input and example"
    advice = "when every sum is to stay right on average, with the compensation coreset, and counts for each layer"
    scored_on: ClassVar[Scored] = "inputs"
    of_units: ClassVar[bool] = False

    bound: Literal["norm", "data"] = "norm"
    examples: int = Field(default=128, ge=1)
    sampled: bool = True

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The responses of each input, example by example, for ``bound: data``."""
        return (InputResponses(examples=self.examples),) if self.bound == "data" else ()

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores of the weights of one tensor.

        Raises:
            InputError: pieces are no single weights, or the bound is that of units.
        """
        layout = seen.layout
        assert layout is not None
        if self.bound == "norm" or reduce.index().numel() != seen.weight.numel():
            raise InputError(
                f"saliency {self.name}: of {seen.name} by itself, single weights are drawn, with bound: data; for units choose"
                " granularity channel"
            )
        responses = seen.of(self.statistics[0])
        weights = matrix(seen.weight, layout)
        kernel = weights.shape[2] * weights.shape[0] // layout.inputs
        parts = []
        for one, columns in zip(weights, responses.tensor_split(len(weights), dim=1), strict=True):
            parts.append(edges(one.T, columns.repeat_interleave(kernel, dim=1)).T)
        likely = from_matrix(torch.stack(parts), layout)
        return reduce(self._drawn(likely, seen, seen.name))

    def score_group(self, seen: GroupObservation) -> Tensor:
        """Return float64 scores of the units of a group; minus infinity for those of which nothing is read.

        Raises:
            InputError: units have different numbers of entries in a member.
        """
        made = seen.weights([one for one in seen.makers if one[0].weight.ndim > 1]).norm(dim=1)
        likely = torch.zeros(seen.units, dtype=torch.float64, device=made.device)
        for one, reduce in seen.readers:
            index = reduce.index().flatten().to(made.device)
            activity = made[None, index] if self.bound == "norm" else one.of(self.statistics[0]).to(torch.float64) @ entries(one, reduce).T
            likely[index] = torch.maximum(likely[index], sensitivities(by_output(one, reduce), activity))
        return self._drawn(likely, seen.makers[0][0], seen.name)

    def _drawn(self, likely: Tensor, seen: Observation, name: str) -> Tensor:
        keys = (likely / likely.sum()).log()
        if not self.sampled:
            return keys
        stream = counter.key(seen.seed, seen.step, name + "::coreset")
        uniform = counter.uniform(stream, 0, likely.numel(), likely.device).view(likely.shape) + 2.0**-54
        return keys - (-uniform.log()).log()


def by_output(seen: Observation, reduce: Reduce) -> Tensor:
    """Return how much each output reads of each piece: the sum of \\|w\\| over entries and kernel positions, ``[pieces, outputs]``."""
    assert seen.layout is not None
    roles, shape = seen.layout.roles, seen.layout.shape
    made = [size if role in ("stack", "group", "output") else 1 for role, size in zip(roles, shape, strict=True)]
    outputs = torch.arange(seen.layout.outputs, device=seen.weight.device).view(made).expand(shape)
    rows = reduce.rows(seen.weight).to(torch.float64).abs()
    found = torch.zeros(len(rows), seen.layout.outputs, dtype=torch.float64, device=rows.device)
    return found.scatter_add_(1, reduce.rows(outputs), rows)
