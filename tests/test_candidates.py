"""Thresholds and waiting for a stable mask, against masks that are chosen by hand while training."""

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
