"""Gates that are exactly zero with a probability that can be differentiated (the L0 relaxation)."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki import counter
from niwaki.relaxation.base import Moment
from niwaki.relaxation.gate import Gate

LARGEST_LOGIT = math.log(100.0)
"""Bound of the size of ``log alpha``: beyond it gates hardly learn again."""


class HardConcrete(Gate):
    """Gates drawn from a stretched concrete distribution that is clipped to [0, 1], so that zero and one have probability.

    Each gate has one own parameter, ``log alpha``. A draw is made for each step; evaluation uses the gates without noise. How many gates
    close is decided by ``penalty: expected_l0``, the expected number of open ones. ``log alpha`` is kept within log 100 on both sides
    after every step, as in the authors' code.

    Attributes:
        beta: temperature of the concrete distribution, above 0.
        gamma: lower end of the stretched interval, below 0.
        zeta: its upper end, above 1.
        drop: probability that a gate is closed before it is stretched, at the beginning.
        spread: standard deviation of the initial ``log alpha``.

    >>> import torch
    >>> gates = HardConcrete()
    >>> round(float(gates.gate_active({"log_alpha": torch.tensor(0.0)})), 4)
    0.8318
    """

    name = "hard_concrete"
    equation = (
        "z = min(1, max(0, σ((log u - log(1 - u) + log α) / β) (ζ - γ) + γ)), u uniform; without noise"
        " min(1, max(0, σ(log α) (ζ - γ) + γ)); P(z ≠ 0) = σ(log α - β log(-γ / ζ))"
    )
    source = "Louizos, Welling, Kingma 2018"
    samples = True
    effort = "one number for each piece, drawn at every step; dense training"
    advice = "pieces (units, heads, filters) whose number a penalty is to decide"

    beta: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 2.0 / 3.0
    gamma: Annotated[float, Field(lt=0.0, allow_inf_nan=False)] = -0.1
    zeta: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 1.1
    drop: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    spread: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.01

    def initial_parameters(self, shape: tuple[int, ...], moment: Moment) -> dict[str, Tensor]:  # noqa: D102
        noise = counter.normal(counter.key(moment.seed, 0, f"{moment.name}::hard_concrete"), 0, math.prod(shape))
        return {"log_alpha": (math.log(1.0 - self.drop) - math.log(self.drop) + self.spread * noise).float().view(shape)}

    def gate(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        log_alpha = own["log_alpha"]
        if moment.evaluating:
            logits = log_alpha
        else:
            stream = counter.key(moment.seed, moment.step, f"{moment.name}::hard_concrete")
            u = counter.uniform(stream, 0, log_alpha.numel(), log_alpha.device).add_(2.0**-54).view(log_alpha.shape)
            logits = (torch.logit(u).to(log_alpha.dtype) + log_alpha) / self.beta
        return (torch.sigmoid(logits) * (self.zeta - self.gamma) + self.gamma).clamp(0.0, 1.0)

    def gate_constrain(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: D102
        return {"log_alpha": own["log_alpha"].clamp(-LARGEST_LOGIT, LARGEST_LOGIT)}

    def gate_score(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return own["log_alpha"]

    def gate_active(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return torch.sigmoid(own["log_alpha"] - self.beta * math.log(-self.gamma / self.zeta))


class StochasticGate(Gate):
    """Gates that are open or closed by chance, with a learned probability.

    Each gate has one own parameter, the logit of its probability. A draw is made for each step; evaluation keeps the pieces whose
    probability is above one half.

    Attributes:
        estimator: of the gradient: ``straight_through``, the gate's derivative in its probability is taken as one; ``concrete``, gates are
            soft, ``σ((logit u + s) / τ)`` (a Gumbel-softmax of two classes), with the derivative of that.
        temperature: ``τ`` of ``concrete``, above 0.
        probability: that a gate is open, at the beginning.
    """

    name = "stochastic_gate"
    equation = "z ~ Bernoulli(σ(s)), dz/dσ(s) := 1; or z = σ((logit u + s) / τ), u uniform; without noise z = [σ(s) > 1/2]"
    source = (
        "Srinivas, Subramanya, Babu 2016 (training sparse networks); Zhou, Lan, Liu, Yosinski 2019 (supermasks); Zhou, Zhang, Xu, Zhang"
        " 2021 (ProbMask, concrete)"
    )
    samples = True
    effort = "one number for each piece, drawn at every step; dense training"
    advice = "masks of untrained or trained weights that are found by chance and gradient"

    estimator: Literal["straight_through", "concrete"] = "straight_through"
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9

    def initial_parameters(self, shape: tuple[int, ...], moment: Moment) -> dict[str, Tensor]:  # noqa: D102
        return {"logit": torch.full(shape, math.log(self.probability) - math.log1p(-self.probability))}

    def gate(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        logit = own["logit"]
        probability = torch.sigmoid(logit)
        if moment.evaluating:
            return (logit > 0).to(logit.dtype)
        stream = counter.key(moment.seed, moment.step, f"{moment.name}::stochastic_gate")
        u = counter.uniform(stream, 0, logit.numel(), logit.device).add_(2.0**-54).view(logit.shape)
        if self.estimator == "concrete":
            return torch.sigmoid((torch.logit(u).to(logit.dtype) + logit) / self.temperature)
        drawn = (u < probability.detach()).to(logit.dtype)
        return drawn + (probability - probability.detach())

    def gate_soft(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        return torch.sigmoid(own["logit"])

    def gate_score(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return own["logit"]

    def gate_active(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return torch.sigmoid(own["logit"])
