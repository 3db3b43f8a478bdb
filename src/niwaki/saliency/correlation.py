"""Scores that compare the responses of units with each other: what others can stand in for can go.

The rankings are nested: units are removed, or chosen, one after the other, and the score is the place in that order, k / n for the k-th to
go. Units that are masked already come first, in no competition with the others. Scores of layers are alike by construction, so that a
global ranking takes the same share of each.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.errors import InputError
from niwaki.layout import from_matrix, matrix
from niwaki.saliency.activity import UnitSaliency, entries
from niwaki.saliency.base import Observation, Reduce, Saliency, Scored
from niwaki.statistics import InputCovariance, InputResponses, Statistic


class Correlation(UnitSaliency):
    """Keeps one representative of units whose responses are correlated, positively or negatively.

    ``maximum``: of the two units with the largest \\|r\\| of all, the one goes that is more correlated with the rest.
    ``sum``: the unit with the largest sum of \\|r\\| goes. Constant units go first: a bias can stand in for them. Time is O(units²)
    for each tensor that reads them. With the compensation ``merge: {by: responses}``, which adds what the unit did to its most correlated
    neighbour, this is Sietsma & Dow's removal of duplicates.

    Source: Suau, Zappella, Apostoloff 2019 (principal filter analysis, ranking); Babaeizadeh, Smaragdis, Campbell 2016 (pairs); Sietsma &
    Dow 1991 (duplicate units).

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> from niwaki.saliency import Correlation, Observation
    >>> from niwaki.statistics import InputCovariance
    >>> class Columns:  # pieces are the columns of a matrix
    ...     def rows(self, values): return values.T
    ...     def index(self): return torch.arange(3)
    ...     def __call__(self, values): return values.sum(0)
    >>> covariance = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.3], [0.0, 0.3, 4.0]])
    >>> layout = Layout(("output", "input"), (2, 3))
    >>> seen = Observation("fc.weight", torch.zeros(2, 3), layout=layout, statistics={InputCovariance(): covariance})
    >>> (Correlation().score(seen, Columns()) * 3).round().tolist()  # 1 goes first, for it is correlated with 2 as well
    [2.0, 1.0, 3.0]
    """

    name = "correlation"
    equation = "s_j = k / n for the k-th to go; r_ij = corr(x_i, x_j), largest |r| (maximum) or Σ_i |r_ij| (sum) first"
    source = "Suau et al. 2019 (PFA); Sietsma & Dow 1991"
    effort = "one forward pass over the data; inputs² numbers, and units² operations a tensor (units³ at worst)"
    advice = "units that repeat each other, with merge: responses"
    single_field = "by"

    by: Literal["maximum", "sum"] = "maximum"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The covariance of all inputs."""
        return (InputCovariance(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores in [0, 1], 0 for masked units.

        Raises:
            InputError: the covariance is not finite, or units have different numbers of entries.
        """
        covariance = _of_units(seen, reduce)
        variance = covariance.diagonal()
        constant = variance <= _TINY * variance.max()
        size = torch.where(constant, 1.0, variance).sqrt()
        related = (covariance / size / size[:, None]).abs()
        related = (related + related.T) / 2
        related[constant], related[:, constant] = 0.0, 0.0
        related.fill_diagonal_(0.0)
        active = _active(seen, reduce)
        order = [int(j) for j in (active & constant).nonzero()]
        order += _least_correlated_last(related, active & ~constant, self.by)
        return _places(order, len(active), active).reshape(reduce.index().shape)


def _least_correlated_last(related: Tensor, alive: Tensor, by: str) -> list[int]:
    """Return the units in the order in which they go."""
    alive = alive.clone()
    related = related.where(alive & alive[:, None], -1.0)
    totals = related.clamp(min=0.0).sum(dim=1)
    best, partner = related.max(dim=1)
    order: list[int] = []
    for _ in range(int(alive.sum())):
        compared = alive
        if by == "maximum":
            one = int(best.masked_fill(~alive, -torch.inf).argmax())
            compared = torch.zeros_like(alive)
            compared[[one, int(partner[one])]] = True
        among = totals.masked_fill(~(compared & alive), -torch.inf)
        gone = int((among >= among.max() - _ROUNDING).nonzero()[-1])  # of equal ones, the last
        order.append(gone)
        alive[gone] = False
        totals -= related[gone].clamp(min=0.0)
        related[gone], related[:, gone] = -1.0, -1.0
        left = (partner == gone) & alive
        if by == "maximum" and left.any():
            best[left], partner[left] = related[left].max(dim=1)
    return order


class SubsetSelection(UnitSaliency):
    """Chooses the units whose responses span most: each next one is that of which the chosen ones explain least.

    This is QR factorization with column pivoting of the centred responses, as pivoted Cholesky factorization of their covariance; and the
    greedy maximization of det(L_S), the likeliest sets of a determinantal point process with kernel L. ``covariance``: L is the covariance.
    ``gaussian``: L_ij = exp(-10/T ‖v_i - v_j‖²) + 0.01 [i = j] of the response vectors v over T examples, by which units differ that answer
    differently, however strongly. Units that the chosen ones explain wholly (beyond the rank) are left to go first. Time is O(units³).

    Attributes:
        kernel: what units are compared by.
        examples: of the data that ``gaussian`` looks at.

    Source: Kanjilal, Dey, Banerjee 1993 (QR with pivoting); Tamura, Tateishi, Matumoto, Akita 1993 (rank); Mariet & Sra 2016 (diversity
    networks, which draw from the determinantal point process).

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> from niwaki.saliency import Observation, SubsetSelection
    >>> from niwaki.statistics import InputCovariance
    >>> class Columns:
    ...     def rows(self, values): return values.T
    ...     def index(self): return torch.arange(3)
    ...     def __call__(self, values): return values.sum(0)
    >>> covariance = torch.tensor([[4.0, 4.0, 0.0], [4.0, 5.0, 0.0], [0.0, 0.0, 2.0]])
    >>> layout = Layout(("output", "input"), (2, 3))
    >>> seen = Observation("fc.weight", torch.zeros(2, 3), layout=layout, statistics={InputCovariance(): covariance})
    >>> (SubsetSelection().score(seen, Columns()) * 3).round().tolist()  # 1 is chosen first; it leaves 0.8 of 0, and all of 2
    [1.0, 3.0, 2.0]
    """

    name = "subset_selection"
    equation = "next = argmax_j L_jj - L_jS (L_SS)⁻¹ L_Sj over the units S chosen so far; s_j = 1 - (k - 1) / n for the k-th chosen"
    source = "Kanjilal et al. 1993; Mariet & Sra 2016"
    effort = "one forward pass over the data; inputs² numbers (gaussian: one for each input and example), and units³ operations a tensor"
    advice = "units that others can express together, with least_squares"
    single_field = "kernel"

    kernel: Literal["covariance", "gaussian"] = "covariance"
    examples: int = Field(default=512, ge=2)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The covariance of all inputs, or their responses example by example."""
        return (InputCovariance(),) if self.kernel == "covariance" else (InputResponses(examples=self.examples),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores in [0, 1], 0 for masked units.

        Raises:
            InputError: what is known of the responses is not finite, or units have different numbers of entries.
        """
        if self.kernel == "covariance":
            kernel = _of_units(seen, reduce)
        else:
            responses = _finite(seen.of(self.statistics[0]).to(torch.float64) @ entries(seen, reduce).T, seen)
            apart = torch.cdist(responses.T, responses.T, compute_mode="donot_use_mm_for_euclid_dist").square()
            kernel = (apart * (-10.0 / len(responses))).exp()
            kernel.diagonal().add_(0.01)
        active = _active(seen, reduce)
        chosen = _pivots(kernel, active)
        rest = [int(j) for j in active.nonzero().flatten().flip(0) if int(j) not in set(chosen)]
        return _places([*rest, *reversed(chosen)], len(active), active).reshape(reduce.index().shape)


def _pivots(kernel: Tensor, active: Tensor) -> list[int]:
    """Return the pivots of the Cholesky factorization, in order, as far as the rank goes."""
    left = kernel.diagonal().clone().masked_fill(~active, -torch.inf)
    least = _TINY * float(left.max())
    factor = torch.zeros_like(kernel)
    chosen: list[int] = []
    for k in range(int(active.sum())):
        pivot = int(left.argmax())
        if not float(left[pivot]) > max(least, 0.0):
            break
        factor[:, k] = (kernel[:, pivot] - factor[:, :k] @ factor[pivot, :k]) / left[pivot].sqrt()
        left -= factor[:, k].square()
        left[pivot] = -torch.inf
        chosen.append(pivot)
    return chosen


class ConnectionCorrelation(Saliency):
    """Correlation of what a weight reads with what its output sums up: connections between unrelated neurons go.

    The output is that of the linear layer itself, before any non-linearity. Sun et al. also keep some of the weak connections, drawn at
    random; here the strongest stay.

    Source: Sun, Wang, Tang 2016 (sparsifying neural network connections for face recognition).

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> from niwaki.saliency import ConnectionCorrelation, Observation
    >>> from niwaki.statistics import InputCovariance
    >>> layout = Layout(("output", "input"), (1, 2))
    >>> seen = Observation("fc.weight", torch.tensor([[3.0, 4.0]]), layout=layout, statistics={InputCovariance(): torch.eye(2)})
    >>> ConnectionCorrelation().score(seen, lambda values: values)
    tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """

    name = "connection_correlation"
    equation = "s_ij = |corr(y_i, x_j)| = |(W C)_ij| / √((W C Wᵀ)_ii C_jj), C the covariance of the inputs"
    source = "Sun et al. 2016"
    effort = "one forward pass over the data; inputs² numbers, and rows · inputs² operations a tensor"
    advice = "single weights of linear layers, where data have no labels; as a baseline"
    scored_on: ClassVar[Scored] = "inputs"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The covariance of all inputs."""
        return (InputCovariance(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return float64 scores; 0 where input or output are constant.

        Raises:
            InputError: the weight is a convolution's, whose output depends on several positions of an input.
        """
        layout = seen.layout
        assert layout is not None
        if layout.kernel or layout.size("group") > 1:
            raise InputError(f"saliency {self.name}: {seen.name} is a convolution; only linear layers have one connection of two neurons")
        covariance = _finite(seen.of(InputCovariance()).to(torch.float64), seen)
        weight = matrix(seen.weight.to(torch.float64), layout)[0]
        shared = weight @ covariance
        squares = (shared * weight).sum(dim=1, keepdim=True) * covariance.diagonal()
        related = shared.abs() / torch.where(squares > 0, squares, torch.inf).sqrt()
        return reduce(from_matrix(related[None], layout))


_ROUNDING = 1e-9
"""Difference up to which sums of correlations are equal."""
_TINY = 1e-12
"""Share of the largest variance below which a unit is constant, or explained."""


def _of_units(seen: Observation, reduce: Reduce) -> Tensor:
    """Return the covariance of the units' mean entries."""
    members = entries(seen, reduce)
    return members @ _finite(seen.of(InputCovariance()).to(torch.float64), seen) @ members.T


def _finite(values: Tensor, seen: Observation) -> Tensor:
    if not values.isfinite().all():
        raise InputError(f"saliency: what {seen.name!r} reads is not finite on the data; check the data and the weights")
    return values


def _active(seen: Observation, reduce: Reduce) -> Tensor:
    """Return which units are not masked wholly, bool ``[units]``."""
    if seen.active is None:
        return torch.ones(reduce.index().numel(), dtype=torch.bool, device=seen.weight.device)
    return (reduce(seen.active.to(torch.float64)) > 0).flatten()


def _places(order: list[int], count: int, active: Tensor) -> Tensor:
    """Return scores that rise along the order in which units go, up to 1; 0 for masked ones."""
    scores = torch.zeros(count, dtype=torch.float64, device=active.device)
    scores[order] = torch.arange(count - len(order) + 1, count + 1, dtype=torch.float64, device=active.device) / count
    return scores
