"""Schedules that decide by what they see, and thresholds, against masks that are chosen by hand while training."""

import pytest
import torch
from support import TARGETS, batch, net, recipe
from torch.nn import functional

import niwaki
from niwaki.errors import InputError
from niwaki.selection import kept

STEPS, EVERY = 24, 3


def weights(model):
    return {name: dict(model.named_parameters())[name].detach().clone() for name in TARGETS}


def step_with(model, optimizer, step):
    images, labels = batch(step)
    optimizer.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def largest(model, sparsity):
    """The weights that are kept of each target by magnitude, all ranked together."""
    flat = torch.cat([w.abs().flatten() for w in weights(model).values()])
    order = torch.sort(flat, descending=True, stable=True).indices[: kept(sparsity, len(flat))]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    return mask


TEXT = "sparsity: 0.5\nallocation: global\nschedule: {mask_stability: {every: 3 steps, end: 1 run, window: 3, distance: %s}}"


def run(model, sparsifier, optimizer, steps, distance):
    """Train, and return the step before which the mask first acts, next to the step at which the oracle expects it."""
    expected, acted, seen = None, None, []
    for step in steps:
        if step % EVERY == 0 and expected is None:
            seen = [*seen, largest(model, 0.5)][-3:]
            if len(seen) == 3 and max(float((seen[2] != other).double().mean()) for other in seen[:2]) < distance:
                expected = step
        step_with(model, optimizer, step)
        if acted is None and sparsifier.sparsity > 0:
            acted = step
    return expected, acted, seen


@pytest.mark.parametrize("distance", [0.012, 0.03, 0.2])
def test_the_mask_acts_once_it_is_stable_and_never_changes(distance):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = niwaki.Sparsifier(model, recipe(TEXT % distance), total_steps=STEPS).attach(optimizer)
    expected, acted, seen = run(model, sparsifier, optimizer, range(STEPS), distance)
    assert acted == expected
    assert expected is not None
    flat = torch.cat([sparsifier.masks[name].flatten() for name in TARGETS])
    assert torch.equal(flat, seen[-1])
    sparsifier.finalize()
    assert torch.equal(torch.cat([sparsifier.masks[name].flatten() for name in TARGETS]), flat)
    assert not any("finalized after" in note for note in sparsifier.notes)


def test_the_last_candidate_acts_in_any_case():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    text = TEXT.replace("1 run", "12 steps") % 1e-9
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
    for step in range(STEPS):
        assert (sparsifier.sparsity > 0) == (step > 12)
        step_with(model, optimizer, step)
    assert sparsifier.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_resumed_run_waits_alike():
    def build():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, optimizer, niwaki.Sparsifier(model, recipe(TEXT % 0.012), total_steps=STEPS).attach(optimizer)

    whole = build()
    for step in range(STEPS):
        step_with(*whole[:2], step)
    assert whole[2].sparsity > 0
    for cut in (4, 7, 20):
        part, again = build(), build()
        for step in range(cut):
            step_with(*part[:2], step)
        for new, old in zip(again, part, strict=True):
            new.load_state_dict(old.state_dict())
        for step in range(cut, STEPS):
            step_with(*again[:2], step)
        assert again[2].masks == whole[2].masks
        assert all(torch.equal(p, q) for p, q in zip(again[0].parameters(), whole[0].parameters(), strict=True))


# ------------------------------------------------------------------ thresholds


def test_what_does_not_reach_the_threshold_goes():
    model = net()
    before = weights(model)
    sparsifier = niwaki.Sparsifier(model, recipe("selection: {threshold: 0.05}"), total_steps=STEPS)
    for name, weight in before.items():
        assert torch.equal(sparsifier.masks[name], weight.abs() >= 0.05)
    assert 0 < sparsifier.sparsity < 1


def test_a_threshold_acts_again_and_only_removes():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.05)
    text = (
        "granularity: output_channel\nsaliency: {magnitude: {norm: l2}}\nselection: {threshold: 0.45}\n"
        "schedule: {constant: {every: 4 steps, end: 1 run}}"
    )
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
    masks = sparsifier.masks
    for step in range(STEPS):
        norms = {name: weight.flatten(1).norm(dim=1) for name, weight in weights(model).items()}
        step_with(model, optimizer, step)
        if step % 4 == 0:
            for name in TARGETS:
                active = masks[name].flatten(1).any(1)
                expected = active & (norms[name] >= 0.45)
                if not expected.any():  # the best one stays
                    expected = norms[name] == norms[name].max()
                assert torch.equal(sparsifier.masks[name].flatten(1).any(1), expected)
            masks = sparsifier.masks


def test_a_threshold_that_nothing_reaches_keeps_one_piece_and_tells():
    model = net()
    best = {name: int(weight.abs().argmax()) for name, weight in weights(model).items()}
    with pytest.warns(UserWarning, match=r"kept one piece of fc1\.weight, of which no score reaches 100, the value of the threshold"):
        sparsifier = niwaki.Sparsifier(model, recipe("selection: {threshold: 100}"), total_steps=STEPS)
    for name, index in best.items():
        assert sparsifier.masks[name].flatten().nonzero().tolist() == [[index]]


def test_a_nan_score_is_told():
    model = net()
    with torch.no_grad():
        model.fc1.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"fc1\.weight"):
        niwaki.Sparsifier(model, recipe("selection: {threshold: 0.1}"), total_steps=STEPS)


# ------------------------------------------------------------------ thresholds that rise

RAMP = "schedule: {threshold_ramp: {begin: 3 steps, ramp: 9 steps, end: 17 steps, every: 4 steps, share: 0.6}}"


def test_rising_thresholds_mask_what_is_below_them_and_nothing_comes_back():
    """Against the published procedure, written out for each tensor."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    sparsifier = niwaki.Sparsifier(model, recipe(RAMP), total_steps=STEPS).attach(optimizer)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights(model).items()}
    references, sparsities = {}, []
    for step in range(STEPS):
        if step in (3, 7, 11, 15, 17):
            for name, weight in weights(model).items():
                sizes = weight.abs()
                if step == 3:
                    references[name] = sizes.flatten().sort().values[round(0.6 * sizes.numel())]  # 60 % of them rank below it
                theta = 2 * references[name] / (2 * (9 - 3) + 3 * (17 - 9))
                threshold = theta * (step - 2) if step < 9 else theta * 7 + 1.5 * theta * (step - 8)
                masks[name] &= sizes >= threshold
        step_with(model, optimizer, step)
        assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in masks.items())
        sparsities.append(sparsifier.sparsity)
    assert 0 < sparsities[3] < sparsities[9] < sparsities[-1]
    assert 0.5 < sparsities[-1] < 0.9
    sparsifier.finalize()
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in masks.items())


def test_rising_thresholds_are_of_the_weights_that_are_active_at_the_first_update():
    model = net()
    masks = niwaki.Sparsifier(model, recipe("sparsity: 0.5"), total_steps=1).finalize().masks
    before = weights(model)
    sparsifier = niwaki.Sparsifier(
        model, recipe("schedule: {threshold_ramp: {begin: 0 steps, ramp: 0 steps, end: 2 steps, share: 0.5}}"), masks=masks, total_steps=2
    )
    for name, weight in before.items():
        active = weight[masks[name]].abs().sort().values
        reference = active[round(0.5 * len(active))]
        assert torch.equal(sparsifier.masks[name], masks[name] & (weight.abs() >= 2 / 6 * (1 + 1.5) * reference))
        assert 0 < sparsifier.masks[name].sum() < masks[name].sum()


# ------------------------------------------------------------------ following the validation loss


def validation_batches():
    return [batch(500, size=24), batch(501, size=8)]


def validation_loss(model):
    """The mean over the 32 examples, of the model in evaluation mode."""
    images, labels = (torch.cat(parts) for parts in zip(*validation_batches(), strict=True))
    with torch.no_grad():
        before = model.training
        loss = functional.cross_entropy(model.eval()(images), labels).item()
        model.train(before)
    return loss


def sparsifier_of(model, text, **given):
    return niwaki.Sparsifier(
        model, recipe(text), total_steps=STEPS, validation=validation_batches(), loss=functional.cross_entropy, **given
    )


LPRUNE = "allocation: global\nschedule: {adaptive: {every: 2 steps, end: 20 steps, most: 0.3, gain: 0.02}}"


@pytest.mark.parametrize("ceiling", [None, 0.4])
@pytest.mark.parametrize("given", [iter, list])
def test_adaptive_pruning_against_a_loop_by_hand(ceiling, given):
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    text = LPRUNE + ("" if ceiling is None else f"\nsparsity: {ceiling}")
    sparsifier = niwaki.Sparsifier(
        model, recipe(text), total_steps=STEPS, validation=given(validation_batches()), loss=functional.cross_entropy
    ).attach(optimizer)
    pieces = sum(w.numel() for w in weights(model).values())
    mask, losses, counts, asked = torch.ones(pieces, dtype=torch.bool), [], [], 0
    for step in range(STEPS):
        if step % 2 == 0 and step <= 20:
            losses.append(validation_loss(model))
            rise = 100 * (losses[-1] / min(losses) - 1)
            fraction = 0.3 * (1 - 1 / (1 + 0.02 * rise))
            asked += fraction > 0
            stay = max(round((1 - fraction) * int(mask.sum())), 0 if ceiling is None else round((1 - ceiling) * pieces))
            sizes = torch.cat([w.abs().flatten() for w in weights(model).values()]).masked_fill(~mask, -1)
            mask = torch.zeros_like(mask)
            mask[torch.sort(sizes, descending=True, stable=True).indices[:stay]] = True
        step_with(model, optimizer, step)
        found = torch.cat([sparsifier.masks[name].flatten() for name in TARGETS])
        assert torch.equal(found, mask), step
        counts.append(int(mask.sum()))
    assert len(set(counts)) > (2 if ceiling is None else 1)
    assert any(a == b for a, b in zip(counts[::2], counts[2::2], strict=False))  # where the loss was at its best, nothing goes
    sparsifier.finalize()
    [note] = sparsifier.notes
    assert note == (
        f"schedule 'adaptive': the validation loss asked for pruning in {asked} of 11 looks, to a sparsity of {1 - counts[-1] / pieces:.4g}"
    )


def test_masks_stay_where_the_loss_asks_for_nothing_also_where_dense_weights_could_change_them():
    model, changed = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    sparsifier = sparsifier_of(model, LPRUNE + "\nrelaxation: latent\ngradient: dense").attach(optimizer)
    sparsifier.on_masks_changed(lambda _: changed.append(sparsifier.step))
    for step in range(STEPS):
        step_with(model, optimizer, step)
    looks = sparsifier._selector.schedule_state.validations
    assert changed == [2 * n for n, look in enumerate(looks) if look.fraction > 0]
    assert 2 < len(changed) < len(looks)


def test_a_look_at_the_validation_loss_leaves_no_trace():
    """Where the loss never asks for anything, training is what it was without the schedule: buffers, gradients, random numbers."""
    plain, watched, drawn = net(), net(), []
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (plain, watched)]
    sparsifier_of(watched, "schedule: {rising_loss: {every: 1 steps, first: 1e-9, then: 1e-9, end: 1 run}}").attach(optimizers[1])
    for step in range(6):
        for model, optimizer in zip((plain, watched), optimizers, strict=True):
            torch.manual_seed(step)
            step_with(model, optimizer, step)
            drawn.append(float(torch.rand(())))
    assert drawn[::2] == drawn[1::2]
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True))


@pytest.mark.parametrize("text", [LPRUNE, LPRUNE.replace("global", "uniform") + "\nsparsity: 0.6", RAMP])
def test_a_resumed_run_goes_on_with_what_it_has_seen(text):
    def build():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        return model, optimizer, sparsifier_of(model, text).attach(optimizer)

    whole = build()
    for step in range(STEPS):
        step_with(*whole[:2], step)
    assert whole[2].finalize().sparsity > 0.05
    for cut in (1, 5, 8, 13, 22):
        part, again = build(), build()
        for step in range(cut):
            step_with(*part[:2], step)
        for new, old in zip(again, part, strict=True):
            new.load_state_dict(old.state_dict())
        for step in range(cut, STEPS):
            step_with(*again[:2], step)
        assert again[2].finalize().notes == whole[2].notes
        assert again[2].masks == whole[2].masks
        assert all(torch.equal(p, q) for p, q in zip(again[0].parameters(), whole[0].parameters(), strict=True))


def test_what_a_validation_loss_needs_is_told():
    for given in ({}, {"loss": functional.cross_entropy}, {"validation": validation_batches()}):
        with pytest.raises(InputError, match=r"^schedule: 'adaptive' needs validation= and loss=, to see how the loss of other"):
            niwaki.Sparsifier(net(), recipe(LPRUNE), total_steps=STEPS, **given)
    model = net()
    sparsifier = sparsifier_of(model, LPRUNE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    step_with(model, optimizer, 0)
    step_with(model, optimizer, 1)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    with pytest.raises(niwaki.NiwakiError, match=r"^the validation loss is nan"):
        step_with(model, optimizer, 2)


# ------------------------------------------------------------------ what a plan says


def test_plans_say_what_decides():
    by_scores = niwaki.plan(
        net(), recipe("selection: {threshold: 0.05}\nschedule: {constant: {every: 4 steps, end: 1 run}}"), total_steps=8
    )
    assert by_scores.updates == {0: None, 4: None, 8: None}
    assert [row.keep for row in by_scores.tensors] == [None] * 3
    assert "selection threshold: the scores decide" in str(by_scores)
    nothing = niwaki.plan(net(), recipe("penalty: l1"), total_steps=8)
    assert nothing.updates == {}
    assert [row.keep for row in nothing.tensors] == [row.pieces for row in nothing.tensors]
    assert "masks are updated: never" in str(nothing)
    waiting = niwaki.plan(net(), recipe(TEXT % 0.1), total_steps=8)
    assert list(waiting.updates) == [0, 3, 6, 8]
    for text, why in (
        (LPRUNE + "\nsparsity: 0.6", "schedule adaptive: the validation loss decides, at most 0.6"),
        (RAMP, "schedule threshold_ramp: the scores decide"),
    ):
        plan = niwaki.plan(net(), recipe(text), total_steps=STEPS)
        assert {row.why for row in plan.tensors} == {why}
        assert [row.keep for row in plan.tensors] == [None] * 3
        assert set(plan.updates.values()) == {None}
