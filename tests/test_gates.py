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


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_where_gates_are_closed_not_where_a_weight_is_zero(kind):
    model = net()
    with torch.no_grad():
        model.fc1.bias.zero_()
        model.fc2.weight[3, 4] = 0.0
    text = f"granularity: channel\nrelaxation: {{{KINDS[kind]}}}"
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=4, example=(batch(0)[0],))
    closed = {gates.name: gates.mode == 0 for gates in sparsifier._gates}
    assert torch.equal(sparsifier.masks["fc1.bias"], ~closed["fc1"])
    assert torch.equal(sparsifier.masks["fc2.weight"], ~(closed["fc2"][:, None] | closed["fc1"][None, :]))
    before = sparsifier.masks
    assert sparsifier.finalize().masks == before


def test_gates_that_close_are_masked_beside_the_masks_of_an_earlier_stage():
    earlier = niwaki.Masks({"fc1.weight": torch.rand(24, 128, generator=torch.Generator().manual_seed(0)) > 0.5})
    sparsifier = niwaki.Sparsifier(net(), recipe("granularity: output_channel\nrelaxation: factor"), masks=earlier, total_steps=4)
    assert torch.equal(sparsifier.masks["fc1.weight"], earlier["fc1.weight"])
    [gates] = [gates for gates in sparsifier._gates if gates.name == "fc1.weight"]
    with torch.no_grad():
        gates.own["factor"][7] = 0.0
    sparsifier._draw()
    expected = earlier["fc1.weight"].clone()
    expected[7] = False
    assert torch.equal(sparsifier.masks["fc1.weight"], expected)
    assert torch.equal(sparsifier.finalize().masks["fc1.weight"], expected)


def test_a_cut_of_all_units_together_ranks_gates_by_their_scores_alone():
    """Not by those of the units that their tensors also read, or by how many tensors a unit is in."""
    text = "sparsity: 0.5\ngranularity: channel\nsaliency: score\nallocation: global\nschedule: {one_shot: {at: 1 run}}\nrelaxation: factor"
    sparsifier = niwaki.Sparsifier(net(), recipe(text), total_steps=1, example=(batch(0)[0],))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gates in sparsifier._gates:
            gates.own["factor"].copy_(torch.randn(gates.own["factor"].shape, generator=generator))
    sizes = torch.cat([gates.own["factor"].detach().abs() for gates in sparsifier._gates])
    names = [gates.name for gates in sparsifier._gates]
    best = torch.zeros(len(sizes), dtype=torch.bool)
    best[torch.sort(sizes, descending=True, stable=True).indices[: len(sizes) // 2]] = True
    sparsifier.step = 1
    masks = sparsifier.finalize().masks
    assert torch.equal(torch.cat([masks[f"{name}.bias"] for name in names]), best)


@pytest.mark.parametrize("kind", ["step_gate", "stochastic_gate"])
def test_binary_gates_are_exactly_zero_or_one(kind):
    relaxation = recipe(f"relaxation: {{{KINDS[kind]}}}").relaxation
    [name] = relaxation.initial_parameters((1,), Moment("x"))
    own = {name: torch.linspace(-9.0, 9.0, 5001)}
    assert set(relaxation.gate(own, Moment("x", step=1)).tolist()) == {0.0, 1.0}


def test_gates_say_which_weight_gives_them_no_gradient():
    model = net()
    text = "granularity: channel\nrelaxation: factor\npenalty: {l1: {of: gate, strength: 0.1}}"
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=4, example=(batch(0)[0],))
    model.fc1.weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.warns(UserWarning, match=r"learns by the gradient of fc1\.weight, which requires none"):
        sparsifier.attach(torch.optim.SGD(trained, lr=0.1))


class Branches(nn.Module):
    """Two layers read one."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        hidden = torch.relu(self.shared(x))
        return torch.relu(self.left(hidden)) + torch.relu(self.right(hidden))


def test_gates_are_trained_where_any_weight_that_they_multiply_is():
    model = Branches()
    text = "granularity: channel\ntarget: {weights: {include: [shared]}}\nrelaxation: factor"
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=4, example=(torch.ones(2, 4),))
    [gates] = sparsifier._gates
    _, second = (tensor.bound.parameter for tensor, _ in gates.acting)
    optimizer = torch.optim.SGD([second], lr=0.1)
    sparsifier.attach(optimizer)
    assert any(gates.own["factor"] is parameter for parameter in optimizer.param_groups[-1]["params"])


def test_a_copy_of_an_attached_optimizer_has_the_own_parameters_already():
    model = net()
    first = optimizer_of(model.parameters())
    sparsifier = niwaki.Sparsifier(model, recipe("relaxation: hard_concrete")).attach(first)
    second = torch.optim.SGD([dict(group) for group in first.param_groups], lr=0.1)
    sparsifier.attach(second)
    assert len(second.param_groups) == len(first.param_groups) == 2


def test_finalizing_where_the_mode_is_published_keeps_it():
    text = "granularity: output_channel\nrelaxation: {stochastic_gate: {probability: 0.4}}"
    model = net()
    sparsifier = niwaki.Sparsifier(model, recipe(text))
    assert bool(model.fc1.weight.any())  # a sample
    with sparsifier.evaluating():
        sparsifier.finalize()
    assert not bool(model.fc1.weight.any())  # no gate is open more probably than not


@pytest.mark.parametrize("relaxation", ["hard_concrete", "dynamic_threshold", "{variational_noise: {noise: weight}}"])
def test_sparse_gradients_are_pulled_back(relaxation):
    losses = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 6, sparse=sparse), nn.Flatten(), nn.Linear(12, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        text = f"target: {{weights: {{include: ['0.weight']}}}}\nrelaxation: {relaxation}"
        niwaki.Sparsifier(model, recipe(text), total_steps=4).attach(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            loss = model(torch.arange(8).view(4, 2) + step).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
