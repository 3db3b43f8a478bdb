"""The interface of a relaxation, and the two without parameters of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from niwaki.component import Component
from niwaki.errors import InputError
from niwaki.layout import Layout


@dataclass(frozen=True)
class Moment:
    """When a relaxation is asked, and of what.

    Attributes:
        name: of the tensor or group, for random streams.
        seed: of the run.
        step: optimizer steps taken.
        start: flat index of this rank's first element in the whole tensor.
        progress: share of the run that has passed, in [0, 1]; 0 where its length is not known.
        evaluating: whether the mode is asked for, rather than the sample of this step.
    """

    name: str
    seed: int = 0
    step: int = 0
    start: int = 0
    progress: float = 0.0
    evaluating: bool = False


class Relaxation(Component):
    """Base of the slot ``relaxation``. All tensors have the shape of the layout's view; own parameters broadcast against it."""

    slot = "relaxation"

    keeps_dense_weights: ClassVar[bool] = True
    decides: ClassVar[bool] = False
    """Whether the zeros of what it publishes for evaluation are the mask (a learned threshold), rather than a selection's result."""
    has_scores: ClassVar[bool] = False
    """Whether it learns a score that ``saliency: score`` can rank by."""
    posterior: ClassVar[bool] = False
    """Whether its score is the logarithm of a squared signal-to-noise ratio, ``E² / Var``."""
    samples: ClassVar[bool] = False
    """Whether it publishes something else in every step, by chance."""
    anneals: ClassVar[bool] = False
    """Whether what it publishes depends on how much of the run has passed."""

    @property
    def mode_differs(self) -> bool:
        """Whether training may see other weights than evaluation does."""
        return self.samples or self.anneals

    @property
    def scale(self) -> float:
        """Factor of the weights that a draw does not leave out."""
        return 1.0

    def initial_latent(self, weight: Tensor, layout: Layout, moment: Moment) -> Tensor:
        """Return the latent weight at the beginning, given the model's; ``layout`` is that of this rank's part."""
        return weight

    def parameters(self, weight: Tensor, layout: Layout, name: str, seed: int) -> dict[str, Tensor]:
        """Return the initial values of the relaxation's own trainable parameters for one weight."""
        return {}

    def relax(self, weight: Tensor, own: Mapping[str, Tensor], moment: Moment) -> Tensor:
        """Return the weight that the model computes with where no mask acts; differentiable in the weight and the own parameters."""
        return weight

    def publish(self, weight: Tensor, own: Mapping[str, Tensor], keep: Tensor, moment: Moment) -> Tensor:
        """Return the weight that the model computes with; ``keep`` is the bool mask of a selection (all True when there is none)."""
        published = self.relax(weight, own, moment)
        gone = (published == 0) | ~keep if self.decides else ~keep
        return published.masked_fill(gone, 0.0)  # also turns the -0.0 of a relaxation that decides into 0.0

    def pull_back(
        self, weight: Tensor, own: Mapping[str, Tensor], gradient: Tensor, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the gradients of the latent weight and of the own parameters (None: none), given that of the published weight.

        The mask is passed straight through: the recipe's gradient policy says which elements use their gradient.
        """
        with torch.enable_grad():
            w = weight.detach().requires_grad_()
            leaves = {name: value.detach().requires_grad_() for name, value in own.items()}
            relaxed = self.relax(w, leaves, moment)
            if not relaxed.requires_grad:
                return torch.zeros_like(gradient), dict.fromkeys(own)
            for_weight, *for_own = torch.autograd.grad(relaxed, [w, *leaves.values()], gradient, allow_unused=True)
        return torch.zeros_like(gradient) if for_weight is None else for_weight, dict(zip(own, for_own, strict=True))

    def constrain(self, weight: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the own parameters that a step must not leave as it has: name -> the value in its place."""
        return {}

    def score(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return the learned score of every element: higher is kept sooner."""
        raise NotImplementedError

    def variance(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor | None:
        """Return the variance of every weight where the noise is added to what its module returns (differentiable), else None."""
        return None

    def expected_active(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return the probability, or soft count, that each element is not zero; differentiable.

        Raises:
            InputError: the relaxation has no such notion.
        """
        raise InputError(f"relaxation: {self.name!r} has no probability that a weight is active; choose one with gates, or another penalty")

    def divergence(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return the Kullback-Leibler divergence of each element's posterior from its prior; differentiable.

        Raises:
            InputError: the relaxation has no posterior.
        """
        raise InputError(f"relaxation: {self.name!r} has no posterior; choose a variational one, or another penalty")

    def gates(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return the gates, without noise, for penalties on them; differentiable.

        Raises:
            InputError: the relaxation has no gates.
        """
        raise InputError(f"relaxation: {self.name!r} has no gates; choose one with gates, or a penalty of: weight")

    def group_options(self, group: Mapping[str, object]) -> dict[str, object]:
        """Return what differs between the optimizer group of the own parameters and the group of the weights."""
        return {}


class LearnsOwn(Relaxation):
    """A relaxation whose own parameters have a learning rate and a weight decay of their own. A base class, itself not registered.

    Attributes:
        learning_rate: of the own parameters when the weights' group is at its initial one; None inherits the weights'.
        weight_decay: of the own parameters; None inherits the weights'.
    """

    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = 0.0

    def group_options(self, group: Mapping[str, object]) -> dict[str, object]:  # noqa: D102
        options: dict[str, object] = {}
        if self.learning_rate is not None:
            options["lr"] = self.learning_rate
        if self.weight_decay is not None and "weight_decay" in group:
            options["weight_decay"] = self.weight_decay
        return options


class Hard(Relaxation):
    """A pruned weight is zero and forgotten: the Parameter is projected after every step."""

    name = "hard"
    equation = "w <- M * w"
    source = "Han, Pool, Tran, Dally 2015"
    effort = "nothing: a pass over the weights after each step"
    advice = "the usual choice; with a growth where masked weights are to come back"
    keeps_dense_weights = False


class Latent(Relaxation):
    """A pruned weight keeps its value out of sight and may come back with it: the model sees ``M * w``.

    The gradient of the published weight is taken as the gradient of the latent one (straight through the mask); the recipe's
    gradient policy says which elements use it.
    """

    name = "latent"
    equation = "published = M * w; dL/dw := dL/dpublished"
    source = "Lin et al. 2020 (DPF); Jayakumar et al. 2020 (Top-KAST)"
    effort = "a second copy of the weights"
    advice = "masks that are drawn often, from weights that go on learning (gradient: dense or superset)"

    def pull_back(  # noqa: D102
        self, weight: Tensor, own: Mapping[str, Tensor], gradient: Tensor, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        return gradient, {}
