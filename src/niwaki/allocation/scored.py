"""Budgets from the scores of each layer by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.allocation.base import Allocation, Evidence
from niwaki.allocation.layer import Layer
from niwaki.allocation.sharing import solved
from niwaki.errors import InputError
from niwaki.selection import kept
from niwaki.statistics import InputCovariance, Statistic

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class OutlierWeighted(Allocation):
    """Layers with more outliers among their scores stay denser, within a band around the sparsity of the whole.

    The deviations are as large as the band, and the numbers of pieces, allow: the layer that is furthest from the mean is at its edge.
    (The published code spreads densities over a range of 2 λ and shifts them to the mean, so that one may be up to 2 λ off, and
    its totals hold only for layers of one size.) Meant for saliencies that weigh by activations, such as ``wanda``; time O(pieces).

    Attributes:
        threshold: ``M``, a score above so many times the mean of its layer is an outlier.
        band: ``λ``, the most by which a layer's sparsity differs from the whole's.
        per: what has outliers and a sparsity of its own: each ``tensor``, or each ``block``: tensors with the same name up to its first
            number, such as ``model.layers.3``.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (1, 10)), 10) for name in "ab"]
    >>> scores = [torch.ones(10), torch.tensor([1.0] * 9 + [100.0])]
    >>> OutlierWeighted(band=0.2).keep(0.5, layers, evidence=Evidence(scores=scores.__getitem__))
    [3, 7]
    """

    name = "outlier_weighted"
    equation = "s_l = S - c (D_l - D), D_l = share of scores > M mean(scores), D its mean, c = λ / max |D_l - D|"
    source = "Yin, Wu, Zhang, Hsieh et al. 2023 (OWL, M = 5, λ = 0.08)"
    effort = "a sort of each layer's scores"
    advice = "large language models with activation-weighted scores, above half of the weights"

    threshold: Positive = 5.0
    band: Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)] = 0.08
    per: Literal["tensor", "block"] = "block"

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"scores"})

    def quotas(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[float]:  # noqa: D102
        blocks: dict[str, list[int]] = {}
        for i, layer in enumerate(layers):
            blocks.setdefault(layer.name if self.per == "tensor" else block(layer.name), []).append(i)
        share = {key: self._outliers(members, layers, evidence) for key, members in blocks.items()}
        pieces = {key: sum(layers[i].pieces for i in members) for key, members in blocks.items()}
        mean = sum(share[key] * n for key, n in pieces.items()) / sum(pieces.values())
        deviations = {key: value - mean for key, value in share.items()}
        # The largest c at which no density leaves the band or [0, 1].
        scale = min((min(self.band, sparsity if d > 0 else 1.0 - sparsity) / abs(d) for d in deviations.values() if d), default=0.0)
        density = {i: 1.0 - sparsity + scale * deviations[key] for key, members in blocks.items() for i in members}
        return [max(density[i], 0.0) * layer.pieces for i, layer in enumerate(layers)]

    def _outliers(self, members: Sequence[int], layers: Sequence[Layer], evidence: Evidence) -> float:
        scores = torch.cat([evidence.best(i, layers[i].name) for i in members])
        return float((scores > self.threshold * scores.mean()).double().mean()) if scores.numel() else 0.0


def block(name: str) -> str:
    """Return a name up to its first number.

    >>> block("model.layers.3.mlp.up_proj.weight"), block("head.weight")
    ('model.layers.3', 'head.weight')
    """
    parts = name.split(".")
    stems = list(accumulate(parts, "{}.{}".format))
    return next((stem for part, stem in zip(parts, stems, strict=True) if part.isdigit()), name)


class ErrorBound(Allocation):
    """Every layer loses the same share of its own total score.

    The smallest scores of each layer go until their sum reaches the share ``ε``, and ``ε`` is what the total number of pieces asks for.
    With squared magnitudes (``power: 2`` after ``magnitude``) it bounds the relative error of every layer's weights in L2; with scores that
    are layer-wise errors (``l_obs``, ``wanda`` squared) that of its outputs. No layer is emptied. Time O(N log N) for N pieces.

    Attributes:
        power: scores count to this power.

    Raises:
        InputError: a negative score.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (1, 4)), 4) for name in "ab"]
    >>> scores = [torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 97.0])]
    >>> ErrorBound().keep(0.5, layers, evidence=Evidence(scores=scores.__getitem__))
    [3, 1]
    """

    name = "error_bound"
    equation = "sum of removed scores^power ≤ ε sum of all scores^power in every layer, ε such that sum p_l N_l = (1 - S) sum N_l"
    source = "Dong, Chen, Pan 2017 (L-OBS); Liebenwein, Baykal, Lang, Feldman, Rus 2020 (PFP)"
    effort = "a sort of all scores"
    advice = "scores that are errors of a layer, and say nothing of the loss"

    power: Positive = 1.0

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"scores"})

    def counts(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[int]:  # noqa: D102
        shares = []
        for i, layer in enumerate(layers):
            best = evidence.best(i, layer.name)
            if best.numel() and not (best[-1] >= 0 and best[0].isfinite()):
                raise InputError(
                    f"allocation.error_bound: {layer.name!r} has negative or infinite scores, which are no errors; choose another saliency,"
                    " or global"
                )
            # The largest scores first, so that a piece's number is that of what is lost with it and all smaller ones.
            shares.append(_lost_shares((best / best[0].clamp(min=torch.finfo(torch.float64).tiny)) ** self.power if best.numel() else best))
        ids = joint_order(shares)
        total = kept(sparsity, sum(layer.pieces for layer in layers))
        return torch.bincount(ids[:total], minlength=len(layers)).tolist()


def _lost_shares(errors: Tensor) -> Tensor:
    """Return for each error (decreasing) the share that is lost with it and all that follow; of zeros the share of their number."""
    if errors.numel() and errors[0] == 0:
        errors = torch.ones_like(errors)
    lost = errors.flip(0).cumsum(0).flip(0)
    return lost / lost[:1]


def joint_order(best: Sequence[Tensor]) -> Tensor:
    """Return the layer of each piece in one ranking over all layers: the best of every layer first, then by score, then by layer.

    Args:
        best: scores of each layer, decreasing.

    >>> joint_order([torch.tensor([5.0, 4.0, 1.0]), torch.tensor([3.0, 2.0])]).tolist()
    [0, 1, 0, 1, 0]
    """
    ids = torch.cat([torch.full((len(one),), i) for i, one in enumerate(best)])
    scores = torch.cat([one.to(torch.float64) for one in best])
    first = torch.cat([torch.arange(len(one)) == 0 for one in best])
    order = scores.argsort(descending=True, stable=True)
    order = order[(~first[order]).to(torch.int8).argsort(stable=True)]
    return ids[order]


class PrincipalFilters(Allocation):
    """Every layer keeps as many units as it has principal components for the same share of the variance of its responses.

    The share ``τ`` is what the total asks for, so a recipe still says how sparse the model becomes. A unit's responses are what its readers
    see; where several layers read a group, the mean of their shares counts. Pieces that are no units are kept in the same share as
    the layer's inputs. Memory and time: the covariance of each layer's inputs and its eigenvalues, O(inputs³).

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (4, 3)), 4) for name in "ab"]
    >>> covariance = [torch.eye(4).double(), torch.diag(torch.tensor([100.0, 1.0, 0.5, 0.1])).double()]
    >>> def observe(i):
    ...     return [Observation("reader", torch.ones(1, 4), statistics={InputCovariance(): covariance[i]})]
    >>> from niwaki.saliency import Observation
    >>> PrincipalFilters().keep(0.375, layers, evidence=Evidence(observe=observe))
    [4, 1]
    """

    name = "pfa"
    equation = "p_l = k / n, smallest k with sum of the k largest eigenvalues ≥ τ sum of all, τ such that sum p_l N_l = (1 - S) sum N_l"
    source = "Suau, Zappella, Apostoloff 2019 (PFA-En)"
    effort = "a pass over the data; inputs² numbers and inputs³ operations a layer"
    advice = "channels, where how many are needed is not known"
    observes = "inputs"

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"observe"})

    @property
    def statistics(self) -> tuple[Statistic, ...]:  # noqa: D102
        return (InputCovariance(),)

    def quotas(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[float]:  # noqa: D102
        assert evidence.observe is not None
        spectra = [[_explained(seen.of(InputCovariance())) for seen in evidence.observe(i)] for i in range(len(layers))]
        for layer, own in zip(layers, spectra, strict=True):
            if not own:
                raise InputError(f"allocation.pfa: nothing reads {layer.name!r}; exclude it from the target")

        def quotas_at(lost: float) -> list[float]:
            shares = [sum(_components(one, 1.0 - lost) / len(one) for one in own) / len(own) for own in spectra]
            return [share * layer.pieces for share, layer in zip(shares, layers, strict=True)]

        total = kept(sparsity, sum(layer.pieces for layer in layers))
        if sum(most := quotas_at(0.0)) < total:  # directions without variance are kept last, and alike
            left = (total - sum(most)) / max(sum(layer.pieces for layer in layers) - sum(most), 1.0)
            return [n + left * (layer.pieces - n) for n, layer in zip(most, layers, strict=True)]
        return solved(quotas_at, 0.0, 1.0, total)


def _explained(covariance: Tensor) -> Tensor:
    """Return the share of the variance that the 1, 2, ... largest principal components have."""
    values: Tensor = torch.linalg.eigvalsh(covariance.to("cpu", torch.float64)).flip(0).clamp(min=0.0)
    values = values.where(values > 1e-12 * values[:1], 0.0)  # rounding
    total = values.sum()
    return values.cumsum(0) / total.clamp(min=torch.finfo(torch.float64).tiny)


def _components(explained: Tensor, share: float) -> int:
    """Return the smallest number of components that has a share of the variance."""
    return int((explained < min(share, float(explained[-1])) - 1e-15).sum()) + 1 if share > 0 else 0
