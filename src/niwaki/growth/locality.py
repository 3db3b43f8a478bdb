"""Growth by where a connection would be: between which units, and how these are connected, active or placed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, prod, sqrt
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.growth.base import ByFraction
from niwaki.growth.random import random_score
from niwaki.layout import Layout, from_matrix, matrix
from niwaki.statistics import Coactivity, Statistic

if TYPE_CHECKING:
    from niwaki.saliency import Observation


class LocalityGrowth(ByFraction):
    """Pruned weights come back between units that belong together, by the network itself and not by the gradient of the loss.

    A layer is a graph between its inputs ``j`` and its outputs ``i``, with a link where a weight is active; of a convolution the units are
    channels, linked where a weight of their kernel is active, and its weights share the score of their channels.

    ``degree``: preferential attachment. Drawn without replacement, with chances in proportion to ``(d_i + 1)(d_j + 1)``, d the number of
    links before the update. ``hebbian``: units that are active together, by the mean product of what the layer reads and puts out.
    ``similarity``: the same divided by the root of both mean squares. ``paths``: the number of paths of three links from i to j.
    ``spatial``: units near each other; both sides lie on a square grid of side 1, row by row, and those within ``radius`` come first, at
    random.

    Attributes:
        by: what belongs together.
        radius: of ``spatial``, in units of the side of the grid.
    """

    name = "locality"
    equation = "G ~ (d_i + 1)(d_j + 1) (degree), |E[y_i x_j]| (hebbian), |cos(y_i, x_j)| (similarity), (A Aᵀ A)_ij (paths), |p_i - p_j| < r"
    source = "Barabási & Albert 1999; Hebb 1949; Daminelli et al. 2015 (paths of length 3); Efraimidis & Spirakis 2006 (the draw)"
    effort = "products of the layer's mask with itself (paths); a pass over data at each update (hebbian, similarity)"
    advice = "experiments on how topology arises; no gradient of the loss is needed"
    needs_whole = True

    by: Literal["degree", "hebbian", "paths", "similarity", "spatial"] = "degree"
    radius: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.25

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What the layer's inputs and outputs do together, if that is looked at."""
        together = {"hebbian": (Coactivity(),), "similarity": (Coactivity(normalized=True),)}
        return (*together.get(self.by, ()), *super().statistics)

    def score(self, seen: Observation, reduce: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        assert seen.layout is not None
        if self.by in ("hebbian", "similarity"):
            together = seen.of(Coactivity(normalized=self.by == "similarity"))
            return reduce(from_matrix(together.abs(), seen.layout))
        values = reduce(_of_weights(_OF_UNITS[self.by](self, _links(seen, seen.layout)), seen.layout))
        if self.by == "paths":
            return values
        numbers = random_score(seen, reduce)
        if self.by == "spatial":
            return numbers + (values > 0)
        return values.log() - (-numbers.log()).log()  # the largest of these are a draw without replacement


def _links(seen: Observation, layout: Layout) -> Tensor:
    """Return which units are linked: ``[groups, outputs, inputs]``, 1 or 0 in float64."""
    active = torch.ones(layout.shape, dtype=torch.bool, device=seen.weight.device) if seen.active is None else seen.active
    table = matrix(active, layout)
    return table.view(*table.shape[:2], layout.size("input"), prod(layout.kernel)).any(dim=-1).to(torch.float64)


def _of_weights(units: Tensor, layout: Layout) -> Tensor:
    """Return what stands for a pair of units for each weight between them, in the layout's view."""
    return from_matrix(units.repeat_interleave(prod(layout.kernel), dim=2), layout)


def _attachment(growth: LocalityGrowth, links: Tensor) -> Tensor:
    return (links.sum(dim=2, keepdim=True) + 1.0) * (links.sum(dim=1, keepdim=True) + 1.0)


def _paths(growth: LocalityGrowth, links: Tensor) -> Tensor:
    """Return the number of paths of three links; walks along the link between i and j itself are none."""
    walks = links @ links.mT @ links
    return walks - links * (links.sum(dim=2, keepdim=True) + links.sum(dim=1, keepdim=True) - 1.0)


def _near(growth: LocalityGrowth, links: Tensor) -> Tensor:
    outputs, inputs = (_places(count).to(links.device) for count in links.shape[1:])
    return (torch.cdist(outputs, inputs) < growth.radius).to(torch.float64).expand(links.shape)


def _places(count: int) -> Tensor:
    """Return where units lie on the square grid: ``[count, 2]``.

    >>> _places(4).tolist()
    [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    """
    side = ceil(sqrt(count))
    number = torch.arange(count)
    return (torch.stack([number // side, number % side], dim=1).to(torch.float64) + 0.5) / side


_OF_UNITS: Mapping[str, Callable[[LocalityGrowth, Tensor], Tensor]] = {"degree": _attachment, "paths": _paths, "spatial": _near}
