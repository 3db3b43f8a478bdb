"""Learned scores, trained straight through the selection."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from niwaki import counter
from niwaki.layout import Layout
from niwaki.relaxation.base import LearnsOwn, Moment


class StraightThrough(LearnsOwn):
    """Every weight has a trainable score; the best scores are active; the selection's derivative is taken as one.

    With ``published = M(S) * w`` and ``dM/dS := 1`` the score's gradient is ``dL/dS = dL/dpublished * w``: the sum over the steps is
    the accumulated movement. The latent weight learns by the recipe's gradient policy (``frozen`` gives edge-popup).

    Attributes:
        scores: initial scores: ``zeros``, ``uniform`` in [0, 1), or the ``magnitude`` of the weights.
        learning_rate: of the scores when the weights' group is at its initial one; None inherits the weights'.
        weight_decay: of the scores; None inherits the weights'.
    """

    name = "straight_through"
    equation = "published = M(S) * w; dL/dS := dL/dpublished * w"
    source = "Sanh, Wolf, Rush 2020 (movement pruning); Bengio, Léonard, Courville 2013 (the estimator)"
    effort = "a trained number for each weight; dense gradients"
    advice = "fine-tuning of pretrained models (movement), masks over random weights (edge-popup)"
    has_scores = True

    scores: Literal["zeros", "uniform", "magnitude"] = "zeros"

    def parameters(self, weight: Tensor, layout: Layout, name: str, seed: int) -> dict[str, Tensor]:  # noqa: D102
        if self.scores == "magnitude":
            return {"score": weight.abs()}
        if self.scores == "uniform":
            stream = counter.key(seed, 0, f"{name}::score")
            return {"score": counter.uniform(stream, 0, weight.numel(), weight.device).to(weight.dtype).view(weight.shape)}
        return {"score": torch.zeros_like(weight, memory_format=torch.contiguous_format)}

    def pull_back(  # noqa: D102
        self, weight: Tensor, own: Mapping[str, Tensor], gradient: Tensor, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        return gradient, {"score": gradient * weight}

    def score(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return own["score"]

    def gates(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return the sigmoid of the scores, which the penalty of soft movement pruning sums up."""
        return torch.sigmoid(own["score"])
