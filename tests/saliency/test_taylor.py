"""First-order scores against autograd: the gradient with respect to a mask at 1, and of the gradient's norm."""

import math

import pytest
import torch
import torch.nn.functional as F

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.granularity import InputChannel
from niwaki.layout import Layout
from niwaki.pieces import Grid
from niwaki.saliency import GateDecorator, Grasp, HeadImportance, Observation, Snip, Taylor
from niwaki.statistics import HessianGradient


def identity(values):
    return values


def channels(values):
    return values.sum((1, 2, 3), dtype=torch.float64)


def loss_of(weight, mask):
    """A small network whose convolution carries a mask."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 5, 5, generator=generator, dtype=torch.float64)
    head = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    features = torch.tanh(F.conv2d(x, weight * mask)).mean((2, 3))
    return F.cross_entropy(features @ head.T, torch.tensor([0, 1, 2, 0]))


@pytest.fixture
def seen():
    weight = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    [gradient] = torch.autograd.grad(loss_of(weight, torch.ones_like(weight)), weight)
    return Observation("conv.weight", weight.detach(), gradient=gradient)


def mask_gradient(weight, shape):
    mask = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    [gradient] = torch.autograd.grad(loss_of(weight, mask.expand_as(weight)), mask)
    return gradient


def test_snip_is_the_gradient_of_a_mask_on_each_weight(seen):
    expected = mask_gradient(seen.weight, seen.weight.shape).abs()
    torch.testing.assert_close(Snip().score(seen, identity), expected, rtol=1e-12, atol=1e-16)
    per_channel = torch.stack([part.sum() for part in expected])
    torch.testing.assert_close(Snip().score(seen, channels), per_channel, rtol=1e-12, atol=0)


def test_taylor_is_the_gradient_of_a_mask_on_each_piece(seen):
    weights = mask_gradient(seen.weight, seen.weight.shape)
    pieces = mask_gradient(seen.weight, (6, 1, 1, 1)).flatten()
    for reduce, expected in ((identity, weights), (channels, pieces)):
        torch.testing.assert_close(Taylor().score(seen, reduce), expected**2, rtol=1e-11, atol=1e-18)
        torch.testing.assert_close(Taylor(aggregate="absolute").score(seen, reduce), expected.abs(), rtol=1e-11, atol=1e-16)


def test_taylor_is_the_slope_of_the_loss_as_a_piece_fades(seen):
    base, step = loss_of(seen.weight, torch.ones_like(seen.weight)), 1e-6
    for channel, score in enumerate(Taylor(aggregate="absolute").score(seen, channels).tolist()):
        mask = torch.ones(6, 1, 1, 1, dtype=torch.float64)
        mask[channel] -= step
        assert score == pytest.approx(abs(float(loss_of(seen.weight, mask) - base)) / step, rel=1e-3)


def test_signs_cancel_in_taylor_and_not_in_snip():
    seen = Observation("w", torch.tensor([[[[1.0, 1.0]]]]), gradient=torch.tensor([[[[3.0, -3.0]]]]))
    assert Taylor().score(seen, channels).tolist() == [0.0]
    assert Snip().score(seen, channels).tolist() == [6.0]


@pytest.mark.parametrize("component", [Taylor(), Taylor(aggregate="absolute"), Snip()], ids=str)
def test_small_and_large_products_keep_their_order(component):
    small = Observation("w", torch.tensor([1e-30, 2e-30]), gradient=torch.tensor([1e-30, 1e-30]))
    scores = component.score(small, identity)
    assert 0 < scores[0] < scores[1]
    half = torch.full((1, 1, 1, 64), 6e4, dtype=torch.float16)
    assert component.score(Observation("w", half, gradient=half), channels).isfinite().all()


@pytest.mark.parametrize("component", [Taylor(), Snip()], ids=str)
def test_mixed_dtypes_and_inputs_unchanged(component):
    weight, gradient = torch.tensor([1.5, -2.0], dtype=torch.float64), torch.tensor([2.0, 4.0], dtype=torch.bfloat16)
    found = component.score(Observation("w", weight, gradient=gradient), identity)
    assert found.tolist() == ([9.0, 64.0] if isinstance(component, Taylor) else [3.0, 8.0])
    assert weight.tolist() == [1.5, -2.0]
    assert gradient.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("component", [Taylor(), Snip()], ids=str)
def test_nan_stays_and_a_missing_gradient_is_told(component):
    nan = Observation("w", torch.tensor([0.0, 1.0]), gradient=torch.tensor([torch.inf, 1.0]))
    found = component.score(nan, identity).tolist()
    assert math.isnan(found[0])
    assert found[1] == 1.0
    with pytest.raises(InputError, match=r"'fc\.weight' has no gradient") as caught:
        component.score(Observation("fc.weight", torch.ones(2)), identity)
    assert "\n" not in str(caught.value)


def test_recipe():
    assert build("saliency", "snip") == Snip()
    assert build("saliency", "taylor") == Taylor(aggregate="squared")
    absolute = build("saliency", {"taylor": {"aggregate": "absolute"}})
    assert build("saliency", absolute.to_data()) == absolute == Taylor(aggregate="absolute")
    assert Taylor.needs == Snip.needs == {"gradient"}


# ------------------------------------------------------------------ signs, and whose gradient


def test_signed_taylor_is_the_predicted_rise_of_the_loss(seen):
    pieces = mask_gradient(seen.weight, (6, 1, 1, 1)).flatten()
    torch.testing.assert_close(Taylor(aggregate="signed").score(seen, channels), -pieces, rtol=1e-11, atol=1e-16)
    base, step = loss_of(seen.weight, torch.ones_like(seen.weight)), 1e-6
    for channel, score in enumerate(Taylor(aggregate="signed").score(seen, channels).tolist()):
        mask = torch.ones(6, 1, 1, 1, dtype=torch.float64)
        mask[channel] -= step
        assert score == pytest.approx(float(loss_of(seen.weight, mask) - base) / step, rel=1e-3)


def test_whose_gradient_a_score_is_of():
    assert [Taylor(over=over).averages for over in ("data", "batch", "sample")] == [None, "batch", "sample"]
    assert [GateDecorator(over=over).averages for over in ("data", "batch", "sample")] == [None, "batch", "sample"]
    assert GateDecorator().averages == HeadImportance().averages == "batch"
    assert build("saliency", {"head_importance": "sample"}) == HeadImportance(over="sample")
    assert Snip().averages is None
    with pytest.raises(InputError, match="'data', 'batch' or 'sample'"):
        build("saliency", {"taylor": {"over": "epoch"}})


class Gated(torch.nn.Module):
    """A convolution, batch normalization, ReLU and max pooling; gates stand behind the normalization, and behind the pooling."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False, dtype=torch.float64)
        self.norm = torch.nn.BatchNorm2d(4, dtype=torch.float64)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)
        self.second = torch.nn.Conv2d(4, 3, 3, padding=1, dtype=torch.float64)

    def forward(self, x, early, late):
        x = self.norm(self.first(x)) * early.view(-1, 1, 1)
        self.read = F.max_pool2d(F.relu(x), 2) * late.view(-1, 1, 1)
        self.read.retain_grad()
        return self.second(self.read).mean((2, 3))


def gated_scores(model, x, y):
    early, late = (torch.ones(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    model.zero_grad()
    F.cross_entropy(model(x, early, late), y).backward()
    return early.grad, late.grad


def test_taylor_on_the_readers_is_gradient_times_activation_and_the_gate_of_a_normalization():
    model = Gated()
    x, y = torch.randn(5, 2, 8, 8, dtype=torch.float64), torch.arange(5) % 3
    early, late = gated_scores(model, x, y)
    layout = Layout(("output", "input", "kernel", "kernel"), (3, 4, 3, 3))
    seen = Observation("second.weight", model.second.weight.detach(), gradient=model.second.weight.grad, layout=layout)
    found = Taylor(aggregate="signed").score(seen, Grid(InputChannel(), layout)).flatten()
    torch.testing.assert_close(found, -late, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(found, -early, rtol=1e-10, atol=1e-15)  # ReLU and pooling pass a gate on
    norm = model.norm
    torch.testing.assert_close(found, -(norm.weight.grad * norm.weight + norm.bias.grad * norm.bias).detach(), rtol=1e-10, atol=1e-15)
    activations = (model.read.detach() * model.read.grad).sum((0, 2, 3))
    torch.testing.assert_close(found, -activations, rtol=1e-10, atol=1e-15)


def test_gate_decorator_is_the_gradient_of_a_gate_on_the_scale():
    model = Gated()
    x, y = torch.randn(5, 2, 8, 8, dtype=torch.float64), torch.arange(5) % 3
    gated_scores(model, x, y)
    seen = Observation("norm.weight", model.norm.weight.detach(), gradient=model.norm.weight.grad)
    scale, gate = model.norm.weight.detach().clone(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(4, dtype=torch.float64)
    outputs = torch.func.functional_call(model, {"norm.weight": scale * gate}, (x, ones, ones))
    [expected] = torch.autograd.grad(F.cross_entropy(outputs, y), gate)
    torch.testing.assert_close(GateDecorator().score(seen, identity), expected.abs(), rtol=1e-10, atol=1e-16)
    assert GateDecorator.scored_on == "norms"
    with pytest.raises(InputError, match=r"'norm\.weight' has no gradient"):
        GateDecorator().score(Observation("norm.weight", scale), identity)


# ------------------------------------------------------------------ GraSP


def test_grasp_is_double_backward(seen):
    weight = seen.weight.clone().requires_grad_()
    [gradient] = torch.autograd.grad(loss_of(weight, torch.ones_like(weight)), weight, create_graph=True)
    [twice] = torch.autograd.grad(gradient.square().sum(), weight)  # 2 H g
    known = Observation("w", seen.weight, statistics={HessianGradient(temperature=1.0): twice.detach() / 2})
    found = Grasp(temperature=1.0).score(known, identity)
    torch.testing.assert_close(found, seen.weight * twice.detach() / 2, rtol=1e-12, atol=0)

    def norm_without(share):
        mask = torch.ones_like(weight)
        mask[2] -= share
        faded = (seen.weight * mask).requires_grad_()
        [now] = torch.autograd.grad(loss_of(faded, torch.ones_like(weight)), faded)
        return float(now.square().sum())

    slope = (norm_without(1e-5) - norm_without(-1e-5)) / 2e-5  # fading a channel changes the gradient's norm by -2 w H g
    assert slope == pytest.approx(-2 * float(Grasp(temperature=1.0).score(known, channels)[2]), rel=1e-5)


def test_grasp_asks_for_its_temperature():
    assert Grasp().statistics == (HessianGradient(temperature=200.0),)
    assert Grasp().needs == frozenset()
    with pytest.raises(InputError, match="HessianGradient was not collected"):
        Grasp().score(Observation("w", torch.ones(2)), identity)
    with pytest.raises(InputError, match="greater than 0"):
        Grasp(temperature=0.0)
