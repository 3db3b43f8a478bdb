"""The interface of a relaxation, and the two without parameters of their own."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from niwaki.component import Component
from niwaki.layout import Layout


class Relaxation(Component):
    """Base of the slot ``relaxation``. All tensors have the shape of the layout's view; own parameters broadcast against it."""

    slot = "relaxation"

    keeps_dense_weights: ClassVar[bool] = True
    decides: ClassVar[bool] = False
    """Whether the published weight's zeros are the mask (a learned threshold), rather than a selection's result."""
    has_scores: ClassVar[bool] = False
    """Whether it learns a score that ``saliency: score`` can rank by."""
    samples: ClassVar[bool] = False
    """Whether it leaves out other pieces in every step, so that it acts without any mask."""

    @property
    def scale(self) -> float:
        """Factor of the weights that a draw does not leave out."""
        return 1.0

    def parameters(self, weight: Tensor, layout: Layout, name: str, seed: int) -> dict[str, Tensor]:
        """Return the initial values of the relaxation's own trainable parameters for one weight."""
        return {}

    def publish(self, weight: Tensor, own: Mapping[str, Tensor], keep: Tensor) -> Tensor:
        """Return the weight that the model computes with; ``keep`` is the bool mask of a selection (all True when there is none)."""
        return weight.masked_fill(~keep, 0.0)

    def pull_back(self, weight: Tensor, own: Mapping[str, Tensor], gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradients of the latent weight and of the own parameters, given the gradient of the published weight."""
        return gradient, {}

    def score(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return the learned score of every element: higher is kept sooner."""
        raise NotImplementedError

    def group_options(self, group: Mapping[str, object]) -> dict[str, object]:
        """Return what differs between the optimizer group of the own parameters and the group of the weights."""
        return {}


class Hard(Relaxation):
    """A pruned weight is zero and forgotten: the Parameter is projected after every step."""

    name = "hard"
    equation = "w <- M * w"
    source = "Han, Pool, Tran, Dally 2015"
    keeps_dense_weights = False


class Latent(Relaxation):
    """A pruned weight keeps its value out of sight and may come back with it: the model sees ``M * w``.

    The gradient of the published weight is taken as the gradient of the latent one (straight through the mask); the recipe's
    gradient policy says which elements use it.
    """

    name = "latent"
    equation = "published = M * w; dL/dw := dL/dpublished"
    source = "Lin et al. 2020 (DPF); Jayakumar et al. 2020 (Top-KAST)"
