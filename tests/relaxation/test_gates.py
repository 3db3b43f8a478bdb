"""What gates are by themselves: the distributions that they are drawn from, and closed forms against sampling and numerical integration."""

import math

import pytest
import torch
from scipy import integrate, stats

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.relaxation import (
    Factor,
    Gate,
    GaussianGate,
    HardConcrete,
    HorseshoeGate,
    LogNormalGate,
    Moment,
    SigmoidAnneal,
    StepGate,
    StochasticGate,
)
from niwaki.relaxation.variational import divergence_of, gamma_divergence, inverse_gamma_divergence

MANY = 200_000


def drawn(gate: Gate, step: int = 1, **own: float) -> torch.Tensor:
    values = {name: torch.full((MANY,), value, dtype=torch.float64) for name, value in own.items()}
    return gate.gate(values, Moment("layer", seed=3, step=step))


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("gate", [HardConcrete(), HardConcrete(beta=0.4, gamma=-0.3, zeta=1.5)])
def test_hard_concrete_gates_are_zero_as_often_as_the_closed_form_says(gate, log_alpha):
    z = drawn(gate, log_alpha=log_alpha)
    open_ = float(gate.gate_active({"log_alpha": torch.tensor(log_alpha, dtype=torch.float64)}))
    assert float((z != 0).double().mean()) == pytest.approx(open_, abs=4.0 * math.sqrt(open_ * (1 - open_) / MANY) + 1e-12)
    assert 0.0 <= float(z.min()) <= float(z.max()) <= 1.0
    # the distribution between the ends, by the definition: z < q iff the stretched sigmoid is below q
    q = 0.4
    logit = math.log((q - gate.gamma) / (gate.zeta - q))
    below = 1.0 / (1.0 + math.exp(-(gate.beta * logit - log_alpha)))
    assert float((z < q).double().mean()) == pytest.approx(below, abs=4.0 * math.sqrt(below * (1 - below) / MANY) + 1e-12)


def test_hard_concrete_without_noise_is_the_published_test_time_gate():
    log_alpha = torch.linspace(-8, 8, 33, dtype=torch.float64)
    expected = [min(1.0, max(0.0, 1.2 / (1.0 + math.exp(-float(a))) - 0.1)) for a in log_alpha]
    assert HardConcrete().gate({"log_alpha": log_alpha}, Moment("x", evaluating=True)).tolist() == pytest.approx(expected)
    assert expected[0] == 0.0
    assert expected[-1] == 1.0


def test_hard_concrete_begins_at_its_drop_rate_and_is_kept_in_bounds():
    initial = HardConcrete(drop=0.2, spread=0.01).initial_parameters((50, 40), Moment("x", seed=1))["log_alpha"]
    assert initial.shape == (50, 40)
    assert float(initial.mean()) == pytest.approx(math.log(0.8) - math.log(0.2), abs=1e-3)
    assert float(initial.std()) == pytest.approx(0.01, rel=0.1)
    kept = HardConcrete().gate_constrain({"log_alpha": torch.tensor([-9.0, 0.3, 9.0])})["log_alpha"]
    assert kept.tolist() == pytest.approx([-math.log(100.0), 0.3, math.log(100.0)])


def test_draws_differ_between_steps_seeds_and_names_and_are_repeatable():
    gate, own = HardConcrete(), {"log_alpha": torch.zeros(64)}
    first = gate.gate(own, Moment("a", seed=1, step=5))
    assert torch.equal(first, gate.gate(own, Moment("a", seed=1, step=5)))
    for other in (Moment("a", seed=1, step=6), Moment("a", seed=2, step=5), Moment("b", seed=1, step=5)):
        assert not torch.equal(first, gate.gate(own, other))


def test_stochastic_gates_open_with_their_probability_and_pass_the_gradient_straight_through():
    gate = StochasticGate()
    z = drawn(gate, logit=-0.7)
    assert set(z.unique().tolist()) == {0.0, 1.0}
    p = 1.0 / (1.0 + math.exp(0.7))
    assert float(z.mean()) == pytest.approx(p, abs=4.0 * math.sqrt(p * (1 - p) / MANY))
    logit = torch.tensor([-2.0, 0.5], dtype=torch.float64, requires_grad=True)
    gate.gate({"logit": logit}, Moment("x", step=1)).backward(torch.tensor([1.0, 3.0], dtype=torch.float64))
    s = torch.sigmoid(logit.detach())
    assert torch.allclose(logit.grad, torch.tensor([1.0, 3.0], dtype=torch.float64) * s * (1 - s))
    assert gate.gate({"logit": torch.tensor([-0.1, 0.0, 0.1])}, Moment("x", evaluating=True)).tolist() == [0.0, 0.0, 1.0]


def test_concrete_gates_harden_as_the_temperature_falls():
    warm, cold = (drawn(StochasticGate(estimator="concrete", temperature=t), logit=0.4) for t in (1.0, 1e-4))
    p = 1.0 / (1.0 + math.exp(-0.4))
    assert float((warm > 0.5).double().mean()) == pytest.approx(p, abs=5e-3)  # whatever the temperature
    assert float(cold.mean()) == pytest.approx(p, abs=5e-3)
    assert float(((cold > 0.01) & (cold < 0.99)).double().mean()) < 1e-3
    assert float(((warm > 0.01) & (warm < 0.99)).double().mean()) > 0.9


def test_sigmoid_gates_grow_steep_exponentially():
    gate, own = SigmoidAnneal(final=200.0), {"score": torch.tensor([-0.1, 0.0, 0.02], dtype=torch.float64)}
    for progress, slope in ((0.0, 1.0), (0.5, math.sqrt(200.0)), (1.0, 200.0)):
        expected = [1.0 / (1.0 + math.exp(-slope * float(s))) for s in own["score"]]
        assert gate.gate(own, Moment("x", progress=progress)).tolist() == pytest.approx(expected)
    assert gate.gate(own, Moment("x", progress=1.0, evaluating=True)).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("surrogate", "slope"),
    [("identity", lambda m: 1.0), ("softplus", lambda m: 1.0 / (1.0 + math.exp(-m))), ("leaky_relu", lambda m: 1.0 if m > 0 else 0.01)],
)
def test_step_gates_are_steps_with_the_slope_of_another_function(surrogate, slope):
    score = torch.tensor([-1.5, -0.2, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    z = StepGate(surrogate=surrogate).gate({"score": score}, Moment("x"))
    assert z.tolist() == [0.0, 0.0, 1.0, 1.0]
    z.sum().backward()
    assert score.grad.tolist() == pytest.approx([slope(m) for m in score.detach().tolist()])
    initial = StepGate(surrogate=surrogate).initial_parameters((1000,), Moment("x"))["score"]
    assert bool((initial > 0).all())


def test_factors_are_themselves():
    own = Factor(start=0.5).initial_parameters((3,), Moment("x"))
    assert Factor().gate(own, Moment("x")).tolist() == [0.5, 0.5, 0.5]
    assert Factor().gate_score({"factor": torch.tensor([-2.0, 1.0])}).tolist() == [2.0, 1.0]


# -- variational -----------------------------------------------------------------------------------------------------------------


def exact_log_uniform(log_alpha: float) -> float:
    """KL(N(1, α) || log-uniform) up to the constant that makes it vanish as α grows: -log(α) / 2 + E log|w|, by integration."""
    alpha = math.exp(log_alpha)
    deviation = math.sqrt(alpha)
    density = stats.norm(1.0, deviation).pdf
    pieces = [(-30.0 * deviation + 1.0, 0.0), (0.0, 1.0 + 30.0 * deviation)]
    expected = sum(
        integrate.quad(lambda w: density(w) * math.log(abs(w)), low, high, limit=500, points=[1.0] if low < 1.0 < high else None)[0]
        for low, high in pieces
    )
    at_infinity = -0.5 * (math.log(2.0) + 0.5772156649015329)  # E log|N(0, 1)|
    return -0.5 * log_alpha + expected - at_infinity


@pytest.mark.parametrize("log_alpha", [-6.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 6.0])
def test_the_log_uniform_divergence_is_within_a_hundredth_of_the_integral(log_alpha):
    found = float(divergence_of(torch.tensor(log_alpha, dtype=torch.float64), "log_uniform"))
    assert found == pytest.approx(exact_log_uniform(log_alpha), abs=0.02)


@pytest.mark.parametrize("log_alpha", [-4.0, 0.0, 3.0])
def test_the_normal_divergence_is_that_of_the_best_prior_variance(log_alpha):
    mean, variance = 0.7, 0.49 * math.exp(log_alpha)
    priors = [math.exp(t) for t in torch.linspace(-12, 12, 20001).tolist()]
    best = min(0.5 * (math.log(t / variance) + (variance + mean**2) / t - 1.0) for t in priors)
    assert float(divergence_of(torch.tensor(log_alpha, dtype=torch.float64), "normal")) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(("mean", "log_deviation"), [(0.0, -3.0), (-0.5, -1.0), (-2.0, 0.5), (-6.0, 1.5), (-10.0, 0.0)])
def test_log_normal_gates_agree_with_numerical_integration(mean, log_deviation):
    gate, deviation = LogNormalGate(lower=-20.0, upper=0.0), math.exp(log_deviation)
    truncated = stats.truncnorm((-20.0 - mean) / deviation, (0.0 - mean) / deviation, loc=mean, scale=deviation)
    low, high = max(-20.0, mean - 12 * deviation), min(0.0, mean + 12 * deviation)

    def expectation(f):
        return integrate.quad(lambda x: truncated.pdf(x) * f(x), low, high, limit=500, epsabs=1e-13)[0]

    own = {"mean": torch.tensor([mean], dtype=torch.float64), "log_deviation": torch.tensor([log_deviation], dtype=torch.float64)}
    divergence = expectation(lambda x: truncated.logpdf(x) - math.log(1.0 / 20.0))
    assert float(gate.gate_divergence(own)) == pytest.approx(divergence, abs=1e-7)
    first, second = expectation(math.exp), expectation(lambda x: math.exp(2.0 * x))
    ratio = first / math.sqrt(second - first**2)
    assert float(gate.gate_score(own)) == pytest.approx(ratio, rel=1e-6)
    mode = float(gate.gate(own, Moment("x", evaluating=True)))
    assert mode == (0.0 if ratio < 1.0 else pytest.approx(first, rel=1e-7))
    sample = gate.gate({name: value.expand(MANY) for name, value in own.items()}, Moment("x", seed=1, step=2)).log()
    assert stats.kstest(sample.numpy(), truncated.cdf).pvalue > 1e-3


def test_log_normal_gates_begin_within_their_interval_which_must_be_one():
    gate = LogNormalGate(lower=-30.0, upper=-2.0)
    assert gate.initial_parameters((2,), Moment("x"))["mean"].tolist() == [-2.0, -2.0]
    assert 0.0 < float(gate.gate(gate.initial_parameters((1,), Moment("x")), Moment("x", evaluating=True))) < math.exp(-2.0)
    for lower, upper in ((0.0, -5.0), (0.0, 0.0)):
        with pytest.raises(InputError, match=r"upper: .* must be above lower"):
            build("relaxation", {"log_normal_gate": {"lower": lower, "upper": upper}})


def test_gaussian_gates_have_their_mean_and_variance_and_close_when_mostly_noise():
    z = drawn(GaussianGate(), mean=0.8, log_variance=-2.0)
    assert stats.kstest(z.numpy(), stats.norm(0.8, math.exp(-1.0)).cdf).pvalue > 1e-3
    own = {"mean": torch.tensor([1.0, 0.1]), "log_variance": torch.tensor([-3.0, -3.0])}  # log α = -3 and 1.6
    assert GaussianGate(threshold=0.0).gate(own, Moment("x", evaluating=True)).tolist() == [1.0, 0.0]
    assert GaussianGate(threshold=2.0).gate(own, Moment("x", evaluating=True)).tolist() == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(("mean", "log_variance"), [(0.0, -9.0), (-1.0, -1.0), (0.7, 0.3), (-8.0, -2.0)])
def test_half_cauchy_factors_agree_with_numerical_integration(mean, log_variance):
    deviation = math.exp(0.5 * log_variance)
    posterior = stats.lognorm(deviation, scale=math.exp(mean))
    m, v = torch.tensor(mean, dtype=torch.float64), torch.tensor(log_variance, dtype=torch.float64)

    def divergence(prior):
        # over log x, where both are smooth; the densities' Jacobians cancel
        def inside(t):
            x = math.exp(t)
            return stats.norm(mean, deviation).pdf(t) * (posterior.logpdf(x) - prior.logpdf(x))

        return integrate.quad(inside, mean - 11 * deviation, mean + 11 * deviation, limit=500, epsabs=1e-12)[0]

    for scale in (1.0, 1e-4):
        assert float(gamma_divergence(m, v, scale)) == pytest.approx(divergence(stats.gamma(0.5, scale=scale)), rel=1e-8, abs=1e-8)
    assert float(inverse_gamma_divergence(m, v)) == pytest.approx(divergence(stats.invgamma(0.5)), rel=1e-8, abs=1e-8)


def test_horseshoe_gates_are_the_root_of_the_product_and_their_divergence_the_sum_of_its_factors():
    gate = HorseshoeGate(global_scale=0.1)
    own = {name: value.double() for name, value in gate.initial_parameters((5,), Moment("x")).items()}
    own |= {"gamma_mean": torch.tensor([0.2, -9.0, 0.0, 1.0, 0.5], dtype=torch.float64)}
    own |= {"shared_inverse_mean": torch.tensor([0.4], dtype=torch.float64)}
    z = gate.gate(own, Moment("x", evaluating=True))
    expected = [math.exp((g + 0.4) / 2.0) for g in (0.2, -9.0, 0.0, 1.0, 0.5)]
    assert z.tolist() == pytest.approx([0.0 if i == 1 else e for i, e in enumerate(expected)])
    v = torch.tensor(-9.0, dtype=torch.float64)
    zero = torch.tensor(0.0, dtype=torch.float64)
    mine = [float(gamma_divergence(g, v, 1.0) + inverse_gamma_divergence(zero, v)) for g in own["gamma_mean"]]
    shared = float(gamma_divergence(zero, v, 0.01) + inverse_gamma_divergence(torch.tensor(0.4, dtype=torch.float64), v))
    assert float(gate.gate_divergence(own).sum()) == pytest.approx(sum(mine) + shared)
    many = {name: value.expand(MANY).clone() if value.numel() == 5 else value for name, value in own.items() if value.numel() == 1}
    many |= {name: torch.full((MANY,), -0.3 if name.endswith("mean") else -1.0, dtype=torch.float64) for name in own if name not in many}
    total = 2 * math.exp(-1.0) + 2 * math.exp(-9.0)
    sample = gate.gate(many, Moment("x", step=1)).log()
    assert stats.kstest(sample.numpy(), stats.norm((-0.6 + 0.4) / 2.0, math.sqrt(total / 4.0)).cdf).pvalue > 1e-3
