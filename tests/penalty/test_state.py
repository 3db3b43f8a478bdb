"""Penalties that remember: mixtures, multipliers, compressed copies, sums of steps and clusters, against loops and closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm

from niwaki import penalty as p
from niwaki.clock import Clock
from niwaki.component import build
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.penalty import Penalized


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- soft weight sharing


def mixture(shared):
    return [[float(value) for value in shared[name]] for name in ("mean", "variance", "portion")]


def likelihood(weights, shared):
    """The log-likelihood, by scipy and loops."""
    return sum(
        math.log(sum(share * norm.pdf(w, m, math.sqrt(v)) for m, v, share in zip(*mixture(shared), strict=True))) for w in weights.tolist()
    )


@pytest.mark.parametrize("zero", [0.8, None])
def test_the_mixture_never_becomes_less_likely(zero):
    weights = torch.cat([0.02 * normal(60), 0.5 + 0.05 * normal(20, seed=1), -0.7 + 0.05 * normal(20, seed=2)])
    penalty = p.SoftWeightSharing(components=4, zero=zero, floor=1e-2)
    shared, seen = {}, []
    for _ in range(25):
        _, shared = penalty.refresh([Penalized(weights[:50], shared=shared), Penalized(weights[50:].view(5, 10), shared=shared)])
        seen.append(likelihood(weights, shared))
        assert float(shared["mean"][0]) == 0.0
        assert float(shared["portion"].sum()) == pytest.approx(1.0, abs=1e-12)
        assert zero is None or float(shared["portion"][0]) == zero
        assert float(shared["variance"].min()) >= 1e-4
    assert all(after >= before - 1e-9 for before, after in pairwise(seen))
    assert seen[-1] > seen[0] + 20
    near = [min(abs(m - target) for m in shared["mean"].tolist()) for target in (0.5, -0.7)]
    assert max(near) < 0.05


def test_one_step_of_the_mixture_is_that_of_the_textbook():
    weights = normal(30)
    penalty = p.SoftWeightSharing(components=2, zero=None, floor=1e-6)
    _, start = penalty.refresh([Penalized(weights)])
    _, after = penalty.refresh([Penalized(weights, shared=start)])
    w, (mean, variance, portion) = weights.numpy(), (np.array(one) for one in mixture(start))
    joint = np.stack([s * norm.pdf(w, m, np.sqrt(v)) for m, v, s in zip(mean, variance, portion, strict=True)], axis=1)
    belongs = joint / joint.sum(1, keepdims=True)
    counts = belongs.sum(0)
    means = (belongs * w[:, None]).sum(0) / counts
    means[0] = 0.0
    spread = (belongs * (w[:, None] - means) ** 2).sum(0) / counts
    for found, expected in zip(mixture(after), (means, spread, counts / counts.sum()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_weights_are_drawn_to_the_components_that_they_may_belong_to():
    weights = normal(7, 5)
    penalty = p.SoftWeightSharing(strength=0.3, components=3)
    _, shared = penalty.refresh([Penalized(weights)])
    leaf = weights.clone().requires_grad_()
    parts = [
        math.log(share) - (leaf - m) ** 2 / (2 * v) - math.log(2 * math.pi * v) / 2 for m, v, share in zip(*mixture(shared), strict=True)
    ]
    [expected] = torch.autograd.grad(-0.3 * torch.logsumexp(torch.stack(parts), 0).sum(), leaf)
    at = Penalized(weights, shared=shared)
    torch.testing.assert_close(penalty.gradient(at), expected, rtol=1e-10, atol=1e-13)
    assert float(penalty.value(at)) == pytest.approx(-0.3 * likelihood(weights.flatten(), shared), rel=1e-10)


# ---------------------------------------------------------------- augmented Lagrangian


def test_multipliers_ascend_what_the_weights_descend():
    penalty = p.AugmentedLagrangian(sparsity=0.75, rate=2.0)
    tensors = [torch.rand(4, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]
    costs = [2.0, torch.linspace(1, 2, 3, dtype=torch.float64)]
    linear = quadratic = 0.0
    shared = {}
    for ramp in (0.0, 0.5, 1.0, 1.0):
        _, shared = penalty.refresh([Penalized(t, cost=k, ramp=ramp, shared=shared) for t, k in zip(tensors, costs, strict=True)])
        leaves = [t.clone().requires_grad_() for t in tensors]
        weights = [torch.full((4, 3), 2.0).double(), costs[1].expand(4, 3)]
        total = sum(float(k.sum()) for k in weights)
        missed = 1 - sum((t * k).sum() for t, k in zip(leaves, weights, strict=True)) / total - 0.75 * ramp
        expected = torch.autograd.grad(linear * missed + quadratic * missed**2, leaves)
        for t, k, gradient in zip(tensors, costs, expected, strict=True):
            torch.testing.assert_close(penalty.gradient(Penalized(t, cost=k, shared=shared)), gradient, rtol=1e-12, atol=1e-16)
        missed = missed.item() if ramp else 0.0  # before it begins, it gathers nothing
        linear, quadratic = linear + 2.0 * missed, quadratic + 2.0 * missed**2
        assert float(shared["linear"]) == pytest.approx(linear, rel=1e-12)
        assert float(shared["quadratic"]) == pytest.approx(quadratic, rel=1e-12)
    assert (linear, quadratic) != (0.0, 0.0)


def test_the_target_sparsity_is_reached():
    """A loss that wants gates of different worth open, and a constraint that three quarters are closed."""
    logits = torch.full((200,), 2.0, dtype=torch.float64)
    worth = torch.linspace(0, 1, 200, dtype=torch.float64)
    penalty = p.AugmentedLagrangian(sparsity=0.75, rate=2.0)
    shared = {}
    for _ in range(6000):
        probabilities = torch.sigmoid(logits)
        _, shared = penalty.refresh([Penalized(probabilities, shared=shared)])
        pull = penalty.gradient(Penalized(probabilities, shared=shared)) - worth / 200  # the loss: minus the worth of what is open
        logits = logits - 20.0 * pull * probabilities * (1 - probabilities)
    reached = 1 - float(torch.sigmoid(logits).mean())
    assert reached == pytest.approx(0.75, abs=0.01)
    assert torch.sigmoid(logits)[-25:].min() > torch.sigmoid(logits)[:100].max()  # what is worth more stays


# ---------------------------------------------------------------- learning-compression


@pytest.mark.parametrize("multipliers", [True, False])
def test_learning_compression_finds_the_best_top_k_of_a_quadratic(multipliers):
    """min 1/2 Σ h (w - t)² with 3 of 9 weights: by brute force, those of the largest h t²."""
    curvature = torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0, 3.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    target = torch.tensor([0.1, -2.0, 0.3, 0.2, 3.0, 0.1, -0.4, 2.5, 0.2], dtype=torch.float64)
    penalty = p.LearningCompression(initial=0.1, factor=1.3, multipliers=multipliers)
    weight, state, shared = target.clone(), {}, {}
    for _ in range(60):
        [state], shared = penalty.refresh([Penalized(weight, density=3 / 9, state=state, shared=shared)])
        mu, copy, held = float(shared["mu"]), state["copy"], state["multiplier"]
        weight = (curvature * target + mu * copy + held) / (curvature + mu)  # the learning step, solved
        at = Penalized(weight, state=state, shared=shared)
        torch.testing.assert_close(penalty.gradient(at), -curvature * (weight - target), rtol=1e-9, atol=1e-9)  # it balances the loss
    best = (curvature * target**2).topk(3).indices
    expected = torch.zeros(9, dtype=torch.float64)
    expected[best] = target[best]
    torch.testing.assert_close(state["copy"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-4)


def test_the_steps_of_learning_compression_written_out():
    penalty = p.LearningCompression(initial=0.5, factor=2.0, compress="soft_threshold", price=0.2)
    first, second = normal(4, 3), normal(4, 3, seed=1)
    [state], shared = penalty.refresh([Penalized(first)])

    def soft(x, t):
        return x.sign() * (x.abs() - t).clamp(min=0)

    copy, held = soft(first, 0.4), torch.zeros(4, 3, dtype=torch.float64)
    assert torch.equal(state["copy"], copy)
    assert float(shared["mu"]) == 0.5
    [state], shared = penalty.refresh([Penalized(second, state=state, shared=shared)])
    copy = soft(second - held / 0.5, 0.2 / 0.5)
    held = held - 0.5 * (second - copy)
    torch.testing.assert_close(state["copy"], copy, rtol=1e-15, atol=0)
    torch.testing.assert_close(state["multiplier"], held, rtol=1e-15, atol=0)
    assert float(shared["mu"]) == 1.0
    at = Penalized(first, state=state, shared=shared)
    leaf = first.clone().requires_grad_()
    [expected] = torch.autograd.grad(0.5 * (leaf - copy - held).square().sum(), leaf)  # mu = 1
    torch.testing.assert_close(penalty.gradient(at), expected, rtol=1e-12, atol=1e-14)
    [again] = torch.autograd.grad(penalty.value(Penalized(leaf, state=state, shared=shared)), leaf)
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-14)
    stepped = p.LearningCompression(apply="proximal").step(at, 0.3)
    torch.testing.assert_close(stepped - first + 0.3 * penalty.gradient(Penalized(stepped, state=state, shared=shared)), 0 * first)


def test_copies_hold_exactly_the_share_of_all_tensors_together():
    penalty = p.LearningCompression()
    first, second = torch.ones(10), torch.full((7,), 0.5)
    states, _ = penalty.refresh([Penalized(first, density=0.3), Penalized(second, density=0.3)])
    assert [int(state["copy"].count_nonzero()) for state in states] == [5, 0]
    assert states[0]["copy"].tolist() == [1.0] * 5 + [0.0] * 5  # equal ones: the lower index stays


# ---------------------------------------------------------------- directional pruning


def test_directional_pruning_is_the_published_optimizer():
    """gRDA: sums of SGD's steps from the initial weight, soft-thresholded by c γ^(1/2) (n γ)^μ."""
    rate, strength, power = 0.05, 0.3, 0.6
    target = torch.tensor([0.02, -0.4, 1.0, 0.0], dtype=torch.float64)
    weight = initial = torch.tensor([0.3, 0.2, -0.1, 0.25], dtype=torch.float64)
    penalty = p.Directional(strength=strength, power=power)
    total, state, shared, zeros = initial.clone(), {}, {}, 0
    theirs = initial.clone()
    for n in range(1, 200):
        total = total - rate * (theirs - target)  # the gradient of a quadratic at the thresholded weight
        threshold = strength * rate**0.5 * (n * rate) ** power
        theirs = total.sign() * (total.abs() - threshold).clamp(min=0)
        [state], shared = penalty.refresh([Penalized(weight, state=state, shared=shared)])
        moved = weight - rate * (weight - target)
        weight = penalty.step(Penalized(moved, state=state, shared=shared), rate)
        torch.testing.assert_close(weight, theirs, rtol=1e-9, atol=1e-11)
        zeros += int((weight == 0).sum())
    assert zeros > 100
    assert weight[2] != 0


# ---------------------------------------------------------------- clusters


def test_members_of_a_cluster_become_the_same():
    """Training with centripetal SGD: differences within a cluster decay by (1 - rate c) a step, whatever the loss."""
    layout = Layout(("output", "input"), (6, 3))
    centers = torch.tensor([[3.0, 0, 0], [0, 3.0, 0]], dtype=torch.float64)
    weight = centers.repeat(3, 1) + 0.3 * normal(6, 3)
    target = normal(6, 3, seed=3)
    penalty = p.Centripetal(strength=0.5, sparsity=2 / 3)
    state, start = {}, weight.clone()
    for _ in range(20):
        gradient = weight - target
        [state], _ = penalty.refresh([Penalized(weight, layout=layout, state=state)])
        pull = penalty.gradient(Penalized(weight, gradient=gradient, layout=layout, state=state))
        weight = weight - 0.1 * (gradient + pull)
    clusters = state["cluster"].tolist()
    assert clusters in ([0, 1] * 3, [1, 0] * 3)
    for cluster in (0, 1):
        rows = torch.tensor(clusters) == cluster
        apart = [(w[rows] - w[rows].mean(0)).norm() for w in (start, weight)]
        assert float(apart[1] / apart[0]) == pytest.approx((1 - 0.1 * 0.5) ** 20, rel=1e-9)
        mean = start[rows].mean(0)
        for _ in range(20):
            mean = mean - 0.1 * (mean - target[rows].mean(0))  # the mean learns by the mean of the gradients
        torch.testing.assert_close(weight[rows].mean(0), mean, rtol=1e-9, atol=1e-12)


def test_there_are_as_many_clusters_as_rows_stay():
    for rows, sparsity, count in ((10, 0.3, 7), (10, 0.0, 10), (5, 0.9, 1)):
        penalty = p.Centripetal(sparsity=sparsity)
        [state], _ = penalty.refresh([Penalized(normal(rows, 4), layout=Layout(("output", "input"), (rows, 4)))])
        assert len(set(state["cluster"].tolist())) == count


# ---------------------------------------------------------------- settings


def test_times_of_ramps_are_checked():
    clock = Clock(total_steps=100, steps_per_epoch=10)
    assert [p.KL(end="0.5 run").ramp(step, clock) for step in (0, 25, 50, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert [p.KL(begin="10 steps", end="30 steps").ramp(step, clock) for step in (5, 10, 20, 30)] == [0.0, 0.0, 0.5, 1.0]
    assert [p.L1(begin="2 epochs").ramp(step, clock) for step in (0, 19, 20)] == [0.0, 0.0, 1.0]
    assert p.L1().ramp(0, clock) == 1.0
    for fields, error in (
        (
            {"begin": "50 steps", "end": "20 steps"},
            r"^penalty\.l1: end \(20 steps = step 20\) must not come before begin \(50 steps = step 50\)$",
        ),
        ({"end": "200 steps"}, r"^penalty\.l1: it acts in full only from step 200 on, after the run's 100 steps"),
    ):
        with pytest.raises(InputError, match=error):
            p.L1(**fields).validate_with(clock)
    with pytest.raises(InputError, match=r"^penalty\.reweighted_l1\.every: must be longer than zero"):
        p.ReweightedL1(every="0 steps").validate_with(clock)
    with pytest.raises(InputError, match=r"end .* must not come before begin"):
        p.Sum(terms=["l2", {"l1": {"begin": "50 steps", "end": "20 steps"}}]).validate_with(clock)
    p.Sum(terms=["l2", {"l1": {"begin": "20 steps", "end": "20 steps"}}]).validate_with(clock)


def test_recipes_say_what_a_penalty_can_do():
    for text, error in (
        ({"hoyer": {"apply": "proximal"}}, r"^penalty\.hoyer\.apply: Input should be 'gradient' or 'decoupled', got 'proximal'"),
        ({"lp": {"p": 1}}, r"^penalty\.lp\.p: "),
        ({"polarization": {"of": "weight"}}, r"^penalty\.polarization\.of: "),
        ({"hoyer_square": {"of": "norm", "per": "piece"}}, r"per: pieces are of weights; choices: per: element, or of: weight"),
        ({"sum": ["l1"]}, r"^penalty\.sum\.terms"),
        ({"sum": "l1"}, r"expected a list of penalties, got 'l1'"),
        ({"sum": ["l1", "l3"]}, r"unknown component 'l3'"),
        ({"sum": ["l1", {"group_lasso": {"ratio": 0.2}}]}, r"a ratio is of one penalty and the loss"),
        ({"nuclear_norm": {"every": "5 steps"}}, r"^penalty\.nuclear_norm: every: is between steps of its own, .* say apply: proximal"),
        ("augmented_lagrangian", r"^penalty\.augmented_lagrangian\.sparsity: this field is required"),
    ):
        with pytest.raises(InputError, match=error):
            build("penalty", text)
    combined = build("penalty", {"sum": ["group_lasso", {"nuclear_norm": {"apply": "proximal", "weigh": "flops"}}]})
    assert [one.name for one in combined.penalties] == ["group_lasso", "nuclear_norm"]
    assert combined.needs == {"flops"}
    assert combined.to_data() == {"sum": {"terms": ["group_lasso", {"nuclear_norm": {"apply": "proximal", "weigh": "flops"}}]}}
    assert build("penalty", combined.to_data()) == combined
