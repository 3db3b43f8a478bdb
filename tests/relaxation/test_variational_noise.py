"""Noise of weights: its statistics, with either way of adding it, and its gradients against the same written inside the forward."""

import math

import pytest
import torch
from support import net
from torch import nn
from torch.nn import functional as F

import niwaki
from niwaki.errors import InputError
from niwaki.relaxation import VariationalNoise

RECIPE = "relaxation: {variational_noise: {initial: -3.0, %s}}"


def layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(6, 4)).double(), torch.randn(6, dtype=torch.float64)
    convolution = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2) if kind == "conv2d" else nn.Conv1d(4, 6, 3, dilation=2)
    shape = (4, 5, 5) if kind == "conv2d" else (4, 9)
    return nn.Sequential(convolution).double(), torch.randn(shape, dtype=torch.float64)


def sparsifier_of(model: nn.Module, options: str, **given) -> niwaki.Sparsifier:
    recipe = niwaki.Recipe.from_yaml("target: {weights: {include: ['*']}}\n" + RECIPE % options)
    return niwaki.Sparsifier(model, recipe, total_steps=100, **given)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d"])
def test_outputs_have_the_mean_and_variance_of_noisy_weights(kind):
    model, x = layer(kind)
    clean = model(x)
    weight = model[0].weight.detach().clone()
    sparsifier_of(model, "noise: local").attach(torch.optim.SGD(model.parameters(), lr=0.1))
    many = 20_000
    outputs = model.train()(x.expand(many, *x.shape)).detach()
    # σ² = exp(-3) wherever log α is within its bound, which cuts at |θ| < e^-5.5
    variance = (math.exp(8.0) * weight.square()).clamp(max=math.exp(-3.0))
    squared = x.square()
    names = () if kind == "linear" else ("stride", "padding", "dilation", "groups")
    options = {name: getattr(model[0], name) for name in names}
    apply = {"linear": F.linear, "conv2d": F.conv2d, "conv1d": F.conv1d}[kind]
    expected = apply(squared, variance, **options)
    assert torch.allclose(outputs.mean(0), clean, atol=5 * float(expected.sqrt().max()) / math.sqrt(many))
    assert torch.allclose(outputs.var(0), expected, rtol=0.08)
    independent = torch.corrcoef(outputs.flatten(1)[:, :2].T)[0, 1]
    assert abs(float(independent)) < 0.05
    assert torch.equal(model.eval()(x), clean)


def test_gradients_are_those_of_the_reparametrized_forward():
    model, x = layer("linear")
    reference = nn.Linear(6, 4).double()
    reference.load_state_dict(model[0].state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsifier = sparsifier_of(model, "noise: local").attach(optimizer)
    log_variance = torch.full((4, 6), -3.0, dtype=torch.float64, requires_grad=True)
    inputs = x.expand(32, 6) * torch.linspace(0.5, 1.5, 32, dtype=torch.float64)[:, None]
    torch.manual_seed(5)
    loss = model.train()(inputs).square().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.manual_seed(5)
    alpha = (log_variance - (reference.weight.square() + 1e-8).log()).clamp(-8, 8).exp()
    spread = F.linear(inputs.square(), alpha * reference.weight.square()) + 1e-16
    mean = reference(inputs)
    by_hand = (mean + spread.sqrt() * torch.randn_like(mean)).square().mean()
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)
    own = optimizer.param_groups[-1]["params"][0]
    assert torch.allclose(model[0].weight.grad, reference.weight.grad, atol=1e-12)
    assert torch.allclose(own.grad, log_variance.grad, atol=1e-12)
    optimizer.step()
    assert torch.allclose(own.detach(), log_variance.detach() - 0.5 * log_variance.grad, atol=1e-12)
    assert torch.allclose(model[0].weight.detach(), (reference.weight - 0.5 * reference.weight.grad).detach(), atol=1e-12)
    assert sparsifier.step == 1


def test_noise_on_the_weights_is_drawn_once_a_step():
    model, x = layer("linear")
    weight = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier_of(model, "noise: weight").attach(optimizer)
    seen = []
    for _ in range(400):
        first, again = model.train()(x), model(x)
        assert torch.equal(first, again)
        seen.append(model[0].weight.detach().clone())
        optimizer.zero_grad()
        first.sum().backward()
        optimizer.step()
    noise = torch.stack(seen) - weight
    assert torch.allclose(noise.mean(0), torch.zeros_like(weight), atol=5 * math.exp(-1.5) / 20)
    assert torch.allclose(noise.std(0), (math.exp(8.0) * weight.square()).clamp(max=math.exp(-3.0)).sqrt(), rtol=0.2)


def test_masks_are_where_the_noise_is_large_and_finalize_takes_the_noise_off():
    model, x = layer("linear")
    weight = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsifier_of(model, "threshold: 0.5").attach(optimizer)
    expected = (-3.0 - (weight.square() + 1e-8).log()) < 0.5
    assert torch.equal(sparsifier.masks["0.weight"], expected)
    assert 0 < int(expected.sum()) < expected.numel()
    assert torch.equal(model[0].weight.detach(), weight)  # in training nothing is masked
    assert bool(sparsifier.computing["0.weight"].all())
    with sparsifier.evaluating():
        assert torch.equal(model[0].weight.detach(), weight.where(expected, 0.0))
    assert torch.equal(model[0].weight.detach(), weight)
    sparsifier.finalize()
    assert torch.equal(model[0].weight.detach(), weight.where(expected, 0.0))
    assert torch.equal(model.train()(x), model.eval()(x))
    assert "forward" not in vars(model[0])


def test_modules_that_cannot_be_reached_are_refused_with_the_way_out():
    for model in (
        nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}),
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
    ):
        sparsifier = sparsifier_of(model, "noise: local")
        with pytest.raises(InputError, match="say noise: weight"):
            sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("noise", ["local", "weight"])
def test_a_resumed_training_equals_the_uninterrupted_one(noise):
    def start():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        recipe = niwaki.Recipe.from_yaml(RECIPE % f"noise: {noise}")
        return model, optimizer, niwaki.Sparsifier(model, recipe, total_steps=8, seed=3).attach(optimizer)

    def run(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            images = torch.randn(8, 1, 8, 8)
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

    whole, optimizer, sparsifier = start()
    run(whole, optimizer, range(8))
    half, optimizer, first = start()
    run(half, optimizer, range(4))
    kept = [half.state_dict(), optimizer.state_dict(), first.state_dict()]
    again, optimizer, second = start()
    again.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    second.load_state_dict(kept[2])
    run(again, optimizer, range(4, 8))
    sparsifier.finalize()
    second.finalize()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert second.masks == sparsifier.masks


def test_log_alpha_is_bounded_in_training_and_not_in_the_mask():
    relaxation = VariationalNoise(threshold=9.0)
    weight, own = torch.tensor([1e-4, 1.0]), {"log_variance": torch.tensor([-5.0, -5.0])}
    assert float(relaxation.log_alpha(weight, own)[0]) > 9.0
    variance = relaxation.variance(weight, own)
    assert variance.tolist() == pytest.approx([math.exp(8.0) * 1e-8, math.exp(-5.0)], rel=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_noise_in_float16_is_finite(autocast):
    """Zero inputs and weights, and inputs whose square float16 does not have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2)).to(torch.float32 if autocast else torch.float16)
    with torch.no_grad():
        model[1].weight[0] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    recipe = niwaki.Recipe.from_yaml((RECIPE % "noise: local") + "\npenalty: {kl: {strength: 1e-4}}")
    niwaki.Sparsifier(model, recipe, total_steps=4).attach(optimizer)
    for x in (torch.zeros(3, 6), torch.full((3, 6), 2000.0)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            outputs = model.train()(x.to(model[0].weight.dtype))
        outputs.float().abs().mean().backward()
        assert bool(outputs.isfinite().all())
        optimizer.step()
        assert all(bool(p.isfinite().all()) for group in optimizer.param_groups for p in group["params"])
