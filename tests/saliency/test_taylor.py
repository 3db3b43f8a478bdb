"""First-order scores against autograd: the gradient with respect to a mask at 1."""

import math

import pytest
import torch
import torch.nn.functional as F

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.saliency import Observation, Snip, Taylor


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
