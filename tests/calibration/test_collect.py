"""How collecting treats models and data: nothing is left behind, nothing is read twice that cannot be."""

import copy

import pytest
import torch
from calibration.problems import PROBLEMS, convolutional, cross_entropy, multilayer, watched
from torch import nn

from niwaki.calibration import collect
from niwaki.statistics import (
    GradientBank,
    GradientSquare,
    Hessian,
    HessianDiagonal,
    HessianGradient,
    InputGram,
    InputResponses,
    InputSize,
    KroneckerFactors,
    OutputSensitivity,
    Relevance,
    SynapticFlow,
)

EVERYTHING = [
    InputSize(), InputGram(), InputResponses(), GradientBank(4), GradientSquare(4), GradientSquare(), HessianGradient(), Hessian(),
    HessianDiagonal("hutchinson", 2), HessianDiagonal("gauss_newton", 2), HessianDiagonal("exact"), KroneckerFactors(), SynapticFlow(),
    Relevance(), OutputSensitivity(),
]  # fmt: skip


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return list(value) if isinstance(value, tuple) else [value.matrix]


def equal(left, right):
    return all(
        torch.equal(a, b)
        for name in left
        for request in EVERYTHING
        for a, b in zip(leaves(left[name][request]), leaves(right[name][request]), strict=True)
    )


def test_an_iterator_gives_the_same_as_a_list_and_the_model_stays_as_it_was():
    model, names, data = convolutional()
    names = names[1:]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.norm.eval()
    grads = [parameter.grad for parameter in model.parameters()]
    copies = [grad.clone() for grad in grads]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    found = collect(model, data, cross_entropy, watched(model, *names), EVERYTHING)
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(grad, before) for grad, before in zip(grads, copies, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert model.training
    assert not model.norm.training
    again = collect(model, iter(data), cross_entropy, watched(model, *names), [*EVERYTHING, *EVERYTHING])
    assert equal(found, again)


def test_one_pass_over_an_iterator_keeps_no_batches():
    alive = []

    class Batch(tuple):
        def __del__(self):
            alive.remove(id(self))

    def batches():
        for x, y in data:
            batch = Batch((x, y))
            alive.append(id(batch))
            assert len(alive) <= 2
            yield batch

    model, names, data = multilayer()
    data = data * 3
    collect(model, batches(), cross_entropy, watched(model, *names), [InputGram(), InputSize()])
    collect(model, batches(), cross_entropy, watched(model, *names), [GradientSquare()])


def test_statistics_do_not_depend_on_how_the_data_are_cut():
    model, names, data = multilayer()
    whole = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    random = (HessianDiagonal("gauss_newton", 2), HessianDiagonal("hutchinson", 2))
    asked = [request for request in EVERYTHING if request not in random]
    left = collect(model, data, cross_entropy, watched(model, *names), asked)
    right = collect(model, whole, cross_entropy, watched(model, *names), asked)
    for name in names:
        for request in asked:
            for a, b in zip(leaves(left[name][request]), leaves(right[name][request]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14, msg=str(request))


def test_hooks_that_mask_gradients_do_not_act_and_wrappers_are_looked_through():
    model, names, data = multilayer()
    asked = [GradientBank(None), HessianGradient(1.0), InputSize()]
    expected = collect(model, data, cross_entropy, watched(model, *names), asked)

    def forbidden(parameter):
        raise AssertionError("a gradient was accumulated")

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(forbidden)
    compiled = torch.compile(model, backend="eager")
    found = collect(compiled, data, cross_entropy, watched(model, *names), asked)
    for name in names:
        for request in asked:
            assert torch.equal(found[name][request], expected[name][request])


def test_training_can_go_on_as_if_nothing_had_happened():
    def train(look):
        model, names, data = PROBLEMS["convolutional"]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(3)
        for x, y in data * 2:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if look:
                collect(model, data, cross_entropy, watched(model, *names[1:]), EVERYTHING)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


def test_an_error_in_the_model_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        collect(model, [(torch.ones(1, 2), torch.zeros(1))], cross_entropy, watched(model, "0.weight"), [InputSize()])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
