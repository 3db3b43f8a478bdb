"""Pieces that are absent from a step by chance, so that the model can do without them."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from niwaki import counter
from niwaki.relaxation.base import Relaxation


class Dropout(Relaxation):
    """Every piece is left out of a step with the same probability; a mask is drawn anew for each step and all examples.

    The pieces are those of the recipe's granularity: single weights (DropConnect), channels, whole residual blocks (LayerDrop, with
    ``granularity: layer``). What is left out is zero in all its tensors and does not learn in that step, except by what the optimizer
    adds itself (momentum, weight decay). Evaluation leaves nothing out.

    Attributes:
        rate: probability of being left out, in [0, 1).
        rescale: divide the weights of the others by ``1 - rate``, which keeps the expected weight; for pieces of single tensors only.

    >>> float(Dropout(rate=0.2).dropped("blocks", 0, 10_000, seed=0, step=1).double().mean().round(decimals=2))
    0.2
    """

    name = "dropout"
    equation = "published = D * w, D = 0 with probability rate for each piece and step, else 1"
    source = "Wan, Zeiler, Zhang, LeCun, Fergus 2013 (DropConnect); Fan, Grave, Joulin 2020 (LayerDrop)"
    samples = True
    effort = "a draw for each piece and step"
    advice = "networks that are to bear the loss of blocks, heads or units later"

    rate: Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)] = 0.2
    rescale: bool = False

    @property
    def scale(self) -> float:
        """Factor of the weights that are not left out."""
        return 1.0 / (1.0 - self.rate) if self.rescale else 1.0

    def dropped(self, name: str, start: int, count: int, seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
        """Return which of the pieces ``start .. start + count - 1`` of ``name`` are left out of the step after ``step`` steps (bool)."""
        return counter.uniform(counter.key(seed, step, f"{name}::dropout"), start, count, device) < self.rate
