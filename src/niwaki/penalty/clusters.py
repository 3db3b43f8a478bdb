"""Filters that are to become the same: members of a cluster go to their mean."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from niwaki.component import Fraction
from niwaki.layout import from_matrix, matrix
from niwaki.penalty.base import NotNegative, Penalized, WithStrength
from niwaki.selection import kept


class Centripetal(WithStrength):
    """Let the rows (filters) of a tensor that are alike become the same: they share their gradients, and are pulled to their mean.

    The rows are clustered once, by k-means from rows that are far apart, into as many clusters as are to stay. Afterwards all but one
    of a cluster can go by merging, at no cost.

    Attributes:
        sparsity: share of the rows that become copies of others.
    """

    name = "centripetal"
    equation = "gradient (mean g - g) + c (w - mean w), means over the rows of a cluster"
    source = "Ding, Ding, Guo, Han 2019 (centripetal SGD)"
    effort = "two passes over the weights and their gradients; k-means once"
    advice = "trained models; then saliency merge_cost with compensation merge takes the copies out"
    whole = True
    remembers = True
    wants_gradient = True

    strength: NotNegative = 3e-3
    apply: Literal["gradient"] = "gradient"
    sparsity: Fraction = 0.5

    def refresh(self, everyone: Sequence[Penalized]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the cluster of each row: those of the first call at which the penalty acts."""
        acts = everyone[0].ramp > 0.0
        return [dict(seen.state) or ({"cluster": self._clusters(_rows(seen.weight, seen))} if acts else {}) for seen in everyone], {}

    def value(self, seen: Penalized) -> Tensor:
        """Return half the sum of the squared distances from the means, without the exchange of gradients."""
        rows = _rows(seen.weight, seen)
        return (rows - _means(rows, seen.state["cluster"])).square().sum() / 2 * self.factor(seen)

    def slope(self, seen: Penalized) -> Tensor:
        """Return what makes the members' gradients the same, and draws them together."""
        if "cluster" not in seen.state:
            return torch.zeros_like(seen.weight)
        assert seen.gradient is not None
        rows, gradients, cluster = _rows(seen.weight, seen), _rows(seen.gradient.to(seen.weight.dtype), seen), seen.state["cluster"]
        found = (_means(gradients, cluster) - gradients) * seen.ramp + (rows - _means(rows, cluster)) * self.factor(seen)
        assert seen.layout is not None
        sizes = matrix(seen.weight, seen.layout).shape
        return from_matrix(found.view(sizes), seen.layout).reshape(seen.weight.shape)

    def _clusters(self, rows: Tensor) -> Tensor:
        """Return the cluster of each row, int64: k-means by Lloyd's steps, from rows each of which is farthest from those before it."""
        count = max(kept(self.sparsity, len(rows)), 1)
        centers = rows[:1]
        for _ in range(count - 1):
            centers = torch.cat([centers, rows[torch.cdist(rows, centers).amin(dim=1).argmax()][None]])
        cluster = torch.cdist(rows, centers).argmin(dim=1)
        for _ in range(100):
            sums = torch.zeros_like(centers).index_add_(0, cluster, rows)
            counts = torch.bincount(cluster, minlength=count)[:, None]
            centers = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
            moved = torch.cdist(rows, centers).argmin(dim=1)
            if torch.equal(moved, cluster):
                break
            cluster = moved
        return cluster


def _rows(values: Tensor, seen: Penalized) -> Tensor:
    assert seen.layout is not None
    return matrix(values, seen.layout).flatten(0, 1)


def _means(rows: Tensor, cluster: Tensor) -> Tensor:
    """Return for each row the mean of its cluster."""
    sums = rows.new_zeros(int(cluster.max()) + 1, rows.shape[1]).index_add_(0, cluster, rows)
    return (sums / torch.bincount(cluster).clamp(min=1)[:, None])[cluster]
