"""Which units the layers that read them can do without: orders of removal that keep the outputs of those layers on data.

All look at the second moments of what a layer reads. Where several layers read a unit, their scores are added up by the granularity;
they are places in an order, so that only units of one group are comparable.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from niwaki.errors import InputError
from niwaki.layerwise.channels import contributions, dependence_order, lasso_path, thinet_order
from niwaki.layerwise.moments import moments
from niwaki.layout import columns_view, matrix
from niwaki.saliency.base import Observation, Reduce, Saliency, Scored
from niwaki.statistics import InputGram, Statistic


class Reconstruction(Saliency):
    """Base: scores of units as a layer that reads them sees them. Itself not registered."""

    scored_on: ClassVar[Scored] = "inputs"
    of_units: ClassVar[bool] = True

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Second moments of what the layer reads."""
        return (InputGram(),)

    def score(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return a score for each unit, float64. Units without active weights have the lowest.

        Raises:
            InputError: pieces that are no inputs of the layer, or differ in size.
        """
        columns = self._columns(seen, reduce)
        pieces = reduce(seen.weight)
        alive = torch.ones_like(seen.weight, dtype=torch.bool) if seen.active is None else seen.active
        present = reduce(alive.to(torch.float64)).flatten() > 0
        return self._ranked(seen, columns, present).to(torch.float64).reshape(pieces.shape)

    def _ranked(self, seen: Observation, columns: Tensor, present: Tensor) -> Tensor:
        raise NotImplementedError

    def _columns(self, seen: Observation, reduce: Reduce) -> Tensor:
        """Return the columns of each unit, flat over groups: int64 ``[units, columns of one]``."""
        assert seen.layout is not None
        groups, _, columns = matrix(seen.weight, seen.layout).shape
        numbers = torch.arange(groups * columns, device=seen.weight.device).view(groups, columns)
        of = reduce.rows(columns_view(numbers, seen.layout).expand(seen.layout.shape)).sort(dim=1).values
        new = torch.cat([torch.ones_like(of[:, :1], dtype=torch.bool), of[:, 1:] != of[:, :-1]], dim=1)
        sizes = new.sum(dim=1)
        found = of[new]
        if len(found) != len(torch.unique(found)) or bool((sizes != sizes[0]).any()):
            raise InputError(
                f"saliency {self.name}: it ranks whole inputs of {seen.name!r}, and these pieces are none;"
                " choose the granularity channel, head or input_channel"
            )
        return found.view(len(of), -1)

    def _products(self, seen: Observation, columns: Tensor) -> Tensor:
        """Return the second moments of what units contribute to the outputs."""
        assert seen.layout is not None
        weight, gram = matrix(seen.weight, seen.layout).to(torch.float64), seen.of(InputGram()).to(torch.float64)
        if not bool(gram.isfinite().all()):
            raise InputError(f"{seen.name}: second moments of its inputs are not finite; look for infinite or NaN values in the data")
        unit = torch.full((weight.shape[0] * weight.shape[2],), -1, device=weight.device)
        unit[columns] = torch.arange(len(columns), device=weight.device)[:, None].expand(columns.shape)
        return contributions(weight, gram, unit.view(weight.shape[0], -1), len(columns))


class ThiNet(Reconstruction):
    """Round in which a unit is removed greedily, so that what all removed ones contributed to the next layer's outputs is least.

    ``M_uv = E[x̂_uᵀ x̂_v]`` counts all outputs at all positions; the paper samples some. Sets are nested, so that one order holds for
    every count. Follow it by ``compensation: least_squares``, as the paper does with one factor a channel.

    Source: Luo, Wu, Lin 2017.

    >>> from niwaki.granularity import InputChannel
    >>> from niwaki.layout import Layout
    >>> from niwaki.pieces import Grid
    >>> layout, gram = Layout(("output", "input"), (1, 3)), torch.tensor([[[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 9.0]]])
    >>> seen = Observation("fc.weight", torch.tensor([[2.0, 2.0, 1.0]]), layout=layout, statistics={InputGram(): gram})
    >>> ThiNet().score(seen, Grid(InputChannel(), layout))  # the first two cancel
    tensor([[1., 0., 2.]], dtype=torch.float64)
    """

    name = "thinet"
    equation = "s = round of greedy removal; each takes the j with the least E‖Σ_(u removed) x̂_u + x̂_j‖²"
    source = "Luo, Wu, Lin 2017"
    effort = "forward passes only; columns² numbers and rows · columns² operations a tensor"
    advice = "channels of a trained network, layer by layer, with little or no training after; follow it by least_squares"

    def _ranked(self, seen: Observation, columns: Tensor, present: Tensor) -> Tensor:
        return thinet_order(self._products(seen, columns), present)


class LassoChannels(Reconstruction):
    """Penalty from which on the lasso leaves a unit out: ``min_β ½ E‖Y - Σ_u β_u x̂_u‖² + λ ‖β‖₁``.

    The solution is followed exactly over all λ. Where its sets are not nested, a unit counts from the largest λ at which it is in.
    Follow it by ``compensation: least_squares``, the paper's second step.

    Source: He, Zhang, Sun 2017; the path: Efron, Hastie, Johnstone, Tibshirani 2004.

    >>> from niwaki.granularity import InputChannel
    >>> from niwaki.layout import Layout
    >>> from niwaki.pieces import Grid
    >>> layout, gram = Layout(("output", "input"), (1, 2)), torch.diag(torch.tensor([1.0, 3.0]))[None]
    >>> seen = Observation("fc.weight", torch.tensor([[2.0, 1.0]]), layout=layout, statistics={InputGram(): gram})
    >>> LassoChannels().score(seen, Grid(InputChannel(), layout))
    tensor([[4., 3.]], dtype=torch.float64)
    """

    name = "lasso_channels"
    equation = "s = max λ with β_u ≠ 0 in argmin_β ½ E‖Y - Σ_u β_u x̂_u‖² + λ ‖β‖₁"
    source = "He, Zhang, Sun 2017"
    effort = "as thinet, and units³ operations"
    advice = "as thinet"

    def _ranked(self, seen: Observation, columns: Tensor, present: Tensor) -> Tensor:
        # Among those that never enter, masked ones are still below others.
        return lasso_path(self._products(seen, columns)).where(present, -1.0)


class LinearDependence(Reconstruction):
    """Round in which a unit is removed greedily, each replaced by a linear combination of the others.

    In each round the unit goes whose loss raises the layer's squared output error least, once all other weights are solved anew:
    ``tr W_u ([H⁻¹]_uu)⁻¹ W_uᵀ``, the exact optimal brain surgeon for units. Follow it by ``compensation: least_squares``.

    Attributes:
        damping: added to H, as a share of its mean diagonal.

    Source: Castellano, Fanelli, Pelillo 1997; Chandrasekaran, Chen, Manry 2000.

    >>> from niwaki.granularity import InputChannel
    >>> from niwaki.layout import Layout
    >>> from niwaki.pieces import Grid
    >>> layout, gram = Layout(("output", "input"), (1, 2)), torch.diag(torch.tensor([1.0, 3.0]))[None]
    >>> seen = Observation("fc.weight", torch.tensor([[2.0, 1.0]]), layout=layout, statistics={InputGram(): gram})
    >>> LinearDependence().score(seen, Grid(InputChannel(), layout))
    tensor([[1., 0.]], dtype=torch.float64)
    """

    name = "linear_dependence"
    equation = "s = round of greedy removal by tr W_u ([H⁻¹]_uu)⁻¹ W_uᵀ, the error that is left when the others are solved anew"
    source = "Castellano, Fanelli, Pelillo 1997; Chandrasekaran, Chen, Manry 2000"
    effort = "forward passes only; columns² numbers and units · columns² operations a tensor"
    advice = "units that are redundant together, without being small or alike; follow it by least_squares"

    damping: float = Field(default=1e-4, ge=0.0, allow_inf_nan=False)

    def _ranked(self, seen: Observation, columns: Tensor, present: Tensor) -> Tensor:
        assert seen.layout is not None
        weight = matrix(seen.weight, seen.layout).to(torch.float64)
        group = columns // weight.shape[2]
        if bool((group != group[:, :1]).any()):
            raise InputError(f"saliency {self.name}: a unit of {seen.name!r} lies in several groups of the convolution; choose thinet")
        return dependence_order(weight, moments(seen.of(InputGram()), self.damping, seen.name), columns, present)
