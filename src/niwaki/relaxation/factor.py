"""Gates without noise: real factors, factors that harden while a network trains, and steps with a gradient put in their place."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from niwaki import counter
from niwaki.relaxation.base import Moment
from niwaki.relaxation.gate import Gate

SMOOTH: Mapping[str, Callable[[Tensor], Tensor]] = {"identity": torch.clone, "softplus": F.softplus, "leaky_relu": F.leaky_relu}
"""Name -> the function whose derivative stands for that of a step."""


class Factor(Gate):
    """A trainable factor for each piece; pieces whose factor a penalty has brought to exactly zero are masked.

    With ``penalty: {l1: {of: gate, apply: proximal}}`` factors arrive at zero; by gradient alone they only become small, and a final
    cut by their size (``saliency: score``) decides.

    Attributes:
        start: initial value of all factors.
    """

    name = "factor"
    equation = "published = v w, v trained"
    source = "Huang & Wang 2018 (sparse structure selection); You et al. 2019 (gate decorators)"
    effort = "one number for each piece"
    advice = "units, blocks or heads that a penalty is to choose among"

    start: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    def initial_parameters(self, shape: tuple[int, ...], moment: Moment) -> dict[str, Tensor]:  # noqa: D102
        return {"factor": torch.full(shape, self.start)}

    def gate(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        return own["factor"]

    def gate_score(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return own["factor"].abs()


class SigmoidAnneal(Gate):
    """Soft gates that harden: a sigmoid whose slope grows over the run, until it is a step.

    A penalty on the gates (``penalty: {l1: {of: gate}}``) pushes them down; the final slope lets none stay between. Evaluation sees
    what would be left if the run ended now: the pieces with a positive parameter, whole.

    Attributes:
        start: initial parameter ``s`` of all gates; the initial gate is ``σ(s)``.
        final: slope at the end of the run, at least 1; it grows from 1 exponentially.
    """

    name = "sigmoid_anneal"
    equation = "published = σ(β s) w, β = final^progress; in the end [s > 0] w"
    source = "Savarese, Silva, Maire 2020 (continuous sparsification, final 200); Luo & Wu 2019 (AutoPruner)"
    anneals = True
    effort = "one number for each piece; dense training"
    advice = "masks that are found together with the weights, without noise"

    start: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    final: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 200.0

    def initial_parameters(self, shape: tuple[int, ...], moment: Moment) -> dict[str, Tensor]:  # noqa: D102
        return {"score": torch.full(shape, self.start)}

    def gate(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        if moment.evaluating:
            return (own["score"] > 0).to(own["score"].dtype)
        return self.gate_soft(own, moment)

    def gate_soft(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        return torch.sigmoid(self.final**moment.progress * own["score"])

    def gate_score(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return own["score"]


class StepGate(Gate):
    """Gates that are open where their parameter is positive; the step's derivative is that of a smooth function near it.

    A piece whose gate is closed can open again: its gate goes on learning.

    Attributes:
        surrogate: whose derivative is taken: ``identity``, ``softplus`` or ``leaky_relu`` (slope 0.01 below zero).
        start: initial parameters: uniform within ``[0, start)``, so that all gates are open.
    """

    name = "step_gate"
    equation = "published = [m > 0] w; d[m > 0]/dm := h'(m), h: identity, log(1 + e^m) or leaky ReLU"
    source = "Xiao, Wang, Rajasekaran 2019 (AutoPrune); Bengio, Léonard, Courville 2013 (the estimator)"
    effort = "one number for each piece; dense training"
    advice = "masks that may take pieces back"

    surrogate: Literal["identity", "softplus", "leaky_relu"] = "softplus"
    start: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0

    def initial_parameters(self, shape: tuple[int, ...], moment: Moment) -> dict[str, Tensor]:  # noqa: D102
        numbers = counter.uniform(counter.key(moment.seed, 0, f"{moment.name}::step_gate"), 0, math.prod(shape))
        return {"score": (numbers.add_(2.0**-54) * self.start).float().view(shape)}

    def gate(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        soft = self.gate_soft(own, moment)
        return (own["score"] > 0).to(soft.dtype) + (soft - soft.detach())

    def gate_soft(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        return SMOOTH[self.surrogate](own["score"])

    def gate_score(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return own["score"]
