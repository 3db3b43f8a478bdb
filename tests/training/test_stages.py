"""Trainings through the stages of a recipe: learning rate, masks, pruning, rewinding, relaxations, distillation."""

import math

import pytest
import torch
from torch.nn import functional
from training import small
from training.small import ELEMENTS, TARGETS, trainer

import niwaki
from niwaki.counter import key
from niwaki.errors import InputError
from niwaki.tasks import Model, Training
from niwaki.training.loop import batches
from niwaki.training.trainer import Trainer

STEPS = 13
"""Of an epoch."""

TICKET = """
stages:
- {for: 5 steps, save: ticket}
- repeat: 3
  stages:
  - {for: 1 run}
  - {prune: {fraction: 0.2, saliency: magnitude, allocation: global}, restore: {weights: ticket, optimizer: fresh, learning_rate: ticket}}
- {for: 1 run}
"""


def followed(text, **settings):
    """Train, and return the trainer, what was trained, and the learning rate, state of the model and masks after every step."""
    made, rates, states, masks = trainer(text, **settings), [], [], []

    def hear(step, total, epoch):
        rates.append(made.optimizer.param_groups[0]["lr"])
        states.append(small.weights(made.model))
        masks.append(made.masks if made.sparsifier is None else made.sparsifier.masks)

    return made, made.run(progress=hear), rates, states, masks


def cosine(position, horizon):
    return 0.1 * (1 + math.cos(math.pi * position / horizon)) / 2


# ---------------------------------------------------------------- the learning rate


def test_stages_share_the_schedule_of_the_run():
    _, _, rates, _, _ = followed("stages: [{for: 0.5 run}, {for: 1 epochs}]", epochs=2)
    assert rates == pytest.approx([cosine(step, 26) for step in range(26)])


def test_a_stage_that_would_outlast_the_schedule_stretches_it():
    _, _, rates, _, _ = followed("stages: [{for: 0.5 run}, {for: 1.5 run}]", epochs=2)
    assert rates == pytest.approx([cosine(step, 26) for step in range(13)] + [cosine(step, 52) for step in range(13, 52)])


def test_a_stage_that_begins_after_its_end_starts_it_anew():
    _, _, rates, _, _ = followed("stages: [{for: 1 run}, {for: 1 epochs}, {for: 6 steps}]", epochs=2)
    assert rates == pytest.approx([cosine(step, n) for n in (26, 13, 6) for step in range(n)])


def test_the_learning_rate_goes_back_with_its_snapshot():
    text = "stages: [{for: 6 steps, save: early}, {for: 20 steps}, {restore: {learning_rate: early}}, {for: 20 steps}]"
    made, _, rates, _, _ = followed(text, epochs=2)
    assert rates == pytest.approx([cosine(step, 26) for step in [*range(26), *range(6, 26)]])
    assert made.total_steps == 46


def test_warm_up_is_part_of_the_schedule_that_starts_anew():
    _, _, rates, _, _ = followed("stages: [{for: 1 run}, {for: 1 run}]", epochs=1, warmup=0.2)
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[13:] == rates[:13]


# ---------------------------------------------------------------- saving and restoring


@pytest.mark.parametrize("optimizer", ["keep", "fresh", "early"])
def test_right_after_a_restore_weights_and_optimizer_are_those_of_the_snapshot(optimizer):
    text = "stages: [{for: 6 steps, save: early}, {for: 20 steps}, {restore: {weights: early, optimizer: OPTIMIZER}}]"
    made, optimizers = trainer(text.replace("OPTIMIZER", optimizer), epochs=2), []
    states = []

    def hear(step, total, epoch):
        states.append(small.weights(made.model))
        optimizers.append([made.optimizer.state[p]["momentum_buffer"].clone() for p in made.model.parameters()])

    made.run(progress=hear)
    now = made.model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in states[5].items())  # the batch norm's buffers too
    assert not torch.equal(now["0.weight"], states[-1]["0.weight"])
    expected = {"keep": optimizers[-1], "fresh": None, "early": optimizers[5]}[optimizer]
    if expected is None:
        assert not made.optimizer.state
    else:
        found = [made.optimizer.state[p]["momentum_buffer"] for p in made.model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert made.optimizer.param_groups[0]["params"][0] is made.model[0].weight


def test_a_snapshot_is_taken_after_the_pruning_and_before_the_restoring_of_its_stage():
    text = """
    stages:
    - {for: 6 steps, save: early}
    - {for: 20 steps, prune: {fraction: 0.5}, save: late, restore: {weights: early}}
    - {restore: {weights: late}}
    """
    made, done, _, states, _ = followed(text, epochs=2)
    now = made.model.state_dict()
    assert done.masks.active == ELEMENTS // 2
    for name, value in states[-1].items():
        assert torch.equal(now[name], value * done.masks[name] if name in done.masks else value)


def test_what_was_saved_does_not_move_with_the_model():
    """A snapshot can be restored twice, and is the same each time."""
    text = """
    stages:
    - {for: 6 steps, save: early}
    - repeat: 2
      stages: [{for: 9 steps}, {restore: {weights: early, optimizer: early}}]
    """
    made, _, _, states, _ = followed(text, epochs=2)
    assert all(torch.equal(made.model.state_dict()[name], value) for name, value in states[5].items())


def test_an_average_begins_anew_after_rewinding():
    text = "stages: [{for: 6 steps, save: early}, {for: 20 steps}, {restore: {weights: early}}, {for: 2 steps}]"
    made, _, _, states, _ = followed(text, epochs=2, ema=0.9, model="plain")
    expected = {name: 0.9 * states[-2][name] + 0.1 * states[-1][name] for name in states[0]}
    for name, value in made.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_a_lottery_ticket_in_small():
    made, done, rates, states, masks = followed(TICKET, epochs=1)
    active = [ELEMENTS]
    for _ in range(3):
        active.append(round(0.8 * active[-1]))
    assert active == [528, 422, 338, 270]
    assert [stage.sparsity for stage in done.stages] == [(ELEMENTS - active[n]) / ELEMENTS for n in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert [(stage.begin, stage.end) for stage in done.stages] == [
        (0, 5), (5, 18), (18, 18), (18, 31), (31, 31), (31, 44), (44, 44), (44, 57),
    ]  # fmt: skip
    assert [sum(int(m.sum()) for m in masks[step].values()) or ELEMENTS for step in (17, 18, 30, 31, 43, 44, 56)] == [
        528, 422, 422, 338, 338, 270, 270,
    ]  # fmt: skip
    assert rates == pytest.approx([cosine(s, 13) for s in range(5)] + 4 * [cosine(s, 18) for s in range(5, 18)])

    # Each round prunes the smallest magnitudes of what is left, all layers together, and nothing comes back.
    before = torch.ones(ELEMENTS, dtype=torch.bool)
    for last, first in ((17, 18), (30, 31), (43, 44)):
        trained = torch.cat([states[last][name].flatten() for name in TARGETS]).abs()
        now = torch.cat([masks[first][name].flatten() for name in TARGETS])
        ranked = trained.masked_fill(~before, -1.0).argsort(descending=True, stable=True)
        expected = torch.zeros_like(before)
        expected[ranked[: int(now.sum())]] = True
        assert torch.equal(now, expected)
        before = now
    assert torch.equal(before, torch.cat([done.masks[name].flatten() for name in TARGETS]))

    # The first step after a rewinding is a step from the ticket, under the mask, with an optimizer that knows nothing.
    for first, batch in ((18, 18), (31, 31), (44, 44)):
        model = made.task.build("small", made.data, 0)
        model.load_state_dict(states[4])
        with torch.no_grad():
            for name, mask in masks[first].items():
                model.get_parameter(name).mul_(mask)
        optimizer = torch.optim.SGD(model.parameters(), lr=rates[first], momentum=0.9, weight_decay=5e-4)
        epoch, number = divmod(batch, STEPS)
        inputs, labels = list(batches(made.data.train, 16, 0, epoch + 1))[number]
        functional.cross_entropy(model(inputs), labels).backward()
        for name, mask in masks[first].items():
            model.get_parameter(name).grad.mul_(mask)
        optimizer.step()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(states[first][name], value * masks[first][name] if name in TARGETS else value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "rates_of_rounds"),
    [
        ("lottery_ticket", [cosine(s, 26) for s in range(1, 26)]),
        ("learning_rate_rewinding", [cosine(s, 26) for s in range(3, 26)]),
        ("train_prune_retrain", [cosine(s, 6) for s in range(6)]),
    ],
)
def test_the_rows_of_the_catalogue_that_have_stages(name, rates_of_rounds):
    made, done, rates, states, _ = followed(niwaki.METHODS[name].recipe.to_yaml(), epochs=2)
    active = [ELEMENTS]
    for _ in range(10):
        active.append(round(0.8 * active[-1]))
    left = [round((1 - stage.sparsity) * ELEMENTS) for stage in done.stages]
    assert list(dict.fromkeys(left)) == active
    assert rates[:26] == pytest.approx([cosine(s, 26) for s in range(26)])
    assert rates[26:] == pytest.approx(10 * rates_of_rounds)
    assert [stage.begin for stage in done.stages if stage.begin == stage.end] == [26 + len(rates_of_rounds) * n for n in range(10)]
    assert made.now.step == len(states) == 26 + 10 * len(rates_of_rounds)


# ---------------------------------------------------------------- masks over several stages


def test_masks_persist_in_later_stages_that_only_train():
    _, done, _, states, masks = followed("stages: [{for: 4 steps, sparsity: 0.5}, {for: 1 epochs}, {for: 5 steps}]", epochs=2)
    assert all(found == done.masks for found in masks)
    assert done.masks.active == ELEMENTS // 2
    assert all((state[name][~mask] == 0).all() for state in states for name, mask in done.masks.items())
    assert not torch.equal(states[3]["0.weight"], states[-1]["0.weight"])
    assert [stage.sparsity for stage in done.stages] == [0.5, 0.5, 0.5]


def test_a_stage_without_training_prunes_at_once():
    _, done, _, states, masks = followed("stages: [{for: 4 steps}, {sparsity: 0.75, allocation: global}, {for: 3 steps}]", epochs=2)
    trained = torch.cat([states[3][name].flatten() for name in TARGETS]).abs()
    kept = torch.cat([masks[4][name].flatten() for name in TARGETS])
    assert kept.sum() == 132
    assert trained[kept].min() >= trained[~kept].max()
    assert (done.stages[1].begin, done.stages[1].end) == (4, 4)


def test_stages_with_targets_of_their_own_leave_each_others_masks_alone():
    text = """
    stages:
    - {for: 4 steps, sparsity: 0.5, target: {weights: {include: [0.weight]}}}
    - {for: 9 steps, sparsity: 0.75, schedule: {cubic: {every: 1 steps, end: 8 steps}}, target: {weights: {include: [3.weight]}}}
    - {for: 1 epochs}
    """
    _, done, _, states, masks = followed(text, epochs=2)
    assert {name: int(mask.sum()) for name, mask in done.masks.items()} == {"0.weight": 72, "3.weight": 96}
    assert list(masks[0]) == ["0.weight"]
    assert all(torch.equal(found["0.weight"], done.masks["0.weight"]) for found in masks)
    assert all((state["0.weight"][~done.masks["0.weight"]] == 0).all() for state in states)
    assert all((state["3.weight"][~done.masks["3.weight"]] == 0).all() for state in states[13:])
    assert [stage.sparsity for stage in done.stages] == [0.5, (72 + 288) / 528, (72 + 288) / 528]


def test_growth_in_a_later_stage_starts_from_the_masks_of_the_earlier_one():
    rigl = "schedule: {constant: {every: 4 steps, end: 0.75 run}}, growth: {gradient: {fraction: 0.3, at_update: step}}"
    text = f"stages: [{{for: 4 steps, sparsity: 0.75}}, {{for: 1 run, sparsity: 0.75, {rigl}}}]"
    _, done, _, _, masks = followed(text, epochs=2)
    assert masks[4].iou(masks[3]) >= 0.7 / 1.3  # 70 % of the active weights stay in an update, where masks of its own would keep 25 %
    assert done.masks != masks[3]
    assert {name: int(mask.sum()) for name, mask in done.masks.items()} == {"0.weight": 36, "3.weight": 96}


@pytest.mark.parametrize(
    "relaxation",
    [
        "relaxation: {soft_threshold: {initial: -3.0, weight_decay: 0.1}}",
        "relaxation: {straight_through: {learning_rate: 1e-2}}, sparsity: 0.8, saliency: score, schedule: {cubic: {every: 1 steps}}",
        "relaxation: latent, sparsity: 0.8, schedule: {constant: {every: 1 steps}}, gradient: {superset: {sparsity: 0.6}}",
    ],
)
def test_nothing_is_left_of_a_relaxation_after_its_stage(relaxation):
    made, done, rates, states, masks = followed(f"stages: [{{for: 1 run, {relaxation}}}, {{for: 1 epochs}}]", epochs=1)
    assert [len(group["params"]) for group in made.optimizer.param_groups] == [8]
    assert set(made.optimizer.state) == set(made.model.parameters())
    assert rates == pytest.approx([cosine(s, 13) for s in range(13)] * 2)
    assert 0 < done.masks.sparsity < 1
    assert all(found == done.masks for found in masks[13:])
    assert all((state[name][~mask] == 0).all() for state in states[13:] for name, mask in done.masks.items())
    assert all(bool((states[-1][name][mask] != 0).all()) for name, mask in done.masks.items())
    assert not torch.equal(states[13]["3.weight"], states[-1]["3.weight"])


def test_own_parameters_follow_the_schedule_from_their_own_learning_rate():
    text = "relaxation: {straight_through: {learning_rate: 1e-2}}, sparsity: 0.8, saliency: score, schedule: {cubic: {every: 1 steps}}"
    made, rates = trainer(f"{{{text}}}", epochs=1), []
    made.run(progress=lambda *_: rates.append([group["lr"] for group in made.optimizer.param_groups]))
    assert [rate[0] for rate in rates] == pytest.approx([cosine(s, 13) for s in range(13)])
    assert [rate[1] for rate in rates] == pytest.approx([0.1 * cosine(s, 13) for s in range(13)])


# ---------------------------------------------------------------- what is added to the loss


def test_distillation_changes_the_loss_as_its_equation_says():
    """One step of plain gradient descent, against autograd on the equation written out."""
    settings = {
        "epochs": 1,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "model": "plain",
        "learning_rate_schedule": "constant",
        "batch_size": 200,
    }
    made = trainer("stages: [{for: 1 steps, objective: {distillation: {temperature: 3.0, weight: 0.7}}}]", **settings)
    model = made.task.build("plain", made.data, 0)
    inputs, labels = next(batches(made.data.train, 200, 0, 1))
    z, t = model(inputs), made.teacher(inputs).detach()
    p, q = torch.softmax(t / 3, 1), torch.softmax(z / 3, 1)
    cross_entropy = -torch.log_softmax(z, 1)[torch.arange(200), labels].mean()
    loss = 0.3 * cross_entropy + 0.7 * 9 * (p * (p / q).log()).sum(1).mean()
    loss.backward()
    [history] = made.run().history
    assert history.train_loss == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(made.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad, rtol=1e-5, atol=1e-7)
    plain = trainer(None, **settings)
    assert plain.run().history[0].train_loss == pytest.approx(cross_entropy.item(), rel=1e-6)


def test_an_objective_of_one_stage_ends_with_it():
    text = "stages: [{for: 1 run, objective: distillation}, {for: 1 run}]"
    asked = []
    made = trainer(text, epochs=1)
    made.teacher.register_forward_hook(lambda *_: asked.append(made.now.step))
    made.run()
    assert asked == list(range(13))
    assert not made.teacher.training
    assert all(p.grad is None for p in made.teacher.parameters())


# ---------------------------------------------------------------- what the user is told


def test_the_record_says_what_each_stage_did():
    _, done, _, _, _ = followed(
        "stages: [{for: 20 steps, save: a}, {prune: {fraction: 0.5}}, {for: 1 epochs, restore: {weights: a}}]", epochs=1
    )
    assert [(s.number, s.says, s.begin, s.end) for s in done.stages] == [
        (1, "stage 1: train for 20 steps; save a", 0, 20),
        (2, "stage 2: prune 50 % of what is active", 20, 20),
        (3, "stage 3: train for 1 epochs; restore weights a", 20, 33),
    ]
    assert [(e.stage, e.step, e.epoch) for e in done.history] == [
        (1, 13, 1), (1, 20, pytest.approx(20 / 13)), (3, 26, 2), (3, 33, pytest.approx(33 / 13)),
    ]  # fmt: skip


def test_training_losses_are_the_means_since_the_last_evaluation():
    made = trainer("stages: [{for: 20 steps}, {for: 6 steps}]", epochs=2)
    losses, step = [], made._loss
    made._loss = lambda *args: losses.append(step(*args)) or losses[-1]
    history = made.run().history
    assert [epoch.step for epoch in history] == [13, 20, 26]
    parts = losses[:13], losses[13:20], losses[20:]
    assert [epoch.train_loss for epoch in history] == pytest.approx(
        [sum(loss.item() for loss in part) / len(part) for part in parts], rel=1e-6
    )


def test_a_frozen_network_can_be_trained_by_its_scores_alone():
    text = """
    {sparsity: 0.5, saliency: score, gradient: frozen, schedule: {constant: {every: 1 steps}},
     relaxation: {straight_through: {scores: uniform, learning_rate: 10}}}
    """
    made, done, _, _, masks = followed(text, epochs=1)
    start = made.task.build("small", made.data, 0)
    for name in TARGETS:
        assert torch.equal(made.model.get_parameter(name), start.get_parameter(name) * done.masks[name])
    assert masks[0] != masks[-1]


@pytest.mark.filterwarnings("ignore:penalty. group_lasso has strength")
def test_stages_that_share_a_penalty_share_the_strength_that_its_ratio_has_in_the_first():
    lasso = "stages: [{repeat: 2, stages: [{for: 1 epochs, granularity: channel, penalty: {group_lasso: {%s, apply: proximal}}}]}]"
    made = trainer(lasso % "ratio: 0.2", epochs=2)
    done = made.run()
    [strength] = made.strengths.values()
    [note] = done.notes
    assert f"strength {strength:.6g}" in note
    plain = trainer(lasso % f"strength: {strength!r}", epochs=2)
    plain.run()
    assert plain.strengths == {}
    assert all(torch.equal(a, b) for a, b in zip(small.weights(made.model).values(), small.weights(plain.model).values(), strict=True))
    other = trainer(
        (lasso % "ratio: 0.2").replace("}]}]", "}]}, {for: 1 epochs, granularity: channel, penalty: {group_lasso: {ratio: 0.3}}}]")
    )
    other.run()
    assert len(other.strengths) == 2


# ---------------------------------------------------------------- making the model smaller

HALF = "sparsity: 0.5, granularity: input_channel, target: {weights: {include: [3.weight]}}"


@pytest.mark.parametrize("settings", [{}, {"ema": 0.8}])
def test_a_shrunk_model_computes_what_the_masked_one_did(settings):
    masked, shrunk = (trainer(f"stages: [{{for: 1 run, {HALF}{end}}}]", epochs=2, **settings) for end in ("", ", finish: shrink"))
    done, small_done = masked.run(), shrunk.run()
    assert tuple(masked.model[0].weight.shape) == (24, 6)
    assert tuple(shrunk.model[0].weight.shape) == (12, 6)
    assert tuple(shrunk.model[3].weight.shape) == (16, 12)
    inputs = masked.data.test.tensors[0]
    torch.testing.assert_close(shrunk.model.eval()(inputs), masked.model.eval()(inputs), rtol=1e-4, atol=1e-6)
    assert small_done.history == done.history
    assert small_done.flops_multiplier == done.flops_multiplier
    assert done.masks.active == small_done.masks.active == 16 * 12
    kept = masked.masks["3.weight"][0].nonzero().flatten().tolist()
    assert small_done.removed.tensors["0.weight"] == {"0": kept}
    assert small_done.removed.tensors["3.weight"] == {"1": kept}
    assert any("smaller" in note for note in small_done.notes)


def test_what_a_smaller_model_costs_is_compared_with_the_original_one():
    made = trainer(f"stages: [{{for: 1 epochs, {HALF}, finish: shrink}}, {{for: 1 epochs}}]", epochs=2)
    done = made.run()
    dense, masked, smaller = 2 * (24 * 6 + 24 * 16 + 32), 2 * (24 * 6 + 12 * 16 + 32), 2 * (12 * 6 + 12 * 16 + 32)
    assert done.flops_multiplier == pytest.approx((masked + smaller) / (2 * dense), rel=1e-12)
    assert [len(group["params"]) for group in made.optimizer.param_groups] == [8]
    assert all(p in made.optimizer.state for p in made.model.parameters())


def test_momentum_goes_on_in_the_smaller_model():
    """Training, shrinking and training is training with the masked units, to rounding: nothing starts afresh."""
    texts = [f"stages: [{{for: 1 epochs, {HALF}{end}}}, {{for: 1 epochs}}]" for end in ("", ", finish: shrink")]
    masked, shrunk = (trainer(text, epochs=2) for text in texts)
    done, small_done = masked.run(), shrunk.run()
    inputs = masked.data.test.tensors[0]
    kept = done.masks["3.weight"][0]
    assert shrunk.model[0].out_features == int(kept.sum())
    torch.testing.assert_close(shrunk.model.eval()(inputs), masked.model.eval()(inputs), rtol=1e-3, atol=1e-5)
    assert small_done.history[-1].train_loss == pytest.approx(done.history[-1].train_loss, rel=1e-5)


def test_a_model_that_cannot_be_made_smaller_stays_masked_and_is_told():
    made = trainer(f"stages: [{{for: 1 epochs, {HALF}, finish: shrink}}]", epochs=1)
    made.model[0].register_forward_hook(lambda module, args, output: output.view(-1, 24))  # a size in somebody's own code
    done = made.run()
    assert made.model[0].out_features == 24
    assert not done.removed
    assert "finish: shrink removed nothing" in done.notes
    assert any(note.startswith("0: 12 masked units were not removed: with 12 of 24 the model") for note in done.notes)
    assert not any("smaller" in note for note in done.notes)


# ---------------------------------------------------------------- stages that end early

WAITING = "mask_stability: {every: 2 steps, end: 1 run, window: 3, distance: DISTANCE}"
EARLY = f"{{for: 2 run, until: masks_stable, sparsity: 0.5, allocation: global, schedule: {{{WAITING}}}}}"


def test_a_stage_ends_with_the_step_at_which_its_masks_are_stable():
    """The ticket then trains for its whole time, with the learning rate from its start."""
    made, done, rates, states, masks = followed(f"stages: [{EARLY.replace('DISTANCE', '0.02')}, {{for: 1 run}}]", epochs=2)
    first = next(i for i, found in enumerate(masks) if found.sparsity)  # the step that is taken under the new masks
    assert 4 <= first < 51
    assert [(s.begin, s.end) for s in done.stages] == [(0, first + 1), (first + 1, first + 27)]
    assert done.stages[0].says == (
        "stage 1: train for 2 run at most, until the masks are stable; sparsity 0.5; allocation global;"
        " schedule mask_stability end 1 run, every 2 steps, window 3, distance 0.02"
    )
    assert rates == pytest.approx([cosine(s, 52) for s in range(first + 1)] + [cosine(s, 26) for s in range(26)])
    assert made.total_steps == made.now.step == first + 27
    assert all(found == masks[first] for found in masks[first:])
    assert done.history[-1].step == first + 27
    assert [epoch.stage for epoch in done.history] == sorted(epoch.stage for epoch in done.history)

    # An oracle of the distances: the largest weights before each even step.
    candidates = []
    for step in range(0, first + 1, 2):
        before = states[step - 1] if step else small.weights(made.task.build("small", made.data, 0))
        flat = torch.cat([before[name].abs().flatten() for name in TARGETS])
        candidate = torch.zeros(ELEMENTS, dtype=torch.bool)
        candidate[torch.sort(flat, descending=True, stable=True).indices[: ELEMENTS // 2]] = True
        candidates.append(candidate)
    stable = [
        n for n in range(2, len(candidates)) if all(float((candidates[n] != candidates[n - k]).double().mean()) < 0.02 for k in (1, 2))
    ]
    assert stable == [first // 2]
    assert torch.equal(torch.cat([masks[first][name].flatten() for name in TARGETS]), candidates[-1])


def test_a_stage_whose_masks_are_never_stable_takes_its_whole_time():
    text = f"stages: [{EARLY.replace('DISTANCE', '1e-9')}, {{for: 1 run}}]"
    _, done, _, _, _ = followed(text, epochs=2, learning_rate_schedule="constant", learning_rate=0.5)
    assert [(s.begin, s.end) for s in done.stages] == [(0, 52), (52, 78)]
    assert done.masks.active == ELEMENTS // 2


def test_a_ticket_that_is_found_early_is_smaller_from_then_on():
    channels = "granularity: channel, target: {weights: {include: [0.weight, 3.weight]}}"
    text = f"stages: [{EARLY.replace('DISTANCE', '0.05')[:-1]}, {channels}, finish: shrink}}, {{for: 1 run}}]"
    made, done, _, _, _ = followed(text, epochs=2, model="norms")
    assert made.model[0].out_features + made.model[3].out_features <= 20
    assert done.stages[0].end < 52
    assert made.total_steps == done.stages[0].end + 26
    assert done.removed


# ---------------------------------------------------------------- new random weights, and signs


def test_fresh_weights_are_those_of_a_new_model_under_the_same_masks():
    text = "stages: [{for: 5 steps}, {prune: {fraction: 0.5}, restore: {weights: fresh, optimizer: fresh}}, {for: 4 steps}]"
    made, done, _, states, masks = followed(text, epochs=2)
    fresh = made.task.build("small", made.data, key(0, 2, "fresh weights"))
    initial = made.task.build("small", made.data, 0)
    # The first step from there, by hand.
    with torch.no_grad():
        for name, mask in done.masks.items():
            fresh.get_parameter(name).mul_(mask)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=cosine(5, 26), momentum=0.9, weight_decay=5e-4)
    inputs, labels = list(batches(made.data.train, 16, 0, 1))[5]
    functional.cross_entropy(fresh(inputs), labels).backward()
    for name, mask in done.masks.items():
        fresh.get_parameter(name).grad.mul_(mask)
    optimizer.step()
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(states[5][name], value * done.masks[name] if name in TARGETS else value, rtol=1e-5, atol=1e-7)
    assert done.masks == masks[5]
    assert done.masks.active == ELEMENTS // 2
    for name in TARGETS:
        kept = done.masks[name]
        assert not torch.equal(states[5][name][kept].sign(), initial.get_parameter(name)[kept].sign())


def test_fresh_weights_differ_from_stage_to_stage_and_from_seed_to_seed():
    text = "stages: [{restore: {weights: fresh}}, {save: one}, {restore: {weights: fresh}}, {for: 1 steps}]"
    found = []
    for seed in (0, 1):
        made = trainer(text, epochs=1, seed=seed, learning_rate=1e-30, weight_decay=0.0)
        first = made.task.build("small", made.data, seed).state_dict()["0.weight"].clone()
        made.run()
        found += [first, made.snapshots["one"]["weights"]["model"]["0.weight"], made.model.state_dict()["0.weight"]]
    assert len({tuple(weight.flatten().tolist()) for weight in found}) == 6


def test_fresh_weights_fit_a_model_that_was_made_smaller():
    text = f"stages: [{{for: 5 steps, {HALF}, finish: shrink}}, {{restore: {{weights: fresh}}}}, {{for: 3 steps}}]"
    made, _, _, _, _ = followed(text, epochs=2)
    assert made.model[0].out_features == 12
    built = made.task.build("small", made.data, key(0, 2, "fresh weights"))
    kept = made.removed.tensors["0.weight"]["0"]
    assert built.get_parameter("0.weight")[kept].shape == made.model[0].weight.shape


def test_fresh_weights_must_be_random():
    text = "stages: [{for: 5 steps}, {restore: {weights: fresh}}]"

    def always_the_same(data):
        torch.manual_seed(5)
        return small.network(data)

    task = small.plane(models={"small": Model(always_the_same, Training(epochs=1, batch_size=16))})
    with pytest.raises(InputError, match=r"^restore: weights 'fresh' are random ones, and this model is always built with the same"):
        trainer(text, task=task)
    made = trainer(None)
    with pytest.raises(InputError, match=r"^restore: weights 'fresh' need a way to build the model anew"):
        Trainer(made.model, made.task, made.data, made.training, 0, small.recipe(text))


def test_signs_of_the_initial_weights_with_one_size_for_each_layer():
    """The supermask study's signed constants: sign(w_0) times the standard deviation of the layer's initial weights, where the mask is."""
    text = "stages: [{save: initial}, {for: 9 steps}, {prune: {fraction: 0.6}, restore: {weights: initial, as: signs}}]"
    made, done, _, states, _ = followed(text, epochs=2)
    initial = made.task.build("small", made.data, 0)
    trained = torch.cat([states[-1][name].abs().flatten() for name in TARGETS])
    assert done.masks.active == round(0.4 * ELEMENTS)
    for name, value in made.model.state_dict().items():
        start = initial.state_dict()[name]
        if name in TARGETS:
            size = start.double().numpy().std()
            sign = torch.where(start > 0, 1.0, -1.0)
            torch.testing.assert_close(value, (sign * size).float().masked_fill(~done.masks[name], 0.0), rtol=1e-6, atol=0)
            assert value[done.masks[name]].abs().unique().numel() == 1
        else:
            assert torch.equal(value, start), name  # what is not masked, batch normalization's buffers too
    assert trained.unique().numel() > 100


def test_signs_need_masks():
    with pytest.raises(InputError, match=r"^restore: as 'signs' is about tensors that are masked, and nothing is masked yet"):
        trainer("stages: [{save: initial}, {for: 2 steps}, {restore: {weights: initial, as: signs}}]").run()


def test_buffers_that_the_model_does_not_save_go_back_too():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x):
            if self.training:
                self.seen += len(x)
            return x

    def build(data):
        return torch.nn.Sequential(torch.nn.Linear(6, 4), Counting(), torch.nn.Linear(4, 2))

    task = small.plane(models={"counting": Model(build, Training(epochs=1, batch_size=16, threads=1))})
    made = trainer("stages: [{for: 3 steps, save: a}, {for: 4 steps}, {restore: {weights: a}}]", task=task)
    made.run()
    assert made.model[1].seen == 48


# ---------------------------------------------------------------- following the validation loss


def test_validation_examples_are_held_out_of_the_training_ones_and_nothing_else_is_looked_at():
    text = "{schedule: {adaptive: {every: 4 steps, gain: 0.05}}, allocation: global}"
    made = trainer(text, epochs=4)
    train, validation = made.data.train.indices, made.data.validation.indices
    assert len(validation) == 40
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(200))
    assert made.data.validation.examples is made.data.train.examples
    done = made.run()
    assert f"schedule 'adaptive' follows the loss of {len(validation)} examples that are not trained on" in done.notes
    [told] = [note for note in done.notes if "looks" in note]
    assert f"to a sparsity of {done.masks.sparsity:.4g}" in told
    again = trainer(text, epochs=4, seed=1)
    assert not torch.equal(again.data.validation.indices, validation)


def test_the_loss_that_is_followed_is_that_of_the_validation_examples():
    text = "{schedule: {rising_loss: {every: 4 steps, end: 1 run}}, allocation: global}"
    made, losses = trainer(text, epochs=4, model="plain"), []  # without the statistics of a batch normalization, which the step moves

    def hear(step, total, epoch):
        if step % 4 == 0:  # what the look before the next step will see
            inputs, labels = made.data.validation[torch.arange(40)]
            with torch.no_grad():
                losses.append(float(functional.cross_entropy(made.model.eval()(inputs), labels)))
        looks[:] = [look.loss for look in made.sparsifier._selector.schedule_state.validations]

    looks = []
    made.run(progress=hear)
    assert len(looks) == len(losses) == 10  # before steps 0, 4, ... 36, and after steps 4, 8, ... 40
    assert looks[1:] == pytest.approx(losses[:-1], rel=1e-6)


def test_validation_examples_that_are_missing_are_told():
    made = trainer(None)
    with pytest.raises(InputError, match=r"^schedule: 'adaptive' follows the loss of validation examples, and the data have none"):
        Trainer(made.model, made.task, made.data, made.training, 0, small.recipe("{schedule: adaptive}"))
