"""Weights and units with a learned variance: what is mostly noise goes (variational, or Bayesian, sparsification)."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from niwaki import counter
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.relaxation.base import LearnsOwn, Moment
from niwaki.relaxation.gate import Gate

LEAST_SQUARE = 1e-8
"""Added to squared means, so that the ratio of a variance to them is finite."""

K1, K2, K3 = 0.63576, 1.87320, 1.48695
"""Constants of the approximated divergence from a log-uniform prior (Molchanov, Ashukha, Vetrov 2017)."""

Prior = Literal["log_uniform", "normal"]


def divergence_of(log_alpha: Tensor, prior: Prior) -> Tensor:
    """Return KL(N(m, α m²) || prior) of each entry, given ``log α``; differentiable.

    ``log_uniform``: p(log |w|) constant, ``k1 - k1 σ(k2 + k3 log α) + log(1 + 1/α) / 2``, an approximation with an error below 0.01, zero
    as α grows. ``normal``: N(0, τ) with the best τ = m² + σ², ``log(1 + 1/α) / 2``, exact.
    """
    half = 0.5 * F.softplus(-log_alpha)
    return half if prior == "normal" else K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + half


class VariationalNoise(LearnsOwn):
    """Every weight is Gaussian with a learned mean and a learned variance; weights that are mostly noise are masked.

    The ratio ``α`` of the variance to the squared mean is a dropout rate that each weight learns: ``penalty: kl`` raises it wherever the
    loss bears the noise. Means start from the weights. Noise is added to what each layer returns, for each example by itself (the local
    reparametrization), or to the weights, once a step. Evaluation uses the means of the weights whose ``log α`` is below the threshold.

    Attributes:
        noise: ``local`` for linear and convolution layers that their parents call, ``weight`` for all.
        prior: ``log_uniform`` (sparse variational dropout) or ``normal`` with a variance of its own for each weight (ARD).
        threshold: of ``log α``, from which on a weight is masked.
        initial: initial ``log σ²``.
        bound: ``log α`` is kept within this size in training.
    """

    name = "variational_noise"
    equation = "w ~ N(θ, σ²), log α = log σ² - log θ²; outputs ~ N(x θ, x² α θ²); mask where log α >= threshold"
    source = "Molchanov, Ashukha, Vetrov 2017 (sparse variational dropout); Kharitonov, Molchanov, Vetrov 2018 (ARD)"
    posterior = True
    decides = True
    has_scores = True
    effort = "a second number for each weight, and a second product in each layer"
    advice = "very high sparsities of small networks; from trained weights, or with a penalty that begins late"

    noise: Literal["local", "weight"] = "local"
    prior: Prior = "log_uniform"
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 3.0
    initial: Annotated[float, Field(allow_inf_nan=False)] = -10.0
    bound: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 8.0

    @property
    def mode_differs(self) -> bool:
        """True: training is noisy, evaluation is not."""
        return True

    def parameters(self, weight: Tensor, layout: Layout, name: str, seed: int) -> dict[str, Tensor]:  # noqa: D102
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {"log_variance": torch.full(weight.shape, self.initial, dtype=dtype, device=weight.device)}

    def log_alpha(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return ``log α`` of each weight; differentiable."""
        variance = own["log_variance"]
        return variance - (weight.to(variance.dtype).square() + LEAST_SQUARE).log()  # float16 has no square as small

    def _bounded(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return self.log_alpha(weight, own).clamp(-self.bound, self.bound)

    def _variance(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return self._bounded(weight, own).exp() * weight.to(own["log_variance"].dtype).square()

    def variance(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor | None:  # noqa: D102
        return self._variance(weight, own) if self.noise == "local" else None

    def relax(self, weight: Tensor, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        if moment.evaluating:
            return weight.masked_fill(self.log_alpha(weight, own) >= self.threshold, 0.0)
        if self.noise == "local":
            return weight
        stream = counter.key(moment.seed, moment.step, f"{moment.name}::variational_noise")
        noise = counter.normal(stream, moment.start, weight.numel(), weight.device).to(weight.dtype).view(weight.shape)
        return weight + (self._variance(weight, own) + LEAST_SQUARE**2).sqrt().to(weight.dtype) * noise

    def pull_back(  # noqa: D102
        self, weight: Tensor, own: Mapping[str, Tensor], gradient: Tensor, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        if self.noise == "local":  # the forward pass itself has used the own parameters
            return gradient, {}
        return super().pull_back(weight, own, gradient, moment)

    def divergence(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return divergence_of(self._bounded(weight, own), self.prior)

    def score(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return the logarithm of the squared signal-to-noise ratio, ``-log α``."""
        return -self.log_alpha(weight, own)


class GaussianGate(Gate):
    """A Gaussian factor for each piece, with a learned mean and variance; pieces that are mostly noise are masked.

    Attributes:
        prior: ``log_uniform`` (Bayesian compression with a normal-Jeffreys prior) or ``normal`` with a variance of its own for each piece
            (the variational information bottleneck).
        threshold: of ``log α = log σ² - log μ²``, from which on a piece is masked.
        initial: initial ``log σ²``; means begin at 1.
        bound: ``log α`` is kept within this size in the divergence.
    """

    name = "gaussian_gate"
    equation = "z ~ N(μ, σ²), log α = log σ² - log μ²; without noise z = μ [log α < threshold]"
    source = "Louizos, Ullrich, Welling 2017 (Bayesian compression); Dai, Zhu, Guo, Wipf 2018 (VIBNet)"
    samples = True
    effort = "two numbers for each piece, drawn at every step; dense training"
    advice = "units whose number a penalty (kl) is to decide"

    prior: Prior = "log_uniform"
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    initial: Annotated[float, Field(allow_inf_nan=False)] = -9.0
    bound: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 20.0

    def initial_parameters(self, shape: tuple[int, ...], moment: Moment) -> dict[str, Tensor]:  # noqa: D102
        return {"mean": torch.ones(shape), "log_variance": torch.full(shape, self.initial)}

    def _log_alpha(self, own: Mapping[str, Tensor]) -> Tensor:
        return own["log_variance"] - (own["mean"].square() + LEAST_SQUARE).log()

    def gate(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        mean = own["mean"]
        if moment.evaluating:
            return mean.masked_fill(self._log_alpha(own) >= self.threshold, 0.0)
        stream = counter.key(moment.seed, moment.step, f"{moment.name}::gaussian_gate")
        noise = counter.normal(stream, 0, mean.numel(), mean.device).to(mean.dtype).view(mean.shape)
        return mean + (0.5 * own["log_variance"]).exp() * noise

    def gate_score(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return -self._log_alpha(own)

    def gate_divergence(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return divergence_of(self._log_alpha(own).clamp(-self.bound, self.bound), self.prior)


class LogNormalGate(Gate):
    """A factor for each piece whose logarithm is Gaussian, cut off on both sides; pieces with little signal to noise are masked.

    With the log-uniform prior over the same interval the divergence has a closed form, and is no approximation.

    Attributes:
        lower: lower end of ``log z``.
        upper: its upper end, above ``lower``.
        threshold: of the signal-to-noise ratio ``E z / sqrt(Var z)``, below which a piece is masked.
        initial: initial ``log σ``; ``μ`` begins at 0, or at the end of the interval that is nearest.
    """

    name = "log_normal_gate"
    equation = (
        "log z ~ N(μ, σ²) on [a, b]; KL = log((b - a) / (σ √(2πe) Z)) - (α φ(α) - β φ(β)) / (2 Z), α = (a - μ) / σ, β = (b - μ) / σ,"
        " Z = Φ(β) - Φ(α); without noise z = E z where E z / √(Var z) >= threshold, else 0"
    )
    source = "Neklyudov, Molchanov, Ashukha, Vetrov 2017 (structured Bayesian pruning)"
    samples = True
    effort = "two numbers for each piece, drawn at every step; dense training"
    advice = "units whose number a penalty (kl) is to decide, with a proper prior"

    lower: Annotated[float, Field(allow_inf_nan=False)] = -20.0
    upper: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    threshold: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    initial: Annotated[float, Field(allow_inf_nan=False)] = -5.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.lower >= self.upper:
            raise InputError(f"upper: {self.upper!r} must be above lower, {self.lower!r}")
        return self

    def initial_parameters(self, shape: tuple[int, ...], moment: Moment) -> dict[str, Tensor]:  # noqa: D102
        return self.gate_constrain({"mean": torch.zeros(shape), "log_deviation": torch.full(shape, self.initial)})

    def gate_constrain(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the mean within the interval and the deviation between e^-20 and e^5, as in the authors' code."""
        return {"mean": own["mean"].clamp(self.lower, self.upper), "log_deviation": own["log_deviation"].clamp(-20.0, 5.0)}

    def gate(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        mean, deviation = own["mean"].double(), own["log_deviation"].double().exp()
        if moment.evaluating:
            expected, ratio = self._expected(mean, deviation)
            return expected.masked_fill(ratio < self.threshold, 0.0).to(own["mean"].dtype)
        low, high = self._ends(mean, deviation)
        stream = counter.key(moment.seed, moment.step, f"{moment.name}::log_normal_gate")
        u = counter.uniform(stream, 0, mean.numel(), mean.device).add_(2.0**-54).view(mean.shape)
        below, above = _below(low), _below(high)
        drawn: Tensor = torch.special.ndtri((below + (above - below) * u).clamp(1e-300, 1.0 - 2.0**-53))
        logarithm: Tensor = (mean + deviation * drawn).clamp(self.lower, self.upper)
        return logarithm.exp().to(own["mean"].dtype)

    def gate_score(self, own: Mapping[str, Tensor]) -> Tensor:
        """Return the signal-to-noise ratio."""
        return self._expected(own["mean"].double(), own["log_deviation"].double().exp())[1].to(own["mean"].dtype)

    def gate_divergence(self, own: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        mean, log_deviation = own["mean"].double(), own["log_deviation"].double()
        low, high = self._ends(mean, log_deviation.exp())
        whole = _below(high) - _below(low)
        width = math.log(self.upper - self.lower) - 0.5 * math.log(2.0 * math.pi * math.e) - log_deviation - whole.log()
        return (width - (low * _density(low) - high * _density(high)) / (2.0 * whole)).to(own["mean"].dtype)

    def _ends(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        return (self.lower - mean) / deviation, (self.upper - mean) / deviation

    def _expected(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expectation of each gate, and its ratio to the standard deviation."""
        low, high = self._ends(mean, deviation)
        whole = _below(high) - _below(low)

        def moment(order: int) -> Tensor:
            shift = order * deviation  # exp(order log z) tilts the Gaussian by that many deviations
            # In logarithms, of lower tails: a large shift would lose all digits of a difference, and overflow.
            to_high, to_low = torch.special.log_ndtr(high - shift), torch.special.log_ndtr(low - shift)
            inside = to_high + torch.log1p(-(to_low - to_high).exp())
            logarithm: Tensor = order * mean + 0.5 * shift.square() + inside - whole.log()
            return logarithm.exp()

        first, second = moment(1), moment(2)
        return first, first / (second - first.square()).clamp(min=1e-300).sqrt()


def _below(x: Tensor) -> Tensor:
    """Return the probability that a standard normal number is below x."""
    probability: Tensor = torch.special.ndtr(x)
    return probability


def _density(x: Tensor) -> Tensor:
    return (-0.5 * x.square()).exp() / math.sqrt(2.0 * math.pi)


class HorseshoeGate(Gate):
    """A positive scale for each piece with a half-Cauchy prior, within another of the whole layer; pieces with a small scale are masked.

    Each half-Cauchy is the root of a product of a Gamma and an inverse Gamma variable, whose posteriors are log-normal.

    Attributes:
        global_scale: ``τ₀`` of the prior of the layer's scale, above 0.
        threshold: of the logarithm of the scale's mode, below which a piece is masked.
        initial: initial ``log σ²`` of all posteriors; means begin so that scales begin near 1.
    """

    name = "horseshoe_gate"
    equation = (
        "z = √(s_a s_b α β), log s_a, log s_b, log α, log β Gaussian; s_a ~ Gamma(1/2, τ₀²), α ~ Gamma(1/2, 1), s_b, β ~"
        " inverse Gamma(1/2, 1); without noise z = exp(μ) [μ - σ² >= threshold]"
    )
    source = "Louizos, Ullrich, Welling 2017 (Bayesian compression)"
    samples = True
    effort = "four numbers for each piece, drawn at every step; dense training"
    advice = "units, where few are to stay and those are not to be shrunk"

    global_scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-5
    threshold: Annotated[float, Field(allow_inf_nan=False)] = -3.0
    initial: Annotated[float, Field(allow_inf_nan=False)] = -9.0

    def initial_parameters(self, shape: tuple[int, ...], moment: Moment) -> dict[str, Tensor]:  # noqa: D102
        one = tuple(1 for _ in shape)
        sizes = {"shared_gamma": one, "shared_inverse": one, "gamma": shape, "inverse": shape}
        means = {f"{name}_mean": torch.zeros(size) for name, size in sizes.items()}
        return means | {f"{name}_log_variance": torch.full(size, self.initial) for name, size in sizes.items()}

    def _posterior(self, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return mean and variance of ``log z``."""
        mean = sum((own[f"{name}_mean"] for name in FACTORS), torch.zeros_like(own["gamma_mean"])) / 2.0
        variance = sum((own[f"{name}_log_variance"].exp() for name in FACTORS), torch.zeros_like(own["gamma_mean"])) / 4.0
        return mean, variance

    def gate(self, own: Mapping[str, Tensor], moment: Moment) -> Tensor:  # noqa: D102
        mean, variance = self._posterior(own)
        if moment.evaluating:
            return mean.exp().masked_fill(mean - variance < self.threshold, 0.0)
        stream = counter.key(moment.seed, moment.step, f"{moment.name}::horseshoe_gate")
        noise = counter.normal(stream, 0, mean.numel(), mean.device).to(mean.dtype).view(mean.shape)
        return (mean + variance.sqrt() * noise).exp()

    def gate_score(self, own: Mapping[str, Tensor]) -> Tensor:
        """Return the logarithm of the scale's mode."""
        mean, variance = self._posterior(own)
        return mean - variance

    def gate_divergence(self, own: Mapping[str, Tensor]) -> Tensor:
        """Return the divergence of each piece's two variables, and an equal share of that of the layer's two."""
        mine = gamma_divergence(own["gamma_mean"], own["gamma_log_variance"], 1.0)
        mine = mine + inverse_gamma_divergence(own["inverse_mean"], own["inverse_log_variance"])
        shared = gamma_divergence(own["shared_gamma_mean"], own["shared_gamma_log_variance"], self.global_scale**2)
        shared = shared + inverse_gamma_divergence(own["shared_inverse_mean"], own["shared_inverse_log_variance"])
        return mine + shared / mine.numel()


FACTORS = ("shared_gamma", "shared_inverse", "gamma", "inverse")
"""The variables whose product a horseshoe gate is the root of."""


def gamma_divergence(mean: Tensor, log_variance: Tensor, scale: float) -> Tensor:
    """Return KL(q || Gamma(1/2, scale)) of ``log x ~ N(mean, variance)``: ``scale`` multiplies a Gamma variable of rate 1."""
    return (
        -0.5 * mean
        - 0.5 * (math.log(2.0 * math.e) + log_variance)
        + 0.5 * math.log(scale)
        + (mean + 0.5 * log_variance.exp()).exp() / scale
    )


def inverse_gamma_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(q || inverse Gamma(1/2, 1)) of ``log x ~ N(mean, variance)``."""
    return 0.5 * mean - 0.5 * (math.log(2.0 * math.e) + log_variance) + (0.5 * log_variance.exp() - mean).exp()
