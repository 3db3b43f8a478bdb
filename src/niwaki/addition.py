"""Where units come from that are added to a model: copies of others, or new ones. Pure choices; ``structured`` carries them out."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from niwaki.component import Component
from niwaki.counter import uniform

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Addition(Component):
    """Base of the slot ``addition``: units that make a model wider."""

    slot = "addition"

    copies: ClassVar[bool] = False
    """Whether an added unit begins as a copy of another, with which it shares what reads that."""

    def sources(self, size: int, count: int, scores: Tensor | None, stream: int) -> Tensor:
        """Return the unit that each added one is a copy of: int64 ``[count]``.

        Args:
            size: units that there are.
            count: units that are added; may be more than there are.
            scores: one for each unit, higher: sooner; None where :attr:`needs` does not ask for ``scores``.
            stream: of random numbers.
        """
        raise NotImplementedError


class Copy(Addition):
    """Copies of units that are drawn at random; what reads a unit is divided among its copies, so that the function stays exactly.

    Copies that are equal get equal gradients. Where nothing else tells them apart, such as dropout, they need a perturbation to part.

    Attributes:
        perturbation: ``ε``, of the copies' weights, as a share of the root mean square of the weights of their layer; the perturbations
            of all copies of a unit sum to zero, so that the function changes by ``O(ε²)``.
    """

    name = "copy"
    equation = "w_j = w_i + ε s_j σ z, a_j = a_i / c for the c copies j of unit i; s_j evenly in [-1, 1], z normal"
    source = "Chen, Goodfellow, Shlens 2016 (Net2Net)"
    copies = True
    single_field = "perturbation"
    effort = "one forward pass"
    advice = "to go on with a trained network in a larger one without losing what it has learned"

    perturbation: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0

    def sources(self, size: int, count: int, scores: Tensor | None, stream: int) -> Tensor:  # noqa: D102
        return (uniform(stream, 0, count) * size).long()

    @staticmethod
    def offsets(copies: int) -> Tensor:
        """Return ``s``, by which the perturbation of each copy of a unit is multiplied: float64 ``[copies]``, evenly in [-1, 1].

        >>> Copy.offsets(2).tolist(), Copy.offsets(3).tolist()
        ([-1.0, 1.0], [-1.0, 0.0, 1.0])
        """
        return torch.linspace(-1.0, 1.0, copies, dtype=torch.float64) if copies > 1 else torch.zeros(1, dtype=torch.float64)


class Split(Copy):
    """Units with the highest scores are split: copies share what reads them, and are moved apart in opposite directions.

    By default the score of a unit is the squared gradient times weight of what makes it, ``(Σ w dL/dw)²``: units that the loss pulls at
    hardest. Kameyama & Kosugi take the fluctuation of a unit's weights during training (give it as scores). With more units to add than
    there are, units are split into more than two.

    Attributes:
        perturbation: ``ε``, as for ``copy``.
    """

    name = "split"
    source = "Kameyama & Kosugi 1991; Liu, Wu, Wang 2019 (splitting steepest descent)"
    needs = frozenset({"scores"})
    effort = "one pass over the data with gradients, unless scores are given"
    advice = "to spend new units where the loss asks for them"

    perturbation: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.01

    def sources(self, size: int, count: int, scores: Tensor | None, stream: int) -> Tensor:  # noqa: D102
        assert scores is not None
        order = scores.double().argsort(descending=True, stable=True)
        return order[torch.arange(count) % size]


class New(Addition):
    """New units with the layer's own initial weights, which nothing reads yet: the function stays exactly.

    What reads them learns first (its gradient is the new unit's output times the error), then they do. Weights come from the module's
    ``reset_parameters``.
    """

    name = "new"
    equation = "w_j ~ initial distribution, a_j = 0"
    source = "the width expansion of Gordon et al. 2018 (MorphNet), begun without a change of the function"
    effort = "one forward pass"
    advice = "where units should differ from those that there are"


class Bridging(Addition):
    """New units between linear layers that connect the pairs (input of the layer, unit of the next layer) the loss asks for most.

    ``G_mn = E[dL/du_m x_n]`` is the bridging gradient of input n of the layer and unit m of the next one. The pairs with the largest |G|
    are dealt out to the new units; each gets ``±√|G|`` on the way in and ``∓ sign(G) √|G|`` on the way out, the sign drawn at random, so
    that what goes through it is a step against the gradient where its activation function is the identity. Both sides are then scaled to
    ``strength`` times the mean magnitude of the weights around them. The function changes by that.

    Attributes:
        strength: ``α``, birth strength.
        share: ``β``, of all pairs that are connected.
    """

    name = "bridging"
    equation = "in_n += r √|G_mn|, out_m -= r sign(G_mn) √|G_mn| for the β M N largest |G|; each times α mean|W| / mean|new|"
    source = "Dai, Yin, Jha 2018 (NeST), neuron growth; the sign there is not told, here it lowers the loss"
    needs = frozenset({"gradient"})
    effort = "one pass over the data with gradients"
    advice = "linear layers whose inputs and errors say which connections are missing"

    strength: Positive = 0.3
    share: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 0.1

    def weights(self, gradient: Tensor, count: int, means: tuple[float, float], stream: int) -> tuple[Tensor, Tensor]:
        """Return what makes new units and what reads them: ``[count, N]`` and ``[M, count]``, float64.

        Args:
            gradient: ``G``, ``[M, N]``.
            count: new units; each gets at least one pair while there are pairs.
            means: mean magnitude of the weights that make units and of those that read them.
            stream: of random numbers.
        """
        flat = gradient.detach().double().cpu().flatten()
        pairs = min(max(round(self.share * len(flat)), count), len(flat))
        chosen = flat.abs().argsort(descending=True, stable=True)[:pairs]
        unit, (m, n) = torch.arange(pairs) % count, (chosen // gradient.shape[1], chosen % gradient.shape[1])
        size = flat[chosen].abs().sqrt()
        sign = torch.where(uniform(stream, 0, pairs) < 0.5, -1.0, 1.0).double()
        into = torch.zeros(count, gradient.shape[1], dtype=torch.float64)
        out = torch.zeros(gradient.shape[0], count, dtype=torch.float64)
        into.index_put_((unit, n), sign * size, accumulate=True)
        out.index_put_((m, unit), -sign * flat[chosen].sign() * size, accumulate=True)
        return _scaled(into, 1, self.strength * means[0]), _scaled(out, 0, self.strength * means[1])


def _scaled(values: Tensor, dim: int, mean: float) -> Tensor:
    """Scale values such that the mean magnitude of those along a dimension that are not zero becomes a number."""
    counts = (values != 0).sum(dim=dim, keepdim=True).clamp(min=1)
    means = values.abs().sum(dim=dim, keepdim=True) / counts
    return values * torch.where(means > 0, mean / means, 0.0)
