"""Are scores comparable between layers: rescaling of the scores of one tensor before all tensors are ranked together.

No normalization changes the order within a tensor. All but ``none`` work and return in float64. NaN stays NaN, so that selection can
name the tensor; infinite scores stay infinite and do not count in sums.
"""

import torch
from pydantic import Field
from torch import Tensor

from niwaki.component import Component
from niwaki.errors import InputError


class Normalization(Component):
    """How the scores of a layer are made comparable with those of the others."""

    slot = "normalization"

    def normalize(self, scores: Tensor, flops_per_piece: float | Tensor | None = None) -> Tensor:
        """Return the rescaled scores of one whole tensor, same shape; higher still means keep.

        ``flops_per_piece``: operations that one piece costs in a forward pass, for normalizations that need ``flops``: a number, or a
        tensor of the shape of the scores where pieces differ.
        """
        raise NotImplementedError

    def _refuse_negative(self, scores: Tensor) -> None:
        values = scores.to(torch.float64)
        if bool(((values < 0) & ~values.isneginf()).any()):
            raise InputError(f"normalization {self.name}: the scores must not be negative; use a saliency without negative scores, or rank")


class Unchanged(Normalization):
    """Scores as they are.

    Source: Singh & Alistarh 2020 (global comparison of saliencies that are already changes of one loss).

    >>> import torch
    >>> Unchanged().normalize(torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """

    name = "none"
    equation = "s' = s"
    source = "Singh & Alistarh 2020"
    effort = "none"
    advice = "scores that are changes of one loss, or ranked within layers"

    def normalize(self, scores: Tensor, flops_per_piece: float | Tensor | None = None) -> Tensor:
        """Return the scores themselves."""
        return scores


class LayerL2(Normalization):
    """Scores divided by their L2 norm over the layer. A layer whose scores are all zero keeps them.

    Source: Molchanov et al. 2017; Michel et al. 2019.

    >>> import torch
    >>> LayerL2().normalize(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000], dtype=torch.float64)
    """

    name = "layer_l2"
    equation = "s' = s / √(Σ s²) over the layer"
    source = "Molchanov et al. 2017"
    effort = "one sum over the scores"
    advice = "scores whose scale differs between layers, such as first-order ones of units"

    def normalize(self, scores: Tensor, flops_per_piece: float | Tensor | None = None) -> Tensor:
        """Return scores whose squares sum to 1."""
        relative, _ = _over_largest(scores)
        norm = _finite(relative).square().sum().sqrt()
        return relative / torch.where(norm > 0, norm, 1.0)


class Lamp(Normalization):
    """Layer-adaptive magnitude pruning: each squared score over the sum of all squared scores that are not smaller.

    Equal scores count in the order in which they are kept (lower index first). The largest score of a layer becomes exactly 1, hence
    the best piece of each layer outlives all others. A layer of zeros is scored as any other layer of equal scores.

    Source: Lee, Park, Mo, Ahn, Shin 2021.

    >>> import torch
    >>> Lamp().normalize(torch.tensor([1.0, 2.0, 1.0]))
    tensor([0.2000, 1.0000, 0.1667], dtype=torch.float64)
    """

    name = "lamp"
    equation = "s'(u) = s(u)² / Σ s(v)² over all v of the layer with s(v) ≥ s(u)"
    source = "Lee et al. 2021"
    effort = "one sort of each layer's scores"
    advice = "magnitudes with a global ranking; it never empties a layer"

    def normalize(self, scores: Tensor, flops_per_piece: float | Tensor | None = None) -> Tensor:
        """Return scores in [0, 1]; infinite ones as they are.

        Raises:
            InputError: a score is negative.
        """
        self._refuse_negative(scores)
        relative, largest = _over_largest(scores)
        squares = _finite(relative).square() if largest > 0 else torch.ones_like(relative).where(relative.isfinite(), 0.0)
        descending, order = squares.flatten().sort(descending=True, stable=True)
        # A parallel cumulative sum may step back in its last digits, which would swap neighbours.
        not_smaller = descending.cumsum(0).cummax(0).values if descending.numel() else descending
        ratios = descending / torch.where(not_smaller > 0, not_smaller, 1.0)
        lamp = torch.empty_like(ratios).scatter_(0, order, ratios).reshape(scores.shape)
        return torch.where(relative.isfinite(), lamp, relative)


class Rank(Normalization):
    """Rank within the layer, from 1 / n for the smallest score to 1 for the largest: every layer loses the same share.

    Among equal scores the lower index ranks higher, as it is the one that is kept.

    Source: the rank transformation of statistics (Conover & Iman 1981), on one layer.

    >>> import torch
    >>> Rank().normalize(torch.tensor([7.0, 9.0, 7.0, 0.0]))
    tensor([0.7500, 1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """

    name = "rank"
    equation = "s' = (1 + number of scores that are removed earlier) / n"
    source = "Conover & Iman 1981"
    effort = "one sort of each layer's scores"
    advice = "scores of which only the order within a layer means something"

    def normalize(self, scores: Tensor, flops_per_piece: float | Tensor | None = None) -> Tensor:
        """Return the multiples of 1 / n from 1 / n to 1, each once."""
        values = _float64(scores).flatten()
        order = values.argsort(descending=True, stable=True)
        ranks = torch.arange(values.numel(), 0, -1, dtype=torch.float64, device=values.device) / max(values.numel(), 1)
        result = torch.empty_like(values).scatter_(0, order, ranks)
        return torch.where(values.isnan(), values, result).reshape(scores.shape)


class PerFlop(Normalization):
    """Scores divided by what a piece costs, so that expensive pieces go first.

    Source: Theis et al. 2018; the power: Singh & Alistarh 2020.

    >>> import torch
    >>> PerFlop(power=0.5).normalize(torch.tensor([3.0, 4.0]), 4.0)
    tensor([1.5000, 2.0000], dtype=torch.float64)
    """

    name = "per_flop"
    equation = "s' = s / (FLOPs of the piece)^power"
    source = "Theis et al. 2018; Singh & Alistarh 2020"
    effort = "one forward pass of one batch"
    advice = "where time matters more than size, with a global ranking or flops_budget"
    needs = frozenset({"flops"})

    power: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)

    def normalize(self, scores: Tensor, flops_per_piece: float | Tensor | None = None) -> Tensor:
        """Return the scores per FLOP.

        Raises:
            InputError: the FLOPs are unknown or not positive, or a score is negative (a larger cost would then protect it).
        """
        cost = None if flops_per_piece is None else torch.as_tensor(flops_per_piece, dtype=torch.float64, device=scores.device)
        if cost is None or not bool((cost > 0).all()):
            least = flops_per_piece if cost is None else float(cost.min())
            raise InputError(f"normalization {self.name}: the FLOPs of a piece must be known and above 0, got {least}")
        self._refuse_negative(scores)
        return _float64(scores) / cost**self.power


class FlopsPenalty(Normalization):
    """Scores of layers divided by their L2 norm, less what a piece costs: cheap pieces are protected, by addition rather than by ratio.

    Attributes:
        strength: λ, for each million FLOPs of a piece.

    Source: Molchanov, Tyree, Karras, Aila, Kautz 2017 (FLOPs regularization).

    >>> import torch
    >>> FlopsPenalty(strength=0.1).normalize(torch.tensor([3.0, 4.0]), 2e6)
    tensor([0.4000, 0.6000], dtype=torch.float64)
    """

    name = "flops_penalty"
    equation = "s' = s / √(Σ s²) - λ · FLOPs of the piece / 10⁶"
    source = "Molchanov et al. 2017"
    effort = "one forward pass of one batch"
    advice = "as per_flop, when cheap pieces are to be protected without being compared by ratio"
    needs = frozenset({"flops"})
    single_field = "strength"

    strength: float = Field(default=1e-3, ge=0.0, allow_inf_nan=False)

    def normalize(self, scores: Tensor, flops_per_piece: float | Tensor | None = None) -> Tensor:
        """Return the scores less their cost, which may be negative.

        Raises:
            InputError: the FLOPs are unknown or negative.
        """
        cost = None if flops_per_piece is None else torch.as_tensor(flops_per_piece, dtype=torch.float64, device=scores.device)
        if cost is None or not bool((cost >= 0).all()):
            raise InputError(f"normalization {self.name}: the FLOPs of a piece must be known and not negative, got {flops_per_piece}")
        return LayerL2().normalize(scores) - self.strength * 1e-6 * cost


def _float64(scores: Tensor) -> Tensor:
    """Return a float64 copy without -0.0, which sorting by bits would tell from +0.0."""
    return scores.to(torch.float64) + 0.0


def _finite(values: Tensor) -> Tensor:
    """Return the values with 0 for the infinite ones and NaN."""
    return values.where(values.isfinite(), 0.0)


def _over_largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores over the largest finite magnitude, whose squares then neither overflow nor all underflow; and that magnitude."""
    values = _float64(scores)
    largest = _finite(values).abs().max() if values.numel() else values.new_zeros(())
    return values / torch.where(largest > 0, largest, 1.0), largest
