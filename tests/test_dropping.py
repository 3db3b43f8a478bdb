"""Dropout of pieces at the step boundary equals gates inside the forward, in float64; and its evaluation, end and resumption."""

import pytest
import torch
from support import net, recipe, train
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.dependency import Group, Member
from niwaki.relaxation import Dropout

STEPS, BLOCKS = 12, 4
TEXT = "granularity: layer\nrelaxation: {dropout: {rate: 0.4}}"


class Residual(nn.Module):
    """Residual blocks, each with a gate."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(BLOCKS))
        self.head = nn.Linear(8, 3)

    def forward(self, x, gates=(1.0,) * BLOCKS):
        x = self.stem(x)
        for block, gate in zip(self.blocks, gates, strict=True):
            x = x + gate * block(x)
        return self.head(x)


def residual():
    torch.manual_seed(1)
    return Residual().double()


def layers(model):
    """One group, whose units are the blocks."""
    members = [
        Member(name, 0, torch.full((len(p),), int(name.split(".")[1])), "output")
        for name, p in model.named_parameters()
        if name.startswith("blocks.")
    ]
    return [Group("blocks", "layer", BLOCKS, tuple(members))]


def data(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64), torch.randint(3, (16,), generator=generator)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


def gates(step, seed=0):
    return (~Dropout(rate=0.4).dropped("blocks", 0, BLOCKS, seed, step)).double()


def step_with(model, optimizer, step, *arguments):
    inputs, labels = data(step)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(inputs, *arguments), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_dropped_layers_equal_gates_in_the_forward(optimizer):
    oracle, model = residual(), residual()
    theirs, ours = optimizer(oracle.parameters()), optimizer(model.parameters())
    sparsifier = niwaki.Sparsifier(model, recipe(TEXT), total_steps=STEPS, groups=layers(model)).attach(ours)
    seen = set()
    for step in range(STEPS):
        gate = gates(step)
        seen.add(tuple(gate.tolist()))
        empty = [all(not p.any() for p in block.parameters()) for block in model.blocks]
        assert empty == [g == 0 for g in gate]
        assert step_with(model, ours, step) == pytest.approx(step_with(oracle, theirs, step, gate), rel=1e-11)
    assert len(seen) > 3
    inputs, _ = data(99)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with sparsifier.evaluating():
        torch.testing.assert_close(model(inputs), oracle(inputs), rtol=1e-10, atol=1e-13)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    sparsifier.finalize()
    for (name, p), q in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")
    assert sparsifier.sparsity == 0.0


def test_evaluation_between_steps_changes_nothing():
    def run(evaluates):
        model = residual()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        sparsifier = niwaki.Sparsifier(model, recipe(TEXT), total_steps=STEPS, groups=layers(model)).attach(optimizer)
        for step in range(STEPS):
            step_with(model, optimizer, step)
            if evaluates:
                with sparsifier.evaluating():
                    model(data(0)[0])
        return sparsifier.finalize().model

    assert all(torch.equal(p, q) for p, q in zip(run(True).parameters(), run(False).parameters(), strict=True))


def test_layers_removed_at_the_end_are_evenly_spaced():
    model = residual()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    text = (
        "sparsity: 0.5\ngranularity: {layer: {aggregate: max}}\nsaliency: position\nschedule: {one_shot: {at: 1 run}}\n"
        + TEXT.partition("\n")[2]
    )
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS, groups=layers(model)).attach(optimizer)
    for step in range(STEPS):
        step_with(model, optimizer, step)
    sparsifier.finalize()
    assert [bool(block[0].weight.any()) for block in model.blocks] == [True, False, True, False]
    assert [bool(sparsifier.masks[f"blocks.{i}.2.bias"].all()) for i in range(BLOCKS)] == [True, False, True, False]


def test_a_resumed_run_draws_the_same():
    def build():
        model = residual()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        return model, optimizer, niwaki.Sparsifier(model, recipe(TEXT), total_steps=STEPS, groups=layers(model), seed=7).attach(optimizer)

    whole = build()
    for step in range(STEPS):
        step_with(*whole[:2], step)
    half = build()
    for step in range(5):
        step_with(*half[:2], step)
    states = [part.state_dict() for part in half]
    again = build()
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for step in range(5, STEPS):
        step_with(*again[:2], step)
    assert all(torch.equal(p, q) for p, q in zip(again[0].parameters(), whole[0].parameters(), strict=True))


def test_rescaled_weights_keep_their_expectation():
    model = net(dtype=torch.float64)
    weight = model.fc1.weight.detach().clone()
    text = "granularity: output_channel\nrelaxation: {dropout: {rate: 0.25, rescale: true}}"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=400).attach(optimizer)
    total = torch.zeros_like(weight)
    for _ in range(400):
        here = model.fc1.weight.detach()
        rows = here.any(1)
        torch.testing.assert_close(here[rows], weight[rows] / 0.75)
        total += here
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert float((total.sum() / 400 - weight.sum()).abs()) < 0.2 * float(weight.abs().sum()) ** 0.5
    with sparsifier.evaluating():
        assert torch.equal(model.fc1.weight, weight)


def test_single_weights_are_dropped_where_pieces_are_elements():
    model = net()
    niwaki.Sparsifier(model, recipe("relaxation: {dropout: {rate: 0.5}}"), total_steps=5)
    share = float((model.fc1.weight == 0).float().mean())
    assert share == pytest.approx(0.5, abs=0.05)
    train(model, [torch.optim.SGD(model.parameters(), lr=0.1)], range(2))
