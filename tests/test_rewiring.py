"""Deep rewiring, hard and soft, against a loop on the parameters that its paper names."""

import math

import pytest
import torch
from scipy import stats
from support import REWIRING, SOFT_REWIRING, TARGETS, batch, net, recipe
from torch.nn import functional

import niwaki
from niwaki.counter import key, normal, uniform
from niwaki.growth import Rewiring
from niwaki.relaxation import Moment, SoftRewiring
from niwaki.saliency import Observation

STEPS, RATE = 20, 0.5


def signs(name, shape, seed):
    return torch.where(uniform(key(seed, 0, f"sign {name}"), 0, math.prod(shape)).view(shape) < 0.5, -1.0, 1.0).double()


def noise(name, shape, seed, step):
    return normal(key(seed, step, f"rewiring {name}"), 0, math.prod(shape)).view(shape)


def sgd_step(model, step):
    """Plain gradient descent on everything but the targets; returns the gradients of these."""
    images, labels = batch(step, dtype=torch.float64)
    model.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in TARGETS:
                parameter -= RATE * parameter.grad
    return {name: dict(model.named_parameters())[name].grad.clone() for name in TARGETS}


def trained(text, after=lambda sparsifier, model, step: None, **options):
    model = net(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, **options)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS, seed=4).attach(optimizer)
    after(sparsifier, model, -1)
    for step in range(STEPS):
        images, labels = batch(step, dtype=torch.float64)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        after(sparsifier, model, step)
    return model


@pytest.mark.parametrize(("strength", "temperature"), [(0.0, 0.0), (0.02, 0.0), (0.01, 1e-4)])
def test_rewiring_is_the_walk_of_its_paper(strength, temperature):
    """The same as a loop over θ: descent, pull and noise on active connections; what reaches zero goes; as many others come at 1e-12."""
    growth = f"{{rewiring: {{strength: {strength}, temperature: {temperature}}}}}"
    text = f"sparsity: 0.8\nschedule: {{constant: {{every: 1 steps, end: 1 run}}}}\ngrowth: {growth}"
    masks = []
    theirs = trained(text, lambda sparsifier, model, step: masks.append(sparsifier.masks))
    model = net(dtype=torch.float64)
    parameters = dict(model.named_parameters())
    sign = {name: signs(name, parameters[name].shape, 4) for name in TARGETS}
    theta = {name: parameters[name].detach().abs() * masks[0][name] for name in TARGETS}
    crossed = 0
    for step in range(STEPS):
        with torch.no_grad():
            for name in TARGETS:
                parameters[name].copy_((sign[name] * theta[name]).where(theta[name] > 0, 0.0))
                assert torch.equal(theta[name] > 0, masks[step][name])
        gradients = sgd_step(model, step)
        for name in TARGETS:
            active = theta[name] > 0
            count = int(active.sum())
            moved = theta[name] - RATE * (gradients[name] * sign[name] + strength)
            moved += math.sqrt(2 * RATE * temperature) * noise(name, moved.shape, 4, step + 1)
            theta[name] = torch.where(active, moved, theta[name])
            stays = active & (theta[name] > 0)
            crossed += count - int(stays.sum())
            order = uniform(key(4, step + 1, f"growth {name}"), 0, stays.numel()).view(stays.shape).masked_fill(stays, -1.0)
            new = order.flatten().topk(count - int(stays.sum())).indices
            theta[name] = theta[name].where(stays, 0.0)
            theta[name].view(-1)[new] = 1e-12
    assert crossed > (100 if strength or temperature else 0)
    for name, parameter in theirs.named_parameters():
        expected = (sign[name] * theta[name]).where(masks[-1][name], 0.0) if name in TARGETS else parameters[name]
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-11, atol=1e-13)


def test_signs_never_flip_and_as_many_connections_stay():
    """Exactly, at every forward pass, and also where momentum and weight decay act."""
    counts, turnover = [], []

    def look(sparsifier, model, step):
        parameters = dict(model.named_parameters())
        for name, mask in sparsifier.masks.items():
            weight = parameters[name].detach()
            assert torch.equal(weight != 0, mask)
            assert (weight * signs(name, weight.shape, 4)).min() >= 0
        counts.append({name: int(mask.sum()) for name, mask in sparsifier.masks.items()})
        turnover.append(sparsifier.masks.hash())

    trained(REWIRING, look, momentum=0.5, weight_decay=1e-3)
    assert all(count == counts[0] for count in counts)
    assert counts[0] == {"conv2.weight": 58, "fc1.weight": 614, "fc2.weight": 77}
    assert len(set(turnover)) > STEPS / 2


def test_signs_are_drawn_half_and_half():
    seen = Observation("w", torch.full((100, 100), -2.0), seed=1)
    first = Rewiring().first(seen)
    assert torch.equal(first.abs(), torch.full((100, 100), 2.0))
    assert stats.binomtest(int((first > 0).sum()), 10_000).pvalue > 1e-3


def test_noise_has_the_variance_of_its_temperature():
    seen = Observation("w", torch.zeros(200, 200, dtype=torch.float64), seed=1, step=3)
    moved = Rewiring(strength=0.0, temperature=0.02).moved(seen, rate=0.25)
    assert stats.kstest(moved.flatten().numpy(), stats.norm(0, 0.1).cdf).pvalue > 1e-3
    pulled = Rewiring(strength=2.0, temperature=0.0).moved(Observation("w", torch.ones(4, 4), seed=1), rate=0.25)
    assert sorted({round(v, 6) for v in pulled.flatten().tolist()}) == [0.5, 1.5]  # against its own sign, not that of the weight


# ---------------------------------------------------------------- soft


def test_soft_rewiring_is_the_walk_of_its_paper():
    hashes = set()
    theirs = trained(SOFT_REWIRING, lambda sparsifier, model, step: hashes.add(sparsifier.masks.hash()))
    relaxation = recipe(SOFT_REWIRING).relaxation
    floor = -(1 - 0.2) / (0.2 * (1e-3 / 1e-6))
    model = net(dtype=torch.float64)
    parameters = dict(model.named_parameters())
    sign = {name: signs(name, parameters[name].shape, 4) for name in TARGETS}
    theta = {}
    for name in TARGETS:
        shape = parameters[name].shape
        active = uniform(key(4, 0, f"density {name}"), 0, math.prod(shape)).view(shape) < 0.2
        theta[name] = (
            parameters[name].detach().abs().where(active, uniform(key(4, 0, f"floor {name}"), 0, math.prod(shape)).view(shape) * floor)
        )
    woken = 0
    for step in range(STEPS):
        with torch.no_grad():
            for name in TARGETS:
                parameters[name].copy_(sign[name] * theta[name].clamp(min=0.0))
        gradients = sgd_step(model, step)
        for name in TARGETS:
            active = (theta[name] > 0).double()
            moved = theta[name] - active * RATE * gradients[name] * sign[name]
            moved -= RATE * 1e-3 * (moved > 0)
            before, theta[name] = theta[name], (moved + 1e-3 * noise(name, moved.shape, 4, step + 1)).clamp(min=floor)
            woken += int(((before <= 0) & (theta[name] > 0)).sum())
    assert relaxation.floor == pytest.approx(floor)
    assert woken > 20
    assert len(hashes) > STEPS / 2
    for name, parameter in theirs.named_parameters():
        expected = sign[name] * theta[name].clamp(min=0.0) if name in TARGETS else parameters[name]
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-11, atol=1e-14)


def test_the_walk_alone_leaves_the_density_active():
    """Its stationary distribution: exponential above zero with mean T / α, uniform between the floor and zero."""
    relaxation = SoftRewiring(density=0.3, strength=1.0, temperature=0.02)
    weight = torch.rand(100, 200, dtype=torch.float64)
    moment = Moment("w", seed=2)
    theta = relaxation.initial_latent(weight, None, moment)
    assert abs(float((relaxation.relax(theta, {}, moment) != 0).double().mean()) - 0.3) < 0.02
    rate = 2e-3
    shares, sizes = [], []
    for step in range(4000):
        theta = relaxation.moved(theta, Moment("w", seed=2, step=step), rate)
        if step > 2000 and step % 100 == 0:
            active = relaxation.relax(theta, {}, moment)
            shares.append(float((active != 0).double().mean()))
            sizes.append(float(active[active != 0].abs().mean()))
    assert abs(sum(shares) / len(shares) - 0.3) < 0.02
    assert abs(sum(sizes) / len(sizes) - 0.02) < 0.002


def test_what_comes_into_given_masks_starts_with_its_sign():
    model = net(dtype=torch.float64)
    masks = niwaki.Sparsifier(model, recipe("sparsity: 0.9"), total_steps=1).finalize().masks
    now = niwaki.Sparsifier(model, recipe(REWIRING), masks=masks, total_steps=STEPS, seed=4).masks
    for name, mask in masks.items():
        weight, new = dict(model.named_parameters())[name].detach(), now[name] & ~mask
        assert new.any()
        assert torch.equal(weight[new], 1e-12 * signs(name, weight.shape, 4)[new])
        assert (weight[mask] * signs(name, weight.shape, 4)[mask] > 0).all()
