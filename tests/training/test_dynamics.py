"""What a training tells of its masks: FLOPs by RigL's accounting, and how they moved, against sums and sets written out."""

import pytest
import torch
from training.small import ELEMENTS, TARGETS, trainer

DENSE = 2 * (ELEMENTS + 32)
"""Forward FLOPs per example: two for a weight; the last layer has 32 weights and is no target."""

GMP = "{sparsity: 0.75, allocation: global, schedule: {cubic: {every: 3 steps, end: 20 steps}}}"
RIGL = "{sparsity: 0.75, schedule: {constant: {every: EVERY steps, end: 0.75 run}}, growth: {gradient: {fraction: 0.3, at_update: UPDATE}}}"
SET = "{sparsity: 0.75, schedule: {constant: {every: 4 steps, end: 0.75 run}}, growth: {random: {fraction: 0.3}}}"
AC_DC = "{sparsity: 0.75, allocation: global, growth: all, schedule: {phases: {dense: [0, 2], sparse: [1, 3], unit: epochs}}}"


def rigl(every, update="step"):
    return RIGL.replace("EVERY", str(every)).replace("UPDATE", update)


def forward(active):
    return 2 * (active + 32)


# ---------------------------------------------------------------- training FLOPs


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9])
def test_a_static_mask_costs_its_share_of_the_forward_pass(sparsity):
    done = trainer(f"{{sparsity: {sparsity}, allocation: global}}", epochs=2).run()
    active = round((1 - sparsity) * ELEMENTS)
    assert done.masks.active == active
    assert done.flops_multiplier == pytest.approx(forward(active) / DENSE, rel=1e-12)


@pytest.mark.parametrize(
    ("every", "update", "epochs", "updates"),
    [(5, "step", 2, 4), (5, "skip_step", 2, 4), (3, "skip_step", 2, 6), (26, "step", 4, 1), (1, "step", 1, 10)],
)
def test_rigl_costs_what_its_formula_says(every, update, epochs, updates):
    made = trainer(rigl(every, update), epochs=epochs)
    done = made.run()
    steps = 13 * epochs
    assert made.now.step == steps
    assert updates == len([step for step in range(1, steps) if step % every == 0 and step <= round(0.75 * steps)])
    sparse = forward(132)
    total = 3 * sparse * (steps - updates) + (2 * sparse + DENSE) * updates
    assert done.flops_multiplier == pytest.approx(total / (3 * DENSE * steps), rel=1e-12)


def test_set_needs_no_gradient_of_masked_weights():
    assert trainer(SET, epochs=2).run().flops_multiplier == pytest.approx(forward(132) / DENSE, rel=1e-12)


def test_gradual_pruning_costs_the_mean_of_what_was_active_in_the_forward_passes():
    done = trainer(GMP, epochs=2).run()
    active, total = ELEMENTS, 0
    for step in range(26):
        total += 3 * forward(active)  # the masks are updated between the backward pass and the optimizer's step
        if step == 20 or (step < 20 and step % 3 == 0):
            active = round((1 - 0.75 + 0.75 * max(0.0, 1 - step / 20) ** 3) * ELEMENTS)
    assert active == 132
    assert done.flops_multiplier == pytest.approx(total / (3 * DENSE * 26), rel=1e-12)


def test_a_learned_threshold_costs_what_is_left_at_every_step():
    made, after = trainer("{relaxation: {soft_threshold: {initial: -3.0, weight_decay: 0.1}}}", epochs=2), []
    start = made.task.build("small", made.data, 0)
    active = sum(int((start.get_parameter(name).abs() > torch.sigmoid(torch.tensor(-3.0))).sum()) for name in TARGETS)
    done = made.run(progress=lambda *_: after.append(sum(int((made.model.get_parameter(name) != 0).sum()) for name in TARGETS)))
    total = sum(3 * forward(n) for n in [active, *after[:-1]])
    assert 0 < done.masks.active < ELEMENTS
    assert done.flops_multiplier == pytest.approx(total / (3 * DENSE * 26), rel=1e-12)


def test_stages_add_up():
    text = "stages: [{for: 1 epochs}, {prune: {fraction: 0.5}}, {for: 2 epochs}, {for: 1 epochs, sparsity: 0.75, allocation: global}]"
    done = trainer(text, epochs=2).run()
    assert done.flops_multiplier == pytest.approx((DENSE + 2 * forward(264) + forward(132)) / (4 * DENSE), rel=1e-12)


# ---------------------------------------------------------------- how masks moved


@pytest.mark.parametrize("text", [rigl(4), rigl(5, "skip_step"), SET, GMP, AC_DC], ids=["rigl", "skip_step", "set", "gmp", "ac_dc"])
def test_dynamics_are_those_of_sets_of_active_weights(text):
    made = trainer(text, epochs=4)
    seen = []

    def hear(step, total, epoch):
        masks = made.sparsifier.masks
        seen.append({(name, i) for name in masks for i in masks[name].flatten().nonzero().flatten().tolist()})

    first = _first_masks(text)
    history = made.run(progress=hear).history
    assert [epoch.step for epoch in history] == [13, 26, 39, 52]
    then, ever, last = first, set(first), 0
    for epoch in history:
        now = seen[epoch.step - 1]
        for one in seen[last : epoch.step]:
            ever |= one
        last = epoch.step
        assert epoch.sparsity == (ELEMENTS - len(now)) / ELEMENTS
        if len(now) == ELEMENTS:
            assert epoch.dynamics is None
        else:
            assert epoch.dynamics.overlap == len(then & now) / len(then | now)
            assert (epoch.dynamics.pruned, epoch.dynamics.grown) == (len(then - now), len(now - then))
            assert epoch.dynamics.ever_active == pytest.approx(len(ever) / ELEMENTS, rel=1e-12)
        then = now
    assert any(epoch.dynamics is not None and epoch.dynamics.overlap < 1 for epoch in history)


def _first_masks(text):
    """The masks before the first step, as they are after it where it makes no update."""
    made = trainer(text, epochs=4)
    leaf, length = made.leaves[0], made.lengths[0]
    made._enter(leaf, length)
    masks = made.sparsifier.masks
    return {(name, i) for name in masks for i in masks[name].flatten().nonzero().flatten().tolist()}


@pytest.mark.filterwarnings("ignore:growth 'gradient' never acts")
def test_what_was_ever_active_begins_with_a_stage():
    text = f"stages: [{{for: 1 epochs, sparsity: 0.5, allocation: global}}, {{for: 1 epochs, {rigl(100)[1:-1]}}}, {{for: 1 epochs}}]"
    history = trainer(text, epochs=3).run().history
    assert [(epoch.dynamics.pruned, epoch.dynamics.grown) for epoch in history][::2] == [(0, 0), (0, 0)]
    assert [epoch.dynamics.ever_active for epoch in history][::2] == [0.5, 0.25]
    assert [epoch.stage for epoch in history] == [1, 2, 3]


def test_what_is_pruned_between_two_stages_is_told_with_the_next_epoch():
    text = "stages: [{for: 1 epochs, sparsity: 0.5, allocation: global}, {prune: {fraction: 0.5, allocation: global}}, {for: 1 epochs}]"
    first, second = trainer(text, epochs=2).run().history
    assert (first.dynamics.pruned, second.dynamics.pruned, second.dynamics.grown) == (0, ELEMENTS // 4, 0)
    assert second.dynamics.overlap == 0.5


@pytest.mark.parametrize(
    ("more", "learning"),
    [
        ("relaxation: latent", 132),
        ("relaxation: latent, gradient: dense", ELEMENTS),
        ("relaxation: latent, gradient: {superset: {sparsity: 0.5}}", ELEMENTS // 2),
        ("relaxation: {straight_through: {scores: zeros}}, saliency: score, schedule: {constant: {every: 1 steps}}", ELEMENTS),
    ],
)
def test_weights_that_learn_beside_the_active_ones_cost_their_gradient(more, learning):
    done = trainer(f"{{sparsity: 0.75, allocation: global, {more}}}", epochs=1).run()
    assert done.flops_multiplier == pytest.approx((2 * forward(132) + forward(learning)) / (3 * DENSE), rel=1e-12)
