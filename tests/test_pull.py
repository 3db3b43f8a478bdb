"""Penalties in training against loops that write them out, in float64."""

import copy
import math
import re

import pytest
import torch
from support import batch, net, recipe, train
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.dependency import Group, Member
from niwaki.errors import InputError

STEPS = 6
RATE, MOMENTUM, STRENGTH = 0.1, 0.9, 3e-2


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


def sparsified(text, groups=None, model=None):
    """Train under a recipe; returns the model and its sparsifier."""
    model = net(dtype=torch.float64) if model is None else model
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS, groups=groups).attach(optimizer)
    train(model, [optimizer], range(STEPS), dtype=torch.float64)
    return model, sparsifier


def written_out(penalty=None, after=None):
    """The oracle: the loss with the penalty added, by autograd, and what is done to the weights after each step."""
    model = net(dtype=torch.float64)
    optimizer = sgd(model)
    for step in range(STEPS):
        images, labels = batch(step, dtype=torch.float64)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        if penalty is not None:
            loss = loss + penalty(dict(model.named_parameters()))
        loss.backward()
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after(dict(model.named_parameters()))
    return model


def assert_same(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}")


TARGETS = ("conv2.weight", "fc1.weight", "fc2.weight")


def test_l1_as_a_gradient():
    model, sparsifier = sparsified(f"penalty: {{l1: {{strength: {STRENGTH}}}}}")
    assert_same(model, written_out(lambda p: STRENGTH * sum(p[n].abs().sum() for n in TARGETS)))
    assert sparsifier.sparsity == 0.0


@pytest.mark.parametrize("text", ["target: norm_scale\npenalty: {l1: {strength: 0.03}}", "penalty: {l1: {strength: 0.03, of: norm}}"])
def test_l1_of_the_scales_of_normalizations(text):
    model, _ = sparsified(text)
    assert_same(model, written_out(lambda p: 0.03 * p["norm.weight"].abs().sum()))


def test_l1_as_steps_of_its_own():
    def shrink(p):
        for name in TARGETS:
            p[name].copy_(p[name].sign() * (p[name].abs() - RATE * STRENGTH).clamp(min=0))

    def decay(p):
        for name in TARGETS:
            p[name].sub_(RATE * STRENGTH * p[name].sign())

    for apply, after in (("proximal", shrink), ("decoupled", decay)):
        model, _ = sparsified(f"penalty: {{l1: {{strength: {STRENGTH}, apply: {apply}}}}}")
        assert_same(model, written_out(after=after))
    assert sum(int((p == 0).sum()) for p in sparsified("penalty: {l1: {strength: 0.3, apply: proximal}}")[0].parameters()) > 50


def rows(p):
    return p.flatten(1).norm(dim=1)


def test_a_group_lasso_of_output_channels():
    text = f"granularity: output_channel\npenalty: {{group_lasso: {{strength: {STRENGTH}, apply: %s}}}}"
    model, _ = sparsified(text % "gradient")
    assert_same(model, written_out(lambda p: STRENGTH * sum(math.sqrt(p[n][0].numel()) * rows(p[n]).sum() for n in TARGETS)))

    def shrink(p):
        for w in (p[n] for n in TARGETS):
            factor = (1 - RATE * STRENGTH * math.sqrt(w[0].numel()) / rows(w)).clamp(min=0)
            w.mul_(factor.view(-1, *[1] * (w.dim() - 1)))

    model, _ = sparsified(text % "proximal")
    assert_same(model, written_out(after=shrink))


def hidden():
    """The units of fc1 and fc2, as a tracer would find them, and the channels of conv2 with 16 columns of fc1 each."""
    return [
        Group(
            "conv2",
            "channel",
            8,
            (
                Member("conv2.weight", 0, torch.arange(8), "output"),
                Member("conv2.bias", 0, torch.arange(8), "along"),
                Member("fc1.weight", 1, torch.arange(128) // 16, "input"),
            ),
        ),
        Group(
            "fc1",
            "channel",
            24,
            (
                Member("fc1.weight", 0, torch.arange(24), "output"),
                Member("fc1.bias", 0, torch.arange(24), "along"),
                Member("fc2.weight", 1, torch.arange(24), "input"),
            ),
        ),
        Group(
            "fc2",
            "channel",
            16,
            (
                Member("fc2.weight", 0, torch.arange(16), "output"),
                Member("fc2.bias", 0, torch.arange(16), "along"),
                Member("head.weight", 1, torch.arange(16), "input"),
            ),
        ),
    ]


def units(p):
    """For each group its units: the rows that make a unit and the columns that read it, views of the parameters."""
    yield [[p["conv2.weight"][i], p["fc1.weight"][:, 16 * i : 16 * i + 16]] for i in range(8)]
    yield [[p["fc1.weight"][i], p["fc2.weight"][:, i]] for i in range(24)]
    yield [[p["fc2.weight"][i], p["head.weight"][:, i]] for i in range(16)]


def norm(parts):
    return torch.cat([part.flatten() for part in parts]).norm()


def test_a_group_lasso_of_dependency_groups():
    text = f"granularity: channel\npenalty: {{group_lasso: {{strength: {STRENGTH}, scaled: %s, apply: %s}}}}"
    model, sparsifier = sparsified(text % ("true", "gradient"), hidden())
    size = {8: 4 * 9 + 24 * 16, 24: 128 + 16, 16: 24 + 5}
    assert_same(
        model,
        written_out(lambda p: STRENGTH * sum(math.sqrt(size[len(group)]) * norm(unit) for group in units(p) for unit in group)),
    )
    assert sparsifier.sparsity == 0.0
    model, _ = sparsified(text % ("false", "gradient"), hidden())
    assert_same(model, written_out(lambda p: STRENGTH * sum(norm(unit) for group in units(p) for unit in group)))

    def shrink(p):
        for group in units(p):  # one after the other: a weight in two groups is shrunk by both
            for unit in group:
                factor = max(0.0, 1 - RATE * STRENGTH * math.sqrt(size[len(group)]) / float(norm(unit)))
                for part in unit:
                    part.mul_(factor)

    model, _ = sparsified(text % ("true", "proximal"), hidden())
    assert_same(model, written_out(after=shrink))


@pytest.mark.parametrize("apply", ["gradient", "proximal", "decoupled"])
def test_what_belongs_to_no_unit_is_left_alone(apply):
    owned = torch.arange(24).where(torch.arange(24) < 10, -1)
    parts = Member("fc1.weight", 0, owned, "output"), Member("fc2.weight", 1, owned, "input")
    model, before = net(dtype=torch.float64), net(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    text = f"granularity: channel\npenalty: {{group_lasso: {{strength: 0.03, apply: {apply}}}}}"
    niwaki.Sparsifier(model, recipe(text), total_steps=1, groups=[Group("fc1", "channel", 10, parts)]).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model.fc1.weight[10:], before.fc1.weight[10:])
    assert torch.equal(model.fc2.weight[:, 10:], before.fc2.weight[:, 10:])
    assert (model.fc1.weight[:10].abs() < before.fc1.weight[:10].abs()).all()


def test_units_at_zero_are_masked_by_a_threshold():
    text = (
        "granularity: channel\nsaliency: {magnitude: {norm: l2}}\nselection: {threshold: 1e-9}\nschedule: {one_shot: {at: 1 run}}\n"
        "penalty: {group_lasso: {strength: 0.06, apply: proximal}}"
    )
    model, sparsifier = sparsified(text, hidden())
    sparsifier.finalize()
    gone = {len(group): [not any(part.any() for part in unit[:1]) for unit in group] for group in units(dict(model.named_parameters()))}
    assert any(any(group) for group in gone.values())
    assert not all(all(group) for group in gone.values())
    masks = sparsifier.masks
    for name, size in (("conv2", 8), ("fc1", 24), ("fc2", 16)):
        kept = masks[f"{name}.bias"].tolist()
        assert sum(kept) >= 1
        assert kept == [not g for g in gone[size]] or (all(gone[size]) and sum(kept) == 1)


def test_masked_weights_stay_zero_and_others_are_pulled():
    text = f"sparsity: 0.5\nsaliency: random\npenalty: {{l1: {{strength: {STRENGTH}, apply: %s}}}}"
    for apply in ("gradient", "proximal", "decoupled"):
        model, sparsifier = sparsified(text % apply)
        plain, _ = sparsified("sparsity: 0.5\nsaliency: random")
        for name, mask in sparsifier.masks.items():
            weight, without = dict(model.named_parameters())[name], dict(plain.named_parameters())[name]
            assert not weight.detach()[~mask].view(torch.int64).any()
            assert weight[mask].abs().sum() < without[mask].abs().sum()


def test_latent_weights_are_pulled():
    text = "sparsity: 0.5\nrelaxation: latent\ngradient: dense\npenalty: {l1: {strength: 0.03, apply: %s}}"
    for apply in ("gradient", "proximal"):
        _, sparsifier = sparsified(text % apply)
        _, plain = sparsified("sparsity: 0.5\nrelaxation: latent\ngradient: dense")
        for name in TARGETS:
            assert sparsifier._tensors[name].latent.abs().sum() < plain._tensors[name].latent.abs().sum()
            pruned = sparsifier._tensors[name].pruned
            assert not dict(sparsifier.model.named_parameters())[name][pruned].any()


def test_each_optimizer_and_group_steps_with_its_own_rate():
    model = net(dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = torch.optim.SGD([{"params": [model.conv2.weight], "lr": 0.5}, {"params": [model.fc1.weight], "lr": 0.25}], lr=0.1)
    second = torch.optim.SGD([model.fc2.weight], lr=torch.tensor(0.125))
    niwaki.Sparsifier(model, recipe("penalty: {l1: {strength: 0.01, apply: decoupled}}"), total_steps=1).attach(first, second)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    first.step()
    second.step()
    for name, rate in (("conv2.weight", 0.5), ("fc1.weight", 0.25), ("fc2.weight", 0.125)):
        torch.testing.assert_close(dict(model.named_parameters())[name], before[name] - rate * 0.01 * before[name].sign())


def test_a_fused_optimizer_unscales_the_pull_too():
    model = net()
    before = model.fc1.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    niwaki.Sparsifier(model, recipe("penalty: {l1: {strength: 0.5}}"), total_steps=1).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(model.fc1.weight, before - 0.1 * 0.5 * before.sign())


def test_a_resumed_run_is_pulled_alike():
    text = "granularity: channel\npenalty: {group_lasso: {strength: 0.03, apply: proximal}}"
    whole, _ = sparsified(text, hidden())
    model = net(dtype=torch.float64)
    optimizer = sgd(model)
    first = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS, groups=hidden()).attach(optimizer)
    train(model, [optimizer], range(3), dtype=torch.float64)
    states = model.state_dict(), optimizer.state_dict(), first.state_dict()
    again = net(dtype=torch.float64)
    optimizer = sgd(again)
    second = niwaki.Sparsifier(again, recipe(text), total_steps=STEPS, groups=hidden()).attach(optimizer)
    for part, state in zip((again, optimizer, second), states, strict=True):
        part.load_state_dict(state)
    train(again, [optimizer], range(3, STEPS), dtype=torch.float64)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_model_without_normalizations_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"^target\.norm_scale: no normalization scale is left"):
        niwaki.Sparsifier(model, recipe("penalty: {l1: {of: norm}}"), total_steps=1)


# ---------------------------------------------------------------- strength from a ratio

RATIO = "granularity: channel\npenalty: {group_lasso: {ratio: 0.2, scaled: %s, apply: %s}}"


def with_ratio(text, model, data=None):
    optimizer = sgd(model)
    data = [batch(50 + i, size=8, dtype=torch.float64) for i in range(3)] if data is None else data
    options = {"total_steps": STEPS, "groups": hidden(), "loss": functional.cross_entropy}
    return optimizer, niwaki.Sparsifier(model, recipe(text), data=data, **options).attach(optimizer)


def ratio_by_hand(scaled):
    """r / (1 - r) times the mean loss of the untrained model over the sum of the norms, by loops."""
    model = net(dtype=torch.float64)
    with torch.no_grad():
        losses = [float(functional.cross_entropy(model(images), y)) for images, y in (batch(50 + i, 8, torch.float64) for i in range(3))]
        total = 0.0
        for group in units(dict(model.named_parameters())):
            for unit in group:
                values = [v for part in unit for v in part.flatten().tolist()]
                total += math.hypot(*values) * (math.sqrt(len(values)) if scaled else 1.0)
    return 0.2 / 0.8 * math.fsum(losses) / 3 / total


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_ratio_becomes_a_strength_at_the_first_step(scaled, apply):
    model = net(dtype=torch.float64)
    optimizer, sparsifier = with_ratio(RATIO % (str(scaled).lower(), apply), model)
    assert sparsifier.strength is None
    with pytest.warns(UserWarning, match="penalty: group_lasso has strength"):
        train(model, [optimizer], range(3), dtype=torch.float64)
    strength = sparsifier.strength
    assert strength == pytest.approx(ratio_by_hand(scaled), rel=1e-12)
    [note] = sparsifier.notes
    assert re.match(rf"penalty: group_lasso has strength {strength:.6g}: its ratio is 0.2, the loss \d", note)
    plain = net(dtype=torch.float64)  # from then on it is that strength, and nothing of the search is left
    optimizer = sgd(plain)
    text = f"granularity: channel\npenalty: {{group_lasso: {{strength: {strength!r}, scaled: {scaled}, apply: {apply}}}}}".replace("T", "t")
    niwaki.Sparsifier(plain, recipe(text.replace("F", "f")), total_steps=STEPS, groups=hidden()).attach(optimizer)
    train(plain, [optimizer], range(3), dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_a_strength_that_was_found_is_resumed_and_not_found_again():
    text = RATIO % ("true", "gradient")
    model = net(dtype=torch.float64)
    optimizer, sparsifier = with_ratio(text, model)
    with pytest.warns(UserWarning, match="penalty: group_lasso has strength"):
        train(model, [optimizer], range(3), dtype=torch.float64)
    states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, sparsifier)]
    train(model, [optimizer], range(3, STEPS), dtype=torch.float64)
    again = net(dtype=torch.float64)
    other, second = with_ratio(text, again, data=[(torch.zeros(1), None)])  # an error, if it were looked at
    assert second.strength is None
    for part, state in zip((again, other, second), states, strict=True):
        part.load_state_dict(state)
    assert second.strength == sparsifier.strength == states[2]["strength"]
    train(again, [other], range(3, STEPS), dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert second.notes == sparsifier.notes


@pytest.mark.parametrize("options", [{}, {"data": [batch(0)]}])
def test_a_ratio_needs_data_and_a_loss(options):
    with pytest.raises(InputError, match=r"^penalty: 'group_lasso' needs data= and loss= \(called as loss\(model\(inputs\), targets\)\)"):
        niwaki.Sparsifier(net(), recipe(RATIO % ("true", "gradient")), total_steps=STEPS, groups=hidden(), **options)


# ---------------------------------------------------------------- before it begins

BEGIN = f"begin: {STEPS} steps, strength: 3.0"


@pytest.mark.parametrize(
    ("rest", "penalty"),
    [
        *(("", f"{{{name}: {{apply: {how}, {BEGIN}}}}}") for name in ("l1", "lp", "nuclear_norm") for how in ("gradient", "proximal")),
        ("", f"{{polarization: {{upper: 0.5, {BEGIN}}}}}"),
        ("", f"{{centripetal: {{{BEGIN}}}}}"),
        ("", f"{{directional: {{{BEGIN}}}}}"),
        ("", f"{{soft_weight_sharing: {{every: 2 steps, {BEGIN}}}}}"),
        ("", f"{{sensitivity: {{apply: decoupled, {BEGIN}}}}}"),
        ("granularity: output_channel", f"{{group_lasso: {{apply: proximal, {BEGIN}}}}}"),
        ("granularity: output_channel", f"{{hoyer_square: {{per: piece, {BEGIN}}}}}"),
        ("relaxation: hard_concrete", f"{{augmented_lagrangian: {{sparsity: 0.5, begin: {STEPS} steps}}}}"),
        (
            "sparsity: 0.5\nschedule: {one_shot: {at: 1 run}}",
            f"{{learning_compression: {{initial: 3.0, every: 1 steps, begin: {STEPS} steps}}}}",
        ),
    ],
)
def test_nothing_is_pulled_before_the_begin(rest, penalty):
    with_penalty, sparsifier = sparsified(f"{rest}\npenalty: {penalty}")
    without, _ = sparsified(rest if "relaxation" in rest or "sparsity" in rest else "penalty: {l1: {strength: 0}}")
    assert_same(with_penalty, without)
    for state in sparsifier.state_dict()["penalty"]:
        for name in ("linear", "quadratic") if state else ():
            assert float(state["shared"].get(name, 0.0)) == 0.0
        if state and "mu" in state["shared"]:
            assert float(state["shared"]["mu"]) == 3.0
            assert all(not one["multiplier"].any() for one in state["terms"].values())


def test_the_sensitivity_is_that_of_the_loss_alone():
    """The gradients of other penalties are added between the look and the step."""
    alone, _ = sparsified("penalty: {sum: [{l2: {strength: 0}}, {sensitivity: {strength: 0.1, bound: 0.05, apply: decoupled}}]}")
    model = net(dtype=torch.float64)
    optimizer = sgd(model)
    text = "penalty: {sum: [{l2: {strength: 2.0}}, {sensitivity: {strength: 0.1, bound: 0.05, apply: decoupled}}]}"
    niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
    other = net(dtype=torch.float64)
    stepped = sgd(other)
    for step in range(STEPS):
        train(model, [optimizer], [step], dtype=torch.float64)
        images, labels = batch(step, dtype=torch.float64)
        stepped.zero_grad()
        functional.cross_entropy(other(images), labels).backward()
        felt = {name: (1 - p.grad.abs() / 0.05).clamp(min=0) for name, p in other.named_parameters()}
        with torch.no_grad():
            for name in TARGETS:
                other.get_parameter(name).grad += 2.0 * other.get_parameter(name)
            stepped.step()
            for name in TARGETS:
                p = other.get_parameter(name)
                p -= RATE * 0.1 * p * felt[name]
    assert_same(model, other)
    assert not torch.equal(alone.fc1.weight, model.fc1.weight)
