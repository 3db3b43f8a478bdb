"""Kronecker factors against the exact Fisher matrix and against loops over examples and positions."""

import numpy as np
import pytest
import torch
from calibration.problems import PROBLEMS, cross_entropy, watched
from torch import nn
from torch.nn import functional

from niwaki.calibration import collect
from niwaki.calibration.labels import sampled_labels
from niwaki.errors import InputError
from niwaki.layout import matrix
from niwaki.statistics import GradientBank, InputGram, KroneckerFactors

GIVEN = KroneckerFactors(labels="given")


def test_on_a_linear_gaussian_model_the_product_is_the_exact_fisher_matrix():
    """Inputs and noise of every combination: they are independent, as in the model, and not only on average."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    model = nn.Linear(3, 2).double()
    x = inputs.repeat_interleave(7, 0)
    with torch.no_grad():
        y = model(x) + noise.repeat(5, 1)

    def loss(outputs, targets):
        return (outputs - targets).square().sum(1).mean() / 2

    order = torch.randperm(35, generator=generator)
    data = [(x[part], y[part]) for part in order.split([20, 12, 3])]
    bank = GradientBank(None)
    found = collect(model, data, loss, watched(model, "weight"), [GIVEN, bank])["weight"]
    a, g = found[GIVEN]
    assert (a.shape, g.shape) == ((1, 3, 3), (1, 2, 2))
    rows = found[bank].flatten(1)
    torch.testing.assert_close(torch.kron(g[0], a[0]), rows.T @ rows / 35, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(g[0], noise.T @ noise / 7, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("problem", ["convolutional", "multilayer"])
def test_factors_are_sums_over_examples_and_positions(problem):
    model, names, data = PROBLEMS[problem]()
    found = collect(model, data, cross_entropy, watched(model, *names), [GIVEN, InputGram()])
    model.eval()
    read, written = {}, {}
    for one in watched(model, *names):
        module = model.get_submodule(one.name.removesuffix(".weight"))

        def keep(module, args, outputs, name=one.name):
            read[name], written[name] = args[0], outputs
            outputs.retain_grad()

        module.register_forward_hook(keep)
    totals = {name: [0, 0] for name in names}
    for x, y in data:
        for i in range(len(x)):
            cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            for name in names:
                module = model.get_submodule(name.removesuffix(".weight"))
                inputs, slopes = read[name].detach(), written[name].grad
                if isinstance(module, nn.Conv2d):
                    inputs = functional.unfold(inputs, module.kernel_size, padding=module.padding, stride=module.stride)[0]
                    inputs, slopes = (
                        inputs.reshape(module.groups, -1, inputs.shape[-1]),
                        slopes[0].flatten(1).reshape(module.groups, -1, inputs.shape[-1]),
                    )
                else:
                    inputs, slopes = inputs[..., None], slopes[..., None]
                totals[name][0] = totals[name][0] + inputs @ inputs.mT / 10
                totals[name][1] = totals[name][1] + slopes @ slopes.mT / slopes.shape[-1] / 10
    for name in names:
        a, g = found[name][GIVEN]
        torch.testing.assert_close(a, totals[name][0].detach(), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(g, totals[name][1], rtol=1e-10, atol=1e-13)
        places = written[name][0].numel() / written[name].shape[1]
        torch.testing.assert_close(a, found[name][InputGram()] * places, rtol=1e-10, atol=1e-13)


def test_of_one_example_and_one_position_the_product_is_the_square_of_the_gradient():
    model, names, data = PROBLEMS["multilayer"]()
    one = [(data[0][0][:1], data[0][1][:1])]
    found = collect(model, one, cross_entropy, watched(model, *names), [GIVEN, GradientBank(None)])
    for watched_ in watched(model, *names):
        a, g = found[watched_.name][GIVEN]
        gradient = matrix(found[watched_.name][GradientBank(None)][0], watched_.layout)[0]
        torch.testing.assert_close(torch.outer(g[0].diagonal(), a[0].diagonal()), gradient.square(), rtol=1e-11, atol=1e-15)


def test_sampled_labels_are_those_of_the_softmax_and_need_no_targets():
    model, names, data = PROBLEMS["multilayer"]()
    request = KroneckerFactors()
    found = collect(model, [(x, None) for x, _ in data], cross_entropy, watched(model, *names), [request], seed=5)
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        labels = sampled_labels(model(x), None, 5, "labels 0", 0)
    expected = collect(model, [(x, labels)], cross_entropy, watched(model, *names), [GIVEN])
    for name in names:
        for ours, theirs in zip(found[name][request], expected[name][GIVEN], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-15)
    with pytest.raises(InputError, match="labels: sampled needs targets that are classes"):
        collect(model, [(x, torch.randn(10, 3))], cross_entropy, watched(model, *names), [request])


def test_float32_models_and_positions_of_words():
    model, names, data = PROBLEMS["attention"]()
    request = KroneckerFactors()
    found = collect(model.float(), data, cross_entropy, watched(model, names[2]), [request])[names[2]][request]
    assert [factor.dtype for factor in found] == [torch.float64] * 2
    assert [tuple(factor.shape) for factor in found] == [(1, 4, 4), (1, 8, 8)]
    assert np.linalg.eigvalsh(found[1][0].numpy()).min() > -1e-15
    assert model.layer.linear1.weight.dtype == torch.float32
    with pytest.raises(InputError, match=r"in_proj_weight: what it reads cannot be observed"):
        collect(model, data, cross_entropy, watched(model, names[1]), [request])
