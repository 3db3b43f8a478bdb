"""Second derivatives against torch.autograd.functional on the mean loss over all data."""

import numpy as np
import pytest
import torch
from calibration.problems import PROBLEMS, classes, cross_entropy, multilayer, watched
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from niwaki.calibration import collect, hessian
from niwaki.errors import InputError
from niwaki.statistics import Hessian, HessianDiagonal, HessianGradient


def everything(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def loss_of_flat(model, names, data, loss):
    """The mean loss over all data as a function of the flat weights, and these."""
    parameters = [model.get_parameter(name).detach() for name in names]
    inputs, targets = everything(data)
    model.eval()

    @sdpa_kernel(SDPBackend.MATH)  # the others cannot be differentiated twice
    def value(flat):
        parts = flat.split([p.numel() for p in parameters])
        weights = {name: part.view_as(p) for name, part, p in zip(names, parts, parameters, strict=True)}
        return loss(functional_call(model, weights, (inputs,)), targets)

    return value, torch.cat([p.flatten() for p in parameters])


def true_hessian(model, names, data, loss):
    return torch.autograd.functional.hessian(*loss_of_flat(model, names, data, loss))


def flat(found, names, request):
    return torch.cat([found[name][request].flatten() for name in names])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_hessian_and_its_diagonal_are_those_of_autograd(problem):
    model, names, data = PROBLEMS[problem]()
    names = names[-2:]
    expected = true_hessian(model, names, data, cross_entropy)
    model.train()
    exact = HessianDiagonal("exact")
    found = collect(model, data, cross_entropy, watched(model, *names), [Hessian(), exact])
    joint = found[names[0]][Hessian()]
    assert joint is found[names[1]][Hessian()]
    assert joint.names == names
    assert joint.matrix.dtype == torch.float64
    torch.testing.assert_close(joint.matrix, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(found, names, exact), expected.diagonal(), rtol=1e-9, atol=1e-12)
    rows = joint.rows(names[1])
    assert rows == slice(expected.shape[0] - model.get_parameter(names[1]).numel(), expected.shape[0])
    assert model.training


def test_inactive_weights_have_no_rows():
    model, names, data = multilayer()
    active = {"0.weight": torch.rand(5, 4) < 0.5}
    with torch.no_grad():
        model[0].weight.masked_fill_(~active["0.weight"], 0.0)
    expected = true_hessian(model, names, data, cross_entropy)
    kept = torch.cat([active["0.weight"].flatten(), torch.ones(15, dtype=torch.bool)])
    exact = HessianDiagonal("exact")
    found = collect(model, data, cross_entropy, watched(model, *names, active=active), [Hessian(), exact, HessianGradient(1.0)])
    torch.testing.assert_close(found[names[0]][Hessian()].matrix, expected * torch.outer(kept, kept), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(found, names, exact), expected.diagonal() * kept, rtol=1e-9, atol=1e-12)
    value, weights = loss_of_flat(model, names, data, cross_entropy)
    slope = torch.func.grad(value)(weights) * kept
    torch.testing.assert_close(flat(found, names, HessianGradient(1.0)), (expected @ slope) * kept, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_hessian_times_the_gradient_is_double_backward(problem, temperature, dtype):
    model, names, data = PROBLEMS[problem]()
    model.float().to(dtype)
    data = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in data]
    request = HessianGradient(temperature)
    found = collect(model, iter(data), cross_entropy, watched(model, *names), [request])
    double = [(x.double() if x.is_floating_point() else x, y) for x, y in data]
    value, weights = loss_of_flat(model.double(), names, double, lambda o, t: cross_entropy(o / temperature, t))
    slope = torch.func.grad(value)(weights)
    _, expected = torch.autograd.functional.hvp(value, weights, slope)
    rtol, atol = (1e-9, 1e-16) if dtype == torch.float64 else (1e-3, 1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(flat(found, names, request), expected, rtol=rtol, atol=atol)
    assert found[names[0]][request].dtype == torch.float64
    assert flat(found, names, request).abs().max() > 0


def test_hutchinson_approaches_the_diagonal():
    model, names, data = multilayer()
    matrix = true_hessian(model, names, data, cross_entropy)
    request = HessianDiagonal("hutchinson", probes=400)
    whole = [everything(data)]
    found = flat(collect(model, whole, cross_entropy, watched(model, *names), [request], seed=1), names, request)
    off = (matrix - matrix.diagonal().diag()).square().sum(1)  # the variance of one probe, exactly
    z = (found - matrix.diagonal()) / (off / 400).sqrt()
    assert z.abs().max() < 5
    assert 0.6 < z.square().mean() < 1.6
    split = flat(collect(model, data, cross_entropy, watched(model, *names), [request], seed=1), names, request)
    parts = [true_hessian(model, names, [batch], cross_entropy) * len(batch[0]) / 10 for batch in data]  # whose signs are independent
    off = sum((part - part.diagonal().diag()).square().sum(1) for part in parts)
    assert ((split - matrix.diagonal()) / (off / 400).sqrt()).abs().max() < 5
    few = [HessianDiagonal("hutchinson", probes=3)]
    one = collect(model, data, cross_entropy, watched(model, *names), few, seed=1)[names[0]][few[0]]
    assert torch.equal(one, collect(model, data, cross_entropy, watched(model, *names), few, seed=1)[names[0]][few[0]])
    assert not torch.equal(one, collect(model, data, cross_entropy, watched(model, *names), few, seed=2)[names[0]][few[0]])


@pytest.mark.parametrize("loss", [cross_entropy, lambda o, t: functional.mse_loss(o, functional.one_hot(t, 3).double())])
def test_gauss_newton_approaches_its_own_diagonal_and_is_never_negative(loss):
    model, names, data = multilayer()
    inputs, targets = everything(data)
    parameters = [model.get_parameter(name).detach() for name in names]
    _, weights = loss_of_flat(model, names, data, loss)

    def outputs(flat):
        parts = flat.split([p.numel() for p in parameters])
        return functional_call(model, {n: part.view_as(p) for n, part, p in zip(names, parts, parameters, strict=True)}, (inputs,))

    jacobian = torch.autograd.functional.jacobian(outputs, weights).flatten(0, 1)
    inner = torch.autograd.functional.hessian(lambda o: loss(o.view(10, 3), targets), outputs(weights).flatten())
    expected = (jacobian.T @ inner @ jacobian).diagonal()
    request = HessianDiagonal("gauss_newton", probes=600)
    found = flat(collect(model, [(inputs, targets)], loss, watched(model, *names), [request]), names, request)
    assert (found >= 0).all()
    assert (
        (found - expected).abs() <= 6 * expected * (2 / 600) ** 0.5
    ).all()  # the square of a sum of signs has a variance of at most 2 G²
    split = flat(collect(model, data, loss, watched(model, *names), [request]), names, request)
    assert ((split - expected).abs() <= 6 * expected * (2 / 600) ** 0.5).all()
    assert (split >= 0).all()


def test_gauss_newton_of_one_output_is_exact():
    """One example and one output: the square of a sign times the root is the diagonal itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = [(torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 1, dtype=torch.float64))]
    request = HessianDiagonal("gauss_newton", probes=1)
    found = collect(model, data, functional.mse_loss, watched(model, "0.weight"), [request])["0.weight"][request]
    (slope,) = torch.autograd.grad(model(data[0][0]).sum(), [model[0].weight])
    torch.testing.assert_close(found, 2 * slope.square())


def test_a_loss_that_is_linear_has_no_curvature():
    model = nn.Linear(3, 2).double()
    data = [(torch.randn(4, 3, dtype=torch.float64), torch.zeros(4))]
    asked = [
        Hessian(),
        HessianGradient(1.0),
        HessianDiagonal("exact"),
        HessianDiagonal("hutchinson", 2),
        HessianDiagonal("gauss_newton", 2),
    ]
    found = collect(model, data, lambda o, t: o.sum(1).mean(), watched(model, "weight"), asked)["weight"]
    assert not found.pop(Hessian()).matrix.any()
    assert not any(value.any() for value in found.values())


def test_limits_and_bad_input_are_told(monkeypatch):
    model, names, data = multilayer()
    tensors = watched(model, *names)
    monkeypatch.setattr(hessian, "LARGEST", 10)
    with pytest.raises(InputError, match="the exact Hessian of 35 weights"):
        collect(model, data, cross_entropy, tensors, [Hessian()])
    monkeypatch.setattr(hessian, "OUTPUTS", 2)
    with pytest.raises(InputError, match="gauss_newton takes at most 2 outputs"):
        collect(model, data, cross_entropy, tensors, [HessianDiagonal("gauss_newton")])
    with pytest.raises(InputError, match="the loss of batch 0 is not finite"):
        collect(model, data, lambda o, t: cross_entropy(o / 0, t), tensors, [HessianGradient()])
    with pytest.raises(InputError, match="batch 1 has no targets"):
        collect(model, [data[0], (data[1][0], None)], cross_entropy, tensors, [HessianGradient()])

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x), None

    pair = Pair().double()
    with pytest.raises(InputError, match="must be a tensor or have logits"):
        collect(pair, data, lambda o, t: cross_entropy(o[0], t), watched(pair, "layer.weight"), [HessianGradient()])


def test_backward_passes_that_cannot_be_vectorized_go_row_by_row():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, slope):
            (x,) = ctx.saved_tensors
            return Twice.apply(x, slope)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, slope):
            ctx.save_for_backward(x, slope)
            return 2 * x * slope

        @staticmethod
        def backward(ctx, down):
            x, slope = ctx.saved_tensors
            assert np.isfinite(down.numpy()).all()  # numpy cannot be vectorized
            return 2 * slope * down, 2 * x * down

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return Square.apply(self.layer(x))

    model = Squared().double()
    data = classes(lambda n: torch.randn(n, 4, dtype=torch.float64))
    found = collect(model, data, lambda o, t: o.sum(1).mean(), watched(model, "layer.weight"), [Hessian()])["layer.weight"][Hessian()]
    x, _ = everything(data)
    expected = torch.block_diag(*[2 * x.T @ x / len(x)] * 3)
    torch.testing.assert_close(found.matrix, expected)
