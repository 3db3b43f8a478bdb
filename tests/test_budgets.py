"""Allocations that look at data, growth and time, inside a training: what they may see is there when they are asked."""

import warnings

import pytest
import torch
from support import batch, net, train
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.errors import InputError
from niwaki.pieces import element_masks

DATA = [batch(100 + i) for i in range(2)]
LOOKING = ("pfa", "error_bound", "outlier_weighted", "dynamic_programming", {"sensitivity": {"sparsities": [0.3, 0.6, 0.9]}})


def build(model, recipe, steps, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return niwaki.Sparsifier(model, recipe, total_steps=steps, data=DATA, loss=functional.cross_entropy, **more)


@pytest.mark.parametrize("allocation", LOOKING, ids=str)
@pytest.mark.parametrize("saliency", ["wanda", "taylor", "kfac_obd"])
def test_a_first_mask_that_is_drawn_has_the_budgets_of_what_is_looked_at(allocation, saliency):
    said = {"sparsity": 0.5, "saliency": saliency, "allocation": allocation, "schedule": {"constant": {"every": "2 steps"}}}
    drawn = build(net(), niwaki.Recipe(growth="random", **said), 4)
    ranked = build(net(), niwaki.Recipe(**said), 4)
    assert {name: int(mask.sum()) for name, mask in drawn.masks.items()} == {name: int(mask.sum()) for name, mask in ranked.masks.items()}
    assert drawn.masks != ranked.masks


@pytest.mark.parametrize("compensation", ["least_squares", "obs"])
def test_survivors_of_a_drawn_mask_are_compensated(compensation):
    said = {"sparsity": 0.5, "saliency": "kfac_obs", "schedule": {"constant": {"every": "2 steps"}}, "growth": "random"}
    model, plain = net(), net()
    masks = build(model, niwaki.Recipe(**said, compensation=compensation), 4).masks
    assert build(plain, niwaki.Recipe(**said), 4).masks == masks
    assert not torch.equal(model.fc2.weight, plain.fc2.weight)
    losses = [float(sum(functional.cross_entropy(one.eval()(x), y) for x, y in DATA).detach()) for one in (net(), model, plain)]
    assert abs(losses[1] - losses[0]) < abs(losses[2] - losses[0])


def test_what_an_allocation_looks_at_needs_no_gradient_that_the_saliency_has_of_each_batch():
    said = {"sparsity": 0.5, "allocation": "pfa", "saliency": {"taylor": {"over": "batch"}}}
    sparsifier = build(net(), niwaki.Recipe(**said), 4)
    other = build(net(), niwaki.Recipe(**{**said, "saliency": "magnitude"}), 4)
    assert [int(m.sum()) for m in sparsifier.masks.values()] == [int(m.sum()) for m in other.masks.values()]


@pytest.mark.parametrize("initial_mask", ["random", "saliency"])
@pytest.mark.parametrize("by", ["weight", "gradient", "nonzeros", "survivors"])
def test_redistribution_from_the_first_mask_to_the_end_of_the_run(by, initial_mask):
    """Where no gradient is at hand (before the first step, and after a loop has cleared the last ones) nothing is shared out by it."""
    recipe = niwaki.Recipe(
        sparsity=0.5,
        allocation={"redistribution": {"by": by}},
        growth={"random": {"initial_mask": initial_mask}},
        schedule={"cubic": {"initial": 0.3, "every": "2 steps", "end": "1 run"}},
    )
    model = net()
    sparsifier = niwaki.Sparsifier(model, recipe, total_steps=6)  # no data=
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    first = sparsifier.masks
    train(model, [optimizer], range(6))
    optimizer.zero_grad()
    masks = sparsifier.finalize().masks
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in first.values()) == round(0.7 * total)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.5 * total)


def test_rows_that_have_no_more_active_weights_are_told():
    model = nn.Linear(4, 2, bias=False)
    given = niwaki.Masks({"weight": torch.tensor([[True, False, False, False], [True] * 4])})
    recipe = niwaki.Recipe(sparsity=0.5, allocation={"uniform": {"per": "row"}}, target={"weights": {"include": ["*"]}})
    with pytest.warns(UserWarning, match="masked 1 more weights of weight than asked: some of its rows have no others that are active"):
        sparsifier = niwaki.Sparsifier(model, recipe, masks=given)
    assert sparsifier.masks["weight"].sum(1).tolist() == [1, 2]


def test_losses_of_rounds_that_may_take_weights_back_are_of_the_original_weights():
    """A search in the second round tries masks that hold weights which the first one has set to zero."""
    model = net(dtype=torch.float64)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = niwaki.Recipe(
        sparsity=0.6,
        saliency="magnitude",
        allocation={"sensitivity": {"sparsities": [0.3, 0.6, 0.9]}},
        schedule={"one_shot": {"at": "1 run", "rounds": 2, "revive": True}},
    )
    data = [batch(3, dtype=torch.float64)]
    sparsifier = niwaki.Sparsifier(model, recipe, total_steps=1, data=data, loss=functional.cross_entropy)
    selector = sparsifier._selector
    selector.originals = {name: tensor.weight.clone() for name, tensor in sparsifier._targets.items()}
    with torch.no_grad():
        for name in selector.originals:
            model.get_parameter(name).mul_(0.5)  # what a first round has left
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pieces = [torch.arange(one.pieces).view_as(active) % 3 > 0 for one, active in zip(sparsifier.ranked, selector._active(), strict=True)]
    found = selector._loss_of(pieces)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    masks = element_masks(sparsifier.ranked, pieces)
    weights = {name: w.masked_fill(~masks[name].view(w.shape), 0.0) if name in masks else w for name, w in dense.items()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    expected = functional.cross_entropy(torch.func.functional_call(model, weights | buffers, (data[0][0],)), data[0][1])
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_batch_norm_is_estimated_anew_only_when_masks_act():
    """A schedule that compares masks before one acts leaves the dense model as it is meanwhile."""
    recipe = niwaki.Recipe(
        sparsity=0.5,
        schedule={"mask_stability": {"every": "1 steps", "end": "1 run", "window": 3, "distance": 1e-9}},
        compensation="batchnorm_recalibration",
    )
    model, twin = net(), net()
    sparsifier = build(model, recipe, 8)
    optimizer, other = (torch.optim.SGD(one.parameters(), lr=0.05) for one in (model, twin))
    sparsifier.attach(optimizer)
    for step in range(2):
        train(model, [optimizer], range(step, step + 1))
        train(twin, [other], range(step, step + 1))
        assert sparsifier._selector.schedule_state.state_dict()["seen"] is not None
        assert sparsifier.sparsity == 0.0
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    train(model, [optimizer], range(2, 8))
    masks = sparsifier.finalize().masks
    assert sum(int(m.sum()) for m in masks.values()) == round(0.5 * sum(m.numel() for m in masks.values()))


def test_nothing_is_collected_where_nothing_goes():
    """A schedule that begins with no sparsity, and dense phases, look at no data."""
    read = []

    class Data:
        def __iter__(self):
            read.append(1)
            yield from DATA

    recipe = niwaki.Recipe(
        sparsity=0.5,
        saliency="wanda",
        growth="all",
        schedule={"phases": {"dense": [0, 4], "sparse": [2, 6], "unit": "steps"}},
    )
    model = net()
    sparsifier = niwaki.Sparsifier(model, recipe, total_steps=8, data=Data())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    found = []
    for step in range(8):
        train(model, [optimizer], range(step, step + 1))
        found.append((sparsifier.sparsity > 0.0, len(read)))
    assert found == [(False, 0)] * 2 + [(True, 1)] * 2 + [(False, 1)] * 2 + [(True, 2)] * 2


def test_a_budget_of_flops_starts_from_masks_that_were_given():
    """Pieces that are masked already count as what they cost, and stay."""
    given = niwaki.Masks({"fc2.weight": torch.arange(24 * 16).view(16, 24) % 3 > 0})
    recipe = niwaki.Recipe(allocation={"flops_budget": {"flops": 0.6}}, schedule={"linear": {"every": "2 steps", "end": "1 run"}})
    model = net()
    sparsifier = build(model, recipe, 4, masks=given)
    assert sparsifier.masks["fc2.weight"].equal(given["fc2.weight"])
    assert all(bool(mask.all()) for name, mask in sparsifier.masks.items() if name != "fc2.weight")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    train(model, [optimizer], range(4))
    masks = sparsifier.finalize().masks
    uses = {"conv2.weight": 16, "fc1.weight": 1, "fc2.weight": 1}  # conv2 has 4 x 4 outputs
    dense = 4 * 9 * 64 + sum(uses[name] * masks[name].numel() for name in uses) + 5 * 16
    left = dense - sum(uses[name] * int((~masks[name]).sum()) for name in uses)
    assert 0.6 * dense - 16 < left <= 0.6 * dense
    assert not bool((masks["fc2.weight"] & ~given["fc2.weight"]).any())


# ---------------------------------------------------------------- what steps add up to


@pytest.mark.parametrize("schedule", [{"constant": {"every": "2 steps"}}, {"cubic": {"initial": 0.2, "every": "2 steps"}}], ids=str)
def test_no_mask_is_ranked_by_steps_before_the_first_one(schedule):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"before it has seen a step; let 'c[a-z]*' begin later"):
        build(model, niwaki.Recipe(sparsity=0.5, saliency="accumulated_movement", schedule=schedule), 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for saliency in ("accumulated_movement", {"mfac": {"dynamic": True, "gradients": 4}}):
        build(net(), niwaki.Recipe(sparsity=0.5, saliency=saliency, schedule="cubic"), 8)  # nothing is masked at first
    drawn = niwaki.Recipe(sparsity=0.5, saliency="accumulated_movement", schedule={"constant": {"every": "2 steps"}}, growth="random")
    build(net(), drawn, 8)


def test_statistics_of_steps_count_as_memory():
    recipe = niwaki.Recipe(sparsity=0.5, saliency={"mfac": {"dynamic": True, "gradients": 64}}, schedule="cubic")
    with pytest.raises(InputError, match=r"^memory: the statistics need 958 kB, .* for StepGradients, .*; window: 6 would fit$"):
        build(net(), recipe, 8, memory=100_000)


def test_gradients_that_a_scaler_has_scaled_add_up_unscaled():
    """A fused optimizer divides by the scale in its own step, after the hooks."""
    found = []
    for scaled in (False, True):
        model = net()
        recipe = niwaki.Recipe(sparsity=0.5, saliency="accumulated_movement", schedule={"one_shot": {"at": "1 run"}})
        sparsifier = build(model, recipe, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
        sparsifier.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2, enabled=scaled)
        for step in range(3):
            images, labels = batch(step)
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(images), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(sparsifier._watched_steps())
    for name, values in found[0].items():
        for request, value in values.items():
            assert torch.allclose(value, found[1][name][request], rtol=1e-5, atol=1e-9), name
            assert value.abs().max() > 0
