"""What penalties act on in a training: gates, probabilities and thresholds of relaxations, costs, states; against loops, in float64."""

import copy
import math

import pytest
import torch
from support import TARGETS, batch, net, recipe, train
from torch import nn
from torch.func import functional_call
from torch.nn import functional

import niwaki
from niwaki.errors import InputError
from niwaki.pull.terms import require_whole

STEPS = 6
RATE, MOMENTUM = 0.1, 0.9


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


def sparsified(text, steps=STEPS, **options):
    model = net(dtype=torch.float64)
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=steps, **options).attach(optimizer)
    return model, optimizer, sparsifier


def still(model):
    """Give every parameter a gradient of zero, so that only the penalty moves anything."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


# ---------------------------------------------------------------- gates


def with_factors(penalty=None, after=None):
    """The oracle: a factor for each output of each target, in the forward pass, with the penalty in the loss."""
    model = net(dtype=torch.float64)
    weights = dict(model.named_parameters())
    factors = {name: nn.Parameter(torch.ones(len(weights[name]), dtype=torch.float64)) for name in TARGETS}
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": factors.values()}], lr=RATE, momentum=MOMENTUM)

    def relaxed():
        return {n: weights[n] * v.view(-1, *[1] * (weights[n].ndim - 1)) for n, v in factors.items()}

    for step in range(STEPS):
        images, labels = batch(step, dtype=torch.float64)
        optimizer.zero_grad()
        loss = functional.cross_entropy(functional_call(model, relaxed(), images), labels)
        (loss if penalty is None else loss + penalty(factors)).backward()
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after(factors)
    return factors, relaxed()


GATES = "granularity: output_channel\nrelaxation: {factor: {weight_decay: 0}}\npenalty: "


@pytest.mark.parametrize(
    ("text", "penalty", "after"),
    [
        ("{l1: {strength: 0.02, of: gate}}", lambda v: 0.02 * sum(one.abs().sum() for one in v.values()), None),
        ("{bimodal: {strength: 0.05}}", lambda v: 0.05 * sum((one.abs() * (1 - one.abs()).abs()).sum() for one in v.values()), None),
        (
            "{polarization: {strength: 0.02, of: gate, t: 1.3}}",
            lambda v: 0.02 * (1.3 * (g := torch.cat(list(v.values()))).norm(1) - (g - g.mean()).norm(1)),
            lambda v: [one.clamp_(0, 1) for one in v.values()],
        ),
        (
            "{l1: {strength: 2.0, of: gate, apply: proximal}}",
            None,
            lambda v: [one.copy_(one.sign() * (one.abs() - RATE * 2.0).clamp(min=0)) for one in v.values()],
        ),
    ],
)
def test_penalties_of_gates_equal_those_written_in_the_loss(text, penalty, after):
    model, optimizer, sparsifier = sparsified(GATES + text)
    train(model, [optimizer], range(STEPS), dtype=torch.float64)
    factors, relaxed = with_factors(penalty, after)
    own = {gates.name: gates.own["factor"] for gates in sparsifier._gates}
    for name in TARGETS:
        torch.testing.assert_close(own[name].flatten(), factors[name].data, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dict(model.named_parameters())[name], relaxed[name], rtol=1e-9, atol=1e-12)
    if "proximal" in text:
        assert any((one == 0).any() for one in own.values())
    assert any((one != 1).any() for one in own.values())


def expected_step(sparsifier, formula):
    """Where plain gradient descent on a formula of each set of own parameters takes them, before any step."""
    found = {}
    for gates in sparsifier._gates:
        leaf = next(iter(gates.own.values())).detach().clone().requires_grad_()
        [gradient] = torch.autograd.grad(formula(gates.name, leaf), leaf)
        found[gates.name] = leaf.detach() - RATE * gradient
    return found


def open_probability(log_alpha):
    return torch.sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1))


@pytest.mark.parametrize("granularity", ["element", "output_channel"])
def test_the_expected_number_of_open_gates(granularity):
    model, optimizer, sparsifier = sparsified(
        f"granularity: {granularity}\nrelaxation: hard_concrete\npenalty: {{expected_l0: {{strength: 0.5}}}}"
    )
    expected = expected_step(sparsifier, lambda _, a: 0.5 * open_probability(a).sum())
    still(model)
    optimizer.step()
    for gates in sparsifier._gates:
        torch.testing.assert_close(gates.own["log_alpha"].detach(), expected[gates.name], rtol=1e-6, atol=1e-9)


def test_gates_cost_what_their_pieces_do():
    text = "granularity: output_channel\nrelaxation: hard_concrete\npenalty: {expected_l0: {strength: 0.5, weigh: %s}}"
    size = {"conv2.weight": 4 * 9, "fc1.weight": 128, "fc2.weight": 24}
    count = {"conv2.weight": 8, "fc1.weight": 24, "fc2.weight": 16}
    positions = {"conv2.weight": 16, "fc1.weight": 1, "fc2.weight": 1}
    for weigh in ("parameters", "flops"):
        model, optimizer, sparsifier = sparsified(text % weigh, data=[batch(0, dtype=torch.float64)])
        cost = {n: size[n] * (positions[n] if weigh == "flops" else 1) for n in TARGETS}
        mean = sum(cost[n] * count[n] for n in TARGETS) / sum(count.values())
        expected = expected_step(sparsifier, lambda name, a, cost=cost, mean=mean: 0.5 * cost[name] / mean * open_probability(a).sum())
        still(model)
        optimizer.step()
        for gates in sparsifier._gates:
            torch.testing.assert_close(gates.own["log_alpha"].detach(), expected[gates.name], rtol=1e-6, atol=1e-9)


def test_thresholds_are_raised():
    model, optimizer, sparsifier = sparsified("relaxation: dynamic_threshold\npenalty: {threshold: {strength: 0.5}}")
    still(model)
    optimizer.step()
    for name in TARGETS:
        own = sparsifier._tensors[name].own["threshold"].detach()
        torch.testing.assert_close(own, torch.full_like(own, RATE * 0.5))  # exp(-0) = 1
    still(model)
    optimizer.step()
    own = sparsifier._tensors["fc1.weight"].own["threshold"].detach()
    assert float(own.flatten()[0]) == pytest.approx(RATE * 0.5 * (1 + MOMENTUM + math.exp(-RATE * 0.5)), rel=1e-12)


def test_divergences_pull_latent_weights_and_own_parameters():
    model, optimizer, sparsifier = sparsified("relaxation: variational_noise\npenalty: {kl: {strength: 0.01, end: 2 steps}}", steps=4)
    relaxation = sparsifier.recipe.relaxation
    tensor = sparsifier._tensors["fc2.weight"]
    for step, ramp in enumerate((0.0, 0.5, 1.0)):
        weight = tensor.latent.clone().requires_grad_()
        own = {name: value.detach().clone().requires_grad_() for name, value in tensor.own.items()}
        gradients = torch.autograd.grad(0.01 * ramp * relaxation.divergence(weight, own).sum(), [weight, *own.values()])
        optimizer.state.clear()  # no momentum
        still(model)
        optimizer.step()
        for before, after, gradient in zip([weight, *own.values()], [tensor.latent, *tensor.own.values()], gradients, strict=True):
            torch.testing.assert_close(after.detach(), before.detach() - RATE * gradient, rtol=1e-6, atol=1e-10, msg=f"step {step}")
    assert gradients[0].any()


def test_a_fused_optimizer_unscales_the_pull_of_own_parameters_too():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    sparsifier = niwaki.Sparsifier(model, recipe("relaxation: dynamic_threshold\npenalty: {threshold: {strength: 0.5}}"), total_steps=1)
    sparsifier.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    own = sparsifier._tensors["fc1.weight"].own["threshold"].detach()
    torch.testing.assert_close(own, torch.full_like(own, 0.05))


def test_sensitivities_do_not_see_the_scale_of_a_fused_optimizer():
    text = "penalty: {sensitivity: {strength: 0.5, bound: 1.0}}"
    weights = []
    for scale in (1.0, 1024.0):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        niwaki.Sparsifier(model, recipe(text), total_steps=1).attach(optimizer)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25 * scale)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        before = model.fc1.weight.detach().clone()
        optimizer.step()
        weights.append(model.fc1.weight.detach())
        torch.testing.assert_close(weights[-1], before - 0.1 * (0.25 + 0.5 * 0.75 * before))
    torch.testing.assert_close(*weights)


# ---------------------------------------------------------------- costs of weights, scales and pieces


def test_weights_cost_their_multiply_adds():
    model, optimizer, _ = sparsified("penalty: {l1: {strength: 0.02, weigh: flops}}", data=[batch(0, dtype=torch.float64)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    still(model)
    optimizer.step()
    uses = {"conv2.weight": 16, "fc1.weight": 1, "fc2.weight": 1}
    mean = sum(uses[n] * before[n].numel() for n in TARGETS) / sum(before[n].numel() for n in TARGETS)
    for name in TARGETS:
        expected = before[name] - RATE * 0.02 * uses[name] / mean * before[name].sign()
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected, rtol=1e-12, atol=0)


WHOLE = "granularity: channel\ntarget: {weights: {include: ['*']}}\n"


def test_scales_cost_what_their_units_do():
    """The channels of conv1: 9 weights each, and 9 in each of the 8 filters that read them, at 64 and 16 positions."""
    for weigh in ("parameters", "flops"):
        model, optimizer, _ = sparsified(
            WHOLE + f"penalty: {{l1: {{strength: 0.02, of: norm, weigh: {weigh}}}}}", data=[batch(0, dtype=torch.float64)]
        )
        still(model)
        optimizer.step()
        torch.testing.assert_close(model.norm.weight.detach(), torch.full((4,), 1 - RATE * 0.02, dtype=torch.float64))  # all cost the same
    with pytest.raises(
        InputError, match=r"^penalty\.l1\.weigh: 'flops' of a scale is that of its unit, and granularity 'element' has no units"
    ):
        recipe("penalty: {l1: {of: norm, weigh: flops}}")


def test_scales_of_two_layers_differ_in_cost():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Flatten(), nn.Linear(54, 5),
        ).double()  # fmt: skip

    model, data = build(), [batch(0, dtype=torch.float64)]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    text = WHOLE + "penalty: {l1: {strength: 0.02, of: norm, weigh: %s}}"
    for weigh, first, second in (("parameters", 9 + 6 * 9, 4 * 9 + 5 * 9), ("flops", 9 * 64 + 6 * 9 * 9, 4 * 9 * 9 + 5 * 9)):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        niwaki.Sparsifier(model, recipe(text % weigh), total_steps=1, data=data).attach(optimizer)
        still(model)
        optimizer.step()
        if weigh == "parameters":  # biases and normalizations of the units are theirs too
            first, second = first + 3, second + 3
        mean = (4 * first + 6 * second) / 10
        for layer, cost in ((model[1], first), (model[4], second)):
            torch.testing.assert_close(
                layer.weight.detach(), torch.full_like(layer.weight, 1 - RATE * 0.02 * cost / mean).detach(), msg=weigh
            )


def test_pieces_cost_their_flops():
    model, optimizer, _ = sparsified(
        "granularity: output_channel\npenalty: {group_lasso: {strength: 0.02, scaled: false, weigh: flops}}",
        data=[batch(0, dtype=torch.float64)],
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    still(model)
    optimizer.step()
    cost = {"conv2.weight": 36 * 16, "fc1.weight": 128, "fc2.weight": 24}
    mean = sum(cost[n] * len(before[n]) for n in TARGETS) / sum(len(before[n]) for n in TARGETS)
    for name in TARGETS:
        w = before[name]
        norms = w.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1))
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), w - RATE * 0.02 * cost[name] / mean * w / norms)


# ---------------------------------------------------------------- several, and their times


def test_a_sum_is_all_of_them_and_ramps_are_followed():
    text = "penalty: {sum: [{l1: {strength: 0.02, begin: 1 steps, end: 3 steps}}, {l2: {strength: 0.3, apply: decoupled, begin: 4 steps}}]}"
    model, optimizer, _ = sparsified(text)
    plain = net(dtype=torch.float64)
    other = sgd(plain)
    train(model, [optimizer], range(STEPS), dtype=torch.float64)
    for step in range(STEPS):
        images, labels = batch(step, dtype=torch.float64)
        other.zero_grad()
        weights = dict(plain.named_parameters())
        ramp = [0.0, 0.0, 0.5, 1.0, 1.0, 1.0][step]
        (functional.cross_entropy(plain(images), labels) + 0.02 * ramp * sum(weights[n].abs().sum() for n in TARGETS)).backward()
        other.step()
        if step >= 4:
            with torch.no_grad():
                for name in TARGETS:
                    weights[name].mul_(1 - RATE * 0.3)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-14)


def test_a_nuclear_norm_acts_from_time_to_time():
    model, optimizer, _ = sparsified("penalty: {nuclear_norm: {strength: 0.5, apply: proximal, every: 3 steps}}")
    for step in range(6):
        before = model.fc2.weight.detach().clone()
        still(model)
        optimizer.step()
        sigma = torch.linalg.svdvals(before)
        shrunk = (sigma - 3 * RATE * 0.5).clamp(min=0) if step in (2, 5) else sigma
        torch.testing.assert_close(torch.linalg.svdvals(model.fc2.weight.detach()), shrunk, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- what is remembered

STATEFUL = {
    "reweighted_l1": "penalty: {reweighted_l1: {strength: 1e-3, every: 2 steps}}",
    "soft_weight_sharing": "penalty: {soft_weight_sharing: {components: 3, every: 2 steps}}",
    "augmented_lagrangian": "relaxation: hard_concrete\npenalty: {augmented_lagrangian: {sparsity: 0.5, rate: 50, end: 4 steps}}",
    "learning_compression": (
        "sparsity: 0.5\nallocation: global\nschedule: {one_shot: {at: 1 run}}\n"
        "penalty: {learning_compression: {initial: 0.5, factor: 1.5, every: 2 steps}}"
    ),
    "directional": "penalty: {directional: {strength: 0.05}}",
    "polarization": "penalty: {polarization: {strength: 0.05}}",
    "centripetal": "penalty: {centripetal: {strength: 0.1}}",
    "sum": "penalty: {sum: [{reweighted_l1: {every: 4 steps}}, {hoyer: {strength: 1e-2}}, {directional: {strength: 0.01}}]}",
}


@pytest.mark.parametrize("text", STATEFUL.values(), ids=STATEFUL)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(text, stop):
    model, optimizer, _ = sparsified(text)
    train(model, [optimizer], range(STEPS), dtype=torch.float64)
    first, of_first, before = sparsified(text)
    train(first, [of_first], range(stop), dtype=torch.float64)
    states = [copy.deepcopy(part.state_dict()) for part in (first, of_first, before)]
    assert any(state is not None for state in states[2]["penalty"])
    again, of_second, after = sparsified(text)
    for part, state in zip((again, of_second, after), states, strict=True):
        part.load_state_dict(state)
    train(again, [of_second], range(stop, STEPS), dtype=torch.float64)
    plain, of_plain, _ = sparsified(text.split("penalty:")[0] + "penalty: {l2: {strength: 0}}")
    train(plain, [of_plain], range(STEPS), dtype=torch.float64)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))  # it does act


def test_a_constraint_is_met_in_training():
    text = "relaxation: {hard_concrete: {learning_rate: 1.0}}\npenalty: {augmented_lagrangian: {sparsity: 0.7, rate: 300, end: 0.3 run}}"
    model, optimizer, sparsifier = sparsified(text, steps=300)
    for step in range(300):
        images, labels = batch(step % 4, dtype=torch.float64)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    open_ = torch.cat([open_probability(gates.own["log_alpha"].detach()).flatten() for gates in sparsifier._gates])
    assert 1 - float(open_.mean()) == pytest.approx(0.7, abs=0.01)


def test_learning_compression_ends_at_weights_that_the_cut_does_not_change():
    text = (
        "sparsity: 0.6\nallocation: global\nschedule: {one_shot: {at: 1 run}}\n"
        "penalty: {learning_compression: {initial: 0.05, factor: 1.3, every: 5 steps, apply: proximal}}"
    )
    model, optimizer, sparsifier = sparsified(text, steps=150)
    train(model, [optimizer], range(150), dtype=torch.float64)
    before = {name: dict(model.named_parameters())[name].detach().clone() for name in TARGETS}
    sparsifier.finalize()
    assert sparsifier.sparsity == pytest.approx(0.6, abs=1e-3)
    moved = max(float((dict(model.named_parameters())[name].detach() - before[name]).abs().max()) for name in TARGETS)
    assert moved < 1e-2
    assert max(float(w.abs().max()) for w in before.values()) > 0.3


def test_sr_ste_pulls_pruned_latent_weights_alone():
    text = (
        "granularity: 2:4\nrelaxation: latent\ngradient: dense\nschedule: {constant: {every: 1 steps}}\npenalty: {sr_ste: {strength: 0.5}}"
    )
    model, optimizer, sparsifier = sparsified(text)
    train(model, [optimizer], range(1), dtype=torch.float64)
    tensor = sparsifier._tensors["fc1.weight"]
    optimizer.state.clear()
    before, pruned = tensor.latent.clone(), tensor.pruned.clone()
    still(model)
    optimizer.step()
    torch.testing.assert_close(tensor.latent, torch.where(pruned, before * (1 - RATE * 0.5), before), rtol=1e-14, atol=0)
    assert float(pruned.double().mean()) == 0.5


# ---------------------------------------------------------------- refusals


class Shard:
    name, sharded = "fc1.weight", True


def test_shards_of_what_is_looked_at_whole_are_refused():
    with pytest.raises(InputError, match=r"^penalty: 'hoyer' looks at whole tensors, and fc1\.weight is sharded; choose another penalty"):
        require_whole("hoyer", [Shard()])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("penalty: expected_l0", r"^penalty: 'expected_l0' is of the relaxation's prob.*, and 'hard' has none; .*hard_concrete"),
        ("penalty: kl", r"^penalty: 'kl' is of the relaxation's divergences from a prior, and 'hard' has none; .*variational_noise"),
        ("relaxation: soft_threshold\npenalty: threshold", r"learned thresholds, and 'soft_threshold' has none; .*dynamic_threshold"),
        ("relaxation: latent\nsparsity: 0.5\npenalty: {l1: {of: gate}}", r"gates, and 'latent' has none; choices: .*factor"),
        (
            "relaxation: sigmoid_anneal\npenalty: {l1: {of: gate, apply: proximal}}",
            r"^penalty\.l1\.apply: 'proximal' is of numbers that are trained themselves, and relaxation 'sigmoid_anneal' computes",
        ),
        ("sparsity: 0.5\npenalty: sr_ste", r"^penalty: 'sr_ste' is of pruned weights that learn; it needs a sparsity, relaxation: latent"),
        ("penalty: learning_compression", r"^sparsity: missing; penalty 'learning_compression' draws the weights to a copy with"),
        ("sparsity: 0.5\npenalty: learning_compression", r"^schedule: 'one_shot' at the start masks before penalty 'learning_compression'"),
        ("penalty: {sum: [l1, group_lasso]}", r"^penalty: 'group_lasso' is about pieces of several weights, and granularity 'element'"),
        ("penalty: {hoyer_square: {per: piece}}", r"^penalty: 'hoyer_square' is about pieces of several weights"),
        ("sparsity: 0.5\npenalty: {sum: [l1, exploration_l2]}", r"^penalty: 'exploration_l2' needs gradient"),
        (
            "sparsity: 0.5\nsaliency: score\nrelaxation: {straight_through: {scores: uniform}}\ngradient: frozen\n"
            "schedule: {constant: {every: 1 steps}}\npenalty: l1",
            r"^penalty: 'l1' pulls weights, and gradient 'frozen' lets none learn; choices: active, dense",
        ),
    ],
)  # fmt: skip
def test_combinations_that_cannot_be(text, error):
    with pytest.raises(InputError, match=error):
        recipe(text)
