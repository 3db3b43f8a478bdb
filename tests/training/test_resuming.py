"""A training that stops after any step, each time to go on in fresh objects from its checkpoint, equals one that never stopped."""

import math
import os
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from training import small
from training.small import trainer

import niwaki
from niwaki.errors import InputError
from niwaki.training import checkpoint

RIGL = "sparsity: 0.75, schedule: {constant: {every: 5 steps, end: 0.75 run}}, growth: {gradient: {fraction: 0.3, at_update: UPDATE}}"
AC_DC = "sparsity: 0.75, allocation: global, growth: all, schedule: {phases: {dense: [0, 9], sparse: [5, 15], unit: steps}}"
STR = "relaxation: {soft_threshold: {initial: -3.0, weight_decay: 0.1}}"
MOVEMENT = (
    "sparsity: 0.8, saliency: score, allocation: global, relaxation: {straight_through: {learning_rate: 1e-1}},"
    " schedule: {cubic: {begin: 0.1 run, every: 1 steps, end: 0.7 run}}, objective: {distillation: {weight: 0.5}}"
)
TOP_KAST = (
    "sparsity: 0.8, schedule: {constant: {every: 1 steps}}, relaxation: latent, gradient: {superset: {sparsity: 0.6}},"
    " penalty: {exploration_l2: {strength: 1e-4}}"
)
GMP = "sparsity: 0.75, allocation: global, schedule: {cubic: {every: 3 steps, end: 0.75 run}}"
PRUNE = "prune: {fraction: 0.2, allocation: global}, restore: {weights: ticket, optimizer: OPTIMIZER, learning_rate: ticket}"
TICKET = f"stages: [{{for: 5 steps, save: ticket}}, {{repeat: 2, stages: [{{for: 9 steps}}, {{{PRUNE}}}]}}, {{for: 9 steps}}]"
STAGED = (
    f"stages: [{{for: 7 steps, {STR}}}, {{for: 3 steps}},"
    " {for: 9 steps, saliency: snip, sparsity: 0.9, schedule: {one_shot: {at: 4 steps}}},"
    f" {{for: 8 steps, {RIGL.replace('0.75,', '0.9,', 1).replace('UPDATE', 'step')}}}]"
)

SHRINK = """
stages:
- {for: 9 steps, sparsity: 0.5, granularity: input_channel, schedule: {one_shot: {at: 5 steps}}, finish: shrink}
- {for: 5 steps}
- {prune: {fraction: 0.3, granularity: input_channel}, finish: shrink}
- {for: 7 steps, sparsity: 0.8, growth: gradient, schedule: {constant: {every: 2 steps}}}
"""
WIDEN = """
stages:
- {for: 9 steps, sparsity: 0.5, granularity: input_channel, schedule: {one_shot: {at: 5 steps}}, finish: shrink}
- {for: 4 steps, finish: {widen: {factor: 1.5, by: BY}}}
- {for: 5 steps, sparsity: 0.6, granularity: input_channel, schedule: {one_shot: {at: 2 steps}}, finish: shrink}
- {finish: {widen: {flops: 0.9, by: new}}}
- {for: 7 steps, sparsity: 0.8, growth: gradient, schedule: {constant: {every: 2 steps}}}
"""
LOUD = small.plane(loss=lambda outputs, targets: 1e4 * functional.cross_entropy(outputs, targets))
"""Its gradients overflow in float16 until the scaler has come down."""

RATIO = "stages: [{repeat: 2, stages: [{for: 5 steps, granularity: channel, penalty: {group_lasso: {ratio: 0.2}}}]}]"

UNTIL = (
    "stages: [{for: 1 run, until: masks_stable, sparsity: 0.5, schedule: {mask_stability: {every: 2 steps, window: 3, distance: 0.03}}},"
    " {for: 9 steps}]"
)
ADAPTIVE = "{allocation: global, schedule: {NAME: {every: 2 steps, end: 0.9 run}}}"
RAMP = "{schedule: {threshold_ramp: {begin: 4 steps, ramp: 0.4 run, end: 0.7 run, every: 3 steps, share: 0.6}}}"
BEGIN_ANEW = (
    "stages: [{save: initial}, {for: 5 steps}, {prune: {fraction: 0.5}, restore: {weights: fresh, optimizer: fresh}}, {for: 4 steps},"
    " {restore: {weights: initial, as: signs}}, {for: 4 steps}]"
)

SUITABLE = {
    "network_slimming": {"model": "norms"},
    "morphnet": {"model": "norms"},
    "bn_ista": {"model": "norms"},
    "polarization": {"model": "norms"},
    "early_bird_channels": {"model": "norms", "epochs": 4},
    "head_importance": {"model": "attention"},
    "layerdrop": {"model": "attention"},
    "gate_decorator": {"model": "norms"},
    "two_four": {"model": "fours"},
    "adaprune": {"model": "fours"},
}
"""What methods need whose units the first network does not have."""

CASES = {
    "dense": (None, {}),
    "dense with everything": (
        None,
        {"model": "dropout", "optimizer": "adamw", "learning_rate": 0.01, "ema": 0.9, "clip_norm": 1.0, "accumulate": 2, "warmup": 0.2},
    ),
    "float16": (f"{{{GMP}}}", {"precision": "float16"}),
    "float16 with overflows": (f"{{{GMP}}}", {"precision": "float16", "task": LOUD, "learning_rate": 1e-5}),
    "bfloat16": (None, {"precision": "bfloat16"}),
    "gmp": (f"{{{GMP}}}", {}),
    "gmp with everything": (f"{{{GMP}}}", {"model": "dropout", "optimizer": "adamw", "learning_rate": 0.01, "ema": 0.9, "clip_norm": 1.0}),
    "rigl": (f"{{{RIGL}}}".replace("UPDATE", "step"), {}),
    "rigl that skips steps": (f"{{{RIGL}}}".replace("UPDATE", "skip_step"), {"optimizer": "adamw", "learning_rate": 0.01}),
    "set": ("{sparsity: 0.75, schedule: {constant: {every: 4 steps, end: 0.75 run}}, growth: {random: {fraction: 0.3}}}", {}),
    "ac_dc": (f"{{{AC_DC}}}", {"ema": 0.9}),
    "str": (f"{{{STR}}}", {"optimizer": "adamw", "learning_rate": 0.01}),
    "movement with distillation": (f"{{{MOVEMENT}}}", {}),
    "top_kast": (f"{{{TOP_KAST}}}", {"precision": "float16"}),
    "snip": ("{sparsity: 0.75, saliency: snip, allocation: global}", {}),
    "lottery ticket": (TICKET.replace("OPTIMIZER", "fresh"), {"ema": 0.9}),
    "rewinding the optimizer too": (TICKET.replace("OPTIMIZER", "ticket"), {"optimizer": "adamw", "learning_rate": 0.01}),
    "stages": (STAGED, {}),
    "until the masks are stable": (UNTIL, {}),
    "adaptive": (ADAPTIVE.replace("NAME", "adaptive"), {}),
    "rising loss": (ADAPTIVE.replace("NAME", "rising_loss"), {"model": "dropout"}),
    "rising thresholds": (RAMP, {}),
    "fresh weights and signs": (BEGIN_ANEW, {"ema": 0.9}),
    "strength from a ratio": (RATIO, {}),
    **{
        name: (method.recipe.to_yaml(), SUITABLE.get(name, {}))
        for name, method in niwaki.METHODS.items()
        if method.recipe.stages is not None
    },
    "shrinking": (SHRINK, {"optimizer": "adamw", "learning_rate": 0.01}),
    "shrinking with an average": (SHRINK, {"ema": 0.9}),
    "widening by splitting": (WIDEN.replace("BY", "split"), {"optimizer": "adamw", "learning_rate": 0.01}),
    "widening by bridges, with an average": (WIDEN.replace("BY", "bridging"), {"ema": 0.9, "model": "plain"}),
}


def assert_same(one, other):
    """Model, masks, history, stages and notes are equal to the bit; wall time is not looked at."""
    (made, done), (again, found) = one, other
    assert found.masks == done.masks
    for name, value in made.model.state_dict().items():
        assert again.model.state_dict()[name].numpy().tobytes() == value.numpy().tobytes(), name
    assert again.optimizer.state_dict()["state"].keys() == made.optimizer.state_dict()["state"].keys()
    assert found.history == done.history
    assert replace(found, seconds=0.0, masks=done.masks) == replace(done, seconds=0.0)


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    """Nothing here loses power, and there are hundreds of checkpoints."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


STEPS = [(name, 30 if name in niwaki.METHODS else 1) for name in CASES] + [("rigl", 7), ("movement with distillation", 7), ("stages", 4)]


@pytest.mark.parametrize(("name", "steps"), STEPS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resumed_equals_uninterrupted(tmp_path, name, steps):
    text, settings = CASES[name]

    def make():
        return trainer(text, **{"epochs": 2, **settings})

    made = make()
    done = made.run()
    again, found, sittings = small.in_sittings(make, tmp_path / "checkpoint", steps)
    assert sittings == math.ceil(made.total_steps / steps)
    assert_same((made, done), (again, found))


def test_a_training_that_forgets_a_part_of_its_state_differs(tmp_path):
    """The comparison above can fail: each part of the state matters to some training."""
    lost = {"optimizer": "dense", "scaler": "float16 with overflows", "ema": "ac_dc", "snapshots": "lottery ticket"}
    for part, name in [*lost.items(), ("sparsifier", "rigl"), ("losses", "dense")]:
        text, settings = CASES[name]
        made, fresh = trainer(text, epochs=2, **settings), trainer(text, epochs=2, **settings)
        made.run(stop=lambda: False, save=lambda state, made=made: checkpoint.save(tmp_path / f"{made.now.step}", state()), every=0)
        state = checkpoint.load(tmp_path / "9")
        if fresh.sparsifier is None and part == "sparsifier":
            fresh._enter(fresh.leaves[0], fresh.lengths[0])
            state["sparsifier"] = fresh.sparsifier.state_dict() | {"active_zeros": 10**9}  # so that it is not refused
            fresh = trainer(text, epochs=2, **settings)
        elif part == "losses":
            state["losses"] = state["losses"][1:]
        elif part == "snapshots":
            state["snapshots"]["ticket"]["weights"]["model"] = state["model"]
        else:
            state[part] = getattr(fresh, part).state_dict()
        fresh.load(state)
        found = fresh.run()
        assert made.history != found.history, part


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    made = trainer(epochs=1)
    made.run(save=lambda state: checkpoint.save(tmp_path / "c", state()), every=0)
    with pytest.raises((InputError, RuntimeError), match=r"1\.weight|size mismatch|Missing key|Unexpected key"):
        trainer(epochs=1, model="plain").load(checkpoint.load(tmp_path / "c"))


def test_a_training_that_was_finished_is_not_begun_again(tmp_path):
    made = trainer(epochs=1)
    done = made.run(save=lambda state: checkpoint.save(tmp_path / "c", state()), every=0)
    again = trainer(epochs=1)
    again.load(checkpoint.load(tmp_path / "c"))
    found = again.run(progress=lambda *_: pytest.fail("trained again"))
    assert found.history == done.history
    assert torch.equal(again.model[0].weight, made.model[0].weight)
