"""A relaxation at the step boundary equals the same relaxation written inside the forward, in float64, for 30 steps.

The oracle is a model whose parameters are the latent weights, reparametrised in its forward with plain autograd, trained by the
same optimizer: the losses and the weights must agree to the last bit.
"""

import pytest
import torch
from support import STR, TARGETS, batch, net, recipe
from torch.func import functional_call
from torch.nn import functional

import niwaki

STEPS = 30


def threshold_in_forward(weight, own):
    return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(own))


class PassThrough(torch.autograd.Function):
    """M(S) * w with the top half of the scores active, dM/dS := 1 and dM*w/dw := 1 (dense gradient)."""

    @staticmethod
    def forward(ctx, weight, score):
        order = torch.sort(score.flatten(), descending=True, stable=True).indices[: round(0.5 * score.numel())]
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[order] = True
        ctx.save_for_backward(weight)
        return weight.masked_fill(~mask.view(weight.shape), 0.0)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient, gradient * weight


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}


def in_forward(relax, initial, optimizer):
    """Train with the relaxation inside the forward; returns losses, latent weights, own parameters and published weights."""
    model = net(dtype=torch.float64)
    own = {name: torch.nn.Parameter(initial(dict(model.named_parameters())[name].detach())) for name in TARGETS}
    opt = optimizer([{"params": list(model.parameters())}, {"params": list(own.values())}])
    losses = []

    def published():
        return {name: relax(dict(model.named_parameters())[name], own[name]) for name in TARGETS}

    for step in range(STEPS):
        images, labels = batch(step, dtype=torch.float64)
        opt.zero_grad()
        loss = functional.cross_entropy(functional_call(model, published(), images), labels)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses, own, published()


def at_the_boundary(text, optimizer, compiled=False):
    model = net(dtype=torch.float64)
    opt = optimizer(model.parameters())
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(opt)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    losses = []
    for step in range(STEPS):
        images, labels = batch(step, dtype=torch.float64)
        opt.zero_grad()
        loss = functional.cross_entropy(run(images), labels)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    own = list(opt.param_groups[-1]["params"])
    return losses, own, model, sparsifier


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_soft_threshold(optimizer, compiled):
    losses, own, published = in_forward(threshold_in_forward, lambda w: torch.tensor(-3.0, dtype=w.dtype), optimizer)
    ours, our_own, model, sparsifier = at_the_boundary(STR, optimizer, compiled)
    assert ours == losses
    for theirs, mine in zip(own.values(), our_own, strict=True):
        assert theirs.item() == mine.item()
    for name, weight in published.items():
        assert torch.equal(dict(model.named_parameters())[name], weight)
    assert 0.0 < sparsifier.sparsity < 1.0
    assert abs(own["fc1.weight"].item() + 3.0) > 1e-3  # the threshold did learn


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_straight_through(optimizer):
    text = (
        "sparsity: 0.5\nsaliency: score\nrelaxation: {straight_through: {scores: magnitude, weight_decay: null}}\ngradient: dense\n"
        "schedule: {constant: {every: 1 steps, end: 1 run}}"
    )
    losses, own, published = in_forward(PassThrough.apply, torch.abs, optimizer)
    ours, our_own, model, _ = at_the_boundary(text, optimizer)
    assert ours == losses
    for theirs, mine in zip(own.values(), our_own, strict=True):
        assert torch.equal(theirs.flatten(), mine.flatten())
    assert all(not torch.equal(own[n], dict(net(dtype=torch.float64).named_parameters())[n].abs()) for n in TARGETS)
    # The masks of the last update come from the scores before the last step; the weights under them are the latent ones.
    latest = dict(model.named_parameters())
    for name, weight in published.items():
        both = (latest[name] != 0) & (weight != 0)
        assert both.any()
        assert torch.equal(latest[name][both], weight[both])
