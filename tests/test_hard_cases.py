"""What demanding loops do to a sparsifier: each case was once silently wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Muon

import niwaki
from niwaki import InputError, Recipe, Sparsifier

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 16, generator=GENERATOR)
Y = (X.sum(1) > 0).long()


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def go(model, optimizers, steps):
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        functional.cross_entropy(model(X), Y).backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("order", [1, -1], ids=["muon_first", "adamw_first"])
def test_thresholds_learn_in_another_optimizer_than_their_weights(order):
    """Muon holds the weights and cannot hold a threshold; one AdamW step of a threshold is checked against the closed form."""
    model = mlp()
    muon = Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
    adamw = AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-2, weight_decay=0.5)
    sparsifier = Sparsifier(model, Recipe(relaxation={"soft_threshold": {"initial": -3.0}}), total_steps=20).attach(muon, adamw)
    gates = adamw.param_groups[-1]["params"]
    start = sparsifier._tensors["0.weight"].latent.clone()
    functional.cross_entropy(model(X), Y).backward()
    s = torch.tensor(-3.0, requires_grad=True)
    (torch.sign(start) * torch.relu(start.abs() - torch.sigmoid(s)) * model[0].weight.grad).sum().backward()
    for optimizer in (muon, adamw)[::order]:
        optimizer.step()
    expected = -3.0 * (1 - 1e-2 * 0.5) - 1e-2 * s.grad.sign()  # AdamW's first step: decoupled decay, then lr * sign
    assert gates[0].item() == pytest.approx(expected.item(), rel=1e-5)
    go(model, (muon, adamw)[::order], 20)
    assert sparsifier.step == 21
    for name, tensor in sparsifier._tensors.items():  # what the model computes with is the relaxation of what was learned last
        w, gate = tensor.latent, torch.sigmoid(tensor.own["threshold"].detach())
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), torch.sign(w) * torch.relu(w.abs() - gate))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(sparsity=0.9, growth="random", schedule={"linear": {"end": "1 run", "every": "5 steps"}}),
        niwaki.method("rigl", sparsity=0.9, schedule={"cubic": {"end": "1 run", "every": "4 steps"}}),
    ],
    ids=["random", "gradient"],
)
def test_a_schedule_that_ends_with_the_run_reaches_its_target_without_growing(recipe):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, recipe, total_steps=10).attach(optimizer)
    go(model, [optimizer], 10)
    before = sparsifier.masks
    sparsifier.finalize()
    assert sparsifier.masks.active == round(0.1 * before.total)
    assert (sparsifier.masks - before).active == 0  # what grew now could not learn any more


@pytest.mark.parametrize("relaxation", ["latent", "straight_through", {"soft_threshold": {"initial": -6.0}}])
def test_weights_that_are_written_between_steps_are_adopted(relaxation):
    score = {"saliency": "score", "sparsity": 0.5, "schedule": {"cubic": {"every": "1 steps"}}} if relaxation == "straight_through" else {}
    plain = {"sparsity": 0.5, "schedule": {"cubic": {"every": "1 steps"}}} if relaxation == "latent" else {}
    model = mlp()
    optimizer = SGD(model.parameters(), lr=1e-3)
    Sparsifier(model, Recipe(relaxation=relaxation, **score, **plain), total_steps=10).attach(optimizer)
    go(model, [optimizer], 2)
    model.load_state_dict({name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()})
    go(model, [optimizer], 1)
    alive = model[2].weight[model[2].weight != 0]
    assert len(alive) > 0
    torch.testing.assert_close(alive, torch.full_like(alive, 0.5), atol=0.02, rtol=0.0)


@pytest.mark.parametrize("relaxation", ["hard", "latent"])
def test_pruned_weights_that_are_written_last_are_zero_when_finalized(relaxation):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, Recipe(sparsity=0.5, relaxation=relaxation), total_steps=4).attach(optimizer)
    go(model, [optimizer], 4)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    masks = sparsifier.finalize().masks
    assert torch.equal(model[0].weight.detach(), masks["0.weight"].float())


def test_a_last_selection_by_gradients_without_data_is_refused_before_training():
    with pytest.raises(InputError, match="pass data= and loss="):
        Sparsifier(mlp(), Recipe(sparsity=0.5, saliency="taylor", schedule={"cubic": {"end": "1 run"}}), total_steps=200)


def test_an_optimizer_of_another_model_is_refused():
    sparsifier = Sparsifier(mlp(), niwaki.method("rigl"), total_steps=200)
    with pytest.raises(InputError, match="holds none of the target parameters"):
        sparsifier.attach(SGD(mlp().parameters(), lr=0.1))


def test_exchanged_parameters_are_refused():
    model = mlp()
    sparsifier = Sparsifier(model, niwaki.method("rigl"), total_steps=200)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(InputError, match=r"0\.weight of the model is not the parameter"):
        sparsifier.attach(SGD(model.parameters(), lr=0.1))


def test_two_sparsifiers_share_an_optimizer_unless_one_skips_steps():
    def recipe(target, growth):
        schedule = {"constant": {"every": "2 steps"}}
        return Recipe(sparsity=0.5, target={"weights": {"include": [target]}}, schedule=schedule, growth=growth)

    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    step = {"gradient": {"at_update": "step"}}
    first = Sparsifier(model, recipe("0.weight", step), total_steps=20).attach(optimizer)
    with pytest.raises(InputError, match="another sparsifier is attached"):
        Sparsifier(model, recipe("2.weight", "gradient"), total_steps=20).attach(optimizer)
    second = Sparsifier(model, recipe("2.weight", step), total_steps=20).attach(optimizer)
    masks = first.masks, second.masks
    go(model, [optimizer], 7)
    assert first.masks != masks[0]
    assert second.masks != masks[1]
    assert first.sparsity == second.sparsity == 0.5


def test_a_scaler_that_skips_one_of_two_optimizers_does_not_shift_the_steps():
    model = mlp()
    first = SGD(model[0].parameters(), lr=0.1)
    second = SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    recipe = niwaki.method("rigl", sparsity=0.5, schedule={"constant": {"every": "3 steps"}})
    sparsifier = Sparsifier(model, recipe, total_steps=40).attach(first, second)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for iteration in range(12):
        for optimizer in (first, second):
            optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(X), Y)).backward()
        if iteration in (4, 8):  # once each of them overflows alone
            model[0 if iteration == 4 else 2].weight.grad[0, 0] = torch.inf
        scaler.step(first)
        scaler.step(second)
        scaler.update()
        assert sparsifier.step == iteration + (iteration not in (4, 8))
        if iteration not in (4, 8):
            sparsifier.state_dict()


def test_growth_with_global_allocation_empties_no_layer():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    optimizer = SGD(model.parameters(), lr=0.01)
    recipe = Recipe(
        sparsity=0.85,
        granularity="output_channel",
        allocation="global",
        target={"weights": {"include": ["*"]}},
        growth={"random": {"fraction": 0.5}},
        schedule={"constant": {"every": "1 steps", "end": "1 run"}},
    )
    sparsifier = Sparsifier(model, recipe, total_steps=30).attach(optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        assert min(int(mask.any(1).sum()) for mask in sparsifier.masks.values()) >= 1
        assert sum(int(mask.any(1).sum()) for mask in sparsifier.masks.values()) == 6


def test_a_last_selection_by_gradients_uses_the_data():
    def masks(**last):
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1)
        recipe = Recipe(sparsity=0.5, saliency="taylor", schedule={"one_shot": {"at": "1 run"}})
        sparsifier = Sparsifier(model, recipe, total_steps=3, data=[(X, Y)], loss=functional.cross_entropy).attach(optimizer)
        go(model, [optimizer], 3)
        optimizer.zero_grad(**last)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        functional.cross_entropy(model(X), Y).backward()
        scores = (weights["2.weight"] * model[2].weight.grad).double().square().flatten()
        optimizer.zero_grad(**last)
        return sparsifier.finalize().masks["2.weight"].flatten(), scores

    for last in ({"set_to_none": True}, {"set_to_none": False}):
        found, scores = masks(**last)
        assert scores[found].min() >= scores[~found].max()


def test_assigned_gradients_are_masked_before_the_step():
    def run(assign):
        model = mlp()
        optimizer = Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
        Sparsifier(model, Recipe(sparsity=0.5), total_steps=5).attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(X), Y)
            if assign:
                for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                    parameter.grad = gradient
            else:
                loss.backward()
            optimizer.step()
        return model[0].weight.detach()

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize(("layers", "said"), [({"*": 0.2}, "amounts to sparsity 0.2"), ({"nowhere*": 0.3}, "matches no layer")])
def test_an_impossible_allocation_is_told_before_training(layers, said):
    schedule = {"cubic": {"begin": "3 steps", "end": "8 steps", "every": "1 steps"}}
    with pytest.raises(InputError, match=said):
        Sparsifier(mlp(), Recipe(sparsity=0.1, allocation={"explicit": {"layers": layers}}, schedule=schedule), total_steps=10)


def test_padded_patterns_say_how_much_they_keep():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    recipe = Recipe(granularity={"n_m": {"n": 2, "m": 4, "remainder": "pad"}})
    planned = niwaki.plan(model, recipe).tensors[0].keep
    with pytest.warns(UserWarning, match="kept 32 weights where the sparsity asks for 24"):
        assert Sparsifier(model, recipe).masks.active == planned == 32


def test_skipping_every_step_is_refused_in_any_unit():
    recipe = niwaki.method("rigl", schedule={"constant": {"every": "1 epochs"}})
    with pytest.raises(InputError, match="never trains"):
        Sparsifier(mlp(), recipe, total_steps=50, steps_per_epoch=1)


DAMAGED = [{}, [], {"version": 1}, {"version": 1, "recipe": "", "seed": 0, "step": None, "notes": [], "tensors": {}}]


@pytest.mark.parametrize("state", DAMAGED)
def test_a_damaged_state_is_one_line(state):
    with pytest.raises(InputError, match=r"^load_state_dict: [^\n]*$"):
        Sparsifier(mlp(), Recipe(sparsity=0.5)).load_state_dict(state)
