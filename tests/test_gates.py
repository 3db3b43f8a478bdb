"""Gates of a model equal the same gates written inside the forward, for single weights, filters and units; masks, cuts, checkpoints."""

import pytest
import torch
from support import TARGETS, Net, batch, net, recipe
from torch import nn
from torch.func import functional_call
from torch.nn import functional

import niwaki
from niwaki.errors import InputError
from niwaki.relaxation import Moment

STEPS = 12


def optimizer_of(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(model, optimizer, steps, dtype=torch.float64):
    losses = []
    for step in steps:
        images, labels = batch(step, dtype=dtype)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


KINDS = {
    "hard_concrete": "hard_concrete: {learning_rate: 0.3}",
    "stochastic_gate": "stochastic_gate: {learning_rate: 0.3}",
    "concrete": "stochastic_gate: {estimator: concrete, learning_rate: 0.3}",
    "sigmoid_anneal": "sigmoid_anneal: {learning_rate: 0.3}",
    "step_gate": "step_gate: {learning_rate: 0.3}",
    "factor": "factor: {learning_rate: 0.3}",
    "gaussian_gate": "gaussian_gate: {learning_rate: 0.3, initial: -3}",
    "log_normal_gate": "log_normal_gate: {learning_rate: 0.05, initial: -1}",
    "horseshoe_gate": "horseshoe_gate: {learning_rate: 0.05, initial: -2}",
}


def shape_of(granularity, weight):
    return weight.shape if granularity == "element" else (weight.shape[0], *[1] * (weight.ndim - 1))


def in_forward(text, granularity):
    """The oracle: gates are ordinary parameters, and multiply the weights in the forward."""
    relaxation = recipe(text).relaxation
    model = net(dtype=torch.float64)
    weights = dict(model.named_parameters())
    own = {}
    for name in TARGETS:
        initial = relaxation.initial_parameters(shape_of(granularity, weights[name]), Moment(name, seed=4))
        own[name] = {key: nn.Parameter(value.double()) for key, value in initial.items()}
    group = {"params": [p for values in own.values() for p in values.values()], "lr": relaxation.learning_rate, "weight_decay": 0.0}
    optimizer = optimizer_of([{"params": list(weights.values())}, group])
    losses = []
    for step in range(STEPS):
        images, labels = batch(step, dtype=torch.float64)
        optimizer.zero_grad()
        gates = {name: relaxation.gate(own[name], Moment(name, 4, step, 0, step / STEPS)) for name in TARGETS}
        loss = functional.cross_entropy(functional_call(model, {n: weights[n] * gates[n] for n in TARGETS}, (images,)), labels)
        loss.backward()
        optimizer.step()
        for name in TARGETS:
            with torch.no_grad():
                for key, value in relaxation.gate_constrain(own[name]).items():
                    own[name][key].copy_(value)
        losses.append(loss.item())
    return losses, own, weights


@pytest.mark.parametrize("granularity", ["element", "output_channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_gates_equal_the_same_gates_inside_the_forward(kind, granularity):
    text = f"granularity: {granularity}\nrelaxation: {{{KINDS[kind]}}}"
    expected, own, weights = in_forward(text, granularity)
    model = net(dtype=torch.float64)
    optimizer = optimizer_of(model.parameters())
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS, seed=4).attach(optimizer)
    losses = train(model, optimizer, range(STEPS))
    assert losses == pytest.approx(expected, rel=1e-10)
    found = {key: value for group in optimizer.param_groups for key, value in zip(range(10**6), group["params"], strict=False)}
    assert found
    state = sparsifier.state_dict()
    for name in TARGETS:
        for key, value in own[name].items():
            assert torch.allclose(state["gates"][name][key].view(value.shape), value.detach(), atol=1e-9)
        assert torch.allclose(state["tensors"][name]["latent"].view(weights[name].shape), weights[name].detach(), atol=1e-9)


def test_a_units_gate_multiplies_what_the_unit_puts_out():
    model = net(dtype=torch.float64).eval()
    images, labels = batch(0, dtype=torch.float64)
    text = "granularity: channel\nrelaxation: {factor: {start: 0.5}}"
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=4, example=(images,))
    names = {gates.name for gates in sparsifier._gates}
    assert {"conv2", "fc1", "fc2"} <= names
    factor = {gates.name: gates.own["factor"] for gates in sparsifier._gates}
    with torch.no_grad():
        for i, value in enumerate(factor.values()):
            value.copy_(torch.linspace(0.2, 1.4, value.numel(), dtype=torch.float64).roll(i))
    sparsifier._draw()

    class Gated(Net):
        def forward(self, x):
            def gate(name, shape):
                return 1.0 if name not in factor else factor[name].view(shape)

            x = torch.relu(self.norm(self.conv1(x))) * gate("conv1", (1, -1, 1, 1))
            x = (torch.relu(self.conv2(x)) * gate("conv2", (1, -1, 1, 1))).flatten(1)
            x = torch.relu(self.fc1(x)) * gate("fc1", (1, -1))
            return self.head(torch.relu(self.fc2(x)) * gate("fc2", (1, -1)))

    plain = Gated().double().eval()
    plain.load_state_dict(net(dtype=torch.float64).state_dict())
    assert torch.allclose(model(images), plain(images), atol=1e-12)
    model.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    functional.cross_entropy(plain(images), labels).backward()
    for tensor in sparsifier._targets.values():
        tensor.pull_back()
    for gates in sparsifier._gates:
        gates.pull_back()
        assert torch.allclose(gates.own_gradient("factor"), factor[gates.name].grad, atol=1e-12)


def test_a_closed_unit_is_masked_in_all_its_members_and_can_be_taken_out():
    images, labels = batch(0)
    model = net()
    text = "granularity: channel\nrelaxation: factor"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=4, example=(images,)).attach(optimizer)
    gates = {one.name: one for one in sparsifier._gates}
    with torch.no_grad():
        gates["fc1"].own["factor"][[3, 20]] = 0.0
        gates["conv2"].own["factor"][5] = 0.0
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    masks = sparsifier.masks
    gone = torch.zeros(24, dtype=torch.bool)
    gone[[3, 20]] = True
    of_conv = torch.zeros(128, dtype=torch.bool)
    of_conv[5 * 16 : 6 * 16] = True
    assert torch.equal(masks["fc1.weight"], ~(gone[:, None] | of_conv[None, :]))
    assert torch.equal(masks["fc1.bias"], ~gone)
    assert torch.equal(masks["fc2.weight"], (~gone)[None, :].expand(16, 24))
    assert bool((model.fc1.weight[3] != 0).any())  # what makes the unit trains on, so that its gate can open again
    with sparsifier.evaluating():
        assert not bool(model.fc1.weight[3].any())
        outputs = model.eval()(images)
    sparsifier.finalize()
    assert not bool(model.fc1.weight[3].any())
    smaller = niwaki.shrink(model, masks, (images,)).model
    assert smaller.fc1.out_features == 22
    assert smaller.conv2.out_channels == 7
    assert torch.allclose(smaller.eval()(images), outputs, atol=1e-6)


def test_a_final_cut_ranks_by_the_learned_scores_and_is_exact():
    text = (
        "sparsity: 0.75\ngranularity: output_channel\nsaliency: score\nallocation: global\nschedule: {one_shot: {at: 1 run}}\n"
        "relaxation: {hard_concrete: {learning_rate: 0.5}}"
    )
    model = net()
    optimizer = optimizer_of(model.parameters())
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=6).attach(optimizer)
    train(model, optimizer, range(6), torch.float32)
    scores = {gates.name: gates.values()["log_alpha"].flatten() for gates in sparsifier._gates}
    sparsifier.finalize()
    whole = torch.cat(list(scores.values()))
    best = torch.zeros(48, dtype=torch.bool)
    best[torch.sort(whole, descending=True, stable=True).indices[:12]] = True
    kept = torch.cat([sparsifier.masks[name].flatten(1).all(dim=1) for name in TARGETS])
    assert torch.equal(kept, best)
    assert torch.equal(kept, torch.cat([sparsifier.masks[name].flatten(1).any(dim=1) for name in TARGETS]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_equals_the_uninterrupted_one(kind):
    text = f"granularity: input_channel\nrelaxation: {{{KINDS[kind]}}}"

    def start():
        model = net()
        optimizer = optimizer_of(model.parameters())
        return model, optimizer, niwaki.Sparsifier(model, recipe(text), total_steps=8, seed=2).attach(optimizer)

    whole, optimizer, sparsifier = start()
    train(whole, optimizer, range(8), torch.float32)
    half, optimizer, first = start()
    train(half, optimizer, range(5), torch.float32)
    kept = [half.state_dict(), optimizer.state_dict(), first.state_dict()]
    again, optimizer, second = start()
    again.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    second.load_state_dict(kept[2])
    train(again, optimizer, range(5, 8), torch.float32)
    assert sparsifier.masks == second.masks
    sparsifier.finalize()
    second.finalize()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_changes_over_a_run_needs_its_length():
    with pytest.raises(InputError, match="pass total_steps="):
        niwaki.Sparsifier(net(), recipe("relaxation: sigmoid_anneal"))
