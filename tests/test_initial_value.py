"""What weights start from that have just grown."""

import math

import pytest
import torch
from scipy import stats
from support import batch, net, recipe, train
from torch.nn import functional

import niwaki
import niwaki.growth  # registers initial values
from niwaki.component import build
from niwaki.saliency import Observation
from niwaki.statistics import InitialWeight

STEPS = 12


def values(data, **fields):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 50, generator=generator, dtype=torch.float64) * 3 + 1
    active = torch.rand(60, 50, generator=generator) < 0.3
    weight = weight.masked_fill(~active, 0.0)
    seen = Observation(**{"name": "w", "weight": weight, "seed": 1, "step": 2, "active": active} | fields)
    return build("initial_value", data).values(seen, lambda x: x.sum(dtype=torch.float64)), seen


def test_normal_values_have_a_share_of_the_deviation_of_active_weights():
    found, seen = values({"normal": 0.5})
    deviation = float(seen.weight[seen.active].std(correction=0))
    assert stats.kstest(found.flatten().numpy(), stats.norm(0, 0.5 * deviation).cdf).pvalue > 1e-3
    assert stats.kstest(found.flatten().numpy(), stats.norm(0, 0.6 * deviation).cdf).pvalue < 1e-3  # and the test would see it


def test_uniform_values_reach_a_share_of_the_mean_size_of_active_weights():
    found, seen = values({"uniform": 0.5})
    reach = 0.5 * float(seen.weight[seen.active].abs().mean())
    assert stats.kstest(found.flatten().numpy(), stats.uniform(-reach, 2 * reach).cdf).pvalue > 1e-3
    assert 0.99 * reach < float(found.abs().max()) <= reach


@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_random_values_depend_on_what_they_are_for(name):
    first, seen = values(name)
    assert torch.equal(first, values(name)[0])
    assert all((first == values(name, **other)[0]).sum() == 0 for other in ({"seed": 3}, {"step": 3}, {"name": "v"}))
    whole = float(seen.weight.shape[1])
    rows, _ = values(name, weight=seen.weight[20:], active=seen.active[20:], start=20 * int(whole))
    scale = first[20:] / rows  # a shard draws the same numbers; here its sums are its own
    torch.testing.assert_close(scale, scale[0, 0].expand_as(scale), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("scale", "power"), [(0.1, 1.0), (0.02, 0.0), (3.0, 0.5)])
def test_gradient_values_go_down_the_loss(scale, power):
    gradient = torch.tensor([[4.0, -9.0], [0.0, -0.25]])
    found, _ = values({"gradient": {"scale": scale, "power": power}}, gradient=gradient, weight=torch.zeros(2, 2), active=None)
    expected = [[-math.copysign(scale * abs(g) ** power, g) if g else 0.0 for g in row] for row in gradient.tolist()]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-15)


def test_initial_values_are_those_at_the_beginning_times_a_share():
    first = torch.randn(60, 50, dtype=torch.float64)
    found, _ = values({"initial": 0.25}, statistics={InitialWeight(): first})
    assert torch.equal(found, 0.25 * first)
    assert build("initial_value", "initial").statistics == (InitialWeight(),)


TEXT = (
    "sparsity: 0.8\nschedule: {{constant: {{every: 4 steps, end: 0.75 run}}}}\n"
    "growth: {{random: {{fraction: 0.5, at_update: skip_step, initial_value: {value}}}}}"
)


@pytest.mark.parametrize("value", ["zero", "initial", "{gradient: {scale: 0.5}}", "{normal: {scale: 1}}"])
def test_only_new_weights_begin_anew_and_with_fresh_slots(value):
    """The step of an update is skipped, so that right after it new weights are what they started from, and others what they were."""
    model = net(dtype=torch.float64)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = niwaki.Sparsifier(model, recipe(TEXT.format(value=value)), total_steps=STEPS).attach(optimizer)
    grown = regrown = 0
    for step in range(STEPS):
        masks = sparsifier.masks
        before = {name: dict(model.named_parameters())[name].detach().clone() for name in masks}
        images, labels = batch(step, dtype=torch.float64)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        dense = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in masks], retain_graph=True)
        loss.backward()
        optimizer.step()
        if step not in (4, 8):
            continue
        for (name, mask), gradient in zip(masks.items(), dense, strict=True):
            weight, now = dict(model.named_parameters())[name].detach(), sparsifier.masks[name]
            new = now & ~mask
            assert torch.equal(weight[now & mask], before[name][now & mask])
            expected = {"zero": torch.zeros_like(weight), "initial": first[name], "{gradient: {scale: 0.5}}": -0.5 * gradient}.get(value)
            if expected is not None:
                torch.testing.assert_close(weight[new], expected[new], rtol=1e-12, atol=0)
            else:
                assert weight[new].std() > 0
            slots = optimizer.state[dict(model.named_parameters())[name]]["momentum_buffer"]
            assert not slots[new].any()
            assert not slots[~now].any()
            grown, regrown = grown + int(new.sum()), regrown + int((now & mask).sum())
    assert grown > 100
    assert regrown > 100


def test_a_gradient_scaler_does_not_scale_what_grows():
    def run(scaled):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        text = TEXT.format(value="{gradient: {scale: 0.5}}")
        niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(6):
            images, labels = batch(step)
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(images), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
        return model.fc1.weight.detach().clone()

    assert torch.equal(run(True), run(False))


def test_growing_back_to_a_dense_network_restores_what_is_asked_for():
    model = net()
    first = model.fc2.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    text = "schedule: {list: {sparsity: [0.5, 0.0], every: 2 steps}}\ngrowth: {random: {fraction: 0, initial_value: initial}}"
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=4).attach(optimizer)
    train(model, [optimizer], range(3))
    assert sparsifier.sparsity == 0.0
    assert torch.equal(model.fc2.weight.detach(), first)


def test_what_grows_into_given_masks_starts_alike():
    model = net()
    masks = niwaki.Sparsifier(model, recipe("sparsity: 0.9"), total_steps=1).finalize().masks
    before = {name: dict(model.named_parameters())[name].detach().clone() for name in masks}
    text = TEXT.format(value="{normal: {scale: 1}}")
    now = niwaki.Sparsifier(model, recipe(text), masks=masks, total_steps=STEPS).masks
    for name, mask in masks.items():
        weight, new = dict(model.named_parameters())[name].detach(), now[name] & ~mask
        assert new.sum() > 5
        assert weight[new].all()
        assert torch.equal(weight[now[name] & mask], before[name][now[name] & mask])


def test_whole_units_start_from_their_initial_values():
    """Biases and normalizations too, which no saliency scores."""
    model = net()
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    text = (
        "sparsity: 0.5\ngranularity: channel\nschedule: {constant: {every: 1 steps, end: 1 run}}\n"
        "growth: {random: {fraction: 0.5, initial_value: initial}}"
    )
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=8, example=(batch(0)[0],)).attach(optimizer)
    grown = 0
    for step in range(1, 8):
        before = sparsifier.masks
        train(model, [optimizer], range(step, step + 1))
        for name, mask in sparsifier.masks.items():
            weight, new = dict(model.named_parameters())[name].detach(), mask & ~before[name]
            assert torch.equal(weight[new], first[name][new])
            grown += int(new.sum()) if name.endswith("bias") else 0
    assert grown > 5
