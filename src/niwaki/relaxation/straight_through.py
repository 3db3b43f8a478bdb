"""Learned scores, trained straight through the selection."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki import counter
from niwaki.layout import Layout
from niwaki.relaxation.base import Relaxation


class StraightThrough(Relaxation):
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
    has_scores = True

    scores: Literal["zeros", "uniform", "magnitude"] = "zeros"
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = 0.0

    def parameters(self, weight: Tensor, layout: Layout, name: str, seed: int) -> dict[str, Tensor]:  # noqa: D102
        if self.scores == "magnitude":
            return {"score": weight.abs()}
        if self.scores == "uniform":
            stream = counter.key(seed, 0, f"{name}::score")
            return {"score": counter.uniform(stream, 0, weight.numel(), weight.device).to(weight.dtype).view(weight.shape)}
        return {"score": torch.zeros_like(weight, memory_format=torch.contiguous_format)}

    def pull_back(self, weight: Tensor, own: Mapping[str, Tensor], gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: D102
        return gradient, {"score": gradient * weight}

    def score(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return own["score"]

    def group_options(self, group: Mapping[str, object]) -> dict[str, object]:  # noqa: D102
        options: dict[str, object] = {}
        if self.learning_rate is not None:
            options["lr"] = self.learning_rate
        if self.weight_decay is not None and "weight_decay" in group:
            options["weight_decay"] = self.weight_decay
        return options
