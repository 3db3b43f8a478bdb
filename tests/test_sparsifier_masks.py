"""A sparsifier that starts from masks, and one that only holds them."""

import io

import pytest
import torch
from support import DPF, GMP, RIGL, SET, STR, TARGETS, batch, net, pruned_are_zero, recipe, train
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.calibration import forward
from niwaki.masks import Masks
from niwaki.sparsifier import hold

STEPS = 24


def random_masks(model, sparsity=0.5, names=TARGETS, seed=5):
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    return Masks({name: torch.rand(parameters[name].shape, generator=generator) >= sparsity for name in names})


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)


def run(model, sparsifier, steps=STEPS, after=lambda step: None):
    train(model, [sparsifier._optimizers[0]], range(steps), after)
    return sparsifier.finalize().masks


# ---------------------------------------------------------------- holding


def test_held_masks_stay_while_everything_else_learns():
    model, untouched = net(), net()
    masks = random_masks(model, names=("conv1.weight", "fc1.weight", "norm.weight"))  # also what no recipe acts on by default
    held = hold(model, masks)
    assert pruned_are_zero(model, masks)
    assert held.masks == masks
    assert held.sparsity == masks.sparsity
    held.attach(adam(model))
    run(model, held, after=lambda step: None if pruned_are_zero(model, masks) else pytest.fail("a pruned weight moved"))
    assert held.masks == masks
    assert pruned_are_zero(model, masks)
    for name, parameter in model.named_parameters():
        before = dict(untouched.named_parameters())[name]
        assert not torch.equal(parameter[masks[name]] if name in masks else parameter, before[masks[name]] if name in masks else before)


def test_held_masks_equal_a_model_that_is_multiplied_by_them():
    """SGD on the held model is SGD on ``loss(m * w)`` from the masked weights: the oracle has the mask inside its forward."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    held = hold(model, Masks({"0.weight": mask}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held.attach(optimizer)
    inputs = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(16) % 3
    for _ in range(10):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        hidden = torch.tanh(inputs @ (weights["0.weight"] * mask).T + weights["0.bias"])
        loss = functional.cross_entropy(hidden @ weights["2.weight"].T + weights["2.bias"], targets)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight -= 0.1 * gradient
    torch.testing.assert_close(model[0].weight.detach(), weights["0.weight"].detach() * mask, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model[2].weight.detach(), weights["2.weight"].detach(), rtol=1e-12, atol=1e-14)


def test_an_optimizer_that_has_stepped_before_forgets_what_is_pruned():
    model = net()
    optimizer = adam(model)
    train(model, [optimizer], range(3))
    mask = random_masks(model)["fc1.weight"]
    before = optimizer.state[model.fc1.weight]["exp_avg"].clone()
    hold(model, Masks({"fc1.weight": mask})).attach(optimizer)
    after = optimizer.state[model.fc1.weight]["exp_avg"]
    assert before[~mask].any()
    assert torch.equal(after, before * mask)


def test_a_holding_sparsifier_shares_an_optimizer_even_with_one_that_skips_steps():
    model = net()
    optimizer = adam(model)
    masks = random_masks(model, names=("fc1.weight",))
    held = hold(model, masks).attach(optimizer)
    text = "target: {weights: {include: [fc2.weight]}}\n" + RIGL
    acting = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
    first = acting.masks
    train(model, [optimizer], range(STEPS))
    assert acting.masks != first
    assert (held.finalize().masks, held.step) == (masks, STEPS)
    assert pruned_are_zero(model, masks)
    assert pruned_are_zero(model, acting.finalize().masks)


def test_nothing_to_do_and_masks_that_do_not_fit_are_told():
    model = net()
    with pytest.raises(niwaki.InputError, match="masks nothing, and there are no masks= to hold"):
        hold(model, Masks())
    with pytest.raises(niwaki.InputError, match=r"'fc3\.weight' is not a parameter of this Net; did you mean 'fc2\.weight'"):
        hold(model, Masks({"fc3.weight": torch.ones(2, 2, dtype=torch.bool)}))
    with pytest.raises(niwaki.InputError, match="shape"):
        niwaki.Sparsifier(model, recipe(GMP), total_steps=STEPS, masks=Masks({"fc2.weight": torch.ones(2, 2, dtype=torch.bool)}))
    with pytest.raises(niwaki.InputError, match="it has stages"):
        niwaki.Sparsifier(model, recipe("stages: [{for: 1 run}]"), total_steps=STEPS)


def test_masks_of_wrapped_and_of_tied_names_are_held():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    mask = torch.eye(4, dtype=torch.bool)
    held = hold(model, Masks({"module.2.weight": mask}))
    assert torch.equal(model[0].weight != 0, mask)
    assert torch.equal(next(iter(held.masks.values())), mask)


# ---------------------------------------------------------------- starting from masks


@pytest.mark.parametrize("allocation", ["global", "uniform", "erdos_renyi"])
def test_without_growth_only_what_is_active_is_chosen(allocation):
    model = net()
    masks = random_masks(model)
    text = f"sparsity: 0.9\nallocation: {allocation}\nschedule: {{cubic: {{every: 3 steps, end: 0.75 run}}}}"
    sparsifier = niwaki.Sparsifier(model, recipe(text), masks=masks, total_steps=STEPS).attach(adam(model))
    assert sparsifier.masks == masks  # the schedule begins at 0: what was masked stays masked
    seen = [masks]

    def after(step):
        assert (sparsifier.masks - seen[-1]).active == 0
        assert pruned_are_zero(model, sparsifier.masks)
        seen.append(sparsifier.masks)

    final = run(model, sparsifier, after=after)
    assert final.active == round(0.1 * masks.total)
    assert (final - masks).active == 0


def test_the_first_selection_from_masks_takes_the_largest_of_what_is_active():
    """Against a plain sort of the active magnitudes."""
    model = net()
    masks = random_masks(model)
    weights = torch.cat([dict(model.named_parameters())[name].detach().abs().flatten() for name in TARGETS])
    active = torch.cat([masks[name].flatten() for name in TARGETS])
    keep = round(0.2 * len(weights))
    expected = torch.zeros_like(active)
    expected[torch.where(active, weights, -1.0).topk(keep).indices] = True
    chosen = niwaki.Sparsifier(model, recipe("{sparsity: 0.8, allocation: global}"), masks=masks).masks
    assert torch.equal(torch.cat([chosen[name].flatten() for name in TARGETS]), expected)


def test_masks_through_pieces_stay_and_pieces_are_counted():
    model = net()
    masks = random_masks(model, 0.5)
    text = "{sparsity: 0.5, granularity: output_channel, allocation: uniform}"
    chosen = niwaki.Sparsifier(model, recipe(text), masks=masks).masks
    assert (chosen - masks).active == 0
    for name, mask in chosen.items():
        rows = mask.flatten(1).any(dim=1)
        assert int(rows.sum()) == round(0.5 * len(rows))
        assert torch.equal(mask[rows], masks[name][rows])


def test_a_lower_final_sparsity_needs_growth():
    model = net()
    masks = random_masks(model, 0.8)
    with pytest.raises(niwaki.InputError, match=r"^sparsity: 0\.5 is below that of the masks to start from, 0\.\d+, and growth: none"):
        niwaki.Sparsifier(model, recipe("sparsity: 0.5"), masks=masks)
    text = "{sparsity: 0.5, growth: random, schedule: {constant: {every: 4 steps, end: 0.75 run}}}"
    sparsifier = niwaki.Sparsifier(model, recipe(text), masks=masks, total_steps=STEPS).attach(adam(model))
    assert run(model, sparsifier).sparsity == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("text", [RIGL, SET])
def test_given_masks_are_the_first_ones_of_a_growth(text):
    """They are not drawn anew: the first update exchanges some of them."""
    model = net()
    masks = random_masks(model, 0.8)
    data = [batch(-1)]
    sparsifier = niwaki.Sparsifier(model, recipe(text), masks=masks, total_steps=STEPS, data=data, loss=functional.cross_entropy).attach(
        adam(model)
    )
    drawn = niwaki.Sparsifier(net(), recipe(text), total_steps=STEPS).masks
    assert sparsifier.masks.iou(masks) > 2 * drawn.iou(masks)
    assert sparsifier.masks != masks
    final = run(model, sparsifier)
    assert final.active == drawn.active
    assert pruned_are_zero(model, final)


def test_masks_without_a_zero_leave_the_first_mask_to_the_growth():
    model = net()
    everything = Masks({name: torch.ones_like(mask) for name, mask in random_masks(model).items()})
    assert niwaki.Sparsifier(model, recipe(SET), masks=everything, total_steps=STEPS).masks == (
        niwaki.Sparsifier(net(), recipe(SET), total_steps=STEPS).masks
    )


def test_growth_without_data_waits_for_the_first_gradients():
    model = net()
    masks = random_masks(model, 0.8)
    with pytest.warns(UserWarning, match="growth 'gradient' had no data="):
        sparsifier = niwaki.Sparsifier(model, recipe(RIGL), masks=masks, total_steps=STEPS).attach(adam(model))
    assert sparsifier.masks == masks
    assert sparsifier.needs_dense_gradient
    train(model, [sparsifier._optimizers[0]], range(1))
    assert sparsifier.masks != masks
    assert not sparsifier.needs_dense_gradient


def test_tensors_that_are_no_targets_keep_their_masks_beside_an_acting_recipe():
    model = net()
    masks = random_masks(model, names=("conv1.weight", "fc1.weight"))
    text = "target: {weights: {include: [fc2.weight]}}\n" + RIGL
    sparsifier = niwaki.Sparsifier(model, recipe(text), masks=masks, total_steps=STEPS).attach(adam(model))
    gradient_zero = []

    def after(step):
        now = sparsifier.masks
        assert Masks({name: now[name] for name in masks}) == masks
        assert pruned_are_zero(model, now)
        if model.conv1.weight.grad is not None:  # RigL skips its update steps
            gradient_zero.append(not model.conv1.weight.grad[~masks["conv1.weight"]].any())

    final = run(model, sparsifier, after=after)
    assert all(gradient_zero)
    assert set(final) == {"conv1.weight", "fc1.weight", "fc2.weight"}
    assert final["fc2.weight"].sum() == round(0.2 * 16 * 24)


@pytest.mark.parametrize("text", [DPF, STR])
def test_relaxations_start_from_masks(text):
    model = net()
    masks = random_masks(model)
    sparsifier = niwaki.Sparsifier(model, recipe(text), masks=masks, total_steps=STEPS).attach(adam(model))
    assert pruned_are_zero(model, masks)
    final = run(model, sparsifier)
    assert pruned_are_zero(model, final)
    if text is STR:  # nothing else brings weights back than a selection
        assert (final - masks).active == 0


def test_inputs_of_several_tensors():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, a, b):
            return self.second(torch.relu(self.first(a + b)))

    model = Sum()
    a, b, labels = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) % 2
    assert torch.equal(forward(model, (a, b)), model(a, b))
    assert torch.equal(forward(model.first, a), model.first(a))
    text = "{sparsity: 0.5, saliency: snip, normalization: per_flop, target: {weights: {include: [first]}}}"
    masks = niwaki.Sparsifier(model, recipe(text), data=[((a, b), labels)], loss=functional.cross_entropy).masks
    gradient = torch.autograd.grad(functional.cross_entropy(model(a, b), labels), model.first.weight)[0]
    assert masks["first.weight"].sum() == 16
    assert not gradient[~masks["first.weight"]].isnan().any()


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "text", ["", GMP, "target: {weights: {include: [fc2.weight]}}\n" + RIGL, "target: {weights: {include: [fc1.weight]}}\n" + STR, DPF]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_training_equals_the_uninterrupted_one(text):
    def start():
        model = net()
        masks = random_masks(model, names=("conv1.weight", *TARGETS))
        sparsifier = niwaki.Sparsifier(model, recipe(text), masks=masks, total_steps=STEPS) if text else hold(model, masks)
        optimizer = adam(model)
        return model, optimizer, sparsifier.attach(optimizer)

    def result(model, optimizer, sparsifier):
        state = [value for slots in optimizer.state_dict()["state"].values() for value in slots.values()]
        return [*model.state_dict().values(), *state, *sparsifier.finalize().masks.values()]

    whole = start()
    train(whole[0], [whole[1]], range(STEPS // 2))
    saved = torch.load(stored([part.state_dict() for part in whole]), weights_only=True)
    train(whole[0], [whole[1]], range(STEPS // 2, STEPS))
    resumed = start()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    train(resumed[0], [resumed[1]], range(STEPS // 2, STEPS))
    for a, b in zip(result(*whole), result(*resumed), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def stored(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def test_a_state_with_other_held_tensors_is_refused():
    model = net()
    masks = random_masks(model)
    state = hold(model, masks).state_dict()
    with pytest.raises(niwaki.InputError, match=r"conv2\.weight is a target of only one of them"):
        hold(net(), Masks({name: masks[name] for name in TARGETS if name != "conv2.weight"})).load_state_dict(state)


def test_a_threshold_leaves_a_tensor_empty_that_masks_have_emptied():
    model = net()
    nothing = niwaki.Masks({"fc1.weight": torch.zeros(24, 128, dtype=torch.bool)})
    sparsifier = niwaki.Sparsifier(model, recipe("selection: {threshold: 0.05}"), masks=nothing, total_steps=1)
    assert sparsifier.masks["fc1.weight"].sum() == 0
    assert torch.equal(sparsifier.masks["fc2.weight"], model.fc2.weight.abs() >= 0.05)
